"""taktsight-trainer: from good images to a recipe, and what the recipe is worth.

Options only: torch is imported when a command has work to do, so that --help and a mistyped option answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calibration.console import EXIT_CODES, run_command, say
from calibration.options import Finite
from calibration.preprocess import Rectangle
from calibration.recipe import MOST_MM_PER_PX
from calibration.registration import RegistrationSettings
from calibration.signing import make_key, public_key_file, read_signing_key, sign_recipe
from trainer.compile import compile_command
from trainer.method_options import with_method_options
from trainer.options import parsed_size
from trainer.race_command import race_command

IMAGES = click.IntRange(min=5)  # trainer.prepared.FEWEST_GOOD, which would import torch
PX = Finite(min=0, min_open=True)
MM_PER_PX = Finite(min=0, max=MOST_MM_PER_PX, min_open=True)


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="taktsight")
def commands() -> None:
    """Learn from good parts, export one graph, measure it."""


@commands.command("fit", epilog="Example: taktsight-trainer fit images/flange --recipe flange.recipe")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--detector", default="patch_layout", show_default=True, help="An unknown name lists all there are.")
@click.option("--size", default="256", show_default=True, help="Detector input in px: SIDE or HEIGHTxWIDTH.")
@click.option(
    "--registration",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Align every part to a reference; auto decides from the good images.",
)
@click.option(
    "--max-angle",
    type=Finite(0, 180),
    default=180.0,
    show_default=True,
    help="Largest rotation to search, degrees.",
)
@click.option("--max-shift", type=Finite(min=0), help="Largest shift to search, image px; the whole view if not given.")
@click.option(
    "--max-scale-change",
    type=Finite(0, 0.5),
    default=0.0,
    show_default=True,
    help="Size change to search; 0.1 = 10 %.",
)
@click.option("--region", help="Region of interest in reference px: X,Y,WIDTH,HEIGHT.")
@click.option("--ignore", type=click.Path(path_type=Path), help="Image in the reference view, white where not to look.")
@click.option("--zones", type=click.Path(path_type=Path), help="File of zones with limits of their own (JSON).")
@click.option("--tiles", default="off", show_default=True, help="For small defects: COLUMNSxROWS of --size, or auto.")
@click.option(
    "--smallest-defect", "smallest_defect_px", type=PX, help="Its diameter in reference px, for --tiles auto."
)
@click.option("--mm-per-px", type=MM_PER_PX, help="Of the reference view: places are told in mm too.")
@click.option(
    "--gamma",
    type=Finite(0.01, 100),
    default=1.0,
    show_default=True,
    help="Tone curve: above 1 spreads the bright tones apart.",
)
@click.option(
    "--false-reject-rate",
    type=Finite(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Share of good parts that may be rejected.",
)
@click.option("--bit-depth", type=click.IntRange(8, 16), help="Sensor depth of 16-bit files, if below 16.")
@click.option("--part-pattern", help="Regular expression for the part number in file names; parts are never split.")
@click.option(
    "--most-images",
    type=IMAGES,
    default=1000,
    show_default=True,
    help="Learn from at most so many, evenly spaced.",
)
@click.option(
    "--threshold",
    type=click.Choice(["false_reject_rate", "normal_intersection", "best_f1"]),
    default="false_reject_rate",
    show_default=True,
    help="How the score's threshold is found; the last two need images in train/DEFECT.",
)
@click.option(
    "--takt-ms",
    type=Finite(min=1),
    help="Cycle time: say whether a part keeps 0.9 of it here; dcgan searches for as long.",
)
@with_method_options
@click.option("--keep-suspects", is_flag=True, help="Learn from good images that score as no good part does, too.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted training.")
@click.option("--product", help="Name of the product; the folder's name if not given.")
def fit_command(  # noqa: PLR0913, PLR0917 one parameter per option
    data: Path,
    recipe: Path,
    detector: str,
    size: str,
    registration: str,
    max_angle: float,
    max_shift: float | None,
    max_scale_change: float,
    region: str | None,
    ignore: Path | None,
    zones: Path | None,
    tiles: str,
    smallest_defect_px: float | None,
    mm_per_px: float | None,
    gamma: float,
    false_reject_rate: float,
    bit_depth: int | None,
    part_pattern: str | None,
    most_images: int,
    threshold: str,
    takt_ms: float | None,
    keep_suspects: bool,
    resume: bool,
    product: str | None,
    **chosen: Any,
) -> None:
    """Learn from the good images in DATA and write RECIPE.

    DATA is a folder in MVTec AD layout (train/good, test/*), a recording, or a plain folder of good images. Labelled
    defects, for the methods and thresholds that use them, are in train/DEFECT; crack+stain is a part with both.
    """
    from trainer import session
    from trainer.fit import FitRequest
    from trainer.learning import Options

    height, width = parsed_size(size)
    request = FitRequest(
        recipe=recipe,
        detector=detector,
        height=height,
        width=width,
        registration=registration,
        registration_settings=RegistrationSettings(max_angle, max_shift, max_scale_change),
        region=_rectangle(region),
        ignore=ignore,
        zones=zones,
        tiles=tiles,
        smallest_defect_px=smallest_defect_px,
        mm_per_px=mm_per_px,
        gamma=gamma,
        false_reject_rate=false_reject_rate,
        most_images=most_images,
        resume=resume,
        keep_suspects=keep_suspects,
        threshold=threshold,
        takt_ms=takt_ms,
        options=Options(**chosen),
    )
    session.learn(data, request, part_pattern=part_pattern, bit_depth=bit_depth, product=product)


commands.add_command(race_command)


@commands.command(
    "evaluate",
    short_help="Measure a recipe on test images.",
    epilog="Example: taktsight-trainer evaluate flange.recipe images/flange --report out.html",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML report here.")
@click.option("--bit-depth", type=click.IntRange(8, 16), help="Sensor depth of 16-bit files, if below 16.")
def evaluate_command(
    recipe: Path, data: Path, json_file: Path | None, report: Path | None, bit_depth: int | None
) -> None:
    """Measure RECIPE on the test images of DATA, through the exported graph as it runs beside the line."""
    from trainer import session

    session.measure(recipe, data, json_file=json_file, report=report, bit_depth=bit_depth)


@commands.command("report", epilog="Example: taktsight-trainer report flange.recipe --out flange.html")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="HTML file to write.")
def report_command(recipe: Path, out: Path) -> None:
    """Take the HTML report out of RECIPE."""
    from trainer import session

    session.taken_out(recipe, out)


@commands.command(
    "generate",
    short_help="Make new pictures of good parts.",
    epilog="Example: taktsight-trainer generate flange.recipe images/flange --out made --count 16",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for the pictures.")
@click.option("--count", type=click.IntRange(2, 10_000), default=64, show_default=True, help="Pictures to make.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed: same pictures.")
def generate_command(recipe: Path, data: Path, out: Path, count: int, seed: int) -> None:
    """Make new pictures of good parts with the dcgan in RECIPE, as the detector sees parts.

    They are compared with the good images in DATA: copies, and pictures unlike any good part, are counted, and OUT.png
    shows both by t-SNE. Look at them before anything learns from them.
    """
    from trainer import generate_session

    generate_session.generate(recipe, data, out, count=count, seed=seed)


@commands.command(
    "keygen", short_help="Make a key to sign recipes with.", epilog="Example: taktsight-trainer keygen release.key"
)
@click.argument("keyfile", type=click.Path(path_type=Path))
def keygen_command(keyfile: Path) -> None:
    """Make a key to sign recipes with: KEYFILE is private and stays here, KEYFILE.pub goes to the stations."""
    key = make_key(keyfile)
    say(f"private key: {keyfile}: who has it can sign recipes")
    say(f"public key: {public_key_file(keyfile)}, id {key.key_id}: name it in station.yaml under recipes.keys")


@commands.command(
    "sign", short_help="Sign a recipe.", epilog="Example: taktsight-trainer sign flange.recipe --key release.key"
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key file made by keygen.")
@click.option("--revision", type=click.IntRange(min=1), help="Stations refuse an older one.  [Unix time in seconds]")
def sign_command(recipe: Path, key: Path, revision: int | None) -> None:
    """Sign RECIPE, in the file itself: stations that trust the key will run it. What decides verdicts stays."""
    signature = sign_recipe(recipe, read_signing_key(key), revision)
    say(f"{recipe}: signed by key {signature.key}, revision {signature.revision}, {signature.created}")


commands.add_command(compile_command)


def main() -> None:
    """Entry point of the console script."""
    run_command(commands, "taktsight-trainer")


def _rectangle(text: str | None) -> Rectangle | None:
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
        raise click.BadParameter(f"{text!r} found, need X,Y,WIDTH,HEIGHT", param_hint="--region")
    return Rectangle(*(int(number) for number in numbers))


if __name__ == "__main__":
    main()
