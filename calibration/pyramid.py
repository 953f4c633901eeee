"""Pictures at reduced size, and what is read from them. Pixel centres lie at whole numbers on every level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.frame import Pixels, gray

Level = NDArray[np.float32]  # (h, w), gray 0..255
Complexes = NDArray[np.complexfloating[Any, Any]]  # places x + iy
Floats = NDArray[np.floating[Any]]


def level_place(place: complex, factor: int) -> complex:
    """Return a place in the pixels of a level reduced by factor."""
    return (place + (0.5 + 0.5j)) / factor - (0.5 + 0.5j)


def reduced(level: Pixels, factor: int) -> Level:
    """Return block means of factor x factor pixels as float32, without incomplete blocks at the right and bottom."""
    return np.asarray(_block_means(level, factor), np.float32)


def _block_means(level: Pixels, factor: int) -> NDArray[Any]:
    if factor == 1:
        return level
    height, width = level.shape[0] // factor, level.shape[1] // factor
    whole = level[: height * factor, : width * factor]
    return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)


def fine_level(pixels: Pixels, bit_depth: int, factor: int) -> Level:
    """Return the frame as gray float32 0..255, reduced by factor and lightly smoothed."""
    full_scale = 1.0 if pixels.dtype == np.float32 else float(2**bit_depth - 1)
    smooth = cv2.getGaussianKernel(5, 1.0, cv2.CV_32F)
    level = _block_means(gray(pixels), factor)  # in the frame's own type: scaled, converted and smoothed in one pass
    scaled = cv2.sepFilter2D(level, cv2.CV_32F, smooth * (255 / full_scale), smooth, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(scaled, np.float32)


def gradient(level: Level) -> tuple[Level, Level]:
    """Return d/dx and d/dy, gray levels / px."""
    x = cv2.Sobel(level, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    y = cv2.Sobel(level, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


@dataclass(frozen=True, slots=True)
class Slopes:
    """The gradient of a level, gray levels / px."""

    x: Level
    y: Level
    strength: Level

    @property
    def strong(self) -> float:
        """The 99th percentile of the strength."""
        place = int(0.99 * (self.strength.size - 1))
        return float(np.partition(self.strength, place, axis=None)[place])


def slopes(level: Level) -> Slopes:
    """Return the gradient and its size."""
    x, y = gradient(level)
    return Slopes(x, y, np.hypot(x, y))


def sample(level: Floats, points: Complexes) -> Floats:
    """Return the picture at points (..., P), x + iy, bilinear, edge pixels repeated outside.

    P: at most 32766, what OpenCV takes in a row.
    """
    if points.size == 0:
        return np.zeros(points.shape, np.float32)
    pairs = np.ascontiguousarray(points, np.complex64).view(np.float32).reshape(-1, points.shape[-1], 2)
    values = cv2.remap(level, pairs, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return np.asarray(values, np.float32).reshape(points.shape)


def in_frame(level: Level, place: Complexes) -> NDArray[np.bool_]:
    """Return which places lie inside the picture."""
    height, width = level.shape
    across = (place.real >= 0) & (place.real <= width - 1)
    return np.asarray(across & (place.imag >= 0) & (place.imag <= height - 1))
