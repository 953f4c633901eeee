"""Numbers as the reports for people write them: on axes and beside a threshold."""

from __future__ import annotations

import math


def number(value: float, beside: float | None = None) -> str:
    """Return a score with four significant digits, or as many more as tell it from the number beside it."""
    for digits in range(4, 17):
        text = f"{value:.{digits}g}"
        if beside is None or beside == value or text != f"{beside:.{digits}g}":
            break
    return text


def round_numbers(low: float, high: float) -> list[float]:
    """Return three to seven multiples of 1, 2 or 5 times a power of ten between low and high (low < high)."""
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(power * factor for factor in (5, 2, 1) if (high - low) / (power * factor) >= 3)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
