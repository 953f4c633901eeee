"""taktsight-trainer race: options, and what is printed and written."""

from __future__ import annotations

from pathlib import Path

import click

from calibration.options import Finite
from trainer.options import parsed_size


@click.command(
    "race",
    short_help="Fit every detector, drop what is too slow, keep the best.",
    epilog="Example: taktsight-trainer race images/flange --takt-ms 50 --out race --recipe flange.recipe",
)
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--takt-ms", type=Finite(min=1), required=True, help="Cycle time; 0.9 of it is the deadline.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("race"), show_default=True, help="Folder of results."
)
@click.option("--recipe", type=click.Path(path_type=Path), help="Fit the winner on all good images and write it here.")
@click.option("--detector", "detectors", multiple=True, help="Only this one; repeat it.  [all that fit the data]")
@click.option(
    "--size", "sizes", multiple=True, default=("256",), show_default=True, help="SIDE or HEIGHTxWIDTH; repeat."
)
@click.option(
    "--device", type=click.Choice(["cpu"]), default="cpu", show_default=True, help="Where latency is measured."
)
@click.option(
    "--registration", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True, help="As in fit."
)
@click.option(
    "--overkill",
    type=Finite(0, 0.5),
    default=0.02,
    show_default=True,
    help="Share of good parts rejected at which escape is compared.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Reconstructors: epochs at most.  [as in fit]")
@click.option("--weights", type=click.Path(path_type=Path), help="Backbone weights file, as in fit.")
@click.option("--bit-depth", type=click.IntRange(8, 16), help="Sensor depth of 16-bit files, as in fit.")
@click.option("--part-pattern", help="Regular expression for the part number in file names, as in fit.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="As in fit.")
@click.option("--ray", metavar="local|ADDRESS", help="Run on a Ray cluster; data and --out must be on a shared disk.")
def race_command(  # noqa: PLR0913, PLR0917 one parameter per option
    data: Path,
    takt_ms: float,
    out: Path,
    recipe: Path | None,
    detectors: tuple[str, ...],
    sizes: tuple[str, ...],
    device: str,  # noqa: ARG001 one choice so far
    registration: str,
    overkill: float,
    epochs: int | None,
    weights: Path | None,
    bit_depth: int | None,
    part_pattern: str | None,
    seed: int,
    ray: str | None,
) -> None:
    """Fit every detector on the good images in DATA and compare what they are worth and cost on this machine.

    Each learns from four fifths of the good images. It is measured on the rest and on synthetic defects made from
    these, and on the labelled test images where DATA has some. A race that was broken off goes on where it stopped;
    candidates that failed are asked again.
    """
    from trainer import race_session
    from trainer.race import RaceRequest

    request = RaceRequest(
        data=data,
        out=out,
        takt_ms=takt_ms,
        detectors=detectors,
        sizes=tuple(parsed_size(size) for size in sizes),
        registration=registration,
        overkill=overkill,
        seed=seed,
        epochs=epochs,
        weights=weights,
        bit_depth=bit_depth,
        part_pattern=part_pattern,
    )
    race_session.run(request, recipe, ray)
