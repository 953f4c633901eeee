"""What several commands of the trainer take as a size."""

from __future__ import annotations

import click
import pytest

from trainer.options import parsed_size


@pytest.mark.parametrize(("text", "size"), [("256", (256, 256)), ("256x384", (256, 384)), ("64X32", (64, 32))])
def test_a_size_is_one_side_or_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert parsed_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "2.5", "²", "256x²"])
def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="need SIDE or HEIGHTxWIDTH"):
        parsed_size(text)
