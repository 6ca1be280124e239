"""``diffsynth lora``: look into LoRA files, translate, merge and extract them."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffsynth.cli.ending import plain_errors
from diffsynth.errors import ArgumentError, LoRAError

if TYPE_CHECKING:
    from diffsynth.checkpoints.architecture import Match
    from diffsynth.lora.formats import LoRA

logger = logging.getLogger("diffsynth")

Dialect = Literal["comfy", "kohya", "diffusers", "peft"]
app = typer.Typer(
    name="lora",
    help="LoRA files: what is inside, other dialects, merging and extracting.",
    no_args_is_help=True,
)
_Out = Annotated[
    Path, typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False)
]
_Svd = Annotated[
    int | None, typer.Option(help="Turn LoHa, LoKr and whole differences into A and B of this rank.")
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]
_Network = Annotated[str | None, typer.Option(help="Of a file for two experts: high or low.")]


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="LoRA files.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per LoRA.")] = False,
) -> None:
    """Say what LoRA files hold: dialect, ranks, alphas, layers, and what is no part of a LoRA."""
    with plain_errors():
        found = [_told(lora) for path in paths for lora in _open(path, None)]
        typer.echo(json.dumps(found, indent=1) if as_json else "\n\n".join(map(_text, found)))


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="A LoRA of any dialect.", show_default=False)],
    out: _Out,
    to: Annotated[Dialect, typer.Option("--to", help="The dialect to write.")] = "comfy",
    svd: _Svd = None,
    network: _Network = None,
    overwrite: _Overwrite = False,
) -> None:
    """Write a LoRA in another dialect; what that cannot name is an error that lists it."""
    with plain_errors():
        from diffsynth.lora.dialects import to_low_rank, write_loras

        if svd is not None and svd < 1:
            raise ArgumentError(f"--svd is {svd}; give a rank of 1 or more (32 is usual).")
        with _written(out, [path], overwrite=overwrite) as write:
            loras = _open(path, network)
            _refuse_unread(loras)
            told = loras if svd is None else [to_low_rank(lora, svd) for lora in loras]
            made = write(lambda place: write_loras(place, told, to))
        typer.echo(
            f"{made}: {sum(len(lora.layers) for lora in loras)} layers, from {loras[0].dialect} to {to}"
        )


@app.command()
def merge(
    base: Annotated[list[Path], typer.Argument(help="A DiT: file, folder or shards.", show_default=False)],
    out: _Out,
    lora: Annotated[
        list[Path], typer.Option("--lora", help="A LoRA; may be given again.", show_default=False)
    ],
    weight: Annotated[
        list[float] | None, typer.Option("--weight", help="Strength of each LoRA, in the same order; 1.")
    ] = None,
    network: _Network = None,
    overwrite: _Overwrite = False,
) -> None:
    """Write a checkpoint with LoRAs fused into it. Weights kept in fp8 are written as bfloat16."""
    with plain_errors():
        from diffsynth.lora.merging import merge as merge_into
        from diffsynth.models.lora_experts import number
        from diffsynth.video.paths import told_size

        weights = weight or [1.0] * len(lora)
        if len(weights) != len(lora):
            raise ArgumentError(f"--weight was given {len(weights)} times for {len(lora)} LoRAs.")
        for one_weight in weights:
            number(one_weight, "--weight")
        missing: dict[str, tuple[str, ...]] = {}
        with _written(out, [*base, *lora], overwrite=overwrite) as write:
            pairs = [(one, w) for path, w in zip(lora, weights, strict=True) for one in _open(path, network)]
            if len(pairs) != len(lora):
                raise LoRAError(
                    "One of the files holds LoRAs of both experts; choose one: --network high or low."
                )
            matches = _dit(base)
            made = write(lambda place: missing.update(merge_into(matches, pairs, place)))
        for why, keys in missing.items():
            typer.echo(f"warning: {len(keys)} keys are {why} ({keys[0]} ...)", err=True)
        typer.echo(f"{made}: {told_size(made.stat().st_size)}")


@app.command()
def extract(
    tuned: Annotated[Path, typer.Argument(help="A fine-tuned DiT.", show_default=False)],
    base: Annotated[Path, typer.Argument(help="The DiT that it was made from.", show_default=False)],
    out: _Out,
    rank: Annotated[int, typer.Option(help="Of the factors; 4 to 128 are usual.")] = 32,
    to: Annotated[Dialect, typer.Option("--to", help="The dialect to write.")] = "comfy",
    overwrite: _Overwrite = False,
) -> None:
    """Take a LoRA from the difference of two checkpoints, by SVD."""
    with plain_errors():
        from diffsynth.lora.dialects import write_loras
        from diffsynth.lora.merging import extract as extract_from
        from diffsynth.video.paths import told_size

        if rank < 1:
            raise ArgumentError(f"--rank is {rank}; give 1 or more (32 is usual).")
        with _written(out, [tuned, base], overwrite=overwrite) as write:
            found = extract_from(_dit([tuned])[0].checkpoint, _dit([base])[0].checkpoint, rank)
            made = write(lambda place: write_loras(place, [found], to))
        size = told_size(made.stat().st_size)
        typer.echo(f"{made}: {len(found.layers)} layers, rank {rank}, {size}")


@contextmanager
def _written(
    out: Path, inputs: Sequence[Path], *, overwrite: bool
) -> Iterator[Callable[[Callable[[Path], object]], Path]]:
    """Check and claim a name; what is given is called with a function that writes, and returns the path."""
    from diffsynth.cli.naming import Names, naming_of, reserved
    from diffsynth.cli.output import as_spelled
    from diffsynth.video.paths import write_whole

    names = Names(out=out, naming=naming_of(is_named=True, overwrite=overwrite), inputs=inputs)
    with reserved(names, (".safetensors",)) as found:
        (path,) = found.paths
        target = Path(os.path.realpath(path.expanduser()))
        yield lambda write: as_spelled(path, write_whole(target, write, overwrite=found.overwrites))


def _open(path: Path, network: str | None) -> list[LoRA]:
    from diffsynth.lora.formats import open_loras

    if network not in (None, "high", "low"):
        raise ArgumentError(f"--network is {network!r}; give high or low.")
    loras = open_loras(path)
    chosen = [lora for lora in loras if network in (None, lora.role)]
    if not chosen:
        role = loras[0].role
        what = "no word of an expert in its name or keys" if role is None else f"for {role} noise"
        raise ArgumentError(f"--network {network}: {path} is one LoRA, {what}; leave --network out.")
    return chosen


def _refuse_unread(loras: Sequence[LoRA]) -> None:
    for lora in loras:
        for why, keys in lora.unread.items():
            raise LoRAError(
                f"{lora.source}: {len(keys)} keys cannot be converted, they are {why}: {', '.join(keys[:4])}"
                f"{' ...' if keys[4:] else ''}."
            )


def _dit(paths: Sequence[Path]) -> list[Match]:
    from diffsynth.checkpoints.checkpoint import Checkpoint
    from diffsynth.checkpoints.detect import detect
    from diffsynth.models.registry import ARCHITECTURES

    given: Any = paths[0] if len(paths) == 1 else list(paths)
    matches = detect(Checkpoint.open(given), ARCHITECTURES)
    for match in matches:
        match.require_config()
    return matches


def _told(lora: LoRA) -> dict[str, Any]:
    from diffsynth.lora.changes import rank_of

    changes = [layer.weight for layer in lora.layers.values() if layer.weight is not None]
    scales = Counter(f"{getattr(change, 'scale', 1.0):g}" for change in changes)
    return {
        "file": lora.source, "dialect": lora.dialect, "expert": lora.role, "keys": lora.num_keys,
        "layers": len(lora.layers), "kinds": dict(Counter(map(rank_of, changes))),
        "scales": dict(scales), "biases": sum(layer.bias is not None for layer in lora.layers.values()),
        "unread": {why: list(keys) for why, keys in lora.unread.items()},
        "metadata": dict(lora.metadata),
    }  # fmt: skip


def _text(told: dict[str, Any]) -> str:
    def counted(counts: dict[str, int]) -> str:
        return ", ".join(f"{kind} x {count}" for kind, count in counts.items()) or "none"

    lines = [
        f"{told['file']}",
        f"  dialect  {told['dialect']}"
        + (f", for the {told['expert']}-noise expert" if told["expert"] else ""),
        f"  layers   {told['layers']}, of {told['keys']} keys",
        f"  kinds    {counted(told['kinds'])}; biases {told['biases']}",
        f"  alpha/r  {counted(told['scales'])}",
    ]
    lines += [
        f"  unread   {len(keys)} keys, {why}: {', '.join(keys[:4])}" for why, keys in told["unread"].items()
    ]
    lines += [f"  {name} = {value[:100]}" for name, value in list(told["metadata"].items())[:12]]
    return "\n".join(lines)
