"""What a user may write for an option of several commands."""

from __future__ import annotations

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """A number in a range. Raises click.BadParameter for NaN, which click finds in every range, and for infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return float(number)


def parsed_size(text: str) -> tuple[int, int]:
    """Return (height, width) px of "256" or "256x384". Raises click.BadParameter."""
    height, _, width = text.lower().partition("x")
    if not height.isdecimal() or (width and not width.isdecimal()):
        raise click.BadParameter(
            f"{text!r} found, need SIDE or HEIGHTxWIDTH such as 256 or 256x384", param_hint="--size"
        )
    return int(height), int(width or height)
