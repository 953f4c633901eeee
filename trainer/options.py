"""What a user may write for an option of several commands."""

from __future__ import annotations

import click


def parsed_size(text: str) -> tuple[int, int]:
    """Return (height, width) px of "256" or "256x384". Raises click.BadParameter."""
    height, _, width = text.lower().partition("x")
    if not height.isdecimal() or (width and not width.isdecimal()):
        raise click.BadParameter(
            f"{text!r} found, need SIDE or HEIGHTxWIDTH such as 256 or 256x384", param_hint="--size"
        )
    return int(height), int(width or height)
