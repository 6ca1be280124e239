"""Decoding with the Wan2.1 VAE at its official size, against diffusers; and its memory by length.

    python benchmarks/vae.py  # 9 frames 480 x 832 in bf16, untiled
    python benchmarks/vae.py --size 3,15,26 --profile  # which operations take the time
    python benchmarks/vae.py --weights as-loaded,channels-last --input channels-last,plain
    python benchmarks/vae.py --exact  # also the errors of both to float32
    python benchmarks/vae.py --only memory  # peak memory of decode_stream with 3, 9 and 17 latents

Ours is measured once per combination of chunk, layout of the weights and layout of the input; the first is
what decode() does. The memory rows are fresh processes: growth of the peak (VmHWM) over what was there
before decoding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.allocations import top_operations
from benchmarks.common import Row, interleaved, memory_kib, parser, report, run_child, set_threads
from benchmarks.full_size import TOY_VAE, diffusers_twin
from diffsynth.models.wan.vae import WanVideoVAE

MEMORY_LATENTS = (3, 9, 17)


class PlainInput(WanVideoVAE):
    """Without channels-last: what activations cost in the layout of PyTorch's default."""

    def _ready(self, chunk: Tensor) -> Tensor:
        return chunk.to(self.conv1.weight.device, self.conv1.weight.dtype).contiguous()


def built(dtype: torch.dtype, is_toy: bool) -> tuple[WanVideoVAE, nn.Module]:
    """Ours and diffusers' on the same random weights."""
    torch.manual_seed(0)
    ours = WanVideoVAE.from_config(TOY_VAE if is_toy else {}).to(dtype).eval().requires_grad_(False)
    return ours, diffusers_twin(ours, "vae-toy" if is_toy else "vae")


def variant(ours: WanVideoVAE, weights: str, layout: str) -> WanVideoVAE:
    """The same weights, laid out otherwise."""
    made = (PlainInput if layout == "plain" else WanVideoVAE)(ours.config)
    made.load_state_dict(ours.state_dict(), assign=True)
    made = made.eval().requires_grad_(False)
    if weights == "channels-last":
        for parameter in made.parameters():
            kind = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.ndim)
            if kind is not None and parameter.shape[2:].numel() > 1:
                parameter.data = parameter.data.contiguous(memory_format=kind)
    return made


def decoders(
    ours: WanVideoVAE, latents: Tensor, given: argparse.Namespace
) -> dict[str, Callable[[], Tensor]]:
    """Ways of ours to decode."""
    works: dict[str, Callable[[], Tensor]] = {}
    for weights in given.weights.split(","):
        for layout in given.input.split(","):
            vae = variant(ours, weights, layout)
            for chunk in given.chunk_latents.split(","):
                count = latents.shape[2] if chunk == "all" else int(chunk)
                name = f"chunks of {chunk}, weights {weights}, input {layout}"
                works[name] = lambda v=vae, c=count: v.decode(
                    latents, normalise=False, chunk_latents=c
                ).clamp_(-1, 1)
    return works


def decoded_by_peer(peer: nn.Module, latents: Tensor) -> Tensor:
    return peer.decode(latents, return_dict=False)[0].float()  # type: ignore[no-any-return, operator]


def deviation(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference, of pixels in [-1, 1]."""
    return float((a - b).square().mean().sqrt())


def decode_rows(given: argparse.Namespace) -> list[Row]:
    dtype = getattr(torch, given.dtype)
    ours, peer = built(dtype, given.toy)
    latents = torch.randn(1, 16, *map(int, given.size.split(",")))
    works: dict[str, Callable[[], Tensor]] = decoders(ours, latents, given)
    works["diffusers"] = partial(decoded_by_peer, peer, latents.to(dtype))
    if given.profile:
        for name in (next(iter(works)), "diffusers"):
            works[name]()
            print(f"{name}\n{top_operations(works[name])}")
        return []
    outputs = {name: work() for name, work in works.items()}
    spent = interleaved(works, repeats=given.repeats, warmup=0)  # the outputs above were the warm-up
    frames, height, width = outputs["diffusers"].shape[2:]
    label = f"VAE decode {frames} frames {height} x {width} {given.dtype}"
    exact = peer.float().decode(latents, return_dict=False)[0] if given.exact else None

    def notes(name: str) -> str:
        text = f"pixels differ by {deviation(outputs[name], outputs['diffusers']):.1e}"
        if exact is None:
            return text
        errors = [deviation(outputs[one], exact) for one in (name, "diffusers")]
        return f"{text}; from float32: ours {errors[0]:.1e}, peer {errors[1]:.1e}"

    return [
        Row(
            figure=f"{label}: {name}",
            unit="s",
            ours=spent[name],
            peer_name="diffusers",
            peer=spent["diffusers"],
            goal=">= 1.3",
            notes=notes(name),
        )
        for name in works
        if name != "diffusers"
    ]


def child(side: str, count: int, given: argparse.Namespace) -> None:
    """Decode ``count`` latents and tell how much the peak grew; frames are dropped as they come."""
    dtype = getattr(torch, given.dtype)
    ours, peer = built(dtype, given.toy)
    latents = torch.randn(1, 16, count, *map(int, given.memory_size.split(",")))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of building
    before = memory_kib("VmHWM")
    if side == "ours":
        for frames in ours.decode_stream(latents, normalise=False):
            del frames
    else:
        peer.decode(latents.to(dtype))
    print(json.dumps({"mib": (memory_kib("VmHWM") - before) / 1024}))


def memory_rows(given: argparse.Namespace) -> list[Row]:
    rows = []
    for count in MEMORY_LATENTS:
        values: dict[str, list[float]] = {"ours": [], "diffusers": []}
        for _ in range(min(3, given.repeats)):
            for side, found in values.items():
                words = (
                    f"--child {side} --count {count} --memory-size {given.memory_size} --dtype {given.dtype}"
                )
                words += "" if given.threads is None else f" --threads {given.threads}"
                words += " --toy" if given.toy else ""
                found.append(run_child("vae.py", *words.split())["mib"])
        rows.append(
            Row(
                figure=f"VAE decode, peak growth, {count} latents of {given.memory_size} {given.dtype}",
                unit="MiB",
                ours=values["ours"],
                peer_name="diffusers decode",
                peer=values["diffusers"],
                goal="equal for 3, 9 and 17 latents",
            )
        )
    return rows


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--size", default="3,60,104", help="latent frames, height, width")
    arguments.add_argument(
        "--memory-size", default="20,32", help="latent height and width of the memory rows"
    )
    arguments.add_argument("--dtype", default="bfloat16")
    arguments.add_argument("--chunk-latents", default="1,2,all")
    arguments.add_argument(
        "--weights", default="as-loaded", help="as-loaded, channels-last, or both with a comma"
    )
    arguments.add_argument(
        "--input", default="channels-last", help="channels-last, plain, or both with a comma"
    )
    arguments.add_argument("--exact", action="store_true", help="compare with float32 too")
    arguments.add_argument("--toy", action="store_true", help="16 channels instead of 96")
    arguments.add_argument(
        "--profile", action="store_true", help="print operations of one decode of each and stop"
    )
    arguments.add_argument("--only", choices=("time", "memory"))
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    arguments.add_argument("--count", type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    with torch.no_grad():
        if given.child:
            child(given.child, given.count, given)
            return
        rows = decode_rows(given) if given.only != "memory" else []
        if given.only != "time" and not given.profile:
            rows += memory_rows(given)
    if rows:
        report("vae", rows, given.out, threads)


if __name__ == "__main__":
    main()
