"""What comes back, and what the pipeline tells on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.pipelines.counting import calls_of


def test_output_types_agree(toy_pipe: WanVideoPipeline) -> None:
    made = {
        kind: toy_pipe(["a red circle", "a square"], seed=0, output_type=kind)
        for kind in ("pil", "pt", "np", "latent")
    }
    assert made["latent"].shape == (2, 16, 2, 2, 4) and made["latent"].dtype == torch.float32
    assert made["pt"].shape == (2, 5, 3, 16, 32) and made["pt"].dtype == torch.float32
    assert made["pt"].min() >= 0.0 and made["pt"].max() <= 1.0
    assert made["np"].shape == (2, 5, 16, 32, 3) and made["np"].dtype == np.float32
    assert np.array_equal(made["np"], made["pt"].movedim(2, -1).numpy())
    for video, floats in zip(made["pil"], made["np"], strict=True):
        levels = np.stack([np.asarray(frame) for frame in video])
        # rounded to the nearest level; float32 leaves ties a hair on either side
        assert np.abs(levels - floats * 255).max() < 0.5001


def test_a_single_video_as_tensor_keeps_its_batch_axis(toy_pipe: WanVideoPipeline) -> None:
    assert toy_pipe("a red circle", seed=0, output_type="pt").shape == (1, 5, 3, 16, 32)


def test_tiles_cover_the_picture(toy_pipe: WanVideoPipeline) -> None:
    arguments = {"seed": 0, "height": 48, "width": 64, "num_frames": 1, "output_type": "pt"}
    with calls_of(toy_pipe.parts.vae.decoder) as calls:
        tiled = toy_pipe("x", tiled=True, tile_size=(4, 4), tile_stride=(2, 2), **arguments)
    assert tiled.shape == (1, 1, 3, 48, 64) and len(calls) == 2 * 3
    assert toy_pipe.last_settings["tile_size"] == (4, 4)
    toy_pipe("x", **arguments)
    assert "tile_size" not in toy_pipe.last_settings, "settings tell what was used"


def test_callback_sees_each_step_and_may_change_latents(toy_pipe: WanVideoPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def zeros_at_the_end(
        pipe: WanVideoPipeline, step: int, timestep: Tensor, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        assert pipe is toy_pipe and tensors["latents"].shape == (1, 16, 2, 2, 4)
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else None

    latents = toy_pipe(
        "x", num_inference_steps=4, sigma_shift=1.0, seed=0, callback_on_step_end=zeros_at_the_end,
        output_type="latent",
    )  # fmt: skip
    assert seen == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    assert not latents.any()


def test_interrupt_stops_after_the_step(toy_pipe: WanVideoPipeline) -> None:
    steps: list[int] = []

    def stop(pipe: WanVideoPipeline, step: int, *_: object) -> None:
        steps.append(step)
        if step == 1:
            pipe.interrupt()

    arguments = {"num_inference_steps": 5, "seed": 0, "num_frames": 1}
    assert len(toy_pipe("x", callback_on_step_end=stop, **arguments)) == 1, "what is there is decoded"
    assert steps == [0, 1]
    with calls_of(toy_pipe.dit) as calls:
        toy_pipe("x", **arguments)
    assert len(calls) == 5, "the next call runs to its end"


def test_progress_bar_wraps_the_steps(toy_pipe: WanVideoPipeline) -> None:
    wrapped: list[int] = []

    def bar(steps: Tensor) -> Tensor:
        wrapped.append(len(steps))
        return steps

    toy_pipe("x", num_inference_steps=3, seed=0, progress_bar_cmd=bar, output_type="latent")
    assert wrapped == [3]


def test_v1_arithmetic(toy_folder: Path) -> None:
    pipe = WanVideoPipeline.from_pretrained(
        toy_folder, torch_dtype=torch.bfloat16, device="cpu", precision="v1"
    )
    kinds: set[torch.dtype] = set()

    def look(_: object, __: int, ___: Tensor, tensors: Mapping[str, Tensor]) -> None:
        kinds.add(tensors["latents"].dtype)

    with calls_of(pipe.dit) as calls:
        latents = pipe("x", seed=0, num_inference_steps=3, callback_on_step_end=look, output_type="latent")
    assert kinds == {torch.bfloat16}
    assert latents.dtype == torch.float32 and torch.equal(latents, latents.bfloat16().float())
    told = torch.stack([timestep[0] for _, timestep, *_ in calls])
    assert torch.equal(told, told.bfloat16().double()), "the network is told bfloat16 timesteps"
    frames = np.stack([np.asarray(f) for f in pipe("x", seed=0)])
    assert pipe.last_settings["tile_size"] == (30, 52), "tiled is the default, as in v1"
    floats = pipe("x", seed=0, output_type="np")[0]
    above = floats * 255 - frames
    # pixels are cut, not rounded; 1e-3 is float32 at 255
    assert above.min() > -1e-3 and above.max() < 1.001 and above.max() > 0.9


def test_last_settings_are_plain_and_complete(toy_pipe: WanVideoPipeline) -> None:
    toy_pipe("a red circle", seed=5, num_frames=4, output_type="latent")
    settings = toy_pipe.last_settings
    assert json.loads(json.dumps(settings)) == settings
    expected = {
        "prompt": "a red circle", "seed": 5, "height": 16, "width": 32, "num_frames": 5, "sampler": "euler",
        "num_inference_steps": 2, "cfg_scale": 3.0, "sigma_shift": 3.0,
    }  # fmt: skip
    assert expected.items() <= settings.items()
    again = {name: value for name, value in settings.items() if name != "output_type"}
    assert toy_pipe(**again, output_type="latent").shape == (1, 16, 2, 2, 4), "and can be asked again"


def test_describe_tells_what_is_loaded(toy_pipe: WanVideoPipeline, two_experts: WanVideoPipeline) -> None:
    text = toy_pipe.describe()
    for part in ("WanDiT", "WanTextEncoder", "WanVideoVAE", "dit.safetensors", "2 blocks", "num_frames=5"):
        assert part in text, part
    assert "dit_low_noise: not loaded" in text
    assert "low-noise one below timestep 875" in two_experts.describe()


@pytest.mark.parametrize("name", ["dit", "vae", "text_encoder", "device", "torch_dtype"])
def test_parts_are_within_reach(toy_pipe: WanVideoPipeline, name: str) -> None:
    assert getattr(toy_pipe, name) is not None
