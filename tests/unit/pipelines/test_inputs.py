"""What can be given in place of a prompt, a seed or a schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.errors import ArgumentError
from diffsynth.pipelines.request import known_arguments
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.sampling.registry import SAMPLERS
from diffsynth.video import VideoData, save_frames
from tests.unit.pipelines.counting import calls_of

# float32 with the sums of attention in another order
TOLERANCE = 5e-5


def drawing(num_frames: int = 5) -> torch.Tensor:
    """Float frames (F, 3, 16, 32) whose values are whole 8-bit levels."""
    levels = torch.arange(num_frames * 3 * 16 * 32).view(num_frames, 3, 16, 32) * 7 % 256
    return levels.float() / 255


def test_one_frame_makes_a_picture(toy_pipe: WanVideoPipeline) -> None:
    (picture,) = toy_pipe("a red circle", num_frames=1, seed=0)
    assert picture.size == (32, 16)
    latents = toy_pipe("a red circle", num_frames=1, seed=0, output_type="latent")
    assert latents.shape == (1, 16, 1, 2, 4)


def test_input_video_may_be_a_file_pictures_or_floats(toy_pipe: WanVideoPipeline, tmp_path: Path) -> None:
    video = drawing()
    pictures = [Image.fromarray(np.asarray((f.permute(1, 2, 0) * 255).round().byte())) for f in video]
    save_frames(pictures, tmp_path / "frames")
    arguments = {"denoising_strength": 0.5, "seed": 0, "output_type": "latent"}
    given = (video, pictures, VideoData(image_folder=tmp_path / "frames"), video.numpy())
    made = [toy_pipe("a red circle", input_video=source, **arguments) for source in given]
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_strength_decides_how_much_of_the_video_stays(toy_pipe: WanVideoPipeline) -> None:
    video = drawing()
    assert toy_pipe.parts.vae is not None
    clean = toy_pipe.parts.vae.encode(video.transpose(0, 1)[None] * 2 - 1)
    far = [
        float((latents - clean).abs().mean())
        for latents in (
            toy_pipe("x", input_video=video, denoising_strength=s, seed=0, output_type="latent")
            for s in (0.02, 0.2, 0.9)
        )
    ]
    assert far[0] < far[1] < far[2] and far[0] < 0.2
    kept = toy_pipe("x", input_video=video, denoising_strength=1.0, seed=0, output_type="latent")
    assert torch.equal(kept, toy_pipe("x", seed=0, output_type="latent")), "strength 1 is noise alone"


def test_input_video_serves_every_sample_of_a_batch(toy_pipe: WanVideoPipeline) -> None:
    arguments = {"input_video": drawing(), "denoising_strength": 0.5, "output_type": "latent"}
    batch = toy_pipe(["a red circle", "a square"], seed=3, **arguments)
    single = toy_pipe("a square", seed=4, **arguments)
    torch.testing.assert_close(batch[1:], single, atol=TOLERANCE, rtol=0)


def test_a_longer_input_video_is_read_from_its_start(toy_pipe: WanVideoPipeline) -> None:
    arguments = {"denoising_strength": 0.5, "seed": 0, "output_type": "latent"}
    long = toy_pipe("x", input_video=drawing(9), **arguments)
    assert torch.equal(long, toy_pipe("x", input_video=drawing(9)[:5], **arguments))
    with pytest.raises(ArgumentError, match=r"has 4 frames and num_frames is 5; give fit=.hold"):
        toy_pipe("x", input_video=drawing(4), **arguments)


def test_embeds_with_rows_of_padding_equal_those_without(toy_pipe: WanVideoPipeline) -> None:
    rows, negative = torch.randn(1, 6, 32), torch.randn(1, 3, 32)
    arguments = {"seed": 0, "output_type": "latent"}
    short = toy_pipe(prompt_embeds=rows, negative_prompt_embeds=negative, **arguments)
    padded = torch.cat([rows, torch.zeros(1, 58, 32)], dim=1)
    long = toy_pipe(prompt_embeds=padded, negative_prompt_embeds=negative, **arguments)
    torch.testing.assert_close(short, long, atol=TOLERANCE, rtol=0)


def test_embeds_equal_the_prompt_they_came_from(toy_pipe: WanVideoPipeline) -> None:
    parts = toy_pipe.parts
    assert parts.tokenizer is not None and parts.text_encoder is not None
    with torch.no_grad():
        rows = [parts.text_encoder(parts.tokenizer.batch([text])[0]) for text in ("a red circle", "blurry")]
    arguments = {"seed": 0, "output_type": "latent"}
    from_rows = toy_pipe(prompt_embeds=rows[0], negative_prompt_embeds=rows[1], **arguments)
    assert torch.equal(from_rows, toy_pipe("a red circle", "blurry", **arguments))
    mixed = toy_pipe(prompt_embeds=rows[0], negative_prompt="blurry", **arguments)
    assert torch.equal(from_rows, mixed)


def test_embeds_need_no_text_encoder(toy_folder: Path) -> None:
    files = [toy_folder / "dit.safetensors", toy_folder / "vae.safetensors"]
    pipe = WanVideoPipeline.from_pretrained(files, torch_dtype=torch.float32, device="cpu")
    rows = torch.randn(1, 6, 32)
    assert len(pipe(prompt_embeds=rows, cfg_scale=1.0, seed=0)) == 5
    assert len(pipe(prompt_embeds=rows, negative_prompt_embeds=rows, prompt="", seed=0)) == 5


def test_latents_replace_the_seed(toy_pipe: WanVideoPipeline) -> None:
    noise = torch.randn(1, 16, 2, 2, 4, generator=torch.Generator().manual_seed(11))
    from_noise = toy_pipe("a red circle", latents=noise, output_type="latent")
    assert "seed" not in toy_pipe.last_settings
    assert torch.equal(from_noise, toy_pipe("a red circle", seed=11, output_type="latent"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sigmas_replace_steps_and_shift(toy_pipe: WanVideoPipeline, sampler: str) -> None:
    made = SAMPLERS[sampler]()
    made.reset(3, 5.0)
    arguments = {"seed": 0, "output_type": "latent", "sampler": sampler}
    asked = toy_pipe("x", num_inference_steps=3, sigma_shift=5.0, **arguments)
    same = toy_pipe("x", sigmas=made.sigmas[:-1], timesteps=made.timesteps, **arguments)
    torch.testing.assert_close(asked, same, atol=TOLERANCE, rtol=0)  # the grid went through float32
    with calls_of(toy_pipe.dit) as calls:
        toy_pipe("x", sigmas=[1.0, 0.5], timesteps=[900, 400], **arguments)
    assert [float(timestep.max()) for _, timestep, *_ in calls] == [900.0, 400.0]


def test_seeds_repeat_and_are_told(toy_pipe: WanVideoPipeline) -> None:
    drawn = toy_pipe("a red circle", output_type="latent")
    seed = toy_pipe.last_settings["seed"]
    assert torch.equal(drawn, toy_pipe("a red circle", seed=seed, output_type="latent"))
    assert not torch.equal(drawn, toy_pipe("a red circle", output_type="latent"))


def test_the_table_of_arguments_is_made_once_and_cannot_be_changed() -> None:
    known = known_arguments()
    assert known is known_arguments() and "prompt" in known
    with pytest.raises(TypeError):
        known["prompt"] = ("str", "")  # type: ignore[index]
