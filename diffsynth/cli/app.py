"""The command ``diffsynth``: every subcommand. Nothing here imports torch."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from diffsynth import __version__
from diffsynth.cli import dataset, lora
from diffsynth.cli.ending import missing_package, plain_errors, whole_output
from diffsynth.cli.flags import DECODE_FLAGS, FLAGS, DtypeName, short_dtype, with_flags
from diffsynth.cli.task_flags import REFINE_FLAGS, TASK_FLAGS

TaskName = Enum(
    "TaskName",
    {
        "grey": "grey",
        "canny": "canny",
        "scribble": "scribble",
        "flow": "flow",
        "depth": "depth",
        "pose": "pose",
        "layout": "layout",
    },
    type=str,
)

app = typer.Typer(
    name="diffsynth",
    help="Videos from words with the Wan models, and tools for their checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lora.app)
app.add_typer(dataset.app)


def main() -> None:
    """Run the command line of this process, and end the process."""
    with whole_output():
        try:
            app(prog_name="diffsynth")
        except ModuleNotFoundError as error:  # of what reads the line: commands tell theirs themselves
            missing = missing_package(error)
            if missing is None or "--debug" in sys.argv:
                raise
            typer.echo(f"error: {missing}", err=True)
            raise SystemExit(1) from None


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"diffsynth {__version__} (Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(
    epilog="For example: diffsynth generate 'a cat on the beach' --model Wan2.1-T2V-1.3B --out cat.mp4"
)
@with_flags((*FLAGS, *TASK_FLAGS))
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to show.", show_default=False)] = None,
    **given: object,
) -> None:
    """Make a video, or a picture, from words. What is not given is as the model's makers recommend.

    A line of Wan's own generate.py works as well: diffsynth generate --task t2v-14B --ckpt_dir FOLDER ...
    """
    from diffsynth.cli.generate import run_generate

    with plain_errors(bool(given.pop("debug"))):
        run_generate(prompt, given)


@app.command(epilog="For example: diffsynth refine --from video-2.mp4 --size 1280*720 --model Wan2.1-T2V-14B")
@with_flags(REFINE_FLAGS)
def refine(
    prompt: Annotated[
        str | None, typer.Argument(help="What to show; default: the file's.", show_default=False)
    ] = None,
    **given: object,
) -> None:
    """Make a preview large: the same prompt and seed, begun from the preview instead of noise."""
    from diffsynth.cli.refine import run_refine

    with plain_errors(bool(given.pop("debug"))):
        run_refine(prompt, given)


@app.command(epilog="For example: diffsynth decode cat.1a2b3c4d.latents.safetensors --tiled")
@with_flags(DECODE_FLAGS)
def decode(
    latents: Annotated[
        Path, typer.Argument(help="What `generate` left: NAME.ID.latents.safetensors.", show_default=False)
    ],
    **given: object,
) -> None:
    """Make the video of saved latents: goes on where a run died in its last step."""
    from diffsynth.cli.decode import run_decode

    with plain_errors(bool(given.pop("debug"))):
        run_decode(latents, given)


@app.command(epilog="For example: diffsynth preprocess --task canny in.mp4 out.mp4")
def preprocess(  # noqa: PLR0913
    source: Annotated[Path, typer.Argument(help="A video, a picture, or a folder of pictures.")],
    out: Annotated[Path, typer.Argument(help="The control video, or .png or .jpg for a picture.")],
    *,
    task: Annotated[TaskName, typer.Option(help="What to draw.")],
    boxes: Annotated[
        Path | None, typer.Option(help='Of layout: JSON, [{"FRAME": [left, top, right, bottom], ...}, ...].')
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of depth and pose: folder of the network; of depth: or a hub id.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Let that network be downloaded.")] = False,
    device: Annotated[str, typer.Option(help="Of depth and pose: cpu or cuda.")] = "cpu",
    thresholds: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Of canny and scribble: lower and upper gradient of a line; by the picture."),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second; the source's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Draw the control video of a video: grey, lines, motion, depth, poses or boxes."""
    from diffsynth.cli.preprocess import PreprocessRequest, run_preprocess
    from diffsynth.video.preprocess import Options

    with plain_errors():
        options = Options(model=model, download=download, device=device, thresholds=thresholds)
        run_preprocess(
            PreprocessRequest(
                source=source, out=out, task=task.value, boxes=boxes, options=options, fps=fps,
                overwrite=overwrite,
            )
        )  # fmt: skip


@app.command()
def inspect(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per network.")] = False,
) -> None:
    """Say what checkpoints hold, by their headers alone: fast, and nothing is loaded."""
    from diffsynth.cli.inspect import run_inspect

    with plain_errors():
        run_inspect(paths, as_json)


@app.command(epilog="For example: diffsynth plan Wan2.1-T2V-14B --height 480 --width 832 --vram 12")
def plan(  # noqa: PLR0913
    paths: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Files, folders or patterns.", show_default=False)
    ],
    *,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="4 k + 1; default: the model's.")] = None,
    vram: Annotated[float | None, typer.Option(help="GiB of the GPU that may be used.")] = None,
    ram: Annotated[float | None, typer.Option(help="GiB of host memory that may be used.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of the weights.")] = DtypeName.bf16,
    num_persistent: Annotated[
        int | None, typer.Option(help="About so many parameters of each DiT stay; 0 streams all blocks.")
    ] = None,
    no_cfg: Annotated[bool, typer.Option("--no-cfg", help="Without guidance.")] = False,
    copy_gbs: Annotated[float | None, typer.Option(help="GB/s from pinned memory to the GPU; 25.")] = None,
    ring_gbs: Annotated[float | None, typer.Option(help="GB/s from the file to the GPU; 5.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s in bfloat16; 150.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a generation takes and how it is arranged within limits, by headers alone."""
    from diffsynth.cli.plan import USUAL, PlanRequest, run_plan
    from diffsynth.vram_management.plan import Rates

    told = {"copy_gbs": copy_gbs, "ring_gbs": ring_gbs, "tflops": tflops}
    with plain_errors():
        rates = Rates(**{name: rate for name, rate in told.items() if rate is not None})
        request = PlanRequest(
            height=USUAL if height is None else height, width=USUAL if width is None else width,
            num_frames=USUAL if num_frames is None else num_frames, num_branches=1 if no_cfg else 2,
            dtype=short_dtype(dtype.value), num_persistent=num_persistent, vram_gib=vram, ram_gib=ram,
            rates=rates,
        )  # fmt: skip
        run_plan(paths, request, as_json)


@app.command()
def schema(
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, with what each model reads.")
    ] = False,
) -> None:
    """List every argument of a generation: what it means, its default, and what reads it."""
    from diffsynth.cli.schema import run_schema

    with plain_errors():
        run_schema(as_json)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="For example: diffsynth train train/recipes/tiny_lora.yaml --run.steps 500",
)
def train(context: typer.Context) -> None:
    """Train a LoRA, or everything: CONFIG.yaml [--key.sub value ...]; --help lists every key."""
    from diffsynth.cli.train import run_train

    arguments = list(context.args)
    debug = "--debug" in arguments
    with plain_errors(debug):
        run_train([argument for argument in arguments if argument != "--debug"])


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what this machine has, what is missing, and how to mend it."""
    from diffsynth.cli.doctor import run_doctor

    with plain_errors():
        run_doctor(as_json)
