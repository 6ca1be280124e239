"""What one step, one encode and one decode ask of a GPU: launches, waits, copies, bytes, FLOPs; needs no GPU.

    python benchmarks/counts.py                          # all: minutes, and 2 GB of memory
    python benchmarks/counts.py --only "14B" --no-host   # figures with these words in their names, no times

It counts on the simulated CUDA runtime of the tests (docs/testing.md), which it starts by itself: torch's own
CUDA build runs, kernels compute nothing, full-size weights take no memory. Where there is a GPU it is left
alone. A row's figure is the number of launches; beside it stand all of `counting.Counted`.
tests/fake_cuda/test_counts.py holds them: the last rows of each version of torch are what may be asked.

Networks are called as in use: steps of the DiT in a pipeline's call, the VAE through the pipeline, training
by the training module under Lightning. "generated": elementwise work of the DiT runs in kernels that
torch.compile makes, the default on a GPU with Triton; "eager": DIFFSYNTH_COMPILE=0.

Host time is the CPU time of the thread that launches, for one step of a call: how long a step would take if
the GPU took no time at all. A launch takes what the simulated runtime makes of it, microseconds as on a real
one. The peer is diffusers' pipeline on the same weights.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.common import Row, milliseconds, parser, report
from benchmarks.counting import Mark, Work, counted
from benchmarks.full_size import TOY_VAE
from benchmarks.gpu.diffusers_peers import diffusers_dit
from benchmarks.gpu.shared import MODELS, SIZES, TEXT_TOKENS, VideoSize
from diffsynth.conditioning.conditions import Conditions
from diffsynth.denoising.expert import Expert
from diffsynth.models.wan.dit import WanDiT
from diffsynth.models.wan.vae import WanVideoVAE
from diffsynth.ops import compiled
from diffsynth.ops.fp8_policy import put_fp8_layers
from diffsynth.pipelines.components import PipelineComponents
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management.copiers import host_buffer
from diffsynth.vram_management.flat import FlatLayout, bind
from diffsynth.vram_management.fp8 import widening
from tests.fake_cuda import build, controls

CUDA = torch.device("cuda", 0)
NUM_STEPS, COUNTED = 3, 1  # the first step embeds the text, the last has none to foresee
WEIGHTS = ("bf16", "fp8 widened", "fp8 multiplied")
HOST = {"14B": "480P", "1.3B": "480P17"}  # steps whose host time is told


def works() -> dict[str, Callable[[], Work]]:
    """What is counted, by the name of its figure; to be built when its turn comes."""
    found: dict[str, Callable[[], Work]] = {}
    places = [(weights, place) for weights in WEIGHTS for place in ("resident", "streamed")]
    for model, size, kernels in (
        ("14B", "480P", "generated"),
        ("14B", "480P", "eager"),
        ("toy", "toy", "eager"),
    ):
        label = f"DiT {model} {size}" if model != "toy" else "DiT toy"
        for way in places if (model, kernels) != ("14B", "eager") else places[:1]:
            name = f"{label}: guided step, {', '.join(way)}, {kernels}"
            found[name] = partial(guided_step, model, SIZES[size], *way, kernels)
        found[f"{label}: LoRA step, full checkpointing"] = partial(lora_step, model, SIZES[size])
    for size in ("480P", "720P", "toy"):
        found[f"VAE {size}: encode"] = partial(vae_encode, SIZES[size])
        found[f"VAE {size}: decode"] = partial(vae_decode, SIZES[size])
    return found


def guided_step(model: str, size: VideoSize, weights: str, place: str, kernels: str) -> Work:
    """The second step of a pipeline's call."""
    pipe = dit_pipeline(model, weights, is_streamed=place == "streamed")

    def work(mark: Mark) -> None:
        with generating(kernels == "generated"):
            pipe(**call_of(pipe, size), progress_bar_cmd=partial(between_steps, mark))

    return work


def dit_pipeline(model: str, weights: str = "bf16", *, is_streamed: bool = False) -> Any:
    """A pipeline of one DiT whose weights take no memory."""

    with torch.device("meta"):
        dit = WanDiT.from_config(MODELS[model]).to(torch.bfloat16).eval().requires_grad_(False)
        if weights != "bf16":
            put_fp8_layers(dit)
            dit.visit = widening(dit, dit.visit)
    dit.to_empty(device="cpu" if is_streamed else CUDA)
    if is_streamed:
        rest_in_locked_memory(dit)
    parts = PipelineComponents(device=CUDA, dtype=torch.bfloat16, high=Expert(dit=dit))
    pipe = WanVideoPipeline(parts)
    if weights != "bf16":
        pipe.choose_kernels(fp8_compute="fp8" if weights == "fp8 multiplied" else "widened")
    if is_streamed:
        pipe.enable_vram_management(num_persistent_param_in_dit=0)
    return pipe


def rest_in_locked_memory(dit: nn.Module) -> None:
    """Lay the blocks where a stream would carry them, so that it carries nothing: pages stay untouched."""

    for block in dit.blocks:  # type: ignore[union-attr]
        layout = FlatLayout(block)
        bind(layout.tensors, layout.views(host_buffer(layout.num_bytes, CUDA).buffer))


def call_of(pipe: Any, size: VideoSize) -> dict[str, Any]:
    """Arguments of a call that asks for latents."""
    text = torch.zeros(1, TEXT_TOKENS, pipe.dit.config.text_dim, dtype=torch.bfloat16)
    return {
        "prompt_embeds": text, "negative_prompt_embeds": text, "height": size.height, "width": size.width,
        "num_frames": size.num_frames, "num_inference_steps": NUM_STEPS, "seed": 0, "cfg_scale": 5.0,
        "output_type": "latent",
    }  # fmt: skip


def between_steps(mark: Mark, timesteps: Iterable[Any]) -> Iterator[Any]:
    """Mark where the step that counts begins and ends."""
    for index, timestep in enumerate(timesteps):
        if index in (COUNTED, COUNTED + 1):
            mark()
        yield timestep


@contextmanager
def generating(is_on: bool) -> Iterator[None]:
    """With or without kernels that torch.compile makes; a compiler that fails is an error here."""

    with patch.object(compiled, "is_switched_on", lambda: is_on):
        yield
    if compiled.compiler.has_failed:
        raise RuntimeError("torch.compile failed: the figures would be those of eager.")


def lora_step(model: str, size: VideoSize) -> Work:
    """The second step of a run by Lightning, on one sample in a file."""

    with torch.device("meta"):
        dit = WanDiT.from_config(MODELS[model]).to(torch.bfloat16)
    dit.to_empty(device=CUDA)

    def work(mark: Mark) -> None:
        with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
            train(Expert(dit=dit), size, Path(folder), mark)

    return work


def train(expert: Any, size: VideoSize, folder: Path, mark: Mark) -> None:
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    from diffsynth.training.batches import Batches, StepSampler
    from diffsynth.training.cached_dataset import open_cache
    from diffsynth.training.config import MemoryConfig, ModelSources, RunConfig, TrainConfig
    from diffsynth.training.dataset.config import DatasetConfig
    from diffsynth.training.learners import Denoiser, Learner
    from diffsynth.training.module import WanTrainingModule
    from diffsynth.training.objective import FlowMatchObjective
    from diffsynth.training.processes import quiet_lightning
    from diffsynth.training.run import _joined, _Picked
    from diffsynth.training.samples import EncodedSample
    from diffsynth.training.tuning import TuneConfig, tune

    sizes = expert.dit.config
    text = Conditions(text=torch.zeros(1, TEXT_TOKENS, sizes.text_dim))
    latents = torch.zeros(1, 16, (size.num_frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    sample = folder / "sample.safetensors"
    EncodedSample(latents=latents, positive=text, negative=text).save(sample)
    config = TrainConfig(
        model=ModelSources(dit=("dit",)), data=(DatasetConfig(path=str(folder)),), tune=TuneConfig(rank=16),
        memory=MemoryConfig(gradient_checkpointing="full"),
        run=RunConfig(steps=NUM_STEPS, output=str(folder)),
    )  # fmt: skip
    samples = open_cache(sample)
    batches = Batches(samples, size=1, seed=0, num_steps=NUM_STEPS)
    learner = Learner(denoiser=Denoiser(expert), tuned=tune(expert.dit, (), config.tune))
    module = WanTrainingModule([learner], FlowMatchObjective(config.objective), batches, config)

    class Marks(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (COUNTED, COUNTED + 1):
                mark()

    loader = DataLoader(
        _Picked(samples), batch_sampler=StepSampler(batches, start=0, stop=NUM_STEPS), collate_fn=_joined
    )
    try:
        with quiet_lightning():
            trainer = Trainer(
                accelerator="gpu", devices=1, precision="32-true", max_epochs=1, logger=False,
                callbacks=[Marks()], use_distributed_sampler=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder),
            )  # fmt: skip
            trainer.fit(module, train_dataloaders=loader)
    finally:
        learner.tuned.detach()


def vae_pipeline(size: VideoSize) -> Any:

    with torch.device("meta"):
        vae = WanVideoVAE.from_config(TOY_VAE if size.name == "toy" else {}).to(torch.bfloat16)
    vae.to_empty(device=CUDA).eval().requires_grad_(False)
    return WanVideoPipeline(PipelineComponents(device=CUDA, dtype=torch.bfloat16, vae=vae))


def vae_encode(size: VideoSize) -> Work:
    """A video of bytes on the host, as an input video comes."""
    pipe = vae_pipeline(size)
    video = torch.empty(1, 3, size.num_frames, size.height, size.width, dtype=torch.uint8)
    return lambda mark: between(mark, lambda: pipe.parts.encode_video(video))


def vae_decode(size: VideoSize) -> Work:
    """To pictures of bytes on the host."""
    pipe = vae_pipeline(size)
    shape = (16, (size.num_frames - 1) // 4 + 1, size.height // 8, size.width // 8)
    latents = torch.empty(1, *shape, device=CUDA)

    def decode() -> None:
        for _ in pipe.decode_stream(latents):
            pass

    return lambda mark: between(mark, decode)


def between(mark: Mark, work: Callable[[], object]) -> None:
    mark()
    work()
    mark()


def counted_row(figure: str, work: Work) -> Row:
    found = counted(work)
    moved = found.product_bytes + found.other_bytes
    notes = (
        f"{found.syncs} syncs, {found.copies} copies, {moved / 1e9:.4g} GB, {found.flops / 1e12:.4g} TFLOP"
    )
    return Row(figure=figure, unit="launches", ours=[found.launches], notes=notes, extra=found.as_numbers())


def host_figure(model: str) -> str:
    return f"DiT {model} {HOST[model]}: guided step, host time"


def host_row(model: str, repeats: int) -> Row:
    """Host time of a guided step, against diffusers' pipeline on the same weights."""
    pipe, size = dit_pipeline(model), SIZES[HOST[model]]
    theirs = peer_call(pipe, size)

    def ours(mark: Mark) -> None:
        with generating(True):
            pipe(**call_of(pipe, size), sampler="euler", progress_bar_cmd=partial(between_steps, mark))

    seconds: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for turn in range(repeats + 1):
        for name, work in (("ours", ours), ("diffusers", theirs)):
            times: list[float] = []
            work(lambda times=times: times.append(time.thread_time()))  # type: ignore[misc]
            if turn:
                seconds[name].append(times[1] - times[0])
    return Row(
        figure=host_figure(model), unit="ms",
        ours=milliseconds(seconds["ours"]), peer_name="diffusers' pipeline",
        peer=milliseconds(seconds["diffusers"]), notes="resident bf16, generated",
    )  # fmt: skip


def peer_call(pipe: WanVideoPipeline, size: VideoSize) -> Work:
    """diffusers' pipeline on the weights of ours, with as many steps."""
    import diffusers

    assert isinstance(pipe.dit, WanDiT)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)  # its UniPC solves on the GPU
    peer = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=diffusers_dit(pipe.dit)
    )
    peer.set_progress_bar_config(disable=True)
    text = call_of(pipe, size)["prompt_embeds"].to(CUDA)

    def call(mark: Mark) -> None:
        def after(peer: object, index: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
            if index in (COUNTED - 1, COUNTED):
                mark()
            return given

        peer(
            prompt_embeds=text, negative_prompt_embeds=text, height=size.height, width=size.width,
            num_frames=size.num_frames, num_inference_steps=NUM_STEPS, guidance_scale=5.0,
            output_type="latent", callback_on_step_end=after,
        )  # fmt: skip

    return call


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", default="", help="words that the figure has")
    arguments.add_argument("--no-host", action="store_true", help="no host times")
    words = sys.argv[1:] if words is None else words
    given = arguments.parse_args(words)
    chosen = {name: make for name, make in works().items() if given.only in name}
    timed = {host_figure(model): model for model in HOST if not given.no_host}
    timed = {name: model for name, model in timed.items() if given.only in name}
    if not chosen and not timed:
        known = "\n  ".join([*works(), *map(host_figure, HOST)])
        arguments.error(f"--only {given.only!r}: no figure has it in its name. They are\n  {known}")
    if not build.is_loaded():
        if why := build.why_not():
            sys.exit(f"No figures: {why}.")
        os.execve(sys.executable, [sys.executable, __file__, *words], build.environment())
    from tests.fake_cuda import answers  # noqa: F401  # registers what no kernel computes

    print("Counted on a simulated GPU; no GPU of this machine is used.")
    logging.getLogger("diffsynth").setLevel(logging.ERROR)
    controls.copies_move_bytes(False)
    for name, make in chosen.items():
        report("counts", [counted_row(name, make())], given.out, 1)
    for model in timed.values():
        report("counts", [host_row(model, given.repeats)], given.out, 1)


if __name__ == "__main__":
    main()
