"""One call of the DiT with the sizes of Wan2.1-T2V-1.3B and fewer blocks, against diffusers.

    python benchmarks/dit_step.py              # 4 blocks, latents 5 x 40 x 40 (2000 tokens), bf16 and fp32
    python benchmarks/dit_step.py --toy        # seconds
    python benchmarks/dit_step.py --profile    # which operations take the time

Both have the same weights. As in a generation: ours embeds the text and projects the keys of the
cross-attention once (reported apart), diffusers does its whole forward each time, and calls the network once
per side of the guidance. diffusers keeps time embedding, norms and modulation in float32, as its
from_pretrained does.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.allocations import peak_bytes, top_operations
from benchmarks.common import Row, interleaved, parser, report, set_threads
from benchmarks.full_size import DIT_1_3B, TOY_DIT, diffusers_twin
from diffsynth.conditioning.conditions import Conditions
from diffsynth.models.wan.dit import Branch, WanDiT

TIMESTEP = 875.0
WIDE = (torch.float64, torch.complex128)


class Pair:
    """Ours and the peer on the same weights, and one call's inputs."""

    def __init__(
        self, dtype: torch.dtype, *, is_toy: bool, num_layers: int, grid: Sequence[int], real_tokens: int
    ) -> None:
        config = {**(TOY_DIT if is_toy else DIT_1_3B), "num_layers": num_layers}
        torch.manual_seed(0)
        self.ours = WanDiT.from_config(config).to(dtype).eval().requires_grad_(False)
        sizes = {
            "num_attention_heads": config["num_heads"],
            "attention_head_dim": config["dim"] // config["num_heads"],
            "ffn_dim": config["ffn_dim"],
            "text_dim": config["text_dim"],
            "num_layers": num_layers,
        }
        self.peer = diffusers_twin(self.ours, "dit-1.3b", sizes)
        self.dtype = dtype
        self.latents = torch.randn(1, 16, *grid)
        self.texts = [self._text(real_tokens, config["text_dim"]) for _ in range(2)]
        self.branches = self.prepared()

    def _text(self, real_tokens: int, width: int) -> Tensor:
        text = torch.zeros(1, 512, width)
        text[:, :real_tokens] = torch.randn(1, real_tokens, width)
        return text.to(self.dtype)

    def prepared(self) -> list[Branch]:
        """Both sides of the guidance with their keys, which a generation computes once."""
        branches = [self.ours.prepare(Conditions(text=text)) for text in self.texts]
        with torch.no_grad():
            for branch in branches:
                for block in self.ours.blocks:
                    slot = branch.keys.of(block, keeps=True)
                    slot.keys = block.cross_attn.keys(branch.text, branch.image)
        return branches

    def run_ours(self, sides: int = 1) -> list[Tensor]:
        return self.ours(self.latents, torch.tensor([TIMESTEP]), self.branches[:sides])

    def run_peer(self, sides: int = 1) -> list[Tensor]:
        latents, time = self.latents.to(self.dtype), torch.tensor([TIMESTEP])
        return [self.peer(latents, time, text, return_dict=False)[0].float() for text in self.texts[:sides]]

    def widened_peer_output(self) -> Tensor:
        """The peer in float32 on these weights: what both should give but for rounding."""
        kept = {name: p.data for name, p in self.peer.named_parameters()}
        try:
            self.peer.float()
            text, time = self.texts[0].float(), torch.tensor([TIMESTEP])
            return self.peer(self.latents, time, text, return_dict=False)[0]
        finally:
            for name, parameter in self.peer.named_parameters():
                parameter.data = kept[name]


def relative(a: Tensor, b: Tensor) -> float:
    """Length of the difference over length of ``b``."""
    return float(torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double()))


@contextmanager
def captured(block: nn.Module) -> Iterator[list[tuple]]:
    """The arguments with which a block is called, tensors copied: ours writes into its input."""
    calls: list[tuple] = []
    hook = block.register_forward_pre_hook(
        lambda _, args: calls.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in args))
    )
    try:
        yield calls
    finally:
        hook.remove()


def block_call(pair: Pair, side: str) -> Callable[[], object]:
    """One block of one side, ready to be called on its own."""
    network, run = (pair.ours, pair.run_ours) if side == "ours" else (pair.peer, pair.run_peer)
    block = network.blocks[0]
    with captured(block) as calls:
        run()
    return lambda: block(*calls[0])


class WideTensors(TorchDispatchMode):
    """Counts float64 and complex128 results, inside blocks and outside."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.is_inside = False
        self.hooks = [block.register_forward_pre_hook(lambda *_: self._enter(True)) for block in blocks]
        self.hooks += [block.register_forward_hook(lambda *_: self._enter(False)) for block in blocks]

    def _enter(self, is_inside: bool) -> None:
        self.is_inside = is_inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor) and one.dtype in WIDE:
                self.found["inside blocks" if self.is_inside else "outside blocks"] += 1
        return result


def count_wide(network: nn.Module, run: Callable[[], object]) -> Counter[str]:
    mode = WideTensors(network.blocks)
    try:
        with mode:
            run()
    finally:
        for hook in mode.hooks:
            hook.remove()
    return mode.found


def error_notes(pair: Pair) -> str:
    ours, peer = pair.run_ours()[0], pair.run_peer()[0]
    if pair.dtype == torch.float32:
        return f"outputs differ by {relative(ours, peer):.1e} relative"
    exact = pair.widened_peer_output()
    return (
        f"outputs differ by {relative(ours, peer):.1e} relative; "
        f"from float32 on these weights: ours {relative(ours, exact):.1e}, peer {relative(peer, exact):.1e}"
    )


def step_rows(pair: Pair, label: str, repeats: int) -> list[Row]:
    """Single forward and pair of forwards."""
    notes, rows = error_notes(pair), []
    for sides, name in ((1, "one forward"), (2, "both sides of the guidance")):
        works = {"ours": partial(pair.run_ours, sides), "peer": partial(pair.run_peer, sides)}
        got = interleaved(works, repeats=repeats)
        rows.append(
            Row(
                figure=f"DiT {label}: {name}",
                unit="s",
                ours=got["ours"],
                peer_name="diffusers",
                peer=got["peer"],
                goal=">= 1.10",
                notes=notes,
            )
        )
    once = interleaved({"ours": pair.prepared}, repeats=repeats)["ours"]
    rows.append(
        Row(figure=f"DiT {label}: prepare(), keys of both sides, once per video", unit="s", ours=once)
    )
    return rows


def memory_row(pair: Pair, label: str, repeats: int) -> Row:
    """Peak of one block; ours with its default chunks of the feed-forward layer."""
    found: dict[str, list[float]] = {}
    for side in ("ours", "peer"):
        call = block_call(pair, side)
        call()
        found[side] = [peak_bytes(call) / 2**20 for _ in range(repeats)]
    tokens = pair.latents[0, 0].numel() // 4
    unit = tokens * pair.ours.config.dim * pair.dtype.itemsize / 2**20
    return Row(
        figure=f"DiT {label}: peak activation of a block",
        unit="MiB",
        ours=found["ours"],
        peer_name="diffusers",
        peer=found["peer"],
        goal=">= 2 (ours <= 0.5 x peer)",
        notes=f"{found['ours'][0] / unit:.1f} against {found['peer'][0] / unit:.1f} times tokens x dim",
    )


def wide_row(pair: Pair, label: str) -> Row:
    ours, peer = count_wide(pair.ours, pair.run_ours), count_wide(pair.peer, pair.run_peer)
    return Row(
        figure=f"DiT {label}: float64 and complex128 results inside blocks",
        unit="",
        ours=[ours["inside blocks"]],
        peer_name="diffusers",
        peer=[peer["inside blocks"]],
        goal="0",
        notes=f"outside: {ours['outside blocks']} against {peer['outside blocks']}",
    )


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--dtypes", default="bfloat16,float32")
    arguments.add_argument("--layers", type=int, default=4)
    arguments.add_argument("--grid", default="5,40,40", help="latent frames, height, width")
    arguments.add_argument("--real-tokens", default="60,512", help="rows of text that are no padding")
    arguments.add_argument("--toy", action="store_true", help="dim 256")
    arguments.add_argument("--profile", action="store_true", help="print operations of one forward and stop")
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    rows: list[Row] = []
    grid = tuple(int(n) for n in given.grid.split(","))
    with torch.no_grad():
        for dtype_name in given.dtypes.split(","):
            for index, real in enumerate(map(int, given.real_tokens.split(","))):
                dtype = getattr(torch, dtype_name)
                pair = Pair(dtype, is_toy=given.toy, num_layers=given.layers, grid=grid, real_tokens=real)
                tokens, dim = pair.latents[0, 0].numel() // 4, pair.ours.config.dim
                label = f"dim {dim}, {given.layers} blocks, {tokens} tokens, {real} words, {dtype_name}"
                if given.profile:
                    pair.run_ours(), pair.run_peer()
                    print(f"ours, {label}\n{top_operations(pair.run_ours)}")
                    print(f"peer, {label}\n{top_operations(pair.run_peer)}")
                    continue
                rows += step_rows(pair, label, given.repeats)
                if index == 0:
                    rows += [memory_row(pair, label, min(3, given.repeats)), wide_row(pair, label)]
    if rows:
        report("dit_step", rows, given.out, threads)


if __name__ == "__main__":
    main()
