"""A checkpoint: names, shapes and dtypes at once; tensors when asked for, as views of the mapped file.

Opening reads headers only (a 28 GB model in some milliseconds, without torch). `renamed` and `select` give
views of a checkpoint; nothing is copied before `tensor` is called, and there only what must be (quantised
weights are widened, parts that another layout keeps apart are joined).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from diffsynth.checkpoints.entry import Entry, apply_step, join_scales, memory_entry, stored_entry, widened
from diffsynth.checkpoints.files import FileGroup, PathLike, group_files
from diffsynth.checkpoints.layout import KeyLayout
from diffsynth.checkpoints.mapped import MappedFile
from diffsynth.checkpoints.open_file import read_header
from diffsynth.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WRAPPER = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


class Checkpoint:
    """Named tensors of one model, in one file or several shards."""

    def __init__(
        self,
        paths: tuple[Path, ...],
        entries: Mapping[str, Entry],
        metadata: Mapping[str, str],
        from_folder: bool = False,
    ) -> None:
        self.paths = paths
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata))
        self.from_folder = from_folder  # found by looking into a folder, not named by the user
        self._entries = entries

    @classmethod
    def open(cls, paths: PathLike | Sequence[PathLike]) -> Checkpoint:
        """Open one model: a file, a folder, glob or index.json of shards, or a list of its shards.

        Raises:
            CheckpointNotFoundError: for a path that does not exist or holds no weights.
            MissingShardError: when a shard is absent; names it.
            CorruptCheckpointError, UnsafeCheckpointError: for a file that cannot or must not be read.
            CheckpointError: when the files belong to several models; `open_all` opens those.
        """
        is_list = not isinstance(paths, (str, Path))
        groups = group_files([paths] if is_list else paths)  # type: ignore[list-item]
        if len(groups) > 1:
            names = "; ".join(", ".join(file.name for file in group.paths) for group in groups)
            raise CheckpointError(
                f"{paths} holds the files of {len(groups)} models ({names}). Open one of them, or all with "
                "Checkpoint.open_all() or ModelManager.load_models()."
            )
        return cls.open_group(groups[0])

    @classmethod
    def open_all(cls, paths: PathLike | Sequence[PathLike | Sequence[PathLike]]) -> list[Checkpoint]:
        """Open every model among ``paths``: files, folders, globs, shards and lists of shards, in any mix."""
        return [cls.open_group(group) for group in group_files(paths)]

    @classmethod
    def open_group(cls, group: FileGroup) -> Checkpoint:
        """Open the files of one model, as `group_files` finds them."""
        entries: dict[str, Entry] = {}
        metadata: dict[str, str] = {}
        home: dict[str, Path] = {}
        for path in group.paths:
            header = read_header(path)
            file = MappedFile(path, path.stat().st_size)
            for name, stored in header.tensors.items():
                if name in home:
                    raise CheckpointError(
                        f"{name} is in {home[name]} and in {path}: these are not shards of one model. Give "
                        "them as two entries of the list, not as one inner list."
                    )
                home[name], entries[name] = path, stored_entry(file, stored)
            metadata = {**header.metadata, **metadata}
        return cls(group.paths, join_scales(entries, metadata), metadata, group.from_folder)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], title: str) -> Checkpoint:
        """Hold tensors that are in memory already; ``title`` stands in messages where a file would.

        Raises:
            CheckpointError: when a name is no text or a value no tensor.
        """
        import torch

        entries = {}
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"{title} holds {name!r}: {type(value).__name__}; it should hold tensors by their names. "
                    "If a trainer wrapped them, give what is inside, such as state['state_dict']."
                )
            entries[name] = memory_entry(value)
        return cls((Path(title),), join_scales(entries, {}), {})

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, in the order of the file."""
        return MappingProxyType({name: entry.shape for name, entry in self._entries.items()})

    @cached_property
    def dtypes(self) -> Mapping[str, str]:
        """Stored dtype of every tensor, spelled as in a safetensors header: "BF16", "F8_E4M3"."""
        return MappingProxyType({name: entry.dtype for name, entry in self._entries.items()})

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @cached_property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(entry.shape) for entry in self._entries.values())

    @cached_property
    def quantisation(self) -> str | None:
        """How weights are quantised: "fp8", "fp8-scaled", "int8-scaled", or None."""
        scaled = {entry.dtype for entry in self._entries.values() if entry.is_scaled}
        if scaled:
            return "fp8-scaled" if any(dtype.startswith("F8_") for dtype in scaled) else "int8-scaled"
        return "fp8" if any(entry.is_quantised for entry in self._entries.values()) else None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Checkpoint({self.source}: {len(self)} tensors, {self.num_bytes / 2**30:.2f} GiB)"

    @property
    def source(self) -> str:
        """The file, or the first shard and how many there are, for messages."""
        more = f" (+{len(self.paths) - 1} shards)" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}" if self.paths else "a checkpoint without files"

    def tensor(
        self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return one tensor.

        Args:
            name: a key of `shapes`.
            device: where it is needed; on the CPU the answer is a view of the mapped file wherever possible.
            dtype: None keeps the stored dtype. Quantised weights (fp8, scaled int8) are widened: stored *
                scale in float32, then ``dtype``, bfloat16 if None.

        Raises:
            KeyError: when there is no such tensor.
            UnsupportedModelError: for a quantisation that this version cannot undo.
        """
        import torch

        entry = self._entries[name]
        raw, scale = entry.load()
        if entry.is_quantised:
            # moved while it is small, widened where it is needed
            scale = None if scale is None else scale.to(device)
            return widened(raw.to(device), scale).to(dtype or torch.bfloat16)
        if not (raw.is_floating_point() or raw.is_complex()):
            dtype = None  # counters and masks stay integers
        return raw.to(device=device, dtype=dtype)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return one tensor as it is stored, and its scale or None; the weight is ``stored.float() * scale``.

        The scale is float32 and broadcasts: () for one per tensor, (rows, 1) for one per row; (rows, blocks,
        1) multiplies the weight seen as (rows, blocks, columns / blocks).
        """
        return self._entries[name].load()

    def renamed(self, layout: KeyLayout) -> Checkpoint:
        """Return a view under the names of ``layout``; tensors that it does not know keep theirs."""
        plan = layout.plan(self._entries)
        return self._view({name: apply_step(step, self._entries, name) for name, step in plan.items()})

    def select(self, names: Iterable[str]) -> Checkpoint:
        """Return a view of some tensors.

        Raises:
            KeyError: when one of them is not there.
        """
        return self._view({name: self._entries[name] for name in names})

    def without_prefix(self, prefix: str) -> Checkpoint:
        """Return a view of the tensors whose names start with ``prefix``, which is cut off."""
        cut = len(prefix)
        return self._view(
            {name[cut:]: entry for name, entry in self._entries.items() if name.startswith(prefix)}
        )

    def unwrapped(self) -> Checkpoint:
        """Return a view without the names of wrappers inside of names: of FSDP, torch.compile, recomputation.

        Raises:
            CheckpointError: when two names are the same without them.
        """
        plain = {name: WRAPPER.sub("", name) for name in self._entries}
        if all(name == told for name, told in plain.items()):
            return self
        if len(set(plain.values())) < len(plain):
            raise CheckpointError(
                f"{self.source} holds a tensor twice: with and without the name of a wrapper."
            )
        return self._view({plain[name]: entry for name, entry in self._entries.items()})

    def merged(self, other: Checkpoint) -> Checkpoint:
        """Return a view of the tensors of both, files of one model that were given apart.

        Raises:
            CheckpointError: when a name is in both.
        """
        if common := set(self._entries) & set(other._entries):
            raise CheckpointError(f"{sorted(common)[0]} is in {self.source} and in {other.source}.")
        paths = tuple(dict.fromkeys(self.paths + other.paths))
        return Checkpoint(
            paths, {**self._entries, **other._entries}, {**other.metadata, **self.metadata}, self.from_folder
        )

    def _view(self, entries: Mapping[str, Entry]) -> Checkpoint:
        return Checkpoint(self.paths, entries, self.metadata, self.from_folder)
