"""What a dataset lists: rows of a table, or the media of a folder with a .txt beside each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffsynth.errors import ArgumentError, MediaNotFoundError
from diffsynth.training.dataset.clips import Dropped, Item, Note, Value
from diffsynth.training.dataset.columns import read_cell, sort_columns
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.dataset.tables import CAPTION_COLUMNS, MEDIA_COLUMNS, TABLE_SUFFIXES, Row, read_table
from diffsynth.video import VIDEO_SUFFIXES
from diffsynth.video.reading import PICTURE_SUFFIXES, natural_key

V1_FOLDER = "train"  # beside metadata.csv; v1 keeps its media there
MORE_VIDEOS = (".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp")
MEDIA_SUFFIXES = frozenset((*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, *MORE_VIDEOS))
# Pictures and videos that nothing here reads.
_UNREAD = """
heic heif avif jxl jp2 psd svg exr dng raw cr2 nef arw
mts vob asf rm rmvb mxf f4v divx dv mod insv braw r3d
"""
OTHER_MEDIA = frozenset(f".{ending}" for ending in _UNREAD.split())
OF_CACHE = (".tensors.safetensors", ".tensors.pth")  # samples that lie beside their media
LIST_PREFIX = "diffsynth_"  # of the lists that we write beside a dataset: no captions


@dataclass(kw_only=True, slots=True)
class Listing:
    """A dataset as it is listed, before any file is looked at."""

    root: Path  # folder that paths are told from
    name: str
    source: str  # the table, or the folder
    items: list[Item] = field(default_factory=list)
    without_caption: list[Item] = field(default_factory=list)  # also in ``items`` when captions may be empty
    dropped: list[Dropped] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


class _NoSuchFileError(Exception):
    """A file that a row names and that is not there."""


def list_items(config: DatasetConfig) -> Listing:
    """Read a dataset's table, or look through its folder.

    Raises:
        MediaNotFoundError: when the path does not exist, or a folder holds neither table nor media.
        ArgumentError: for a table that cannot be read (`read_table`), a cell of another kind, several tables,
            or a file listed twice.
    """
    path = Path(os.path.abspath(os.path.expanduser(config.path)))
    if not path.exists():
        raise MediaNotFoundError(f"{config.path} does not exist; give a folder, or a table ({_known()}).")
    if path.is_file():
        if path.suffix.lower() not in TABLE_SUFFIXES:
            raise ArgumentError(f"{config.path} is no dataset; give a folder, or a table ({_known()}).")
        listing = _from_table(path, config)
    else:
        tables = [path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES]
        tables = [table for table in tables if table.is_file()]
        if len(tables) > 1:
            raise ArgumentError(
                f"{config.path} holds {' and '.join(table.name for table in tables)}; give the path of one."
            )
        listing = _from_table(tables[0], config) if tables else _from_folder(path, config)
    _drop_twice(listing)
    return listing


def _known() -> str:
    return ", ".join(TABLE_SUFFIXES)


def _from_table(path: Path, config: DatasetConfig) -> Listing:
    table = read_table(path, needs_captions=config.missing_captions != "empty")
    inputs, unread = sort_columns(table.columns, path)
    listing = Listing(root=path.parent, name=config.name or path.parent.name, source=str(path))
    captions = [name for name in CAPTION_COLUMNS if name in table.columns]
    unread = (*unread, *captions[1:])
    if unread:
        text = f"columns of {path.name} that nothing reads: {', '.join(unread)}"
        listing.notes.append(Note(media=None, text=text, dataset=listing.name))
    if config.flip and (turned := [name for name in inputs if name.startswith("camera_")]):
        raise ArgumentError(
            f"flip is on and {path} has the column {turned[0]!r}: a mirrored camera moves the other way. "
            "Leave flip off."
        )
    folders = [folder for folder in (path.parent / V1_FOLDER, path.parent) if folder.is_dir()]
    for row in table.rows:
        name = _file_name(row, path)
        told = row.values.get(captions[0], "") if captions else ""
        if not isinstance(told, str):
            raise ArgumentError(f"{path}: {row.place} has the {captions[0]} {told!r}; give a text.")
        try:
            item = Item(
                media=_found(name, folders), name=name, place=row.place,
                caption=_with_trigger(told, config.trigger), inputs=_inputs(row, inputs, folders),
            )  # fmt: skip
        except _NoSuchFileError as error:
            media = Path(os.path.normpath(folders[0] / name))
            listing.dropped.append(Dropped(media=media, reason=f"{row.place}: {error}", dataset=listing.name))
            continue
        _add(listing, item, has_caption=bool(told), config=config)
    _tell_unlisted(listing, folders[0])
    return listing


def _tell_unlisted(listing: Listing, folder: Path) -> None:
    """Videos and pictures beside those of a table, which no row names."""
    named = {
        os.path.abspath(file)
        for item in (*listing.items, *listing.without_caption)
        for value in (item.media, *item.inputs.values())
        for file in (value if isinstance(value, tuple) else (value,))
        if isinstance(file, Path)
    }
    found = sorted(
        (
            entry.name
            for entry in os.scandir(folder)
            if Path(entry.name).suffix.lower() in MEDIA_SUFFIXES | OTHER_MEDIA
            and not entry.name.startswith(".")
            and os.path.abspath(entry.path) not in named
        ),
        key=natural_key,
    )
    if found:
        names = ", ".join(found[:3]) + (", ..." if found[3:] else "")
        table = Path(listing.source).name
        text = f"{len(found)} videos or pictures of {folder} are in no row of {table}: {names}"
        listing.notes.append(Note(media=None, text=text, dataset=listing.name))


def _file_name(row: Row, path: Path) -> str:
    named = {column: row.values[column] for column in MEDIA_COLUMNS if column in row.values}
    if len(named) == 1 and isinstance(name := next(iter(named.values())), str):
        return name
    shown = ", ".join(f"{column}={name!r}" for column, name in named.items())
    raise ArgumentError(
        f"{path}: {row.place} names {shown or 'no file'}; give one file per row, in one of the columns "
        f"{', '.join(MEDIA_COLUMNS)} (a first frame is called input_image)."
    )


def _found(name: str, folders: list[Path]) -> Path:
    for folder in folders:
        candidate = os.path.normpath(os.path.join(folder, name))  # an absolute name stays as it is
        if os.path.isfile(candidate):
            return Path(candidate)
    raise _NoSuchFileError(f"{name} does not exist in {' or '.join(map(str, folders))}")


def _inputs(row: Row, columns: tuple[str, ...], folders: list[Path]) -> Mapping[str, Value]:
    values: dict[str, Value] = {}
    for column in columns:
        if column not in row.values:
            continue
        try:
            values[column] = read_cell(column, row.values[column], lambda name: _found(name, folders))
        except ArgumentError as error:
            raise ArgumentError(f"{row.place}: {error}") from None
        except _NoSuchFileError as error:
            raise _NoSuchFileError(f"its {column} {error}") from None
    return values


def _from_folder(root: Path, config: DatasetConfig) -> Listing:
    listing = Listing(root=root, name=config.name or root.name, source=str(root))
    files = list(_files(root))
    texts = {
        file for file in files if file.suffix.lower() == ".txt" and not file.name.startswith(LIST_PREFIX)
    }
    media = [file for file in files if file.suffix.lower() in MEDIA_SUFFIXES]
    others = [file for file in files if file not in texts and file.suffix.lower() not in MEDIA_SUFFIXES]
    if not media:
        found = _counted(others)
        raise MediaNotFoundError(
            f"{root} holds neither metadata.csv (.tsv, .json, .jsonl) nor a video or picture that is read"
            f"{f', but {found}' if found else ''}; known: {', '.join(sorted(MEDIA_SUFFIXES))}."
        )
    for file in media:
        beside = file.with_suffix(".txt")
        name = file.relative_to(root).as_posix()
        caption = _read_caption(beside) if beside in texts else ""
        item = Item(media=file, name=name, caption=_with_trigger(caption, config.trigger), place=name)
        _add(listing, item, has_caption=bool(caption), config=config)
    strange = [file for file in others if file.suffix.lower() in OTHER_MEDIA]
    told = {file.with_suffix(".txt") for file in (*media, *strange)}
    for text in sorted(texts - told):
        listing.notes.append(
            Note(media=text, text="a caption without a video or picture", dataset=listing.name)
        )
    _tell_others(listing, root, others)
    return listing


def _tell_others(listing: Listing, root: Path, others: Sequence[Path]) -> None:
    """Files of a folder that are not used: media that nothing reads are dropped, the rest is counted."""
    for file in others:
        if file.suffix.lower() in OTHER_MEDIA:
            reason = f"{file.suffix.lower()} is not read; convert it to .png, .jpg or .mp4"
            listing.dropped.append(Dropped(media=file, reason=reason, dataset=listing.name))
    folders = (Path(folder, name) for folder, inner, _ in os.walk(root) for name in inner if name[0] != ".")
    links = [folder for folder in folders if folder.is_symlink()]
    if links:
        text = f"{len(links)} links to folders are not followed: {', '.join(link.name for link in links[:3])}"
        listing.notes.append(Note(media=None, text=text, dataset=listing.name))
    if found := _counted([file for file in others if file.suffix.lower() not in OTHER_MEDIA]):
        text = f"files of other kinds are not used: {found}"
        listing.notes.append(Note(media=None, text=text, dataset=listing.name))


def _counted(files: Iterable[Path]) -> str:
    """How many files of which kind, without those that this package writes."""
    kinds = Counter(
        file.suffix.lower() or "no ending"
        for file in files
        if not (file.name.startswith(LIST_PREFIX) or file.name.endswith(OF_CACHE))
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))


def _files(root: Path) -> Iterator[Path]:
    """All files below, hidden ones and links to folders left out, in natural order."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted((name for name in inner if not name.startswith(".")), key=natural_key)
        for name in sorted(names, key=natural_key):
            if not name.startswith("."):
                yield Path(folder, name)


def _read_caption(file: Path) -> str:
    """The text of a file, its lines joined by blanks."""
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None


def _with_trigger(caption: str, trigger: str) -> str:
    if not trigger or _begins_with(caption, trigger):
        return caption
    return f"{trigger} {caption}".strip()


def _begins_with(caption: str, trigger: str) -> bool:
    """Whether a trigger stands in front as words of its own: "cat" does not begin "cathedral"."""
    seam = caption[len(trigger) - 1 : len(trigger) + 1]
    # ASCII: Chinese and Japanese have no blanks between words.
    return caption.startswith(trigger) and not re.fullmatch(r"\w\w", seam, re.ASCII)


def _add(listing: Listing, item: Item, *, has_caption: bool, config: DatasetConfig) -> None:
    if not has_caption:
        listing.without_caption.append(item)
        if config.missing_captions == "drop":
            reason = f"{item.place}: it has no caption"
            listing.dropped.append(Dropped(media=item.media, reason=reason, dataset=listing.name))
            return
    listing.items.append(item)


def _drop_twice(listing: Listing) -> None:
    """A file that is listed twice is an error; another name of it, by a link, is left out and told."""
    # The file itself stays, whatever its place, and of several links the first.
    ordered = sorted(listing.items, key=lambda item: item.media.is_symlink())
    seen: dict[str, Item] = {}
    left = []
    for item in ordered:
        before = seen.setdefault(os.path.realpath(item.media), item)
        if before is item:
            continue
        if before.media == item.media:
            raise ArgumentError(
                f"{listing.source} lists {item.media.name} twice: {before.place} and {item.place}. Remove "
                "one; repeats= shows the clips of a dataset more often."
            )
        place = "" if item.place == item.name else f"{item.place}: "
        reason = f"{place}it is {before.name} under another name, by a link"
        listing.dropped.append(Dropped(media=item.media, reason=reason, dataset=listing.name))
        left.append(item)
    listing.items = [item for item in listing.items if item not in left]
    listing.without_caption = [item for item in listing.without_caption if item not in left]
