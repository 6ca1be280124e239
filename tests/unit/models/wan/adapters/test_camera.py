"""Rays are added to the patches, frame by frame, in training as in generation."""

from __future__ import annotations

import pytest
import torch

from diffsynth.conditioning.camera import CameraPath, CameraRays, camera_path, moved_poses
from diffsynth.errors import ArgumentError, ConfigurationError
from diffsynth.models.wan.adapters.camera import CameraAdapter, CameraConfig
from tests.toys import TOY_DIT

DIM, HEIGHT, WIDTH = 48, 32, 48


@pytest.fixture
def adapter() -> CameraAdapter:
    return CameraAdapter(CameraConfig(dim=DIM))


@pytest.fixture
def path() -> CameraPath:
    return camera_path(moved_poses("RightUp", 9), HEIGHT, WIDTH)


def grid_of(x: torch.Tensor) -> torch.Tensor:
    """As the DiT hands it over: a view of the sequence (B, L, D)."""
    return x.transpose(1, 2).reshape(x.shape[0], DIM, 3, 2, 3)


def test_training_and_generation_give_the_same(adapter: CameraAdapter, path: CameraPath) -> None:
    x = torch.randn(2, 18, DIM)
    trained = adapter.embed(grid_of(x.clone()), path, None)
    with torch.no_grad():
        made = adapter.embed(grid_of(x.clone()), path, None)
    assert torch.equal(trained, made) and trained.requires_grad
    assert (made - grid_of(x)).abs().amax(dim=(1, 3, 4)).min() > 1e-2  # every frame of every sample
    assert made.flatten(2).transpose(1, 2).is_contiguous()  # blocks work on rows of D


def test_a_path_is_its_rays(adapter: CameraAdapter, path: CameraPath) -> None:
    values = torch.stack([path.latent_frame(index) for index in range(3)], dim=2)
    rays = CameraRays(values=values)
    assert rays.shape == path.shape == (24, 3, HEIGHT, WIDTH)
    x = torch.zeros(1, 18, DIM)
    assert torch.equal(adapter.embed(grid_of(x), rays, None), adapter.embed(grid_of(x), path, None))


def test_rays_of_another_video_are_told(adapter: CameraAdapter, path: CameraPath) -> None:
    x = torch.zeros(1, 2 * 6, DIM).transpose(1, 2).reshape(1, DIM, 2, 2, 3)
    with pytest.raises(ArgumentError, match=r"expected \(24, 2, 32, 48\), the length and size of the video"):
        adapter.embed(x, path, None)


def test_an_adapter_of_another_patch_is_refused(adapter: CameraAdapter) -> None:
    adapter.join(TOY_DIT)
    with pytest.raises(ConfigurationError, match="load the pair that belongs together"):
        CameraAdapter(CameraConfig(dim=DIM, kernel_size=(4, 4))).join(TOY_DIT)
