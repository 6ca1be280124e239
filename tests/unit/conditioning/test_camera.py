"""Rays of a moving camera: what they are, and which paths are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from diffsynth.conditioning.camera import (
    USUAL_ORIGIN,
    CameraConditioner,
    CameraInputs,
    camera_path,
    moved_poses,
)
from diffsynth.conditioning.conditioner import Geometry
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError, DiffSynthError, UnusedInputError
from diffsynth.pipelines.unread import refuse_unreadable

HEIGHT, WIDTH = 16, 24
GEOMETRY = Geometry(
    num_videos=2, num_frames=5, height=HEIGHT, width=WIDTH, latent_channels=16, latent_frames=2,
    latent_height=2, latent_width=3,
)  # fmt: skip


CAMERA = frozenset({"camera"})
CPU = torch.device("cpu")


@dataclass
class Parts:
    adapters: frozenset[str] = CAMERA
    device: torch.device = CPU

    @property
    def facts(self) -> DiTFacts:
        return DiTFacts(adapters=self.adapters)


def pose(x: float = 0.0, y: float = 0.0, z: float = 0.0, turn: float = 0.0) -> list[float]:
    """A camera that stands at (x, y, z), turned about its vertical axis by ``turn`` radians."""
    rotation = [[math.cos(turn), 0, -math.sin(turn)], [0, 1, 0], [math.sin(turn), 0, math.cos(turn)]]
    rows = [[*row, -sum(a * b for a, b in zip(row, (x, y, z), strict=True))] for row in rotation]
    return [*USUAL_ORIGIN[:7], *(number for row in rows for number in row)]


def test_the_middle_of_a_still_picture_looks_straight_ahead() -> None:
    rays = camera_path([pose()], HEIGHT, WIDTH).rays(0)
    assert torch.allclose(rays[3:].norm(dim=0), torch.ones(HEIGHT, WIDTH))
    assert (rays[:3] == 0).all()  # the first camera is the centre of the world
    middle = rays[3:, HEIGHT // 2 - 1 : HEIGHT // 2 + 1, WIDTH // 2 - 1 : WIDTH // 2 + 1].mean(dim=(1, 2))
    assert torch.allclose(middle[:2], torch.zeros(2), atol=1e-6) and middle[2] > 0.99


def test_a_ray_is_a_line_through_the_camera() -> None:
    rays = camera_path([pose(), pose(x=0.5, y=-0.25, z=2.0, turn=0.3)], HEIGHT, WIDTH).rays(1)
    centre = torch.tensor([0.5, -0.25, 2.0])[:, None, None].expand(3, HEIGHT, WIDTH)
    assert torch.allclose(rays[:3], torch.linalg.cross(centre, rays[3:], dim=0), atol=1e-6)
    assert torch.allclose(rays[3:].norm(dim=0), torch.ones(HEIGHT, WIDTH), atol=1e-6)
    # turned by 0.3 about the vertical: what was straight ahead leans by sin(0.3)
    middle = rays[3:, HEIGHT // 2 - 1 : HEIGHT // 2 + 1, WIDTH // 2 - 1 : WIDTH // 2 + 1].mean(dim=(1, 2))
    assert abs(abs(float(middle[0])) - math.sin(0.3)) < 0.01


def test_only_the_way_from_the_first_camera_counts() -> None:
    near = camera_path([pose(x=1.0), pose(x=1.5)], HEIGHT, WIDTH)
    far = camera_path([pose(x=11.0), pose(x=11.5)], HEIGHT, WIDTH)
    assert torch.allclose(near.rays(1), far.rays(1), atol=1e-6)
    assert not torch.allclose(near.rays(1), near.rays(0), atol=1e-3)


def test_four_frames_of_a_ray_stand_beside_each_other() -> None:
    path = camera_path(moved_poses("Left", 9), HEIGHT, WIDTH)
    assert path.shape == (24, 3, HEIGHT, WIDTH)
    first = path.latent_frame(0).view(6, 4, HEIGHT, WIDTH)
    assert all(torch.equal(first[:, i], path.rays(0)) for i in range(4))
    last = path.latent_frame(2).view(6, 4, HEIGHT, WIDTH)
    assert all(torch.equal(last[:, i], path.rays(5 + i)) for i in range(4))


@pytest.mark.parametrize("direction", ["Left", "Right", "Up", "Down", "In", "Out", "LeftUp", "RightDownOut"])
def test_each_direction_goes_its_own_way(direction: str) -> None:
    made = {name: camera_path(moved_poses(name, 5), HEIGHT, WIDTH).rays(4)
            for name in ("Left", "Right", "Up", "Down", "In", "Out", "LeftUp", "RightDownOut")}  # fmt: skip
    assert not any(torch.allclose(made[direction], rays) for name, rays in made.items() if name != direction)
    still = camera_path(moved_poses(direction, 5, speed=0), HEIGHT, WIDTH)
    assert torch.equal(still.rays(4), still.rays(0))


def test_a_list_of_poses_is_the_direction_that_it_spells() -> None:
    conditioner = CameraConditioner()
    told = CameraInputs(camera_control_direction="LeftUp", camera_control_speed=0.1)
    spelled = CameraInputs(camera_control_poses=moved_poses("LeftUp", 5, speed=0.1))
    paths = []
    for inputs in (told, spelled):
        assert conditioner.applies(inputs, Parts())  # type: ignore[arg-type]
        ((name, (path, negative)),) = conditioner.encode(inputs, GEOMETRY, Parts()).adapters.items()  # type: ignore[arg-type]
        assert name == "camera" and negative is None
        paths.append(path)
    assert torch.equal(paths[0].rays(4), paths[1].rays(4))


@pytest.mark.parametrize("word", ["left", "LEFT", "leftup", "LeftUP"])
def test_a_direction_is_the_same_in_any_case(word: str) -> None:
    named = "Left" if word.lower() == "left" else "LeftUp"
    inputs = CameraInputs(camera_control_direction=word)
    assert CameraConditioner().applies(inputs, Parts(CAMERA))  # type: ignore[arg-type]
    assert moved_poses(word, 5) == moved_poses(named, 5)


WRONG: list[tuple[dict[str, Any], frozenset[str], type[DiffSynthError], str]] = [
    ({}, CAMERA, ArgumentError, "follows a camera and none was given; give camera_control_dir"),
    ({"camera_control_direction": "lefty"}, CAMERA, ArgumentError, "is 'lefty'; give Left, Right"),
    ({"camera_control_direction": "UpLeft"}, CAMERA, ArgumentError, "joined in this order"),
    ({"camera_control_direction": ""}, CAMERA, ArgumentError, "camera_control_direction is ''"),
    (
        {"camera_control_direction": "Left", "camera_control_speed": math.inf},
        CAMERA, ArgumentError, "camera_control_speed is inf",
    ),
    (
        {"camera_control_direction": "Left", "camera_control_origin": (0, 1, 1)},
        CAMERA, ArgumentError, r"camera_control_origin is \[0, 1, 1\]; give 19 numbers",
    ),
    (
        {"camera_control_poses": [pose(), [0.0] * 19]},
        CAMERA, ArgumentError, "pose 1 of camera_control_poses has focal lengths 0.0",
    ),
    (
        {"camera_control_poses": [pose()] * 5, "camera_control_direction": "Left"},
        CAMERA, ArgumentError, "camera_control_poses replaces camera_control_direction",
    ),
    (
        {"camera_control_poses": [pose()] * 5, "camera_control_speed": 0.5},
        CAMERA, ArgumentError, "camera_control_poses replaces camera_control_speed",
    ),
    ({"camera_control_direction": "Left"}, frozenset(), UnusedInputError, "needs a Fun Control-Camera model"),
    ({"camera_control_speed": 0.5}, frozenset(), UnusedInputError, "camera_control_speed was given"),
    ({"camera_control_poses": [pose()]}, frozenset(), UnusedInputError, "camera_control_poses was given"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "adapters", "kind", "words"), WRONG)
def test_wrong_paths_are_told(
    arguments: dict[str, Any], adapters: frozenset[str], kind: type[DiffSynthError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        refuse_unreadable(arguments, Parts(adapters).facts)
        CameraConditioner().applies(CameraInputs(**arguments), Parts(adapters))  # type: ignore[arg-type]


def test_as_many_poses_as_frames() -> None:
    inputs = CameraInputs(camera_control_poses=[pose()] * 4)
    with pytest.raises(ArgumentError, match="has 4 poses and num_frames is 5"):
        CameraConditioner().check(inputs, GEOMETRY, Parts())  # type: ignore[arg-type]


def test_without_a_camera_model_nothing_is_done() -> None:
    assert not CameraConditioner().applies(CameraInputs(), Parts(frozenset()))  # type: ignore[arg-type]
