"""Flags of ``generate`` and ``decode``: one row each, named as the argument of ``pipe()`` that it gives.

Nothing here imports torch, so that ``--help`` costs none; a test keeps the table equal to the arguments of
``pipe()``.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any

import typer

SamplerName = Enum("SamplerName", {"euler": "euler", "unipc": "unipc", "dpmpp": "dpm++"}, type=str)
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
DtypeName = Enum(  # every spelling of --dtype
    "DtypeName",
    {
        "bfloat16": "bfloat16", "bf16": "bf16", "float16": "float16", "fp16": "fp16", "float32": "float32",
        "fp32": "fp32", "fp8": "fp8",
    },
    type=str,
)  # fmt: skip
Fp8ComputeName = Enum("Fp8ComputeName", {"widened": "widened", "fp8": "fp8"}, type=str)
FitName = Enum("FitName", {"trim": "trim", "hold": "hold"}, type=str)
ResizeName = Enum("ResizeName", {"cover": "cover", "stretch": "stretch", "contain": "contain"}, type=str)
PrecisionName = Enum("PrecisionName", {"official": "official", "v1": "v1"}, type=str)

VIDEO, GUIDANCE, SOURCE = "The video", "Steps and guidance", "Start from a video"
TILES, MODEL, MEMORY, FILE = "VAE in tiles", "The model", "Memory and kernels", "The file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag. Without a value it is left to the model, or to the function that reads it."""

    name: str  # of the argument that receives it
    kind: Any  # type, as typer reads it
    help: str
    panel: str
    spellings: tuple[str, ...] = ()  # default: --the-name
    default: object = None
    is_hidden: bool = False  # from --help

    @property
    def is_call(self) -> bool:
        """Whether `pipe()` has an argument of this name."""
        return self.panel in (VIDEO, GUIDANCE, SOURCE, TILES)


FLAGS: tuple[Flag, ...] = (
    Flag(name="negative_prompt", kind=str, panel=VIDEO, help="What to keep away from."),
    Flag(name="height", kind=int, panel=VIDEO, help="Pixels, a multiple of 16; Wan2.1: 480."),
    Flag(name="width", kind=int, panel=VIDEO, help="Pixels, a multiple of 16; Wan2.1: 832."),
    Flag(name="num_frames", kind=int, panel=VIDEO, help="4 k + 1; Wan2.1: 81. 1 makes a picture."),
    Flag(name="num_videos_per_prompt", kind=int, panel=VIDEO,
         help="How many, numbered NAME-1, NAME-2 ...; each with a seed one higher."),
    Flag(name="seed", kind=int, panel=VIDEO, help="One number, one video; drawn if not given."),
    Flag(name="strict", kind=bool, panel=VIDEO, default=False, spellings=("--strict",),
         help="Refuse sizes that do not fit the model instead of taking the next that do."),
    Flag(name="cache_text", kind=Path, panel=VIDEO,
         help="Folder of encoded prompts: each is encoded once; later runs leave the text encoder out."),
    Flag(name="preset", kind=str, panel=GUIDANCE,
         help="Settings of a step-distilled model or LoRA: lightx2v-4step. Flags given beside it win."),
    Flag(name="num_inference_steps", kind=int, panel=GUIDANCE, spellings=("--num-inference-steps", "--steps"),
         help="Calls of the model; Wan2.1: 50."),
    Flag(name="cfg_scale", kind=float, panel=GUIDANCE,
         help="How strongly the prompt pulls; Wan2.1: 5. 1 is no guidance, in half the time."),
    Flag(name="cfg_scale_low_noise", kind=float, panel=GUIDANCE,
         help="The same for the low-noise expert of a model that has two."),
    Flag(name="sampler", kind=SamplerName, panel=GUIDANCE, help="How noise becomes video."),
    Flag(name="sigma_shift", kind=float, panel=GUIDANCE,
         help="How far noise levels lean to the noisy end: 1 is even, 3 to 12 are usual."),
    Flag(name="switch_DiT_boundary", kind=float, panel=GUIDANCE, spellings=("--switch-dit-boundary",),
         help="Noise level, 0 to 1, where the low-noise expert takes over."),
    Flag(name="single_expert", kind=bool, panel=GUIDANCE, spellings=("--single-expert",),
         help="Let one expert of a pair take every step, where the other is not in --model."),
    Flag(name="input_video", kind=Path, panel=SOURCE, spellings=("--input-video", "--init_video"),
         help="A video, or a folder of pictures."),
    Flag(name="denoising_strength", kind=float, panel=SOURCE,
         spellings=("--denoising-strength", "--denoising_strength"),
         help="Share of noise laid over --input-video: 0.7 keeps the layout, 1 ignores it."),
    Flag(name="input_image", kind=Path, panel=SOURCE, help="The first frame, of an image-to-video model."),
    Flag(name="end_image", kind=Path, panel=SOURCE, help="The last frame, of an FLF2V or InP model."),
    Flag(name="resize", kind=ResizeName, panel=SOURCE,
         help="How pictures are brought to size: cover crops, stretch distorts, contain sets bars."),
    Flag(name="max_area", kind=int, panel=SOURCE,
         help="Pixels: height and width follow --input-image's proportions; 480 * 832 = 399360."),
    Flag(name="control_video", kind=Path, panel=SOURCE,
         help="Edges, poses or depth to follow, of a Fun Control model: a video, or a folder of pictures."),
    Flag(name="fit", kind=FitName, panel=SOURCE,
         help="Of a video that is not --num-frames long: trim a longer, hold a shorter one's last frame."),
    Flag(name="reference_image", kind=Path, panel=SOURCE,
         help="What the video shows, of a Fun V1.1 Control model."),
    Flag(name="camera_control_direction", kind=str, panel=SOURCE,
         help="Of a Fun Control-Camera model: Left, Right, Up, Down, In, Out, or joined, such as LeftUp."),
    Flag(name="camera_control_speed", kind=float, panel=SOURCE,
         help="How far the camera goes from one frame to the next; 1/54 = 0.0185."),
    Flag(name="motion_bucket_id", kind=float, panel=SOURCE,
         help="Of the speed-control model: 0 (slow) to 100 (fast)."),
    Flag(name="vace_video", kind=Path, panel=SOURCE,
         help="What is known, of a VACE model, grey where something shall be made: a video, or a folder."),
    Flag(name="vace_video_mask", kind=Path, panel=SOURCE,
         help="Of --vace-video: white is made anew, black is kept; a video, or a folder of pictures."),
    Flag(name="vace_reference_image", kind=list[Path], panel=SOURCE, default=(),
         help="What or who shall appear, of a VACE model; several times for several pictures."),
    Flag(name="vace_scale", kind=float, panel=SOURCE,
         help="How strongly the VACE inputs count: 0 to 2; 1 is usual."),
    Flag(name="tiled", kind=bool, panel=TILES, spellings=("--tiled/--no-tiled",),
         help="Code pictures in tiles, which saves memory; default: where the whole does not fit."),
    Flag(name="tile_size", kind=tuple[int, int], panel=TILES, help="Height and width, 8 pixels each; 30 52."),
    Flag(name="tile_stride", kind=tuple[int, int], panel=TILES, help="From one tile to the next; 15 26."),
    Flag(name="model", kind=list[str], panel=MODEL, default=(),
         help="Folder or file, several times for several files, or a hub id with --download. "
              "Default: the tiny Wan that ships with diffsynth."),
    Flag(name="dit", kind=list[str], panel=MODEL, default=(),
         help="Which of several DiTs in --model, by file; twice for a high- and a low-noise expert."),
    Flag(name="lora", kind=list[str], panel=MODEL, default=(),
         help="A LoRA's file of any dialect, several times for several; FILE:0.8 has that strength, else 1."),
    Flag(name="tokenizer_path", kind=Path, panel=MODEL,
         help="Folder of spiece.model or tokenizer.json, where it does not lie beside the text encoder."),
    Flag(name="download", kind=bool, panel=MODEL, default=False, spellings=("--download",),
         help="Let a hub id be downloaded into ./models; without it nothing uses the network."),
    Flag(name="dtype", kind=DtypeName, panel=MODEL,
         help="Of the weights; bfloat16, the tiny Wan float32. fp8 takes half the memory of bfloat16."),
    Flag(name="device", kind=str, panel=MODEL,
         help="cuda, cuda:1, cpu; default: a GPU if there is one, for the tiny Wan the CPU."),
    Flag(name="vram", kind=str, panel=MEMORY,
         help="GiB of the GPU to stay within, or auto: what is free. Blocks that do not fit are streamed."),
    Flag(name="ram", kind=float, panel=MEMORY,
         help="GiB of host memory for resting weights; beyond it blocks are read from their file."),
    Flag(name="num_persistent", kind=int, panel=MEMORY,
         help="About so many parameters of each DiT stay on the GPU; 0 streams every block."),
    Flag(name="attention", kind=str, panel=MEMORY,
         help="Name of the attention kernel; `diffsynth doctor` lists them."),
    Flag(name="fp8_compute", kind=Fp8ComputeName, panel=MEMORY,
         help="Of --dtype fp8: widened to bfloat16, or multiplied as fp8 where the GPU can."),
    Flag(name="precision", kind=PrecisionName, panel=MODEL,
         help="v1 repeats the arithmetic of DiffSynth-Studio 1.x, for old seeds."),
    Flag(name="out", kind=Path, panel=FILE, spellings=("--out", "-o"),
         help=".mp4, .mkv, .mov, .webm or .gif; .png or .jpg for one picture. Default: video.mp4."),
    Flag(name="overwrite", kind=bool, panel=FILE, default=False, spellings=("--overwrite",),
         help="Replace a file that has this name; without --out, the default name gets the next number."),
    Flag(name="fps", kind=float, panel=FILE, help="Frames per second; the model's own, mostly 16."),
    Flag(name="quality", kind=float, panel=FILE, help="1 (smallest file) to 10 (best); 9."),
    Flag(name="crf", kind=float, panel=FILE, help="The codec's own measure instead: 0 is best."),
    Flag(name="codec", kind=str, panel=FILE, help="h264, h265, vp9, av1 or ffmpeg's name of an encoder."),
    Flag(name="pix_fmt", kind=str, panel=FILE, help="yuv420p shows everywhere; yuv444p keeps full colour."),
    Flag(name="keep_latents", kind=bool, panel=FILE, default=False, spellings=("--keep-latents",),
         help="Keep NAME.ID.latents.safetensors, from which `diffsynth decode` makes the video again."),
    Flag(name="save_every", kind=int, panel=FILE,
         help="Save after so many steps, from which `--resume` goes on; 0: never. Default: each minute."),
    Flag(name="resume", kind=Path, panel=FILE,
         help="NAME.ID.steps.safetensors: go on with a run that died, as it was; needs nothing else."),
    Flag(name="preview", kind=bool, panel=FILE, default=False, spellings=("--preview",),
         help="Half the width and height, few steps, 4 seeds (--num-videos-per-prompt) and one sheet of them "
              "all; `diffsynth refine` goes on from the best."),
    Flag(name="quiet", kind=bool, panel=FILE, default=False, spellings=("--quiet", "-q"),
         help="No progress, only warnings."),
    Flag(name="debug", kind=bool, panel=FILE, default=False, spellings=("--debug",),
         help="Show where an error came from."),
)  # fmt: skip

_SHARED = (
    "overwrite", "tiled", "tile_size", "tile_stride", "quality", "crf", "codec", "pix_fmt", "quiet", "debug",
)  # fmt: skip

DECODE_FLAGS: tuple[Flag, ...] = (
    Flag(name="vae", kind=str, panel=MODEL, help="File of the VAE; the one that the run had."),
    Flag(name="dtype", kind=DtypeName, panel=MODEL, help="Of its weights; as in the run."),
    Flag(name="device", kind=str, panel=MODEL, help="cuda, cuda:1, cpu; default: a GPU if there is one."),
    Flag(name="out", kind=Path, panel=FILE, spellings=("--out", "-o"),
         help="As of `generate`; default: the name that the run was given, beside the latents."),
    Flag(name="fps", kind=float, panel=FILE, help="Frames per second; as in the run, else 16."),
    *(flag for flag in FLAGS if flag.name in _SHARED),
)  # fmt: skip


def command_line(words: Sequence[str], values: Mapping[str, Any], flags: Sequence[Flag]) -> str:
    """Return a line for a shell: ``words``, and each flag whose value is not its default.

    Args:
        words: the command, and what stands in front of the flags.
        values: of the flags, by name; those that are missing are left out.
        flags: in the order of the line.
    """
    line = [*words]
    for flag in flags:
        value = values.get(flag.name)
        if value is None or value == flag.default or value in ([], ()):
            continue
        spellings = (flag.spellings or ("--" + flag.name.replace("_", "-"),))[0].split("/")
        if isinstance(value, bool):
            line.append(spellings[0 if value else -1])
        elif isinstance(value, tuple):
            line += [spellings[0], *map(str, value)]
        else:
            for one in value if isinstance(value, list) else [value]:
                line += [spellings[0], str(getattr(one, "source", one))]
    return shlex.join(line)


def short_dtype(name: str) -> str:
    """Return bf16, fp16, fp32 or fp8 for any spelling of a dtype."""
    return next((short for short, long in TORCH_NAMES.items() if name == long), name)


def with_flags(flags: Sequence[Flag]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these flags behind its own first argument; it receives them by keyword."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = next(iter(inspect.signature(command, eval_str=True).parameters.values()))
        parameters = [own, *(_parameter(flag) for flag in flags)]

        @wraps(command)
        def called(**given: object) -> None:
            command(**given)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del called.__wrapped__  # type: ignore[attr-defined]
        return called

    return decorate


def _parameter(flag: Flag) -> inspect.Parameter:
    spellings = flag.spellings or ("--" + flag.name.replace("_", "-"),)
    default: Any = list(flag.default) if isinstance(flag.default, tuple) else flag.default
    option = typer.Option(
        default, *spellings, help=flag.help, rich_help_panel=flag.panel, show_default=False,
        hidden=flag.is_hidden, metavar="HEIGHT WIDTH" if flag.kind == tuple[int, int] else None,
    )  # fmt: skip
    annotation = flag.kind if flag.default is not None else flag.kind | None
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)
