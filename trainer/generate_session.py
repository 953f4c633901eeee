"""What `taktsight-trainer generate` does, once its options are read. Needs no network: the recipe's graph draws."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.console import note, progress_bars, say
from calibration.errors import BadFrame, InputError, NotRegistered
from calibration.recipe import Recipe, read_recipe
from trainer.data import Dataset, Pictures, read_dataset
from trainer.generate import check_new, checked, generated, neighbourhood, overview_of, write_pictures
from trainer.learning import Progress
from trainer.prepared import MOST_UNREGISTERED, prepared_item


def generate(recipe: Path, data: Path, out: Path, *, count: int, seed: int) -> None:
    """Write pictures that the recipe's generator makes to the folder out, and beside it how they lie among good images.

    Raises InputError if the recipe has no generator of whole views, out has files, the picture beside it is there
    already, either cannot be written, or data holds too few good images that fit it.
    """
    loaded = read_recipe(recipe)
    trained_on = loaded.view.bit_depth
    dataset = read_dataset(data, bit_depth=trained_on if trained_on > 8 else None)
    check_new(out)  # before the work
    with progress_bars() as progress:
        made = generated(loaded, count, seed, progress)
        good, missing = prepared_good(loaded, dataset, progress)
    found = checked(made, good)
    shown = neighbourhood(made, good, seed)
    write_pictures(out, made)
    overview = overview_of(out)
    if not cv2.imwrite(str(overview), shown):
        raise InputError(f"{overview}: cannot be written: give a folder beside which a file can be made")
    say(str(found))
    say(f"pictures: {out}; among the good images: {overview}")
    if missing:
        note(f"{len(missing)} of {len(dataset.good)} good images cannot be registered and are left out: {missing[0]}")


def prepared_good(recipe: Recipe, dataset: Dataset, progress: Progress) -> tuple[NDArray[np.float32], list[str]]:
    """Return the good images (n, C, h, w) as the detector sees them, and what those are that cannot be registered.

    Raises InputError naming the first image that does not fit the recipe, or if more than 10 % cannot be registered.
    """
    pictures, images, missing = Pictures(dataset.photometric), [], []
    for done, item in enumerate(dataset.good, 1):
        try:
            images.append(prepared_item(item, pictures, recipe.view, recipe.reference).batch[0])
        except NotRegistered as error:
            missing.append(f"{item.name} ({error})")
        except BadFrame as error:
            raise InputError(f"{item.file}: {error}") from error
        progress("prepare", done, len(dataset.good))
    if len(missing) > MOST_UNREGISTERED * len(dataset.good):
        raise InputError(
            f"{len(missing)} of {len(dataset.good)} good images cannot be registered, first {missing[0]}: give images "
            f"of {recipe.product}, the product of the recipe"
        )
    return np.stack(images), missing
