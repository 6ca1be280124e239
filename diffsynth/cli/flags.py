"""Flags of ``generate`` and ``decode``: those of arguments of ``pipe()``, and the command's own, a row each.

Nothing here imports torch, so that ``--help`` costs none.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from diffsynth.conditioning.argument import GROUPS, TILES, Argument, Kind
from diffsynth.pipelines.options import call_arguments

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
PrecisionName = Enum("PrecisionName", {"official": "official", "v1": "v1"}, type=str)

MODEL, MEMORY, FILE = "The model", "Memory and kernels", "The file"
# what typer reads where an argument is of this kind
KINDS: Mapping[Kind, Any] = {
    "text": str, "whole": int, "number": float, "numbers": float, "switch": bool, "pair": tuple[int, int],
    "path": Path, "picture": Path, "video": Path, "pictures": list[Path],
}  # fmt: skip


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
    argument: Argument | None = None  # of `pipe()`, that it gives
    official: tuple[str, ...] = ()  # flags of Wan's own generate.py that mean it

    @property
    def is_call(self) -> bool:
        """Whether `pipe()` has an argument of this name."""
        return self.argument is not None

    @property
    def all_spellings(self) -> tuple[str, ...]:
        """How it may be written; the first is how we write it."""
        return _spellings(self.name, self.spellings)


def flags_of(arguments: Mapping[str, Argument]) -> tuple[Flag, ...]:
    """Return the flags of these arguments of ``pipe()``, by group: of those that people see in one."""
    shown = [each for each in arguments.values() if each.group is not None and each.flags != ()]
    return tuple(_flag_of(each, arguments) for group in GROUPS for each in shown if each.group == group)


def _flag_of(each: Argument, arguments: Mapping[str, Argument]) -> Flag:
    assert each.group is not None

    def spelled(found: re.Match[str]) -> str:
        return _spellings(found[1], arguments[found[1]].flags)[0] if found[1] in arguments else found[0]

    is_list = each.kind == "pictures"
    return Flag(
        name=each.name, kind=_choice(each) if each.choices else KINDS[each.kind], panel=each.group,
        help=re.sub(r"`(\w+)`", spelled, each.help), spellings=each.flags or (),
        default=() if is_list else None, argument=each, official=each.official,
    )  # fmt: skip


def _choice(each: Argument) -> Any:
    return Enum(f"{each.name.title()}Name", {name: name for name in each.choices}, type=str)


def _spellings(name: str, told: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(told or ("--" + name.replace("_", "-"),))


OWN_FLAGS: tuple[Flag, ...] = (
    Flag(name="model", kind=list[str], panel=MODEL, default=(), official=("ckpt_dir",),
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
    Flag(name="out", kind=Path, panel=FILE, spellings=("--out", "-o"), official=("save_file",),
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
FLAGS = (*flags_of(call_arguments()), *OWN_FLAGS)

_SHARED = ("overwrite", "quality", "crf", "codec", "pix_fmt", "quiet", "debug")

DECODE_FLAGS: tuple[Flag, ...] = (
    Flag(name="vae", kind=str, panel=MODEL, help="File of the VAE; the one that the run had."),
    Flag(name="dtype", kind=DtypeName, panel=MODEL, help="Of its weights; as in the run."),
    Flag(name="device", kind=str, panel=MODEL, help="cuda, cuda:1, cpu; default: a GPU if there is one."),
    Flag(name="out", kind=Path, panel=FILE, spellings=("--out", "-o"),
         help="As of `generate`; default: the name that the run was given, beside the latents."),
    Flag(name="fps", kind=float, panel=FILE, help="Frames per second; as in the run, else 16."),
    *(flag for flag in FLAGS if flag.name in _SHARED or flag.panel == TILES),
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
        spellings = flag.all_spellings[0].split("/")
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
    default: Any = list(flag.default) if isinstance(flag.default, tuple) else flag.default
    option = typer.Option(
        default, *flag.all_spellings, help=flag.help, rich_help_panel=flag.panel, show_default=False,
        hidden=flag.is_hidden, metavar="HEIGHT WIDTH" if flag.kind == tuple[int, int] else None,
    )  # fmt: skip
    annotation = flag.kind if flag.default is not None else flag.kind | None
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)
