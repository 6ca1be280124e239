"""Which model reads which inputs, and what goes beside it; the inputs are told by asking the conditioners.

``python -m diffsynth.models.table`` prints the README's tables; ``--write FILE`` puts them between the marks
of that file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from diffsynth.conditioning.argument import MEDIA, SOURCE, declared_in
from diffsynth.conditioning.conditioner import Conditioner
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.conditioning.registry import CONDITIONERS
from diffsynth.errors import ArgumentError
from diffsynth.models.kinds import facts_of_kind

BEGIN = "<!-- tables of models: python -m diffsynth.models.table --write README.md -->"
END = "<!-- end of the tables of models -->"
SMALL, MIDDLE, LARGE = 1536, 3072, 5120  # width of a DiT in channels
SIZES = {SMALL: "1.3B", MIDDLE: "5B", LARGE: "14B"}  # what people call it


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """Released models that read the same inputs."""

    title: str
    kind: str  # see `diffsynth.models.kinds.KINDS`
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


def main_inputs() -> list[str]:
    """Names of what a model may be shown or told beside words: what has no default and is no setting."""
    kinds = dict.fromkeys(conditioner.Inputs for conditioner in CONDITIONERS.values())
    return [
        name
        for name, each in declared_in(list(kinds)).items()
        if each.group == SOURCE and each.default is None and (each.scope == "clip" or each.kind in MEDIA)
    ]


def inputs_read(facts: DiTFacts) -> tuple[str, ...]:
    """Names of the inputs that a model reads; last those that every model does."""
    read = _names(facts, lambda conditioner: conditioner.reads)
    usual = _names(DiTFacts(), lambda conditioner: conditioner.reads)
    return (*(name for name in read if name not in usual), *(name for name in read if name in usual))


def inputs_needed(facts: DiTFacts) -> tuple[str, ...]:
    """Names of the inputs without which a model does not run."""
    return tuple(_names(facts, lambda conditioner: conditioner.needs))


def _names(facts: DiTFacts, ask: Callable[[Conditioner], Callable[[DiTFacts], frozenset[str]]]) -> list[str]:
    told = {name for conditioner in CONDITIONERS.values() for name in ask(conditioner)(facts)}
    return [name for name in main_inputs() if name in told]


def tables() -> str:
    """Both tables, as Markdown."""
    lines = ["| model | needs | may also be given |", "|---|---|---|"]
    for row in MODELS:
        facts = facts_of_kind(row.kind)
        needed = inputs_needed(facts)
        more = [name for name in inputs_read(facts) if name not in needed]
        lines.append(f"| {row.title} | {_listed(needed)} | {_listed(more)} |")
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


def _fits(adapter: AdapterRow, row: ModelRow) -> str:
    """Which of a row's models an adapter serves: all, those of one size, or none."""
    if adapter.width is None:
        return "yes"
    is_other = adapter.kinds is not None and (row.kind not in adapter.kinds or row.num_experts > 1)
    return "–" if is_other or adapter.width not in row.widths else SIZES[adapter.width]


def _listed(names: Iterable[str]) -> str:
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
