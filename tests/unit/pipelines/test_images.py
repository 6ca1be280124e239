"""Whole calls with pictures: each matters, none is ignored, batches share them, streaming keeps bits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffsynth.errors import ArgumentError, MissingModelError
from diffsynth.models.toy import toy_files
from diffsynth.pipelines.wan_video import WanVideoPipeline
from tests.unit.pipelines.counting import calls_of

KINDS = ("i2v", "i2v-a14b", "flf2v")
# float32 with the sums of attention in another order
TOLERANCE = 5e-5


def pipeline(kind: str, without: str = "") -> WanVideoPipeline:
    files = [file for file in toy_files(kind) if not without or Path(file).stem != without]
    return WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(kind: str) -> WanVideoPipeline:
    return pipeline(kind)


def picture(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def make(pipe: WanVideoPipeline, **given: Any) -> torch.Tensor:
    needs_end = pipe.parts.facts.has_image_positions
    default = {"input_image": picture(1), **({"end_image": picture(2)} if needs_end else {})}
    asked = {"prompt": "a red circle", "seed": 0, "output_type": "latent", **default, **given}
    latents = pipe(**{name: value for name, value in asked.items() if value is not None})
    assert isinstance(latents, torch.Tensor)
    return latents


def test_each_picture_matters_and_the_first_is_asked_for(pipe: WanVideoPipeline) -> None:
    made = make(pipe)
    assert torch.equal(made, make(pipe))
    assert not torch.equal(made, make(pipe, input_image=picture(3)))
    assert not torch.equal(made, make(pipe, end_image=picture(3)))
    with pytest.raises(ArgumentError, match="input_image is missing"):
        make(pipe, input_image=None, end_image=None)


def test_the_planes_and_the_tokens_each_matter() -> None:
    pipe = pipeline("i2v")
    # the crop keeps the middle: the same planes, but the image encoder sees the whole with max_area
    made = make(pipe, input_image=picture(1, (96, 64)), height=32, width=48)
    assert not torch.equal(made, make(pipe, input_image=picture(1, (96, 64)), max_area=32 * 48))
    assert pipe.parts.image_encoder is not None and pipe.dit is not None
    with calls_of(pipe.parts.image_encoder) as calls:
        make(pipe)
    assert len(calls) == 1, "each encoder is asked once"


def test_a_batch_shares_its_picture(pipe: WanVideoPipeline) -> None:
    batch = make(pipe, prompt=["a red circle", "a blue square"], num_videos_per_prompt=2, seed=3)
    single = make(pipe, prompt="a blue square", seed=5)
    torch.testing.assert_close(batch[2:3], single, rtol=0, atol=TOLERANCE)


def test_height_and_width_follow_the_picture_with_max_area(pipe: WanVideoPipeline) -> None:
    latents = make(pipe, input_image=picture(1, (64, 128)), max_area=32 * 64)
    assert latents.shape[-2:] == (8, 4)
    assert (pipe.last_settings["height"], pipe.last_settings["width"]) == (64, 32)
    with pytest.raises(ArgumentError, match="max_area= replaces height; give one or the other"):
        make(pipe, max_area=1536, height=32)


def test_how_a_picture_is_resized_is_the_callers_choice(
    pipe: WanVideoPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    wide = picture(1, (96, 32))
    with caplog.at_level(logging.INFO, "diffsynth"):
        made = [make(pipe, input_image=wide, resize=how) for how in ("cover", "stretch", "contain")]
    assert not any(torch.equal(a, b) for a, b in ((made[0], made[1]), (made[0], made[2]), (made[1], made[2])))
    for words in ("cropped in the middle and resized", "stretched", "resized and set between black bars"):
        assert caplog.text.count(f"input_image of 96x32 was {words} to 48x32") == 1
    with pytest.raises(ArgumentError, match="resize is 'fit'; known: cover, stretch, contain"):
        make(pipe, resize="fit")


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_pictures_of_other_kinds_are_converted_and_it_is_said_once(
    pipe: WanVideoPipeline, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = picture(1).convert(mode)
    if mode == "RGBA":
        other.putalpha(100)
    with caplog.at_level(logging.INFO, "diffsynth"):
        make(pipe, input_image=other)
    assert caplog.text.count("pictures were ") == 1


@pytest.mark.parametrize("kind_of", ["i2v", "flf2v"])
def test_streamed_equals_resident(kind_of: str) -> None:
    pipe = pipeline(kind_of)
    made = make(pipe)
    pipe.enable_vram_management(0)
    assert torch.equal(make(pipe), made)
    pipe.disable_vram_management()
    assert torch.equal(make(pipe), made)


def test_the_image_encoder_can_be_streamed() -> None:
    pipe = pipeline("i2v")
    made = make(pipe)
    from diffsynth.vram_management.memory_plan import NetworkPlan

    encoder = pipe.parts.image_encoder
    assert encoder is not None
    pipe._residency.arrange(
        {"image_encoder": NetworkPlan(
            network="image_encoder", where="streamed", num_blocks=len(encoder.blocks), num_slots=2,
            host="pageable",
        )}
    )  # fmt: skip
    assert torch.equal(make(pipe), made)
    counts = pipe._residency.counts("image_encoder")
    assert counts is not None and counts.copies


def test_a_model_with_a_clip_branch_says_which_encoder_it_lacks() -> None:
    with pytest.raises(MissingModelError, match="CLIP image encoder, and none is loaded"):
        make(pipeline("i2v", without="clip"))
