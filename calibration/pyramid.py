"""Pictures at reduced size, and what is read from them. Pixel centres lie at whole numbers on every level."""

from __future__ import annotations

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
    if factor == 1:
        return np.asarray(level, np.float32)
    height, width = level.shape[0] // factor, level.shape[1] // factor
    whole = level[: height * factor, : width * factor]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA), np.float32)


def fine_level(pixels: Pixels, bit_depth: int, factor: int) -> Level:
    """Return the frame as gray float32 0..255, reduced by factor and lightly smoothed."""
    level = reduced(gray(pixels), factor)
    full_scale = 1.0 if pixels.dtype == np.float32 else float(2**bit_depth - 1)
    level = level * np.float32(255 / full_scale)
    return np.asarray(cv2.GaussianBlur(level, (5, 5), 1.0, borderType=cv2.BORDER_REPLICATE))


def gradient(level: Level) -> tuple[Level, Level]:
    """Return d/dx and d/dy, gray levels / px."""
    x = cv2.Sobel(level, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    y = cv2.Sobel(level, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def sample(level: Floats, points: Complexes) -> Floats:
    """Return the picture at points (P, ...), x + iy, bilinear, edge pixels repeated outside."""
    if points.size == 0:
        return np.zeros(points.shape, np.float32)
    pairs = np.ascontiguousarray(points, np.complex64).view(np.float32).reshape(points.shape[0], -1, 2)
    values = cv2.remap(level, pairs, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return np.asarray(values, np.float32).reshape(points.shape)


def in_frame(level: Level, place: Complexes) -> NDArray[np.bool_]:
    """Return which places lie inside the picture."""
    height, width = level.shape
    across = (place.real >= 0) & (place.real <= width - 1)
    return np.asarray(across & (place.imag >= 0) & (place.imag <= height - 1))
