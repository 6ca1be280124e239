"""Pictures that tests recognise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

NUM_FRAMES = 31


def numbered_frame(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture that tells its number: five grey bars, one per bit."""
    bits = [number >> bit & 1 for bit in range(5)]
    return (
        np.repeat(np.kron(bits, np.ones((height, width // 5 + 1)))[:, :width, None], 3, axis=2).astype("u1")
        * 255
    )


def number_of(image: Image.Image) -> int:
    row = np.asarray(image.convert("L"))[image.height // 2]
    bar = len(row) // 5 + 1
    return sum(int(row[min(bar * bit + bar // 2, len(row) - 1)] > 127) << bit for bit in range(5))


def numbered(count: int = NUM_FRAMES) -> Iterator[np.ndarray]:
    return (numbered_frame(number) for number in range(count))


def noise(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 255 * (1 - x)], axis=2).astype(np.uint8)


def write_odd(path: Path, options: str, frames: Iterable[np.ndarray] | None = None) -> Path:
    """A video with options of x264, such as "sar=4/3", of frames (H, W, 3)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"x264-params": options})
        pictures = list(frames or [noise(seed=number) for number in range(5)])
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if options.startswith("sar="):
            stream.codec_context.sample_aspect_ratio = Fraction(options[4:])
        for frame in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
