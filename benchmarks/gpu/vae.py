"""Decoding a video on a GPU: ours, chunk by chunk, against DiffSynth's default tiles and diffusers.

    python -m benchmarks.gpu.vae            # 480 x 832, 81 frames, bf16
    python -m benchmarks.gpu.vae --sizes 480P,720P
    python -m benchmarks.gpu.vae --toy      # seconds on a CPU

All on the same random weights. Ours is timed until the last frame lies in host memory as 8-bit pixels; the
baseline ends with its blended video on the CPU; diffusers with its video on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import GB, Row
from benchmarks.full_size import TOY_VAE
from benchmarks.gpu.diffsynth_vae import TiledDecoder
from benchmarks.gpu.diffusers_peers import diffusers_vae
from benchmarks.gpu.shared import (
    SIZES,
    Measured,
    Recorder,
    VideoSize,
    fill_randomly,
    measured,
    parser,
    recorder,
)
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.vram_management.plan import layers_of_module, plan_memory

TOY_TILES = {"tile_size": (6, 6), "tile_stride": (3, 3)}


def random_vae(device: torch.device, *, is_toy: bool, dtype: torch.dtype = torch.bfloat16) -> WanVideoVAE:
    """A VAE with random weights, made on the device."""
    with torch.device("meta"):
        vae = WanVideoVAE.from_config(TOY_VAE if is_toy else {}).to(dtype)
    vae = vae.to_empty(device=device).eval().requires_grad_(False)
    fill_randomly(vae, device)
    return vae


def decode_to_bytes(vae: WanVideoVAE, latents: Tensor) -> list[Tensor]:
    """All frames as 8-bit pixels in host memory; the device holds one chunk at a time."""
    frames = []
    for chunk in vae.decode_stream(latents):
        pixels = chunk.clamp_(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
        frames.append(pixels.to("cpu"))
    return frames


def decoders(
    vae: WanVideoVAE, latents: Tensor, *, is_toy: bool
) -> dict[str, Callable[[], Callable[[], object]]]:
    """The peers; each is built when its turn comes."""

    def tiled() -> Callable[[], object]:
        return partial(TiledDecoder(vae, **(TOY_TILES if is_toy else {})), latents)

    def whole() -> Callable[[], object]:
        return partial(TiledDecoder(vae).decode, latents)

    def diffusers() -> Callable[[], object]:
        peer = diffusers_vae(vae)
        given = latents.to(vae.conv2.weight.dtype)
        return lambda: peer.decode(given, return_dict=False)[0]

    return {"DiffSynth's way, tiled": tiled, "DiffSynth's way, untiled": whole, "diffusers": diffusers}


def run_size(vae: WanVideoVAE, size: VideoSize, out: Recorder, repeats: int, *, is_toy: bool) -> None:
    shape = ((size.num_frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    generator = torch.Generator(out.device).manual_seed(1)
    latents = torch.randn(1, 16, *shape, device=out.device, generator=generator)
    figure = f"VAE decode {size.name} {size.num_frames} frames bf16"
    ours = measured(partial(decode_to_bytes, vae, latents), out.device, repeats=repeats)
    add_peak(vae, size, out, f"{figure}, peak", ours)
    for name, build in decoders(vae, latents, is_toy=is_toy).items():
        row = f"{figure}, against {name}"
        peer = out.attempt(row, lambda b=build: measured(b(), out.device, repeats=max(1, repeats - 1)))
        if peer is not None:
            out.add(
                Row(
                    figure=row, unit="s", ours=ours.seconds, peer_name=name, peer=peer.seconds,
                    goal=">= 4" if name == "DiffSynth's way, tiled" else "",
                    notes=f"peak {ours.peak_gb:.2f} against {peer.peak_gb:.2f} GB",
                )
            )  # fmt: skip


def add_peak(vae: WanVideoVAE, size: VideoSize, out: Recorder, figure: str, ours: Measured) -> None:
    plan = plan_memory(
        layers_of_module("vae", vae), dit=None, height=size.height, width=size.width,
        num_frames=size.num_frames, device=out.device.type,
    )  # fmt: skip
    out.add(
        Row(
            figure=figure, unit="GB", ours=[ours.peak_gb], peer_name="plan_memory",
            peer=[plan.peak_bytes / GB], goal="<= 4 GB",
            notes="the plan counts a video that gathers on the device",
        )
    )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", default="480P", help=f"with commas: {', '.join(SIZES)}")
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    names = ["toy"] if given.toy else given.sizes.split(",")
    if unknown := set(names) - set(SIZES):
        arguments.error(f"--sizes: {', '.join(sorted(unknown))} is unknown; known: {', '.join(SIZES)}.")
    out = recorder("vae", given, words)
    with torch.no_grad():
        vae = random_vae(out.device, is_toy=given.toy)
        for name in names:
            work = partial(run_size, vae, SIZES[name], out, given.repeats, is_toy=given.toy)
            out.attempt(f"VAE decode {name}", work)


if __name__ == "__main__":
    main()
