"""What the pipeline costs per step outside of the DiT, against diffusers' pipeline on the same weights.

    python benchmarks/overhead.py

Time of pipe(...) minus time inside the network, for calls of few and of many steps: the slope is the cost
of a step, the rest the cost of a call. The network is the tiny Wan when its weights are there
(diffsynth/tiny/weights), else a random one of dim 96; text comes as embeddings, latents go out, so that
neither encoder nor VAE is asked. Guidance is on.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, Row, parser, report, set_threads
from benchmarks.full_size import diffusers_twin
from diffsynth.denoising.expert import Expert
from diffsynth.models.wan.dit import WanDiT
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.wan_video import WanVideoPipeline

RANDOM = {
    "dim": 96,
    "in_dim": 16,
    "out_dim": 16,
    "ffn_dim": 192,
    "num_layers": 2,
    "num_heads": 4,
    "text_dim": 32,
}
FEW, MANY = 4, 24
SIZE = {"height": 64, "width": 64, "num_frames": 9}


def tiny_pipeline() -> tuple[WanVideoPipeline, str]:
    """The tiny Wan, or a random network while there are no weights."""
    folder = ROOT / "diffsynth" / "tiny" / "weights"
    if list(folder.rglob("*.safetensors")):
        return WanVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu"), "tiny Wan"
    torch.manual_seed(0)
    dit = WanDiT.from_config(RANDOM).eval().requires_grad_(False)
    parts = PipelineComponents(device=torch.device("cpu"), dtype=torch.float32, high=Expert(dit=dit))
    return WanVideoPipeline(parts), "random DiT of dim 96"


class Inside:
    """Adds up the time spent in a network's forward."""

    def __init__(self, network: nn.Module) -> None:
        self.seconds, self.calls = 0.0, 0
        inner = network.forward

        def forward(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.calls += 1

        network.forward = forward  # type: ignore[method-assign]


def outside(run: Callable[[int], object], inside: Inside, steps: int) -> float:
    """Seconds of one call that were not spent in the network."""
    inside.seconds = 0.0
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start - inside.seconds


def peer_pipeline(dit: WanDiT, text: Tensor, negative: Tensor) -> tuple[Callable[[int], object], Inside]:
    """diffusers' pipeline around the same weights."""
    import diffusers

    config = dit.config
    names = ("num_layers", "ffn_dim", "text_dim", "freq_dim")
    sizes = {"num_attention_heads": config.num_heads, "attention_head_dim": config.dim // config.num_heads}
    sizes |= {
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "patch_size": config.patch_size,
        **{n: getattr(config, n) for n in names},
    }
    peer = diffusers_twin(dit, "dit-1.3b", sizes)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=peer
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt_embeds": text, "negative_prompt_embeds": negative, "output_type": "latent", **SIZE}
    return lambda steps: pipe(num_inference_steps=steps, **arguments), Inside(peer)


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sampler", default="unipc", choices=("euler", "unipc", "dpm++"))
    given = arguments.parse_args(words)
    threads = set_threads(given.threads)
    logging.getLogger("diffsynth").setLevel(logging.ERROR)
    pipe, what = tiny_pipeline()
    dit = pipe.dit
    assert isinstance(dit, WanDiT)
    text, negative = torch.randn(2, 1, 20, dit.config.text_dim).unbind(0)
    call = {
        "prompt_embeds": text,
        "negative_prompt_embeds": negative,
        "output_type": "latent",
        "seed": 0,
        **SIZE,
    }
    call |= {
        "sampler": given.sampler,
        "sigma_shift": 5.0,
        "cfg_scale": 5.0,
        "progress_bar_cmd": lambda steps: steps,
    }
    works = {"ours": (lambda steps: pipe(num_inference_steps=steps, **call), Inside(dit))}
    works["diffusers"] = peer_pipeline(dit, text, negative)
    steps_ms: dict[str, list[float]] = {name: [] for name in works}
    call_ms: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(given.repeats + 1):
        for name, (run, inside) in works.items():
            few, many = outside(run, inside, FEW), outside(run, inside, MANY)
            if turn:
                steps_ms[name].append(1000 * (many - few) / (MANY - FEW))
                call_ms[name].append(1000 * few - FEW * steps_ms[name][-1])
    rows = [
        Row(
            figure=f"pipeline, per step outside the DiT, {given.sampler}",
            unit="ms",
            ours=steps_ms["ours"],
            peer_name="diffusers, unipc",
            peer=steps_ms["diffusers"],
            goal="<= 1 ms",
            notes=what,
        ),
        Row(
            figure="pipeline, per call outside steps and DiT",
            unit="ms",
            ours=call_ms["ours"],
            peer_name="diffusers, unipc",
            peer=call_ms["diffusers"],
            notes=f"{what}; ours includes prepare()",
        ),
    ]
    report("overhead", rows, given.out, threads)


if __name__ == "__main__":
    main()
