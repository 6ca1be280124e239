"""Fun Control-Camera: how the camera moves, as the ray of light that every pixel of every frame sees.

Letters: B batch, F pixel frames, T latent frames, H W height and width in pixels.

A pose is a row of 19 numbers, as in RealEstate10K's files: time; focal lengths fx, fy and centre cx, cy as
shares of width and height; two zeros; the first three rows of the 4 x 4 matrix from world to camera. A ray is
six numbers (Pluecker): its moment, camera centre x direction, then its direction.
Source: wan_numerics 10.4; DiffSynth-Studio ``models/wan_video_camera_controller.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from diffsynth.conditioning.argument import SOURCE, argument, names_read
from diffsynth.conditioning.conditioner import Components, Geometry
from diffsynth.conditioning.conditions import Contribution
from diffsynth.conditioning.facts import DiTFacts
from diffsynth.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

POSE_NUMBERS = 19
MATRIX = 7  # where the matrix begins in a pose
SOURCE_RATIO = 1280 / 720  # of the pictures whose focal lengths a pose tells
FRAMES_PER_LATENT = 4
UNREAD = "no loaded model reads it: it needs a Fun Control-Camera model"
USUAL_SPEED = 1 / 54  # per frame
USUAL_ORIGIN = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
# direction -> (place in a pose, sign); sideways and up shift directions of sight, in and out the centre
MOVES = {"Left": (9, 1), "Right": (9, -1), "Up": (13, 1), "Down": (13, -1), "In": (18, -1), "Out": (18, 1)}
DIRECTION = re.compile(r"(left|right)?(up|down)?(in|out)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class CameraPath:
    """What the camera adapter is given: a camera frame by frame, from which rays are made when needed."""

    camera_to_world: Tensor  # (F, 3, 4) float32, relative to the first frame
    intrinsics: Tensor  # (F, 4) float64: fx, fy, cx, cy in pixels
    height: int  # pixels
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Numbers of a pixel, T, H, W."""
        latent_frames = (len(self.intrinsics) - 1) // FRAMES_PER_LATENT + 1
        return 6 * FRAMES_PER_LATENT, latent_frames, self.height, self.width

    def rays(self, frame: int) -> Tensor:
        """Six numbers of each pixel, (6, H, W) float32 on the device of the path, for one pixel frame.

        Directions have length 1 in the camera's own axes; a matrix that is no rotation stretches them, as in
        the source.
        """
        import torch

        fx, fy, cx, cy = self.intrinsics[frame].tolist()
        device = self.camera_to_world.device
        x = (torch.arange(self.width, dtype=torch.float32, device=device) + 0.5 - cx) / fx
        y = (torch.arange(self.height, dtype=torch.float32, device=device) + 0.5 - cy) / fy
        size = (self.height, self.width)
        sight = torch.stack([x.expand(size), y[:, None].expand(size), x.new_ones(size)])
        matrix = self.camera_to_world[frame]
        # No matrix product: GPUs may round its factors to 10 bits.
        directions = (matrix[:, :3, None, None] * (sight / sight.norm(dim=0))).sum(1)
        centre = matrix[:, 3, None, None].expand_as(directions)
        return torch.cat([torch.linalg.cross(centre, directions, dim=0), directions])

    def latent_frame(self, index: int) -> Tensor:
        """Rays of the pixel frames of one latent frame, (1, 24, H, W): six numbers, each of four frames.

        The first latent frame stands for the first pixel frame alone, which counts four times.
        """
        import torch

        first = index * FRAMES_PER_LATENT - (FRAMES_PER_LATENT - 1)
        frames = [self.rays(max(0, first + i)) for i in range(FRAMES_PER_LATENT)]
        return torch.stack(frames, dim=1).flatten(0, 1)[None]

    def to(self, device: torch.device) -> CameraPath:
        """Return the path with its numbers on ``device``, where rays are then made."""
        return CameraPath(
            camera_to_world=self.camera_to_world.to(device), intrinsics=self.intrinsics,
            height=self.height, width=self.width,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CameraRays:
    """Ready-made rays in place of a `CameraPath`; on the host, because all of a video's are large."""

    values: Tensor  # (B or 1, 24, T, H, W)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Numbers of a pixel, T, H, W."""
        _, numbers, frames, height, width = self.values.shape
        return numbers, frames, height, width

    def latent_frame(self, index: int) -> Tensor:
        """Rays of one latent frame, (B or 1, 24, H, W)."""
        return self.values[:, :, index]


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraInputs:
    """Where the camera goes: a direction, or a list of poses."""

    camera_control_direction: str | None = argument(
        None,
        help="Of a Fun Control-Camera model: Left, Right, Up, Down, In, Out, or joined, such as LeftUp.",
        kind="text", scope="clip", group=SOURCE, unread=UNREAD,
    )  # fmt: skip
    camera_control_speed: float = argument(
        USUAL_SPEED, help="How far the camera goes from one frame to the next; 1/54 = 0.0185.",
        kind="number", scope="clip", unit="per frame", group=SOURCE, unread=UNREAD,
    )  # fmt: skip
    camera_control_origin: Sequence[float] = argument(
        USUAL_ORIGIN, help="Pose of the first frame, 19 numbers.", kind="numbers", scope="clip",
        unread=UNREAD,
    )  # fmt: skip
    camera_control_poses: Sequence[Sequence[float]] | None = argument(
        None, help="One pose per frame, in place of `camera_control_direction`.", kind="numbers",
        scope="clip", unread=UNREAD,
    )  # fmt: skip


class CameraConditioner:
    """Poses of a moving camera for the camera adapter; no encoder."""

    Inputs: ClassVar[type] = CameraInputs
    encoder: ClassVar[str | None] = None

    def reads(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset(names_read([CameraInputs])) if "camera" in facts.adapters else frozenset()

    def needs(self, facts: DiTFacts) -> frozenset[str]:
        return frozenset({"camera_control_direction"} if "camera" in facts.adapters else ())

    def applies(self, inputs: CameraInputs, parts: Components) -> bool:
        given = _given(inputs)
        if not self.reads(parts.facts):
            return False
        direction, poses = inputs.camera_control_direction, inputs.camera_control_poses
        if poses is not None:
            if len(given) > 1:
                raise ArgumentError(f"camera_control_poses replaces {' and '.join(given[:-1])}; give one.")
            for number, pose in enumerate(poses):
                _check_pose(pose, f"pose {number} of camera_control_poses")
            return True
        if direction is None:
            raise ArgumentError(
                "This model follows a camera and none was given; give camera_control_direction= "
                f"({', '.join(MOVES)}, or joined: LeftUp; camera_control_speed=0 stands still) or "
                "camera_control_poses=."
            )
        if not isinstance(direction, str):
            raise ArgumentError(
                f"camera_control_direction is a {type(direction).__name__}; give a word such as 'Left', or "
                "poses as camera_control_poses=."
            )
        if not DIRECTION.fullmatch(direction) or not direction:
            raise ArgumentError(
                f"camera_control_direction is {direction!r}; give {', '.join(MOVES)}, or one of each pair "
                "joined in this order: LeftUp, RightDownIn."
            )
        if not _is_number(inputs.camera_control_speed):
            raise ArgumentError(
                f"camera_control_speed is {inputs.camera_control_speed!r}; give a number (0.01 to 0.03 are "
                "usual)."
            )
        _check_pose(inputs.camera_control_origin, "camera_control_origin")
        return True

    def needs_encoder(self, inputs: CameraInputs, parts: Components) -> bool:
        return False

    def check(self, inputs: CameraInputs, geometry: Geometry, parts: Components) -> None:
        poses = inputs.camera_control_poses
        if poses is not None and len(poses) != geometry.num_frames:
            raise ArgumentError(
                f"camera_control_poses has {len(poses)} poses and num_frames is {geometry.num_frames}; give "
                "one pose per frame."
            )

    def encode(self, inputs: CameraInputs, geometry: Geometry, parts: Components) -> Contribution:
        poses = inputs.camera_control_poses
        if poses is None:
            assert inputs.camera_control_direction is not None
            poses = moved_poses(
                inputs.camera_control_direction, geometry.num_frames,
                speed=inputs.camera_control_speed, origin=inputs.camera_control_origin,
            )  # fmt: skip
        path = camera_path(poses, geometry.height, geometry.width).to(parts.device)
        return Contribution(adapters={"camera": (path, None)})


def moved_poses(
    direction: str,
    num_frames: int,
    *,
    speed: float = USUAL_SPEED,
    origin: Sequence[float] = USUAL_ORIGIN,
) -> list[list[float]]:
    """Return one pose per frame of a camera that goes on evenly: frame k is k times ``speed`` from the first.

    Args:
        direction: names out of `MOVES`, joined, in capitals or not.
        num_frames: pixel frames.
        speed: per frame.
        origin: pose of the first frame.
    """
    words = direction.lower()
    moves = {name: move for name, move in MOVES.items() if name.lower() in words}
    poses = []
    for frame in range(num_frames):
        pose = [float(number) for number in origin]
        for place, sign in moves.values():
            pose[place] += sign * speed * frame
        poses.append(pose)
    return poses


def camera_path(poses: Sequence[Sequence[float]], height: int, width: int) -> CameraPath:
    """Return poses (F rows of 19 numbers) as a path in a picture of ``height`` x ``width`` pixels.

    Focal lengths are those of a picture of 16 : 9, from which the video is cut by its sides or by its top and
    bottom; positions are told from the first frame's camera.
    """
    import torch

    rows = torch.tensor([[float(number) for number in pose] for pose in poses], dtype=torch.float64)
    fx, fy, cx, cy = rows[:, 1:5].unbind(1)
    if width / height < SOURCE_RATIO:
        fx = fx * height * SOURCE_RATIO / width
    else:
        fy = fy * width / SOURCE_RATIO / height
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).expand(len(rows), 1, 4)
    world_to_camera = torch.cat([rows[:, MATRIX:].view(-1, 3, 4), last], dim=1)
    relative = world_to_camera[0] @ torch.linalg.inv(world_to_camera)
    relative[0] = torch.eye(4, dtype=torch.float64)
    return CameraPath(
        camera_to_world=relative[:, :3].float(),
        intrinsics=torch.stack([fx * width, fy * height, cx * width, cy * height], dim=1),
        height=height,
        width=width,
    )


def _given(inputs: CameraInputs) -> list[str]:
    """Names of what differs from its default; poses last."""
    told = {
        "camera_control_direction": inputs.camera_control_direction is not None,
        "camera_control_speed": inputs.camera_control_speed != USUAL_SPEED,
        "camera_control_origin": tuple(inputs.camera_control_origin) != USUAL_ORIGIN,
        "camera_control_poses": inputs.camera_control_poses is not None,
    }
    return [name for name, is_given in told.items() if is_given]


def _check_pose(pose: Sequence[float], name: str) -> None:
    if len(pose) != POSE_NUMBERS or not all(_is_number(number) for number in pose):
        raise ArgumentError(
            f"{name} is {list(pose)!r}; give {POSE_NUMBERS} numbers: time, fx, fy, cx, cy, 0, 0 and the "
            "three rows of the matrix from world to camera."
        )
    if not pose[1] > 0 or not pose[2] > 0:
        raise ArgumentError(f"{name} has focal lengths {pose[1]} and {pose[2]}; give numbers above 0.")


def _is_number(value: object) -> bool:
    import math

    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
