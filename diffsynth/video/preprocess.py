"""Control videos out of ordinary ones: grey, lines, motion, depth, poses.

Frames come in and go out one by one, uint8 (H, W, 3), so that a video of any length takes the memory of a few
frames. OpenCV, transformers and rtmlib are imported when a task first needs them; the extra ``control`` of
setup.py brings all three.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsynth.errors import ArgumentError, MissingPackageError, install_extra
from diffsynth.video.flow_colours import flow_colours
from diffsynth.video.pixels import Frames, as_rgb8, iterate_frames

if TYPE_CHECKING:
    from pathlib import Path

logger = logging.getLogger("diffsynth")

Pixels: TypeAlias = NDArray[np.uint8]  # (H, W, 3)
Step: TypeAlias = Callable[[Pixels], Pixels]
Task: TypeAlias = Callable[[Iterator[Pixels]], Iterator[Pixels]]

# Lower and upper, of gradients in 8 bits. A line begins where the gradient is above the upper one and goes on
# while it is above the lower one.
CANNY_THRESHOLDS = (100.0, 200.0)  # those of VideoX-Fun's control videos
SCRIBBLE_THRESHOLDS = (40.0, 120.0)  # after a blur, which leaves the outlines
# Where a picture is too soft for these: the upper one is a share of its own steepest gradients, above what
# rounding to 8 bits makes (12) and above noise, which is what a blur takes from the median gradient.
PEAK_PERCENTILE, SHARE_OF_PEAK, LEAST_GRADIENT, TIMES_NOISE = 99.9, 0.4, 12.0, 5.0
EMPTY_SHARE = 2e-4  # of the pixels; a frame with fewer drawn ones guides nothing
SCRIBBLE_SIGMA = 2.0  # pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a task may be told besides the frames."""

    model: str | Path | None = None  # of depth and pose: folder of weights, or of depth: a hub id
    download: bool = False  # let missing weights be downloaded; without it nothing uses the network
    device: str = "cpu"
    # of canny and scribble, lower and upper; None: the usual ones, and lower ones where a picture is soft
    thresholds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.thresholds is None:
            return
        low, high = self.thresholds
        if not 0 <= low <= high < math.inf or high <= 0:
            raise ArgumentError(
                f"thresholds are {low:g} and {high:g}; give a lower and an upper one, 0 or more, such as "
                f"{CANNY_THRESHOLDS[0]:g} and {CANNY_THRESHOLDS[1]:g} (lower ones find more lines)."
            )


def preprocess(frames: Frames, task: str, options: Options | None = None) -> Iterator[Pixels]:
    """Yield a control video, frame by frame.

    Args:
        frames: whatever `save_video` takes; all of one size.
        task: one of `TASKS`.
        options: of canny, scribble, depth and pose.

    A warning at the end tells how many frames show (almost) nothing.

    Raises:
        ArgumentError: at once for an unknown task, or options that it does not read.
        MissingPackageError: at once when a package is not installed; says how to install it.
    """
    if task not in TASKS:
        raise ArgumentError(f"task is {task!r}; known: {', '.join(TASKS)}.")
    options = options or Options()
    if task not in WITH_MODEL and replace(options, thresholds=None) != Options():
        raise ArgumentError(
            f"model, download and device are for {' and '.join(WITH_MODEL)}; task {task!r} reads none of "
            "them."
        )
    if task not in WITH_LINES and options.thresholds is not None:
        raise ArgumentError(f"thresholds are for {' and '.join(WITH_LINES)}; task {task!r} reads none.")
    drawn = TASKS[task](options)(as_rgb8(frame, index) for index, frame in enumerate(iterate_frames(frames)))
    return _watched(drawn, task)


def _watched(frames: Iterator[Pixels], task: str) -> Iterator[Pixels]:
    """The same frames; at the end a warning, if some of them are of one colour but for a few pixels."""
    count = num_empty = 0
    for frame in frames:
        count += 1
        num_empty += bool((frame != frame[0, 0]).any(axis=2).mean() < EMPTY_SHARE)
        yield frame
    if num_empty:
        advice = "; lower thresholds find more lines" if task in WITH_LINES else ""
        logger.warning("%s: %d of %d frames show (almost) nothing%s.", task, num_empty, count, advice)


def _each(step: Step) -> Task:
    """A task that sees one frame at a time."""
    return lambda frames: map(step, frames)


def _package(module: str, task: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackageError(module, f"task {task!r}", install_extra("control")) from error


def _grey(options: Options) -> Task:
    """Luma, as three equal channels."""
    return _each(lambda pixels: np.asarray(Image.fromarray(pixels).convert("L").convert("RGB")))


def _canny(options: Options) -> Task:
    """White lines on black where brightness jumps."""
    cv2 = _package("cv2", "canny")

    def step(pixels: Pixels) -> Pixels:
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        return _lines(cv2.Canny(grey, *_thresholds(cv2, grey, CANNY_THRESHOLDS, options)))

    return _each(step)


def _scribble(options: Options) -> Task:
    """Thick outlines: small detail is blurred away first."""
    cv2 = _package("cv2", "scribble")
    brush = np.ones((3, 3), np.uint8)

    def step(pixels: Pixels) -> Pixels:
        blurred = cv2.GaussianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (0, 0), SCRIBBLE_SIGMA)
        lines = cv2.Canny(blurred, *_thresholds(cv2, blurred, SCRIBBLE_THRESHOLDS, options))
        return _lines(cv2.dilate(lines, brush))

    return _each(step)


def _thresholds(
    cv2: Any, grey: NDArray[np.uint8], usual: tuple[float, float], options: Options
) -> tuple[float, float]:
    """The caller's, or the usual ones, lowered in one proportion where the picture is soft."""
    if options.thresholds is not None:
        return options.thresholds
    smooth = cv2.GaussianBlur(grey, (0, 0), SCRIBBLE_SIGMA)
    gradient, left = (
        np.abs(cv2.Sobel(each, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(each, cv2.CV_32F, 0, 1))
        for each in (grey, smooth)
    )
    peak, noise = np.percentile(gradient, PEAK_PERCENTILE), max(0.0, np.median(gradient) - np.median(left))
    upper = min(usual[1], max(LEAST_GRADIENT, SHARE_OF_PEAK * peak, TIMES_NOISE * noise))
    return usual[0] * upper / usual[1], float(upper)


def _lines(drawn: NDArray[np.uint8]) -> Pixels:
    return np.repeat(drawn[:, :, None], 3, axis=2)


def _flow(options: Options) -> Task:
    """Motion since the frame before, as colours; the first frame shows those of the second.

    VACE was taught with the flow of a network (RAFT), in the same colours; this is OpenCV's DIS.
    """
    cv2 = _package("cv2", "flow")
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def colours(frames: Iterator[Pixels]) -> Iterator[Pixels]:
        before: NDArray[np.uint8] | None = None
        is_first = True
        for pixels in frames:
            grey: NDArray[np.uint8] = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
            if before is not None:
                drawn = flow_colours(search.calc(before, grey, None))
                yield from [drawn, drawn] if is_first else [drawn]
                is_first = False
            before = grey
        if is_first and before is not None:
            yield flow_colours(np.zeros((*before.shape, 2), np.float32))  # a picture: nothing moves

    return colours


def _depth(options: Options) -> Task:
    """Near is white, far is black, each frame over its own range, as VACE's own control videos."""
    transformers = _package("transformers", "depth")
    torch = _package("torch", "depth")
    if options.model is None:
        raise ArgumentError(
            "task 'depth' needs model: a folder of a depth model of transformers, or with download its id on "
            "the hub, such as depth-anything/Depth-Anything-V2-Small-hf."
        )
    place = {"local_files_only": not options.download}
    try:
        reader = transformers.AutoImageProcessor.from_pretrained(options.model, **place)
        network = transformers.AutoModelForDepthEstimation.from_pretrained(options.model, **place)
    except OSError as error:
        raise ArgumentError(
            f"model is {str(options.model)!r}, where no depth model was found; give a folder, or allow the "
            "download."
        ) from error
    network = network.to(options.device).eval()

    def step(pixels: Pixels) -> Pixels:
        with torch.no_grad():
            found = network(**reader(images=Image.fromarray(pixels), return_tensors="pt").to(options.device))
        sizes = [pixels.shape[:2]]
        near = reader.post_process_depth_estimation(found, target_sizes=sizes)[0]["predicted_depth"].float()
        span = (near.max() - near.min()).clamp(min=1e-6)
        levels = ((near - near.min()) / span * 255).round().byte().cpu().numpy()
        return _lines(levels)

    return _each(step)


def _pose(options: Options) -> Task:
    """Bodies, hands and faces as coloured lines on black, in OpenPose's colours."""
    rtmlib = _package("rtmlib", "pose")
    finder = rtmlib.Wholebody(**_pose_models(options), to_openpose=True, device=options.device)

    def step(pixels: Pixels) -> Pixels:
        # The finder and the drawing both take blue first, as OpenCV does.
        points, scores = finder(np.ascontiguousarray(pixels[:, :, ::-1]))
        drawn = rtmlib.draw_skeleton(
            np.zeros_like(pixels), points, scores, openpose_skeleton=True, kpt_thr=0.43
        )
        return np.ascontiguousarray(drawn[:, :, ::-1])

    return _each(step)


def _pose_models(options: Options) -> Mapping[str, Any]:
    """Which networks `rtmlib.Wholebody` uses: two of a folder, or its own, which it downloads."""
    from pathlib import Path

    if options.model is None:
        if options.download:
            return {"mode": "balanced"}
        raise ArgumentError(
            "task 'pose' needs model: a folder with det.onnx (YOLOX) and pose.onnx (RTMW), or download to "
            "let rtmlib fetch its own."
        )
    session = _package("onnxruntime", "pose").InferenceSession
    found: dict[str, Any] = {}
    for part in ("det", "pose"):
        file = Path(options.model) / f"{part}.onnx"
        if not file.is_file():
            raise ArgumentError(f"{file} does not exist; task 'pose' needs det.onnx and pose.onnx there.")
        height, width = session(str(file)).get_inputs()[0].shape[2:]
        if not (isinstance(height, int) and isinstance(width, int)):
            raise ArgumentError(
                f"{file} takes pictures of any size; task 'pose' needs a network exported for one size, as "
                "those of rtmlib are."
            )
        # rtmlib names the detector's size (height, width) and the pose's (width, height)
        found[part], found[f"{part}_input_size"] = (
            str(file), (height, width) if part == "det" else (width, height)
        )  # fmt: skip
    return found


TASKS: Mapping[str, Callable[[Options], Task]] = {
    "grey": _grey,
    "canny": _canny,
    "scribble": _scribble,
    "flow": _flow,
    "depth": _depth,
    "pose": _pose,
}
WITH_MODEL = ("depth", "pose")
WITH_LINES = ("canny", "scribble")
