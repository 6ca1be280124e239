"""Fun-5B: planes as of A14B, the Wan2.2 VAE, and a first frame that stays clean with its own clock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffsynth.models.toy import toy_files
from diffsynth.models.wan.dit import WanDiT
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.model_inputs import FRAMES, given

HEIGHT, WIDTH = 32, 64
OTHERS = {
    "i2v-5b": [],
    "control-5b": ["control_video", "reference_image"],
    "camera-5b": ["camera_control_direction"],
}


def latents(pipe: WanVideoPipeline, **arguments: Any) -> Tensor:
    usual = {"prompt_embeds": torch.ones(1, 4, 32), "cfg_scale": 1.0, "seed": 0, "num_frames": FRAMES}
    made = pipe(**{**usual, "height": HEIGHT, "width": WIDTH, "output_type": "latent", **arguments})
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("kind", OTHERS)
def test_the_first_frame_is_a_plane_and_a_latent_held_clean(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_files(kind), torch_dtype=torch.float32, device="cpu")
    told: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = WanDiT.forward

    def noting(self: WanDiT, noisy: Tensor, timestep: Tensor, branches: Any, *rest: Any) -> Any:
        told.append((noisy.clone(), timestep.clone(), branches[0].planes))
        return forward(self, noisy, timestep, branches, *rest)

    monkeypatch.setattr(WanDiT, "forward", noting)
    image = given(["input_image"], HEIGHT, WIDTH)["input_image"]
    others = given(OTHERS[kind], HEIGHT, WIDTH)
    made = latents(pipe, input_image=image, **others)
    assert pipe.parts.vae is not None
    with torch.no_grad():
        first = pipe.parts.vae.encode(image[None, :, None] * 2 - 1)
    # fp32: the picture was scaled in another order
    torch.testing.assert_close(made[:, :, :1], first, rtol=1e-4, atol=1e-5)
    for noisy, timestep, planes in told:
        torch.testing.assert_close(noisy[:, :, :1], first, rtol=1e-4, atol=1e-5)
        assert timestep.shape[-1] == 2 and timestep.flatten()[0] == 0 and timestep.flatten()[1] > 0
        torch.testing.assert_close(planes[:, -48:, :1], first, rtol=1e-4, atol=1e-5)
        mask = planes[:, -52:-48]
        assert (mask[:, :, 0] == 1).all() and (mask[:, :, 1:] == 0).all()


def test_control_without_a_first_frame_has_one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_files("control-5b"), torch_dtype=torch.float32, device="cpu")
    times: list[Tensor] = []
    forward = WanDiT.forward

    def noting(self: WanDiT, noisy: Tensor, timestep: Tensor, *rest: Any) -> Any:
        times.append(timestep)
        return forward(self, noisy, timestep, *rest)

    monkeypatch.setattr(WanDiT, "forward", noting)
    assert latents(pipe, **given(["control_video"], HEIGHT, WIDTH)).shape == (1, 48, 2, 2, 4)
    assert times and all(time.numel() == 1 for time in times)
