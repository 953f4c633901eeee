"""taktsight-calibration: thresholds and photometric fields."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from calibration.console import EXIT_CODES, note, run_command, say
from calibration.errors import CalibrationError, InputError
from calibration.frame import reflectance
from calibration.images import check_16_bits, check_depth, image_files, read_image
from calibration.options import Finite
from calibration.photometric import (
    Photometric,
    ReferencePatch,
    flat_field,
    mean_field,
    without_dead_pixels,
    write_photometric,
)
from calibration.recipe import MOST_MM_PER_PX, Recipe, read_recipe, write_recipe
from calibration.recipe_file import read_members
from calibration.recording import is_recording, read_recording
from calibration.scores import PartScore, Scores, read_scores
from calibration.signing import signature_of
from calibration.thresholds import Thresholds, bound_told, median_and_deviation, rate_upper_bound, reject_threshold

MM = Finite(min=0, min_open=True)
FEWEST_PX = 10  # between two points: an error of a pixel then counts a tenth


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="taktsight")
def commands() -> None:
    """What makes pixels and numbers comparable."""


@commands.command(
    "threshold",
    short_help="Set a recipe's threshold from good parts.",
    epilog="Example: taktsight-calibration threshold flange.recipe good.scores --false-reject-rate 0.005",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("scores", type=click.Path(path_type=Path))
@click.option("--false-reject-rate", required=True, type=float, help="Share of good parts that may be rejected.")
@click.option("--label", help="Use only parts of this folder, such as good.")
def threshold_command(recipe: Path, scores: Path, false_reject_rate: float, label: str | None) -> None:
    """Set the threshold of RECIPE from SCORES of known-good parts (taktsight-agent replay --scores)."""
    loaded, found = read_recipe(recipe), read_scores(scores)
    if found.detector_digest != loaded.detector_digest:
        raise InputError(f"{scores}: these scores are of another detector than {recipe}: run replay with this recipe")
    parts = _good_parts(found, label)
    updated = replace(loaded, thresholds=fitted(parts, false_reject_rate, found.engine))
    was_signed = signature_of(recipe, read_members(recipe)[0]) is not None
    digest = write_recipe(recipe, updated)
    _tell(loaded, updated, digest)
    if was_signed:
        note(
            "the recipe was signed with its old threshold; the new one is unsigned: have it signed again with "
            "taktsight-trainer sign"
        )


@commands.command(
    "photometric",
    short_help="Calibrate a station's light.",
    epilog="Example: taktsight-calibration photometric station.npz --dark dark/ --flat white/",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dark", type=click.Path(path_type=Path), help="Recording or folder with the lens covered.")
@click.option("--flat", type=click.Path(path_type=Path), help="Recording or folder of an even white sheet.")
@click.option("--patch", help="Reference patch in every frame: X,Y,WIDTH,HEIGHT,LEVEL with LEVEL in 0..1.")
@click.option("--bit-depth", type=click.IntRange(8, 16), help="Of plain image files with 16 bits per pixel.  [16]")
def photometric_command(
    out: Path, dark: Path | None, flat: Path | None, patch: str | None, bit_depth: int | None
) -> None:
    """Make a station's photometric calibration and write it to OUT (.npz), for `photometric:` in station.yaml."""
    if dark is None and flat is None and patch is None:
        raise click.UsageError("give --dark, --flat or --patch")
    target = None if patch is None else _patch(patch)
    files = _Fields(bit_depth)
    black = None if dark is None else mean_field(files.read(dark), 8)
    white = None if flat is None else flat_field(files.read(flat))
    files.check_depth()
    if white is not None:
        white, dead = without_dead_pixels(white, black)
        if dead:
            note(f"{dead} dead pixel{'s' if dead > 1 else ''}: the flat field takes the median of the neighbours there")
    fields = black if white is None else white
    if target is not None and fields is not None:
        _check_in_view(target, fields.shape)
    write_photometric(out, Photometric(black, white, target))
    say(f"photometric calibration: {out}")


@commands.command(
    "scale",
    short_help="Tell a recipe its millimetres.",
    epilog="Example: taktsight-calibration scale flange.recipe --points 212,80,212,410 --mm 33",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--points", help="Two points in px of the reference view: X1,Y1,X2,Y2.")
@click.option("--mm", type=MM, help="The distance between them.")
@click.option("--mm-per-px", type=MM, help="Instead of the two points: the size of a pixel.")
def scale_command(recipe: Path, points: str | None, mm: float | None, mm_per_px: float | None) -> None:
    """Tell RECIPE how large its reference view is: places of a reject are then told in mm too. No verdict changes."""
    if (points is None) != (mm is None) or (points is None) == (mm_per_px is None):
        raise click.UsageError("give --points and --mm, or --mm-per-px alone")
    loaded = read_recipe(recipe)
    size = mm_per_px if points is None or mm is None else mm / _distance_px(points)
    if size is None or size > MOST_MM_PER_PX:
        raise click.UsageError(f"{size} mm per px found, need at most {MOST_MM_PER_PX:g}: check the points")
    was_signed = signature_of(recipe, read_members(recipe)[0]) is not None
    write_recipe(recipe, replace(loaded, mm_per_px=size))
    height, width = loaded.view.reference_size
    shown = f"{width * size:.4g} x {height * size:.4g} mm"
    say(f"{size:.4g} mm per px: the reference view of {width}x{height} px shows {shown}")
    if was_signed:
        note("the recipe was signed without this scale: have it signed again with taktsight-trainer sign")


def fitted(parts: list[PartScore], false_reject_rate: float, engine: str) -> Thresholds:
    """Return thresholds from scored images of good parts on this engine, each part counting once: with its highest.

    Raises CalibrationError if the parts are too few for the rate, or show nothing in their maps.
    """
    images: dict[str | int, list[PartScore]] = {}
    for number, image in enumerate(parts):
        images.setdefault(image.part_id or number, []).append(image)
    scores = np.array([np.max([image.score for image in part]) for part in images.values()], dtype=np.float64)
    peaks = np.array([np.max([image.map_peak for image in part]) for part in images.values()], dtype=np.float64)
    threshold, map_threshold = (reject_threshold(found, false_reject_rate) for found in (scores, peaks))
    if map_threshold <= 0.0:
        raise CalibrationError(
            f"the anomaly maps of the good parts peak at {map_threshold:g}, need more than 0: see what was photographed"
        )
    good_median, good_deviation = median_and_deviation(scores)
    return Thresholds(
        score=threshold,
        map=map_threshold,
        false_reject_rate=false_reject_rate,
        rate_upper_bound=rate_upper_bound(len(images), false_reject_rate),
        n_good=len(images),
        fitted_on=engine,
        good_median=good_median,
        good_deviation=good_deviation,
    )


def main() -> None:
    """Entry point of the console script."""
    run_command(commands, "taktsight-calibration")


def _good_parts(found: Scores, label: str | None) -> list[PartScore]:
    """Return the scored images. Raises CalibrationError if they are of several labels and none was chosen."""
    labels = Counter(part.label for part in found.parts)
    if label is None and len(labels) > 1:
        counted = ", ".join(f"{name or '(none)'} ({count})" for name, count in sorted(labels.items()))
        raise CalibrationError(f"parts of several folders found: {counted}; need good ones only: add --label good")
    chosen = [part for part in found.parts if label in (None, part.label)]
    if label is not None and not chosen:
        known = ", ".join(repr(name) for name in sorted(labels)) or "no parts at all"
        raise CalibrationError(f"no parts with label {label!r} found, there are {known}: choose one of these")
    scored = [part for part in chosen if part.score is not None and part.map_peak is not None]
    if len(scored) < len(chosen):
        kind = "images" if any(part.part_id for part in chosen) else "parts"
        note(f"{len(chosen) - len(scored)} of {len(chosen)} {kind} had no verdict and are left out")
    return scored


def _tell(before: Recipe, after: Recipe, digest: str) -> None:
    old, new = before.thresholds, after.thresholds
    say(f"threshold {old.score:.4g} ({old.fitted_on}, n = {old.n_good}) -> {new.score:.4g} ({new.fitted_on})")
    say(
        f"{new.n_good} good parts: {new.false_reject_rate:.2%} of good parts rejected on average, "
        f"below {bound_told(new.rate_upper_bound)} with 95 % confidence"
    )
    wished = 2 * new.false_reject_rate
    if new.rate_upper_bound > wished:
        say(f"to be confident of {wished:.2%}, inspect about {_parts_for_bound(new.false_reject_rate, wished)} in all")
    say(f"recipe digest {digest}")


def _parts_for_bound(false_reject_rate: float, bound: float) -> int:
    """Return the number of good parts, to two digits, from which the rate's 95 % bound stays below `bound`.

    The bound jumps up wherever one more part may be rejected, n + 1 = count / rate, so it is looked at there.
    """
    for count in itertools.count(1):
        n_good = math.ceil(count / false_reject_rate - 1e-9) - 1
        if n_good >= 1 and rate_upper_bound(n_good, false_reject_rate) <= bound:
            break
    magnitude = int(10 ** max(0, len(str(n_good)) - 2))
    return -(-n_good // magnitude) * magnitude


class _Fields:
    """The images of a dark and a flat field. bit_depth: of the 16-bit files of folders, None where it was not given."""

    def __init__(self, bit_depth: int | None) -> None:
        self._bit_depth = bit_depth
        self._brightest = 0  # of the files whose depth nobody told

    def read(self, source: Path) -> Iterator[NDArray[np.float32]]:
        """Yield the reflectances of a recording or a folder, one image at a time. Raises InputError if it has none."""
        is_empty = True
        for frame in self._recorded(source) if is_recording(source) else self._stored(source):
            is_empty = False
            yield frame
        if is_empty:
            raise InputError(f"{source}: no images found: put images of the covered lens or the white sheet there")

    def check_depth(self) -> None:
        """Raises InputError if what was read looks like files of a sensor of fewer than 16 bits.

        A dark field alone tells nothing of its sensor: the flat one beside it does.
        """
        check_16_bits(self._brightest)

    def _recorded(self, source: Path) -> Iterator[NDArray[np.float32]]:
        for frame in read_recording(source):
            yield reflectance(frame.pixels, frame.bit_depth)

    def _stored(self, folder: Path) -> Iterator[NDArray[np.float32]]:
        for path in image_files(folder):
            pixels = read_image(path)
            check_depth(pixels, self._bit_depth, str(path))
            if pixels.dtype == np.uint16 and self._bit_depth is None:
                self._brightest = max(self._brightest, int(pixels.max()))
            yield reflectance(pixels, 8 if pixels.dtype == np.uint8 else self._bit_depth or 16)


def _distance_px(text: str) -> float:
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} found, need X1,Y1,X2,Y2", param_hint="--points") from error
    distance = math.hypot(x2 - x1, y2 - y1)
    if not (math.isfinite(distance) and distance >= FEWEST_PX):
        raise click.BadParameter(
            f"two points {distance:g} px apart found, need {FEWEST_PX} or more", param_hint="--points"
        )
    return distance


def _patch(text: str) -> ReferencePatch:
    numbers = text.split(",")
    try:
        x, y, width, height = (int(number) for number in numbers[:4])
        (level,) = (float(number) for number in numbers[4:])
    except ValueError as error:
        raise click.BadParameter(f"{text!r} found, need X,Y,WIDTH,HEIGHT,LEVEL", param_hint="--patch") from error
    return ReferencePatch(x, y, width, height, level)


def _check_in_view(patch: ReferencePatch, shape: tuple[int, ...]) -> None:
    right, low = patch.x_px + patch.width_px, patch.y_px + patch.height_px
    if right > shape[1] or low > shape[0]:
        raise click.BadParameter(
            f"a patch that reaches to {right},{low} found, dark and flat field are {shape[1]}x{shape[0]} px: "
            "measure it in a frame",
            param_hint="--patch",
        )


if __name__ == "__main__":
    main()
