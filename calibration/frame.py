"""One picture as a camera delivered it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.float32]
"""(H, W) gray or (H, W, 3) RGB. uint8 and uint16 count up to 2**bit_depth - 1, float32 is reflectance 0..1."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Pixels that belong to us (copied out of the driver's buffer) and what is known about their capture."""

    pixels: Pixels
    frame_id: int  # the camera's own counter: advances by 1, a gap is a lost frame
    trigger_id: int  # which trigger this answers, counted by the agent from 1
    exposed_ns: int  # camera clock, start of exposure; 0 where the camera does not tell
    received_ns: int  # host clock, time.monotonic_ns() when the pixels were ours
    bit_depth: int = 8
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON values: serial number, exposure, simulated truth

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def reflectance(pixels: Pixels, bit_depth: int) -> NDArray[np.float32]:
    """Return pixels as float32 in 0..1, full scale of the sensor at 1."""
    if pixels.dtype == np.float32:
        return pixels.astype(np.float32, copy=False)
    return pixels.astype(np.float32) / np.float32(2**bit_depth - 1)


def gray(pixels: Pixels) -> Pixels:
    """Return (H, W) of the same type: RGB weighted as in ITU-R BT.601, gray as it is."""
    if pixels.ndim == 2:
        return pixels
    weighted: NDArray[Any] = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return weighted
