"""Absolute values and kinks rounded off, so that a search by their slopes goes the same way in every engine.

Where a slope jumps from -1 to 1 or from 0 to 1, the last bit of a number, another one in every engine, decides which of
two ways a search takes. Huber 1964 for the absolute value; the slope of a rectifier fades in likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def length(difference: Tensor, flat: float) -> Tensor:
    """Return |difference|, a parabola below flat (Huber's loss over flat); flat 0: as it is."""
    size = difference.abs()
    if flat == 0.0:
        return size
    return torch.where(size > flat, size - 0.5 * flat, 0.5 / flat * difference * difference)


def slope(difference: Tensor, flat: float) -> Tensor:
    """Return the gradient of `length`."""
    return torch.sign(difference) if flat == 0.0 else (difference / flat).clamp(-1.0, 1.0)


def opened(before: Tensor, width: float) -> Tensor:
    """Return the slope of a rectifier at its input, rising from 0 to 1 within width round zero; width 0: a step."""
    return (before > 0.0).to(before.dtype) if width == 0.0 else (before / width + 0.5).clamp(0.0, 1.0)
