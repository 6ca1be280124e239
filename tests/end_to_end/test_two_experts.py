"""The tiny Wan in both roles of a pair draws what it draws alone, and a change of one expert counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffsynth import WanVideoPipeline
from diffsynth.tiny import tiny_folder
from tests.pairs import DIT, ROLES, write_tiny_pair

pytestmark = pytest.mark.skipif(
    not (tiny_folder() / DIT).is_file(), reason="the tiny Wan's weights are not in this tree"
)
PROMPT = "a red circle moves right on a black background"
CALL = {"seed": 3, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> WanVideoPipeline:
    folder = write_tiny_pair(tmp_path_factory.mktemp("pair"))
    return WanVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32, device="cpu")


def test_one_network_in_both_roles_draws_what_it_draws_alone(pair: WanVideoPipeline) -> None:
    alone = WanVideoPipeline.from_pretrained(tiny_folder(), torch_dtype=torch.float32, device="cpu")
    assert [Path(pair.parts.sources[name]).parent.name for name in ("dit", "dit_low_noise")] == list(ROLES)
    expected = alone(PROMPT, **CALL)
    for boundary in (0.0, 0.875, 1.0):
        assert torch.equal(pair(PROMPT, **CALL, switch_DiT_boundary=boundary), expected), boundary
    pair.enable_vram_management(num_persistent_param_in_dit=0)
    assert torch.equal(pair(PROMPT, **CALL), expected)
    pair.disable_vram_management()


def test_guidance_is_that_of_the_expert_which_answers(pair: WanVideoPipeline) -> None:
    def made(high: float, low: float, boundary: float) -> Tensor:
        video = pair(PROMPT, **CALL, cfg_scale=high, cfg_scale_low_noise=low, switch_DiT_boundary=boundary)
        assert isinstance(video, Tensor)
        return video

    assert torch.equal(made(2.0, 5.0, 0.0), made(2.0, 1.0, 0.0)), "nothing below the boundary"
    both = made(2.0, 5.0, 0.875)
    assert not torch.equal(both, made(5.0, 5.0, 0.875)) and not torch.equal(both, made(2.0, 2.0, 0.875))
