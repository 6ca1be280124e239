"""DiT, VAE and text encoder equal the reference implementations, loaded as users load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth.conditioning.conditions import Conditions
from diffsynth.conditioning.text import clean_prompt
from diffsynth.models.wan.text_encoder import relative_buckets
from diffsynth.models.wan.vae import LATENT_MEAN, LATENT_STD
from diffsynth.ops.rope import grid_rotation
from tests.golden import case, names
from tests.toys import load_golden_model

SINGLE = [n for n in names("A_t2v_") if "batch2" not in n]


@pytest.mark.parametrize("name", SINGLE)
def test_velocity_equals_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    dit = load_golden_model(golden, "model", golden.config, tmp_path, "wan_video_dit")
    [latents] = [v[None] for k, v in golden.inputs.items() if k.startswith("x")]
    [text] = [v[None] for k, v in golden.inputs.items() if k.startswith("context")]
    branch = dit.prepare(Conditions(text=text))
    for output in golden.outputs:
        timestep = torch.tensor([float(output.removeprefix("out_t"))])
        for grad in (False, True):  # training's out-of-place path gives the same numbers
            with torch.set_grad_enabled(grad):
                [velocity] = dit(latents, timestep, [branch])
            golden.assert_close(output, velocity[0].detach())
            branch.keys.clear()


def test_each_sample_of_a_mixed_batch_equals_the_reference(tmp_path: Path) -> None:
    golden = case("A_t2v_wan21_batch2_mixed_sizes")
    dit = load_golden_model(golden, "model", golden.config, tmp_path, "wan_video_dit")
    for index, timestep in enumerate(golden.arguments["t"]):
        branch = dit.prepare(Conditions(text=golden.inputs[f"context_b{index}"][None]))
        [velocity] = dit(golden.inputs[f"x_b{index}"][None], torch.tensor([timestep]), [branch])
        golden.assert_close(f"out_{index}", velocity[0].detach())


@pytest.mark.parametrize("name", [n for n in names("E_vae21_")])
@pytest.mark.parametrize("chunk", [1, 2, 4], ids=lambda c: f"{c}-latents-a-chunk")
def test_vae_equals_the_reference_whatever_the_chunk(name: str, chunk: int, tmp_path: Path) -> None:
    golden = case(name)
    vae = load_golden_model(golden, "vae", golden.config, tmp_path, "wan_video_vae")
    arguments: dict[str, object] = {"normalise": "unscaled" not in name}
    if "tiled" in name:
        arguments |= {
            "tile_size": tuple(golden.config["tile_size"]),
            "tile_stride": tuple(golden.config["tile_stride"]),
        }
    [video] = [v for k, v in golden.inputs.items() if k.startswith("video")]
    [latents] = [v for k, v in golden.inputs.items() if k.startswith("latent")]
    with torch.no_grad():
        golden.assert_close("encoded", vae.encode(video.clamp(-1, 1), **arguments, chunk_frames=4 * chunk))
        golden.assert_close("decoded", vae.decode(latents, **arguments, chunk_latents=chunk))


def test_normalisation_constants_are_the_official_ones() -> None:
    golden = case("E_vae_normalisation_constants")
    golden.assert_close("mean21", torch.tensor(LATENT_MEAN))
    golden.assert_close("inv_std21", 1 / torch.tensor(LATENT_STD))


@pytest.mark.parametrize("name", ["F_umt5_padded", "F_umt5_long"])
def test_text_features_equal_the_reference(name: str, tmp_path: Path) -> None:
    golden = case(name)
    encoder = load_golden_model(golden, "t5", golden.config, tmp_path, "wan_video_text_encoder")
    with torch.no_grad():
        features = encoder(golden.outputs["ids"], golden.outputs["mask"])
    if "full" in golden.outputs:
        golden.assert_close("full", features)
    else:
        golden.assert_close("valid", features[:, : golden.arguments["n"]])


def test_relative_buckets_equal_the_reference() -> None:
    golden = case("F_umt5_relative_buckets")
    length = int(golden.outputs["relative_position"].max()) + 1
    buckets = relative_buckets(length, golden.config["num_buckets"], golden.config["max_dist"])
    ahead = buckets[0]
    behind = buckets[-1].flip(0)
    for offset, bucket in zip(
        golden.outputs["relative_position"].tolist(), golden.outputs["bucket"].tolist(), strict=True
    ):
        assert (ahead[offset] if offset >= 0 else behind[-offset]) == bucket


def test_prompts_are_cleaned_as_officially() -> None:
    for pair in case("H_text_cleaning").pairs:
        assert clean_prompt(pair["input"]) == pair["whitespace"]


def test_rotary_angles_equal_the_complex128_table() -> None:
    rotation = grid_rotation(range(3), range(4), range(6), head_dim=128).squeeze(1)
    for axis, (start, stop, size) in enumerate([(0, 22, 44), (22, 43, 42), (43, 64, 42)]):
        frequencies = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        index = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(6))[:, axis]
        exact = torch.polar(torch.ones((), dtype=torch.float64), index[:, None] * frequencies)
        ours = torch.view_as_complex(rotation[:, start:stop].double())
        assert (ours - exact).abs().max() < 1e-7  # one rounding to float32
