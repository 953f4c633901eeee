"""What several commands of the trainer take as a size."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from trainer.__main__ import commands
from trainer.options import parsed_size


@pytest.mark.parametrize(("text", "size"), [("256", (256, 256)), ("256x384", (256, 384)), ("64X32", (64, 32))])
def test_a_size_is_one_side_or_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert parsed_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "2.5", "²", "256x²"])
def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="need SIDE or HEIGHTxWIDTH"):
        parsed_size(text)


def number_options() -> list[tuple[str, click.Option]]:
    """Return every option of every command that takes a number with a fraction."""
    return [
        (name, option)
        for name, command in commands.commands.items()
        for option in command.params
        if isinstance(option.type, click.types.FloatParamType)
    ]


def test_the_options_that_take_a_fraction_are_found() -> None:
    found = {(name, option.opts[0]) for name, option in number_options()}
    assert {("fit", "--takt-ms"), ("fit", "--false-reject-rate"), ("fit", "--gamma"), ("race", "--overkill")} <= found
    assert ("fit", "--sparsity") in found


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize(("name", "option"), number_options(), ids=lambda given: getattr(given, "name", given))
def test_what_is_no_number_is_wrong_usage_before_anything_is_read(name: str, option: click.Option, value: str) -> None:
    required = {"fit": ["--recipe", "never.recipe"], "race": [] if option.name == "takt_ms" else ["--takt-ms", "50"]}
    answer = CliRunner().invoke(commands, [name, "nowhere", *required[name], f"{option.opts[0]}={value}"])
    assert (answer.exit_code, f"Invalid value for '{option.opts[0]}'" in answer.output) == (2, True), answer.output


@pytest.mark.parametrize("rate", ["0", "1", "-0.1", "1.5"])
def test_a_rate_that_is_no_share_is_wrong_usage(rate: str) -> None:
    given = ["fit", "nowhere", "--recipe", "never.recipe", f"--false-reject-rate={rate}"]
    answer = CliRunner().invoke(commands, given)
    assert (answer.exit_code, "is not in the range 0<x<1" in answer.output) == (2, True)
