"""One encoded clip: what a training step needs of it, in one safetensors file; and batches of them.

Letters: B batch, C latent channels, T latent frames, h w latent height and width, L text tokens.
A sample has B = 1 everywhere. Its file holds the tensors under dotted names ("positive.planes.mask"); a
tensor that both sides of the guidance share is there once. The metadata's ``structure`` (JSON) says how
tensors and numbers make up the conditions: only the classes of `STORED` can be named there, and nothing is
unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from diffsynth.checkpoints.checkpoint import Checkpoint
from diffsynth.checkpoints.saving import save_tensors
from diffsynth.conditioning.camera import CameraPath, CameraRays
from diffsynth.conditioning.conditions import Conditions, LatentPlan
from diffsynth.conditioning.reference import Reference
from diffsynth.conditioning.speed import Speed
from diffsynth.conditioning.vace import VaceCondition
from diffsynth.errors import ArgumentError, CheckpointError, CorruptCheckpointError

Told = TypeVar("Told")

FORMAT = "diffsynth sample 1"  # in the metadata's "format"; another number is another structure
STRUCTURE, KEY = "structure", "key"
# What a file may name. A new kind of adapter input is one more class here.
STORED: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (Conditions, LatentPlan, VaceCondition, Reference, Speed, CameraPath, CameraRays)
}

# Fields of these that earlier versions wrote, and that nothing reads.
FORMER: Mapping[str, tuple[str, ...]] = {"VaceCondition": ("times",)}


@dataclass(frozen=True, kw_only=True)
class SampleHeader:
    """A sample's file without its tensors."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    structure: Mapping[str, object]
    meta: Mapping[str, str]

    @property
    def id(self) -> str:
        """Stable name of the sample: what noise and noise levels are drawn by."""
        return self.meta.get(KEY, self.path.name)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(1, C, T, h, w)."""
        return self.shapes["latents"]

    @property
    def bucket(self) -> tuple[int, int, int, str]:
        """T, h, w, and everything else that samples of one batch have in common, as text."""
        _, _, frames, height, width = self.latent_shape
        return (
            frames,
            height,
            width,
            self._outline(self.structure.get("positive"), is_text=False)
            + (self._outline(self.structure.get("plan"), is_text=False)),
        )

    @property
    def is_plain(self) -> bool:
        """Whether the clip is told by its caption alone: no picture, plane, adapter input or pinned frame."""
        parts = [self.structure.get(name) for name in ("positive", "plan")]
        inner = [part.get("fields") for part in parts if isinstance(part, dict)]
        slots = {name: value for given in inner if isinstance(given, dict) for name, value in given.items()}
        return all(not value or value == {"map": {}} for name, value in slots.items() if name != "text")

    def _outline(self, part: object, *, is_text: bool) -> str:
        """The structure with shapes in place of tensors; text may differ in length."""
        if isinstance(part, dict) and "tensor" in part:
            shape = self.shapes[str(part["tensor"])]
            return f"(1, L, {shape[2]})" if is_text else str(shape)
        if isinstance(part, dict):
            inner: Mapping[str, object] = part.get("fields") or part.get("map") or {}
            of_conditions = part.get("type") == "Conditions"
            told = [
                f"{name}={self._outline(value, is_text=of_conditions and name == 'text')}"
                for name, value in sorted(inner.items())
                if value is not None and value != {"map": {}}
            ]
            return f"{part.get('type', '')}{{{', '.join(told)}}}"
        return json.dumps(part)


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One clip as the DiT sees it, all tensors with B = 1."""

    latents: Tensor  # (1, C, T, h, w) clean, of the clip alone: no frames of the plan in front
    positive: Conditions  # of the caption; text (1, L, text_dim) without padding
    negative: Conditions | None  # of the empty caption; None: the file, of DiffSynth v1, has none
    plan: LatentPlan = field(default_factory=LatentPlan)
    meta: Mapping[str, str] = field(default_factory=dict)  # everything that decided the numbers

    @property
    def id(self) -> str:
        """Stable name of the sample."""
        return self.meta.get(KEY, "")

    def save(self, path: str | Path) -> None:
        """Write the sample as one safetensors file, whole or not at all.

        Raises:
            OutputPathError: when the disk is full or fails.
            ArgumentError: for conditions that no file can hold.
        """
        tensors, structure = self._packed()
        # A copy of its own for each: conditioners hand out expanded views.
        own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, tensor in tensors.items()}  # fmt: skip
        meta = {**self.meta, "format": FORMAT, STRUCTURE: json.dumps(structure)}
        save_tensors(Path(path), own, meta)

    def at_moment(self, place: float) -> EncodedSample:
        """One latent alone, any but the first.

        Args:
            place: from 0 (the second latent) to 1 (beyond the last).
        """
        later = self.latents.shape[2] - 1
        number = 1 + min(int(place * later), later - 1)
        return replace(self, latents=self.latents[:, :, number : number + 1])

    def described(self, path: Path) -> SampleHeader:
        """The header that a file of this sample would have."""
        tensors, structure = self._packed()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return SampleHeader(path=path, shapes=shapes, structure=structure, meta=self.meta)

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        if self.plan.start is not None:
            raise ArgumentError("A sample has no start: input_video is for generating, not for training.")
        tensors: dict[str, Tensor] = {"latents": self.latents}
        names: dict[int, str] = {}
        structure = {
            name: _packed(value, name, tensors, names)
            for name, value in (("positive", self.positive), ("negative", self.negative), ("plan", self.plan))
        }
        return tensors, structure

    @classmethod
    def load(cls, path: str | Path) -> EncodedSample:
        """Read a sample that `save` wrote.

        Raises:
            CheckpointError: for another kind of file, or a structure that this version does not know.
        """
        file = Checkpoint.open(Path(path))
        header = _header(file)
        # Not the map: a mapped file that is replaced or removed while it is read would stop the program.
        tensors = {name: file.tensor(name).clone() for name in file.shapes}
        parts = {name: _unpacked(value, tensors, header.path) for name, value in header.structure.items()}
        positive, negative, plan = (parts.get(name) for name in ("positive", "negative", "plan"))
        if not (
            isinstance(positive, Conditions)
            and isinstance(negative, Conditions | None)
            and isinstance(plan, LatentPlan)
        ):
            raise CheckpointError(f"{path}: its structure holds no conditions; make it anew.")
        return cls(
            latents=tensors["latents"], positive=positive, negative=negative, plan=plan, meta=header.meta
        )

    @staticmethod
    def header(path: str | Path) -> SampleHeader:
        """Read shapes, structure and metadata, and no tensor.

        Raises:
            CheckpointError: for a file that is no sample, or damaged.
        """
        return _header(Checkpoint.open(Path(path)))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one bucket, side by side."""

    latents: Tensor  # (B, C, T, h, w), clean
    conditions: Conditions
    plan: LatentPlan
    ids: tuple[str, ...]  # of the samples

    @property
    def clean(self) -> Tensor:
        """(B, C, extra frames + T, h, w): all that the DiT is to bring forth.

        Frames that the plan puts in front of a clip (pictures that VACE refers to) are part of it, as they
        are when a video is made; the input that asked for them holds their latents.
        """
        if not self.plan.extra_frames:
            return self.latents
        givers = [given for given in self.conditions.adapters.values() if isinstance(given, VaceCondition)]
        assert len(givers) == 1, "frames in front have one giver"
        front = givers[0].front(self.plan.extra_frames, self.latents.shape[1])
        return torch.cat([front.to(self.latents), self.latents], dim=2)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device; cameras stay on the host, their adapter fetches frame by frame."""
        latents, conditions, plan = map_tensors(
            (self.latents, self.conditions, self.plan), lambda tensor: tensor.to(device)
        )
        return Batch(latents=latents, conditions=conditions, plan=plan, ids=self.ids)


def map_tensors(value: Told, change: Callable[[Tensor], Tensor]) -> Told:
    """Return conditions or a plan with each tensor changed; one that both sides share stays one."""
    return cast(Told, _mapped(value, change, {}))


def collate(samples: Sequence[EncodedSample], use_negative: Sequence[bool]) -> Batch:
    """Join samples of one bucket.

    Args:
        samples: of one bucket; see `SampleHeader.bucket`.
        use_negative: of each, whether its conditions are those of the empty caption (caption dropout).

    Returns:
        The batch; shorter texts are padded with zero rows, which the DiT takes for padding.

    Raises:
        ArgumentError: for samples that do not fit together, or without an empty caption where it is asked.
    """
    if not samples or len(samples) != len(use_negative):
        raise ArgumentError(f"{len(samples)} samples with {len(use_negative)} choices; give one of each.")
    sides = []
    for sample, is_dropped in zip(samples, use_negative, strict=True):
        if is_dropped and sample.negative is None:
            raise ArgumentError(
                f"Sample {sample.id} was cached by DiffSynth v1, without the empty caption: set "
                "caption_dropout to 0, or make the cache anew (--task data_process)."
            )
        sides.append(sample.negative if is_dropped else sample.positive)
    conditions = _joined(sides, "conditions")
    plan = _joined([sample.plan for sample in samples], "plan")
    assert isinstance(conditions, Conditions) and isinstance(plan, LatentPlan)
    latents = _joined([sample.latents for sample in samples], "latents")
    assert isinstance(latents, Tensor)
    return Batch(
        latents=latents, conditions=conditions, plan=plan, ids=tuple(sample.id for sample in samples)
    )


def _header(file: Checkpoint) -> SampleHeader:
    found = file.metadata.get("format")
    if found != FORMAT or len(file.shapes.get("latents", ())) != 5:
        raise CheckpointError(
            f"{file.source} is no cached sample of this version (format {found!r}, expected {FORMAT!r}); "
            "make it anew: --task data_process."
        )
    meta = {name: value for name, value in file.metadata.items() if name not in (STRUCTURE, "format")}
    try:
        structure = json.loads(file.metadata[STRUCTURE], object_hook=_as_now)
    except (KeyError, ValueError, RecursionError):
        structure = None
    if not isinstance(structure, dict):
        raise CorruptCheckpointError(f"{file.source}: its structure is no JSON object; make it anew.")
    return SampleHeader(path=file.paths[0], shapes=file.shapes, structure=structure, meta=meta)


def _as_now(part: dict[str, object]) -> dict[str, object]:
    """A part of a structure, without fields that are gone."""
    gone, inner = FORMER.get(str(part.get("type")), ()), part.get("fields")
    if not gone or not isinstance(inner, dict):
        return part
    return {**part, "fields": {name: value for name, value in inner.items() if name not in gone}}


def _packed(value: object, name: str, tensors: dict[str, Tensor], names: dict[int, str]) -> object:
    """A value as JSON; its tensors go into ``tensors``, each once."""
    if isinstance(value, Tensor):
        known = names.setdefault(id(value), name)
        tensors[known] = value
        return {"tensor": known}
    if type(value).__name__ in STORED and is_dataclass(value):
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
        packed = {key: _packed(item, f"{name}.{key}", tensors, names) for key, item in inner.items()}
        return {"type": type(value).__name__, "fields": packed}
    if isinstance(value, Mapping):
        return {"map": {key: _packed(item, f"{name}.{key}", tensors, names) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return [_packed(item, f"{name}.{index}", tensors, names) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArgumentError(
        f"{name} is a {type(value).__name__}, which no sample can hold; known: {', '.join(STORED)}."
    )


def _mapped(value: object, change: Callable[[Tensor], Tensor], done: dict[int, Tensor]) -> object:
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = change(value)
        return done[id(value)]
    if isinstance(value, CameraPath | CameraRays):
        return value
    if type(value).__name__ in STORED:
        inner = {f.name: getattr(value, f.name) for f in fields(value)}  # type: ignore[arg-type]
        return type(value)(**{name: _mapped(item, change, done) for name, item in inner.items()})
    if isinstance(value, Mapping):
        return {name: _mapped(item, change, done) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(item, change, done) for item in value)
    return value


def _unpacked(value: object, tensors: Mapping[str, Tensor], path: Path) -> object:
    """The reverse of `_packed`."""
    if isinstance(value, list):
        return tuple(_unpacked(item, tensors, path) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        if value["tensor"] not in tensors:
            raise CorruptCheckpointError(f"{path}: the tensor {value['tensor']!r} is missing; make it anew.")
        return tensors[value["tensor"]]
    if "map" in value:
        return {key: _unpacked(item, tensors, path) for key, item in value["map"].items()}
    kind = STORED.get(str(value.get("type")))
    given = value.get("fields")
    if kind is None or not isinstance(given, dict) or given.keys() != {f.name for f in fields(kind)}:
        raise CheckpointError(
            f"{path} holds {value.get('type')!r}, which this version does not know; make it anew, or use the "
            "version that wrote it."
        )
    return kind(**{key: _unpacked(item, tensors, path) for key, item in given.items()})


def _joined(values: Sequence[object], name: str) -> object:
    """Equal structures side by side: tensors along B, the rest must be equal."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise ArgumentError(f"{name} of this batch is {' and '.join(kinds)}; samples of one bucket agree.")
    if isinstance(first, Tensor):
        return _side_by_side([value for value in values if isinstance(value, Tensor)], name)
    if isinstance(first, CameraPath) and len(values) > 1:
        return CameraRays(values=torch.cat([_rays(v) for v in values if isinstance(v, CameraPath)]))
    if isinstance(first, Mapping):
        keys = [tuple(sorted(value)) for value in values if isinstance(value, Mapping)]
        if len(set(keys)) > 1:
            raise ArgumentError(
                f"{name} of this batch has {keys[0]} and {keys[1]}; samples of one bucket agree."
            )
        return {key: _joined([v[key] for v in values if isinstance(v, Mapping)], f"{name}.{key}")
                for key in first}  # fmt: skip
    if type(first).__name__ in STORED:
        inner = [f.name for f in fields(first)]  # type: ignore[arg-type]
        return type(first)(
            **{key: _joined([getattr(v, key) for v in values], f"{name}.{key}") for key in inner}
        )
    if any(value != first for value in values):
        raise ArgumentError(
            f"{name} of this batch is {first!r} and something else; samples of one bucket agree."
        )
    return first


def _side_by_side(tensors: Sequence[Tensor], name: str) -> Tensor:
    if name == "conditions.text":
        rows = [row for tensor in tensors for row in tensor]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ArgumentError(f"{name} of this batch has shapes {sorted(shapes)}; samples of one bucket agree.")
    return torch.cat(list(tensors))


def _rays(path: CameraPath) -> Tensor:
    """(1, 24, T, H, W): several paths have no common camera, their rays stand side by side."""
    return torch.stack([path.latent_frame(index) for index in range(path.shape[1])], dim=2)
