"""``diffsynth dataset``: look at what will be trained on, before anything is trained."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffsynth.cli.ending import plain_errors
from diffsynth.errors import ArgumentError
from diffsynth.vram_management.rates import DEFAULT_RATES

if TYPE_CHECKING:
    from diffsynth.cli.naming import Names, Reserved
    from diffsynth.training.dataset.clips import DatasetPlan
    from diffsynth.training.dataset.config import DatasetConfig
    from diffsynth.vram_management.rates import DiTSizes

Policy = Literal["first", "middle", "random", "uniform", "windows"]
app = typer.Typer(
    name="dataset", help="Training data: what is used, what is not, and why.", no_args_is_help=True
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRequest:
    """What the command was given beside the datasets."""

    model: str  # a known size, or the path of a DiT
    dit: DiTSizes | None  # of that path
    fps: float  # of the model
    grid: int  # pixels
    batch: int
    accumulation: int
    vram_gb: float | None
    tflops: float
    sheet: Path | None
    overwrite: bool  # a file that has the name of the sheet
    decode: bool
    workers: int | None
    list_folder: Path | None
    as_json: bool


@app.callback()
def _root() -> None:
    pass  # keeps ``check`` a subcommand while it is the only one


@app.command(
    epilog="For example: diffsynth dataset check data/dogs --num-frames 81 --size 480x832 --sheet dogs.png"
)
def check(  # noqa: PLR0913
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Folders or tables.", show_default=False)
    ],
    *,
    num_frames: Annotated[
        list[int] | None, typer.Option(help="4 k + 1; may be given again: duration buckets. [default: 81]")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="HEIGHTxWIDTH; may be given again. [default: 480x832]")
    ] = None,
    aspect: Annotated[list[str] | None, typer.Option(help="16:9; each size also in this shape.")] = None,
    resolutions: Annotated[
        Literal["one", "each"], typer.Option(help="One size for each clip, or one of each resolution.")
    ] = "one",
    fps: Annotated[
        str | None, typer.Option(help="Of the clips: a number, or native; that of the model.")
    ] = None,
    clip: Annotated[Policy, typer.Option(help="Which frames.")] = "first",
    windows: Annotated[int, typer.Option(help="Clips of each video; 0 with --clip windows: all.")] = 1,
    seed: Annotated[int, typer.Option(help="Of random clips.")] = 0,
    resize: Annotated[Literal["cover", "stretch", "contain"], typer.Option(help="To the size.")] = "cover",
    repeats: Annotated[float, typer.Option(help="How often an epoch shows each clip.")] = 1.0,
    flip: Annotated[bool, typer.Option("--flip", help="Also mirrored.")] = False,
    trigger: Annotated[str, typer.Option(help="Put in front of every caption.")] = "",
    missing_captions: Annotated[
        Literal["error", "drop", "empty"], typer.Option(help="What to do with files without one.")
    ] = "error",
    v1: Annotated[
        bool, typer.Option("--v1", help="As train_wan_t2v.py takes it: --fps native --clip first.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A file that cannot be used is an error.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every frame: finds damage.")] = False,
    model: Annotated[
        str, typer.Option(help="1.3B, 14B, 5B, or the path of a DiT: for memory and time.")
    ] = "1.3B",
    model_fps: Annotated[float | None, typer.Option(help="Of the model. [default: 16; of 5B 24]")] = None,
    grid: Annotated[
        int | None, typer.Option(help="Pixels; sizes are multiples. [default: 16; of 5B 32]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples at a time.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    vram: Annotated[
        float | None, typer.Option(help="GB (1e9 bytes) of the GPU; names what will not fit.")
    ] = None,
    tflops: Annotated[
        float, typer.Option(help="TFLOP/s in bfloat16: RTX 4090 130, A100 180, H100 650.")
    ] = DEFAULT_RATES.tflops,
    sheet: Annotated[Path | None, typer.Option(help="A .png: pictures of clips with their captions.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a --sheet that is there.")] = False,
    workers: Annotated[int | None, typer.Option(help="Threads that read headers.")] = None,
    lists: Annotated[
        Path | None, typer.Option(help="Folder for the list of dropped files. [default: the dataset's]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a dataset gives: clips, buckets, dropped files and reasons, captions, memory, time."""
    from diffsynth.training.dataset.config import NATIVE, DatasetConfig, Rate

    with plain_errors():
        if v1 and (clip != "first" or windows != 1 or fps not in (None, NATIVE)):
            raise ArgumentError(
                "--v1 means --fps native --clip first; leave --fps, --clip and --windows out."
            )
        rate: Rate = NATIVE if v1 or fps == NATIVE else None if fps is None else _number(fps)
        configs = [
            DatasetConfig(
                path=path, clip=clip, windows=windows, seed=seed, fps=rate,
                num_frames=tuple(num_frames or (81,)), sizes=tuple(map(_size, size or ("480x832",))),
                aspects=tuple(aspect or ()), resolutions=resolutions, resize=resize, repeats=repeats,
                flip=flip, trigger=trigger, missing_captions=missing_captions, strict=strict,
            )
            for path in paths
        ]  # fmt: skip
        dit = _dit_sizes(model)
        is_big = model == "5B" or (dit is not None and dit.spatial_stride == 16)
        run_check(
            configs,
            CheckRequest(
                model=model, dit=dit, fps=model_fps or (24.0 if is_big else 16.0),
                grid=grid or (32 if is_big else 16),
                batch=batch, accumulation=accumulate, vram_gb=vram, tflops=tflops, sheet=sheet,
                overwrite=overwrite, decode=decode, workers=workers, list_folder=lists, as_json=as_json,
            ),
        )  # fmt: skip


def run_check(configs: Sequence[DatasetConfig], request: CheckRequest) -> None:
    """Write the report to stdout, and the contact sheet where it was asked for.

    Raises:
        DiffSynthError: what is wrong with a dataset, or with what was asked.
    """
    from diffsynth.cli.naming import reserved
    from diffsynth.video.paths import IMAGE_SUFFIXES

    if request.sheet is None:
        if request.overwrite:
            raise ArgumentError("--overwrite is about the --sheet, which is missing; leave it out.")
        _report(configs, request, None)
        return
    names = _sheet_names(request.sheet, configs, overwrite=request.overwrite)
    with reserved(names, IMAGE_SUFFIXES) as found:
        _report(configs, request, found)


def _report(configs: Sequence[DatasetConfig], request: CheckRequest, sheet: Reserved | None) -> None:
    from diffsynth.training.dataset.planning import plan_dataset
    from diffsynth.training.dataset.report import report_of, to_object, to_text

    plan = plan_dataset(
        configs, model_fps=request.fps, grid=(request.grid, request.grid), workers=request.workers,
        list_folder=request.list_folder, decode=request.decode,
    )  # fmt: skip
    report = report_of(
        plan, dit=request.dit, dit_name=request.model, batch=request.batch, accumulation=request.accumulation,
        vram_gb=request.vram_gb, tflops=request.tflops,
    )  # fmt: skip
    told = to_object(report)
    undecodable: list[str] = []
    made = None if sheet is None else _draw(plan, sheet, undecodable)
    if request.as_json:
        told["undecodable"] = undecodable
        sys.stdout.write(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        return
    sys.stdout.write(to_text(report) + "\n")
    sys.stdout.writelines(f"warning: cannot be decoded: {text}\n" for text in undecodable)
    if made is not None:
        sys.stdout.write(f"{made}: contact sheet\n")


def _draw(plan: DatasetPlan, sheet: Reserved, undecodable: list[str]) -> Path:
    """Draw the sheet and return its path; what could not be decoded for it is added to ``undecodable``."""
    from diffsynth.cli.output import as_spelled
    from diffsynth.training.dataset.sheet import write_sheet
    from diffsynth.video.paths import write_whole

    (path,) = sheet.paths
    target = Path(os.path.realpath(path.expanduser()))

    def write(place: Path) -> None:
        undecodable.extend(dropped.reason for dropped in write_sheet(plan, place))

    return as_spelled(path, write_whole(target, write, overwrite=sheet.overwrites))


def _sheet_names(sheet: Path, configs: Sequence[DatasetConfig], *, overwrite: bool) -> Names:
    from diffsynth.cli.naming import Names, naming_of

    target = sheet.expanduser().resolve()
    for config in configs:
        folder = Path(config.path).expanduser().resolve()
        if folder.is_dir() and target.is_relative_to(folder):
            raise ArgumentError(
                f"--sheet {sheet} lies in the dataset {config.path}, whose pictures are training data; "
                "write it elsewhere."
            )
    naming = naming_of(is_named=True, overwrite=overwrite)
    return Names(out=sheet, naming=naming, inputs=[config.path for config in configs])


def _dit_sizes(model: str) -> DiTSizes | None:
    """Sizes of a checkpoint by its header; None for a name that is known."""
    from diffsynth.training.dataset.report import KNOWN_DITS
    from diffsynth.vram_management.rates import DiTSizes

    if model in KNOWN_DITS:
        return None
    if not Path(model).expanduser().exists():
        raise ArgumentError(f"--model is {model!r}; give {', '.join(KNOWN_DITS)}, or the path of a DiT.")
    from diffsynth.cli.plan import find_parts

    parts = find_parts([model]).matches
    if "dit" not in parts:
        raise ArgumentError(f"--model {model} holds {', '.join(parts)} and no DiT.")
    config: Any = parts["dit"].config
    return DiTSizes.from_config(config)


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.lower().split("x"))
        return height, width
    except ValueError:
        raise ArgumentError(f"--size is {text!r}; give HEIGHTxWIDTH in pixels, such as 480x832.") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"--fps is {text!r}; give a number, or native.") from None
