"""Which model reads which inputs, and what goes beside it; the inputs are told by asking the conditioners.

``python -m diffsynth.models.table`` prints the README's tables; ``--write FILE`` puts them between the marks
of that file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from diffsynth.conditioning.conditioner import read_inputs
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.conditioning.text import TextInputs
from diffsynth.errors import ArgumentError, DiffSynthError, UnusedInputError
from diffsynth.models.registry import ARCHITECTURES
from diffsynth.models.toy import DIT, KINDS
from diffsynth.models.wan.dit_config import holds_first_frame, plane_channels

BEGIN = "<!-- tables of models: python -m diffsynth.models.table --write README.md -->"
END = "<!-- end of the tables of models -->"
SMALL, MIDDLE, LARGE = 1536, 3072, 5120  # width of a DiT in channels
SIZES = {SMALL: "1.3B", MIDDLE: "5B", LARGE: "14B"}  # what people call it


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """Released models that read the same inputs."""

    title: str
    kind: str  # of their toy, see `diffsynth.models.toy.KINDS`
    checkpoints: tuple[tuple[str, ...], ...]  # the files of each, by the short names of their headers
    widths: tuple[int, ...] = (SMALL, LARGE)  # of its DiTs
    num_experts: int = 1
    # DiffSynth-Studio's README: Wan2.1 I2V 14B is sensitive to precision and should rest in bfloat16.
    is_fp8_sensitive: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRow:
    """An adapter in a file of its own: it serves a DiT of its width."""

    title: str
    width: int | None = None  # of the released file, in channels; None: there are files for every width
    kinds: tuple[str, ...] | None = None  # that it was trained beside; None: any


MODELS: tuple[ModelRow, ...] = (
    ModelRow(
        title="Wan2.1 T2V 1.3B, 14B", kind="t2v", checkpoints=(("wan2.1_t2v_1.3b",), ("wan2.1_t2v_14b",))
    ),
    ModelRow(
        title="Wan2.1 I2V 14B 480P, 720P", kind="i2v",
        checkpoints=(("wan2.1_i2v_14b_480p",), ("wan2.1_i2v_14b_720p",)),
        widths=(LARGE,), is_fp8_sensitive=True,
    ),
    ModelRow(
        title="Wan2.1 FLF2V 14B 720P", kind="flf2v", checkpoints=(("wan2.1_flf2v_14b_720p",),),
        widths=(LARGE,),
    ),
    ModelRow(
        title="Wan2.1 Fun InP 1.3B, 14B (V1.0, V1.1)", kind="i2v",
        checkpoints=(("wan2.1_fun_1.3b_inp",), ("wan2.1_fun_14b_inp",), ("wan2.1_fun_v1.1_1.3b_inp",),
                     ("wan2.1_fun_v1.1_14b_inp",)),
    ),
    ModelRow(
        title="Wan2.1 Fun Control 1.3B, 14B", kind="control",
        checkpoints=(("wan2.1_fun_1.3b_control",), ("wan2.1_fun_14b_control",)),
    ),
    ModelRow(
        title="Wan2.1 Fun V1.1 Control 1.3B, 14B", kind="reference",
        checkpoints=(("wan2.1_fun_v1.1_1.3b_control",), ("wan2.1_fun_v1.1_14b_control",)),
    ),
    ModelRow(
        title="Wan2.1 Fun V1.1 Control-Camera 1.3B, 14B", kind="camera",
        checkpoints=(("wan2.1_fun_v1.1_1.3b_control_camera",), ("wan2.1_fun_v1.1_14b_control_camera",)),
    ),
    ModelRow(
        title="Wan2.1 VACE 1.3B (preview and final), 14B; VACE module beside T2V 14B", kind="vace",
        checkpoints=(("wan2.1_vace_1.3b_preview",), ("wan2.1_vace_1.3b",), ("wan2.1_vace_14b",),
                     ("wan2.1_t2v_14b", "wan2.1_vace_14b_module_only")),
    ),
    ModelRow(
        title="Wan2.1 T2V 1.3B with speed control", kind="speed",
        checkpoints=(("wan2.1_t2v_1.3b", "wan2.1_1.3b_speedcontrol_v1"),), widths=(SMALL,),
    ),
    ModelRow(
        title="Wan2.2 T2V A14B", kind="t2v", checkpoints=(("wan2.2_t2v_a14b",),), widths=(LARGE,),
        num_experts=2,
    ),
    ModelRow(
        title="Wan2.2 I2V A14B", kind="i2v-a14b", checkpoints=(("wan2.2_i2v_a14b",),), widths=(LARGE,),
        num_experts=2,
    ),
    ModelRow(
        title="Wan2.2 Fun A14B InP", kind="i2v-a14b", checkpoints=(("wan2.2_fun_a14b_inp",),),
        widths=(LARGE,), num_experts=2,
    ),
    ModelRow(
        title="Wan2.2 Fun A14B Control", kind="control-a14b", checkpoints=(("wan2.2_fun_a14b_control",),),
        widths=(LARGE,), num_experts=2,
    ),
    ModelRow(
        title="Wan2.2 Fun A14B Control-Camera", kind="camera-a14b",
        checkpoints=(("wan2.2_fun_a14b_control_camera",),), widths=(LARGE,), num_experts=2,
    ),
    ModelRow(
        title="Wan2.2 VACE-Fun A14B", kind="vace", checkpoints=(("wan2.2_vace_fun_a14b",),), widths=(LARGE,),
        num_experts=2,
    ),
    ModelRow(
        title="Wan2.2 TI2V 5B", kind="ti2v", checkpoints=(("wan2.2_ti2v_5b",),), widths=(MIDDLE,),
    ),
    ModelRow(
        title="Wan2.2 Fun 5B InP", kind="i2v-5b", checkpoints=(("wan2.2_fun_5b_inp",),), widths=(MIDDLE,),
    ),
    ModelRow(
        title="Wan2.2 Fun 5B Control", kind="control-5b", checkpoints=(("wan2.2_fun_5b_control",),),
        widths=(MIDDLE,),
    ),
    ModelRow(
        title="Wan2.2 Fun 5B Control-Camera", kind="camera-5b",
        checkpoints=(("wan2.2_fun_5b_control_camera",),), widths=(MIDDLE,),
    ),
)  # fmt: skip

ADAPTERS: tuple[AdapterRow, ...] = (
    AdapterRow(title="LoRA"),
    AdapterRow(title="speed control", width=SMALL),
    AdapterRow(title="VACE module", width=LARGE, kinds=("t2v",)),
)

_SOME: Any = object()  # a picture; whether it is read does not depend on what it shows
# input -> the arguments with which it is given: some mean nothing alone
INPUTS: dict[str, Mapping[str, object]] = {
    "input_image": {"input_image": _SOME},
    "end_image": {"input_image": _SOME, "end_image": _SOME},
    "control_video": {"control_video": [_SOME]},
    "reference_image": {"reference_image": _SOME},
    "camera_control_direction": {"camera_control_direction": "Left"},
    "vace_video": {"vace_video": [_SOME]},
    "vace_video_mask": {"vace_video": [_SOME], "vace_video_mask": [_SOME]},
    "vace_reference_image": {"vace_reference_image": [_SOME]},
    "motion_bucket_id": {"motion_bucket_id": 50},
    "input_video": {"input_video": [_SOME], "denoising_strength": 0.5},
}
# A video to start from and references in front of the latents exclude each other.
ALONE = "input_video"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What conditioners ask of loaded networks, told without any; every encoder counts as loaded."""

    planes: Mapping[str, int]
    image_dim: int | None
    has_image_positions: bool
    adapters: frozenset[str]
    holds_first_frame: bool = False
    vae_file: str = ""
    device: Any = None
    known_words: frozenset[str] = frozenset()
    text_encoder: Any = _SOME
    tokenizer: Any = _SOME
    image_encoder: Any = _SOME
    vae: Any = _SOME

    @property
    def has_image_branch(self) -> bool:
        """Whether the DiT reads tokens of an image encoder."""
        return self.image_dim is not None

    @classmethod
    def of(cls, dit: Mapping[str, Any], adapters: Iterable[str]) -> Facts:
        """Tell them of a DiT's sizes and of its adapters' names in the registry."""
        return cls(
            planes=plane_channels(dit["in_dim"], dit["out_dim"]),
            image_dim=dit.get("image_dim"),
            has_image_positions=dit.get("image_tokens_pos") is not None,
            adapters=frozenset(_door_name(name) for name in adapters),
            holds_first_frame=holds_first_frame(dit["out_dim"]),
        )

    @classmethod
    def of_kind(cls, kind: str) -> Facts:
        """Tell them of a toy, see `diffsynth.models.toy.KINDS`."""
        sizes, adapters = KINDS[kind]
        return cls.of({**DIT, **sizes}, adapters)


def inputs_read(facts: Facts) -> tuple[str, ...]:
    """Names of the inputs that a model reads."""
    return tuple(
        name
        for name, given in INPUTS.items()
        if not any(isinstance(error, UnusedInputError) for error in _refusals(given, facts))
    )


def inputs_needed(facts: Facts) -> tuple[str, ...]:
    """Names of the inputs without which a model does not run."""
    read = [name for name in inputs_read(facts) if name != ALONE]
    return tuple(name for name in read if list(_refusals(_all_but(name, read), facts)))


def tables() -> str:
    """Both tables, as Markdown."""
    lines = ["| model | needs | may also be given |", "|---|---|---|"]
    for row in MODELS:
        facts = Facts.of_kind(row.kind)
        needed = inputs_needed(facts)
        more = [name for name in inputs_read(facts) if name not in needed]
        lines.append(f"| {row.title} | {_names(needed)} | {_names(more)} |")
    titles = [adapter.title for adapter in ADAPTERS]
    lines += ["", f"| model | {' | '.join(titles)} | fp8 weights |", f"|---{'|---' * (len(titles) + 1)}|"]
    for row in MODELS:
        fp8 = "yes, but sensitive: bf16 is safer" if row.is_fp8_sensitive else "yes"
        cells = [_fits(adapter, row) for adapter in ADAPTERS]
        lines.append(f"| {row.title} | {' | '.join(cells)} | {fp8} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Return a page with the tables between its marks made anew.

    Raises:
        ArgumentError: when the page has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ArgumentError(
            f"The page has no marks; put these lines where the tables belong:\n{BEGIN}\n{END}"
        )
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _refusals(given: Mapping[str, object], facts: Facts) -> Iterator[DiffSynthError]:
    """What each conditioner has against these arguments."""
    parts: Any = facts
    for conditioner in CONDITIONERS.values():
        if conditioner.Inputs is TextInputs:
            continue
        try:
            conditioner.applies(read_inputs(conditioner.Inputs, given), parts)
        except DiffSynthError as error:
            yield error


def _all_but(missing: str, names: Iterable[str]) -> dict[str, object]:
    """Arguments of these inputs without one, and without those that mean nothing without it."""
    given: dict[str, object] = {}
    for name in names:
        if missing not in INPUTS[name]:
            given.update(INPUTS[name])
    return given


def _door_name(network: str) -> str:
    """Name of an adapter in `Conditions`, by its name in the registry."""
    module, _, class_name = next(
        row.module for row in ARCHITECTURES if row.name == network and row.module is not None
    ).partition(":")
    return str(getattr(import_module(module), class_name).name)


def _fits(adapter: AdapterRow, row: ModelRow) -> str:
    """Which of a row's models an adapter serves: all, those of one size, or none."""
    if adapter.width is None:
        return "yes"
    is_other = adapter.kinds is not None and (row.kind not in adapter.kinds or row.num_experts > 1)
    return "–" if is_other or adapter.width not in row.widths else SIZES[adapter.width]


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "–"


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into a file.

    Raises:
        ArgumentError: for other arguments, or a file without marks.
    """
    if not arguments:
        sys.stdout.write(tables() + "\n")
        return
    if len(arguments) != 2 or arguments[0] != "--write":
        raise ArgumentError(f"arguments are {arguments}; give none, or --write FILE.")
    page = Path(arguments[1])
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
