"""Optical flow as colours: the hue tells where to, the saturation how far.

Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow" (2007), the colour wheel of its
figures; VACE's flow videos are drawn with it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

# Steps of the wheel from one pure colour to the next; people see fine differences in some hues only.
WHEEL = (
    ((255, 0, 0), 15),
    ((255, 255, 0), 6),
    ((0, 255, 0), 4),
    ((0, 255, 255), 11),
    ((0, 0, 255), 13),
    ((255, 0, 255), 6),
)


def flow_colours(flow: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draw motion; the longest vector of a frame has full colour, none is white.

    Args:
        flow: (H, W, 2) pixels to the right and down.

    Returns:
        (H, W, 3) uint8.
    """
    length = np.hypot(flow[..., 0], flow[..., 1])
    share = length / max(float(length.max()), 1e-5)
    wheel = _wheel()
    position = (np.arctan2(-flow[..., 1], -flow[..., 0]) / np.pi + 1) / 2 * (len(wheel) - 1)
    low = np.floor(position).astype(np.int64)
    part = (position - low)[..., None]
    colour = (1 - part) * wheel[low] + part * wheel[(low + 1) % len(wheel)]
    drawn: NDArray[np.uint8] = np.floor(255 * (1 - share[..., None] * (1 - colour))).astype(np.uint8)
    return drawn


@cache
def _wheel() -> NDArray[np.float64]:
    """(55, 3) in [0, 1]."""
    pure = [np.array(colour, np.float64) / 255 for colour, _ in WHEEL]
    rows = []
    for index, (_, count) in enumerate(WHEEL):
        start, stop = pure[index], pure[(index + 1) % len(pure)]
        rows += [start + (stop - start) * step / count for step in range(count)]
    return np.array(rows)
