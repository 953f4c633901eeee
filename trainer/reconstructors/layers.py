"""What the convolutional networks have in common: how often an image is halved, and with how many filters."""

from __future__ import annotations

import math

from trainer.errors import TrainingError

FEWEST_FILTERS, FIRST_FILTERS, MOST_FILTERS = 4, 16, 128
SMALLEST_MAP = 8


def filters(height: int, width: int, what: str, *, thin: bool = False) -> list[int]:
    """Return the filters of each halving, until the map has 8 px or less on its shorter side.

    They double from 16 on, up to 128; thin: they double up to 128, so that every layer costs about the same.

    Raises TrainingError if the size cannot be halved that often.
    """
    depth = max(2, math.ceil(math.log2(min(height, width) / SMALLEST_MAP)))
    if height % 2**depth or width % 2**depth:
        raise TrainingError(
            f"the {what} halves its input {depth} times, {width}x{height} found: use multiples of {2**depth}"
        )
    if thin:
        return [max(MOST_FILTERS >> (depth - 1 - i), FEWEST_FILTERS) for i in range(depth)]
    return [min(FIRST_FILTERS * 2**i, MOST_FILTERS) for i in range(depth)]
