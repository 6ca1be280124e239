"""What VACE is shown: each input matters, lengths and kinds are checked, scales belong to steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.conditioning.vace import frames_shown, mask_channels, reference_canvas
from diffsynth.errors import ArgumentError, UnusedInputError
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.vace_toys import vace_pipeline

TEXT: dict[str, Any] = {
    "prompt_embeds": torch.ones(1, 5, 32), "negative_prompt_embeds": torch.zeros(1, 3, 32), "seed": 0,
    "output_type": "latent",
}  # fmt: skip
VIDEO = torch.rand(5, 3, 16, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(5, 1, 16, 32).index_fill_(3, torch.arange(16), 1.0)
PICTURE = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> WanVideoPipeline:
    return vace_pipeline(tmp_path_factory.mktemp("vace"))


def made(pipe: WanVideoPipeline, **given: Any) -> torch.Tensor:
    latents = pipe(**{**TEXT, **given})
    assert isinstance(latents, torch.Tensor)
    return latents


def test_each_input_matters(pipe: WanVideoPipeline) -> None:
    results = [
        made(pipe, **given)
        for given in (
            {},
            {"vace_video": VIDEO},
            {"vace_video": 1 - VIDEO},
            {"vace_video": VIDEO, "vace_video_mask": MASK},
            {"vace_video": VIDEO, "vace_video_mask": 1 - MASK},
            {"vace_video": VIDEO, "vace_scale": 0.5},
            {"vace_reference_image": PICTURE},
            {"vace_reference_image": 1 - PICTURE},
            {"vace_reference_image": [PICTURE, 1 - PICTURE]},
            {"vace_reference_image": [1 - PICTURE, PICTURE]},
        )
    ]
    assert all(result.shape == (1, 16, 2, 2, 4) for result in results)
    for index, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[index + 1 :]), index


def test_references_ask_for_noise_of_their_own(pipe: WanVideoPipeline) -> None:
    noise = torch.randn(1, 16, 3, 2, 4)
    given = {"vace_reference_image": PICTURE, "seed": None}
    assert made(pipe, **given, latents=noise).shape == (1, 16, 2, 2, 4)
    with pytest.raises(ArgumentError, match=r"needs \(1, 16, 3, 2, 4\)"):
        made(pipe, **given, latents=noise[:, :, :2])


def test_batch_shares_the_context(pipe: WanVideoPipeline) -> None:
    given: dict[str, Any] = {"vace_video": VIDEO, "vace_reference_image": PICTURE}
    two = made(pipe, **given, num_videos_per_prompt=2)
    single = [made(pipe, **given, seed=seed) for seed in (0, 1)]
    torch.testing.assert_close(two, torch.cat(single), rtol=0, atol=5e-5)


def test_scale_per_step(pipe: WanVideoPipeline) -> None:
    same = made(pipe, vace_video=VIDEO, vace_scale=[0.7, 0.7])
    assert torch.equal(same, made(pipe, vace_video=VIDEO, vace_scale=0.7))
    falling = made(pipe, vace_video=VIDEO, vace_scale=[0.7, 0.0])
    assert not torch.equal(falling, same)
    assert torch.equal(made(pipe, vace_video=VIDEO, vace_scale=[0.0, 0.0]), made(pipe))
    grid = made(pipe, vace_video=VIDEO, vace_scale=[0.7, 0.0], sigmas=[1.0, 0.75])
    assert torch.equal(grid, falling), "shift 3 and 2 steps are these noise levels"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"vace_video_mask": MASK}, "without vace_video"),
        ({"vace_video": VIDEO[:4]}, "vace_video has 4 frames and num_frames is 5"),
        ({"vace_video": VIDEO, "vace_video_mask": MASK[:1]}, "vace_video_mask has 1 frames"),
        ({"vace_video": []}, "vace_video is empty"),
        ({"vace_reference_image": []}, "vace_reference_image is empty"),
        ({"vace_video": VIDEO, "vace_scale": [1.0] * 3}, "3 numbers and there are 2 steps"),
        ({"vace_video": VIDEO, "vace_scale": -1.0}, "vace_scale is -1.0"),
        ({"vace_video": VIDEO, "vace_scale": []}, "one such number per step"),
        (
            {"vace_reference_image": PICTURE, "input_video": VIDEO, "denoising_strength": 0.5},
            "vace_video= in place",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused(pipe: WanVideoPipeline, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        made(pipe, **given)


def test_scale_of_nothing_is_refused(pipe: WanVideoPipeline) -> None:
    with pytest.raises(UnusedInputError, match="nothing to scale"):
        made(pipe, vace_scale=0.5)


def test_length_may_be_mended(pipe: WanVideoPipeline) -> None:
    longer = torch.cat([VIDEO, VIDEO])
    assert torch.equal(made(pipe, vace_video=longer, fit="trim"), made(pipe, vace_video=VIDEO))
    held = torch.cat([VIDEO[:3], VIDEO[2:3].expand(2, -1, -1, -1)])
    assert torch.equal(made(pipe, vace_video=VIDEO[:3], fit="hold"), made(pipe, vace_video=held))


@pytest.mark.parametrize("name", ["vace_video", "vace_reference_image"])
def test_model_without_vace_says_which_to_load(toy_folder: Path, name: str) -> None:
    pipe = WanVideoPipeline.from_pretrained(toy_folder, torch_dtype=torch.float32, device="cpu")
    with pytest.raises(UnusedInputError, match=f"{name} was given.*VACE-1.3B"):
        made(pipe, **{name: PICTURE if "image" in name else VIDEO})


def test_mask_channels_are_pixels_of_a_square() -> None:
    mask = torch.arange(5.0)[:, None, None] * 100 + torch.arange(64.0).view(8, 8).repeat(2, 3)
    channels = mask_channels(mask[None, None, frames_shown(5, 2)], 8)
    assert channels.shape == (1, 64, 2, 2, 3)
    # nearest-exact: latent frame t shows frame floor((t + 0.5) 5 / 2)
    assert torch.equal(channels[0, :, :, 1, 2], torch.arange(64.0)[:, None] + torch.tensor([100.0, 300.0]))


def test_reference_of_any_kind_stands_on_white() -> None:
    picture = Image.new("RGBA", (10, 40), (0, 0, 0, 0))
    canvas = reference_canvas(picture, 16, 32)
    assert torch.equal(canvas, torch.ones(3, 16, 32)), "transparent is white"
    black = np.zeros((20, 10, 3), np.uint8)
    canvas = reference_canvas(black, 16, 32)
    assert (
        (canvas[:, :, 12:20] == -1).all()
        and (canvas[:, :, :12] == 1).all()
        and (canvas[:, :, 20:] == 1).all()
    )
