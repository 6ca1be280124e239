"""A DiT step with its blocks streamed by a real worker thread, against the same step with all of them there.

    python benchmarks/streaming.py

The CPU plays the device: one thread computes, another carries the next block's bytes. What cannot hide is
the memory bandwidth that both share; on a GPU the copy engine has its own way in. Random blocks of the 1.3B
model's sizes, few of them; two sides of guidance.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import Row, interleaved, milliseconds, parser, report, set_threads
from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.wan.dit import WanDiT
from diffsynth.vram_management.streaming import BlockStream, Host
from diffsynth.vram_management.visit import in_order

SIZES = {"dim": 1536, "in_dim": 16, "out_dim": 16, "ffn_dim": 8960, "num_heads": 12, "text_dim": 4096}


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--blocks", type=int, default=6)
    arguments.add_argument("--dim", type=int, default=SIZES["dim"])
    arguments.add_argument("--frames", type=int, default=3, help="latent frames of 30 x 52 positions")
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    torch.manual_seed(0)
    sizes = {**SIZES, "dim": given.dim, "num_layers": given.blocks}
    dit = WanDiT.from_config(sizes).to(torch.bfloat16).eval().requires_grad_(False)
    latents = torch.randn(1, 16, given.frames, 60, 104)
    sides = [dit.prepare(Conditions(text=torch.randn(1, 20, 4096))) for _ in range(2)]

    def step() -> list[Tensor]:
        with torch.no_grad():
            return dit(latents, torch.tensor([500.0]), sides)

    tokens = given.frames * 30 * 52
    rows = []
    for host in ("pageable", "ring"):
        rows.append(compared(dit, step, host, given.repeats, f"{given.blocks} blocks, {tokens} tokens, bf16"))
    report("streaming", rows, given.out, threads)


def compared(dit: WanDiT, step: object, host: Host, repeats: int, notes: str) -> Row:
    """Streamed against all there, in turns."""
    stream = BlockStream(list(dit.blocks), device=torch.device("cpu"), host=host)

    def streamed() -> object:
        dit.visit = stream
        return step()  # type: ignore[operator]

    def plain() -> object:
        dit.visit = in_order
        return step()  # type: ignore[operator]

    seconds = interleaved({"plain": plain, "streamed": streamed}, repeats=repeats)
    before = stream.counts.bytes
    streamed()
    travelled = stream.counts.bytes - before
    stream.close()
    dit.visit = in_order
    return Row(
        figure=f"DiT step, every block streamed from {host} memory, CPU as the device",
        unit="ms",
        ours=milliseconds(seconds["streamed"]),
        peer_name="all blocks there",
        peer=milliseconds(seconds["plain"]),
        goal="ratio >= 0.97",
        notes=notes,
        extra={"bytes_per_step": travelled},
    )


if __name__ == "__main__":
    main()
