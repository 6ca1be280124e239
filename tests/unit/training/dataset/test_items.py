"""Tables and folders: what is listed, and which words tell what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsynth.errors import ArgumentError, MediaNotFoundError
from diffsynth.training.dataset.clips import Item
from diffsynth.training.dataset.columns import known_columns
from diffsynth.training.dataset.config import DatasetConfig
from diffsynth.training.dataset.items import list_items


def items(path: Path, **given: object) -> list[Item]:
    return list_items(DatasetConfig(path=str(path), **given)).items  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos and two pictures; only their names are looked at here."""
    for name in ("train/a.mp4", "b 2.mp4", "deep/c.png", "d.JPG"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return tmp_path


def test_metadata_csv_finds_media_in_train_as_v1_and_beside_it(folder: Path) -> None:
    (folder / "metadata.csv").write_text('file_name,text\na.mp4,"a cat, asleep"\nb 2.mp4, a dog \n')
    told = items(folder)
    assert [(item.media, item.caption) for item in told] == [
        (folder / "train" / "a.mp4", "a cat, asleep"),
        (folder / "b 2.mp4", "a dog"),
    ]
    assert told == items(folder / "metadata.csv")
    assert told[1].place == "metadata.csv line 3"


@pytest.mark.parametrize("media_column", ["video", "image", "file_name", "file_path"])
@pytest.mark.parametrize("text_column", ["prompt", "text", "caption"])
def test_json_and_jsonl_know_these_names(folder: Path, media_column: str, text_column: str) -> None:
    rows = [{media_column: "train/a.mp4", text_column: "a cat"}, {media_column: "d.JPG", text_column: "b"}]
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for name in ("list.json", "list.jsonl"):
        assert [(i.media, i.caption) for i in items(folder / name)] == [
            (folder / "train" / "a.mp4", "a cat"),
            (folder / "d.JPG", "b"),
        ]


def test_a_folder_is_read_with_a_text_beside_each_file(folder: Path) -> None:
    for name in ("train/a.txt", "b 2.txt", "deep/c.txt", "d.txt", "lonely.txt", "diffsynth_dropped.txt"):
        (folder / name).write_text(f"words of\n{name}\n")
    listing = list_items(DatasetConfig(path=str(folder), trigger="zorp"))
    assert {item.name: item.caption for item in listing.items} == {
        "train/a.mp4": "zorp words of train/a.txt",
        "b 2.mp4": "zorp words of b 2.txt",
        "deep/c.png": "zorp words of deep/c.txt",
        "d.JPG": "zorp words of d.txt",
    }
    assert [str(note) for note in listing.notes] == ["lonely.txt: a caption without a video or picture"]


def test_columns_of_conditions_are_arguments_of_pipe(folder: Path) -> None:
    rows = [
        {
            "video": "train/a.mp4", "prompt": "a", "control_video": "b 2.mp4", "input_image": "d.JPG",
            "vace_reference_image": ["deep/c.png", "d.JPG"], "motion_bucket_id": "40", "width": 64,
            "camera_control_origin": [1, 0.5], "end_image": "",
        },
        {"video": "b 2.mp4", "prompt": "b", "vace_reference_image": "deep/c.png;d.JPG"},
    ]  # fmt: skip
    (folder / "list.json").write_text(json.dumps(rows))
    listing = list_items(DatasetConfig(path=str(folder / "list.json")))
    first, second = listing.items
    references = (folder / "deep" / "c.png", folder / "d.JPG")
    assert first.inputs == {
        "control_video": folder / "b 2.mp4",
        "input_image": folder / "d.JPG",
        "vace_reference_image": references,
        "motion_bucket_id": 40,
        "camera_control_origin": (1, 0.5),
    }
    assert second.inputs == {"vace_reference_image": references}
    assert [note.text for note in listing.notes] == ["columns of list.json that nothing reads: width"]


def test_kinds_of_columns_follow_from_the_inputs_of_conditioners() -> None:
    known = known_columns()
    assert {
        name: known[name] for name in ("control_video", "vace_video", "vace_video_mask")
    } == dict.fromkeys(("control_video", "vace_video", "vace_video_mask"), "video")
    assert (known["input_image"], known["vace_reference_image"]) == ("picture", "pictures")
    assert (known["motion_bucket_id"], known["camera_control_direction"]) == ("number", "text")
    assert not {"prompt", "input_video", "tile_size", "fit", "sigmas", "resize"} & set(known)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("file,words\na.mp4,a\n", "has the columns file, words; .*'video' and one to 'prompt'"),
        ("file_name,words\na.mp4,a\n", "has the columns file_name, words; .*one to 'prompt'"),
        ("a.mp4,a cat\nb.mp4,a dog\n", "has no header: its first line is 'a.mp4, a cat'"),
        ("", "is empty"),
        ("file_name,text\n", "has no row"),
        ("file_name,text,text\n", "column 'text' twice"),
        ("file_name,text\na.mp4,a cat, asleep\n", "line 2 has 3 cells .* between quotes"),
        ('file_name,text\na.mp4,"a cat\n', "line 2 cannot be read"),
        ("file_name,text,control_vidoe\na.mp4,a,b\n", "'control_vidoe'.*Did you mean 'control_video'"),
        ("file_name,text,motion_bucket_id\na.mp4,a,fast\n", "line 2: motion_bucket_id is 'fast'; give a num"),
        ("file_name,video,text\na.mp4,b.mp4,a\n", "line 2 names video='b.mp4', file_name='a.mp4'"),
        ("file_name,text\n,a cat\n", "line 2 names no file"),
        (
            "file_name,text\na.mp4,a\ntrain/a.mp4,b\n",
            "a.mp4 twice: metadata.csv line 2 and metadata.csv line 3",
        ),
    ],
)
def test_a_wrong_table_is_told_in_words(folder: Path, table: str, says: str) -> None:
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(ArgumentError, match=says):
        items(folder)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("l.json", "{}", "holds no list"),
        ("l.json", "[1]", "entry 1 is 1; give an object"),
        ("l.json", "[", "is no JSON"),
        ("l.jsonl", '{"video": "a"}\nx\n', "line 2 is no JSON"),
        ("l.json", '[{"video": "train/a.mp4", "text": ["a", "b"]}]', "give a text"),
        ("l.toml", "", "is no dataset"),
    ],
)
def test_a_wrong_list_is_told_in_words(folder: Path, name: str, text: str, says: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ArgumentError, match=says):
        items(folder / name)


def test_a_table_that_is_not_utf8_says_so(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes("file_name,text\na.mp4,cr\xeape\n".encode("latin-1"))
    with pytest.raises(ArgumentError, match="is not UTF-8"):
        items(folder)


def test_a_file_or_condition_that_is_not_there_is_dropped_with_its_line(folder: Path) -> None:
    (folder / "metadata.csv").write_text(
        "file_name,text,control_video\na.mp4,a,gone.mp4\nlost.mp4,b,\nb 2.mp4,c,\n"
    )
    listing = list_items(DatasetConfig(path=str(folder)))
    assert [item.name for item in listing.items] == ["b 2.mp4"]
    (first, second) = [dropped.reason for dropped in listing.dropped]
    assert first.startswith("metadata.csv line 2: its control_video gone.mp4 does not exist in ")
    assert second.startswith("metadata.csv line 3: lost.mp4 does not exist in ")


def test_places_that_hold_no_dataset(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaNotFoundError, match="neither metadata"):
        items(tmp_path / "empty")
    with pytest.raises(MediaNotFoundError, match="does not exist"):
        items(tmp_path / "nowhere")
    for name in ("metadata.csv", "metadata.jsonl"):
        (folder / name).touch()
    with pytest.raises(ArgumentError, match=r"metadata\.csv and metadata\.jsonl; give the path of one"):
        items(folder)


def test_a_mirrored_camera_is_refused(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text,camera_control_direction\na.mp4,a,Left\n")
    with pytest.raises(ArgumentError, match="mirrored camera"):
        items(folder, flip=True)


def test_characters_that_only_unicode_takes_for_an_end_of_line_stay_in_a_caption(folder: Path) -> None:
    words = "a cat\u2028asleep\u0085here"
    (folder / "metadata.csv").write_text(f"file_name,text\na.mp4,{words}\n", encoding="utf-8")
    (folder / "list.jsonl").write_text(
        json.dumps({"video": "train/a.mp4", "prompt": words}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name in ("metadata.csv", "list.jsonl"):
        assert [item.caption for item in items(folder / name)] == [words]


@pytest.mark.parametrize(
    ("caption", "told"),
    [("cat on a mat", "cat on a mat"), ("cathedral at night", "cat cathedral at night"), ("cat", "cat")],
)
def test_a_trigger_is_a_word_and_not_the_beginning_of_one(folder: Path, caption: str, told: str) -> None:
    (folder / "metadata.csv").write_text(f"file_name,text\na.mp4,{caption}\n")
    assert [item.caption for item in items(folder, trigger="cat")] == [told]


@pytest.mark.parametrize(
    ("trigger", "caption"), [("猫", "猫在睡觉"), ("sks:", "sks:dog"), ("sks:", "sks: dog")]
)
def test_a_trigger_without_a_blank_behind_it_stands_there_once(
    folder: Path, trigger: str, caption: str
) -> None:
    (folder / "metadata.csv").write_text(f"file_name,text\na.mp4,{caption}\n", encoding="utf-8")
    assert [item.caption for item in items(folder, trigger=trigger)] == [caption]


def test_files_of_a_folder_that_nothing_reads_are_told(folder: Path) -> None:
    for name in ("train/a.txt", "b 2.txt", "deep/c.txt", "d.txt", "phone.txt", "lonely.txt"):
        (folder / name).write_text("words")
    for name in ("phone.heic", "deep/x.AVIF", "tape.vob", "notes.json", "a.srt", "b.srt", ".hidden.heic"):
        (folder / name).touch()
    for name in ("d.JPG.0123456789abcdef.tensors.safetensors", "d.JPG.tensors.pth", "diffsynth_dropped.txt"):
        (folder / name).touch()
    (folder / "linked").symlink_to(folder / "deep")
    listing = list_items(DatasetConfig(path=str(folder)))
    assert {one.media.name: one.reason for one in listing.dropped} == {
        name: f"{ending} is not read; convert it to .png, .jpg or .mp4"
        for name, ending in (("phone.heic", ".heic"), ("tape.vob", ".vob"), ("x.AVIF", ".avif"))
    }
    assert [note.text for note in listing.notes] == [
        "a caption without a video or picture",
        "1 links to folders are not followed: linked",
        "files of other kinds are not used: 2 .srt, 1 .json",
    ]
    assert listing.notes[0].media == folder / "lonely.txt" and len(listing.items) == 4


def test_a_folder_of_pictures_that_nothing_reads_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(MediaNotFoundError, match=r"picture that is read, but 1 \.heic; known"):
        items(tmp_path)


def test_media_in_no_row_of_a_table_are_told(folder: Path) -> None:
    (folder / "train" / "extra.mp4").touch()
    (folder / "train" / "pose.mp4").touch()
    (folder / "metadata.csv").write_text("file_name,text,control_video\na.mp4,a cat,pose.mp4\n")
    (note,) = list_items(DatasetConfig(path=str(folder))).notes
    assert note.text.endswith("are in no row of metadata.csv: extra.mp4") and note.text.startswith("1 videos")


def test_a_second_name_of_a_file_by_a_link_is_left_out_and_told(folder: Path) -> None:
    (folder / "train" / "0.mp4").symlink_to(folder / "train" / "a.mp4")  # in front of the file itself
    for name in ("train/a.txt", "b 2.txt", "deep/c.txt", "d.txt"):
        (folder / name).write_text("words")
    listing = list_items(DatasetConfig(path=str(folder)))  # the link has no caption, and needs none
    assert [one.media.name for one in listing.dropped] == ["0.mp4"] and not listing.without_caption
    assert listing.dropped[0].reason == "it is train/a.mp4 under another name, by a link"
    assert "a.mp4" in {item.media.name for item in listing.items} and len(listing.items) == 4
    (folder / "metadata.csv").write_text("file_name,text\n0.mp4,a\na.mp4,b\n")
    listing = list_items(DatasetConfig(path=str(folder)))
    assert [one.reason for one in listing.dropped] == [
        "metadata.csv line 2: it is a.mp4 under another name, by a link"
    ]
