"""What `taktsight-trainer generate` does, once its options are read. Needs no network: the recipe's graph draws."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from calibration.console import progress_bars, say
from calibration.errors import InputError
from calibration.recipe import read_recipe
from trainer.data import Pictures, read_dataset
from trainer.fit import prepared_item
from trainer.generate import checked, generated, neighbourhood, write_pictures


def generate(recipe: Path, data: Path, out: Path, *, count: int, seed: int) -> None:
    """Write pictures that the recipe's generator makes to the folder out, and beside it how they lie among good images.

    Raises InputError if the recipe has no generator, out has files, or data holds too few good images.
    """
    loaded = read_recipe(recipe)
    dataset = read_dataset(data)
    pictures = Pictures(dataset.photometric)
    with progress_bars() as progress:
        made = generated(loaded, count, seed, progress)
        images = []
        for done, item in enumerate(dataset.good, 1):
            images.append(prepared_item(item, pictures, loaded.view, loaded.reference).batch[0])
            progress("prepare", done, len(dataset.good))
    good = np.stack(images)
    found = checked(made, good)
    write_pictures(out, made)
    overview = out.with_name(f"{out.name}.png")
    if not cv2.imwrite(str(overview), neighbourhood(made, good, seed)):
        raise InputError(f"{overview}: cannot be written: give a folder beside which a file can be made")
    say(str(found))
    say(f"pictures: {out}; among the good images: {overview}")
