"""Images as the detector sees them: read, corrected, aligned, cut to its view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.condition import Glimpse, glimpse
from calibration.errors import BadFrame, InputError, NotRegistered
from calibration.frame import Pixels
from calibration.photometric import Photometric
from calibration.preprocess import Prepared, View, prepare
from calibration.registration import Reference
from trainer.data import Item, Pictures
from trainer.errors import TrainingError
from trainer.learning import Progress

FEWEST_GOOD = 5  # below this not even a fold can be held out
MOST_UNREGISTERED = 0.1  # share of good images; above it the product does not register


@dataclass(frozen=True, slots=True)
class PreparedSet:
    """Good images as the detector sees them, and those that could not be aligned."""

    items: tuple[Item, ...]
    batch: NDArray[np.float32]  # (n, C, h, w)
    unregistered: tuple[str, ...]  # name and reason of each

    def of(self, kept: NDArray[np.int64]) -> PreparedSet:
        """Return the images of these indices alone."""
        if len(kept) == len(self.items):
            return self
        return PreparedSet(tuple(self.items[index] for index in kept), self.batch[kept], self.unregistered)


def prepare_all(
    items: Sequence[Item], pictures: Pictures, view: View, reference: Reference | None, progress: Progress
) -> PreparedSet:
    """Return the images that can be aligned; all of them without a reference.

    Raises TrainingError if too many cannot, InputError naming an image that the station would refuse.
    """
    batch = np.empty((len(items), view.channels, view.height, view.width), dtype=np.float32)
    kept: list[Item] = []
    unregistered: list[str] = []
    for count, item in enumerate(items, 1):
        try:
            batch[len(kept)] = prepared_item(item, pictures, view, reference).batch[0]
            kept.append(item)
        except NotRegistered as error:
            unregistered.append(f"{item.name} ({error})")
        except BadFrame as error:
            raise InputError(f"{item.file}: {error}") from error
        progress("prepare", count, len(items))
    if len(unregistered) > MOST_UNREGISTERED * len(items) or (unregistered and len(kept) < FEWEST_GOOD):
        raise TrainingError(
            f"{len(unregistered)} of {len(items)} good images cannot be registered, first {unregistered[0]}: "
            "check that all show the same product, or use --registration off"
        )
    return PreparedSet(tuple(kept), batch[: len(kept)], tuple(unregistered))


def prepared_item(item: Item, pictures: Pictures, view: View, reference: Reference | None) -> Prepared:
    """Return one image as the detector sees it; a gray image of a colour product counts as colour."""
    pixels, depth = pixels_of(item, pictures, view)
    return prepare(pixels, depth, view, reference)


def prepared_defect(item: Item, pictures: Pictures, view: View, reference: Reference | None) -> NDArray[np.float32]:
    """Return one labelled defect as the detector sees it, (C, h, w).

    Raises InputError naming the file if it has another size or depth than the good images.
    """
    pixels, depth = pictures(item)
    if depth != view.bit_depth:
        found, wanted = f"{depth} bits", f"{view.bit_depth}"
    elif view.fixed_size and pixels.shape[:2] != view.reference_size:
        found = f"{pixels.shape[1]}x{pixels.shape[0]} px"
        wanted = f"{view.reference_size[1]}x{view.reference_size[0]}"
    else:
        return prepared_item(item, pictures, view, reference).batch[0]
    raise InputError(
        f"{item.file}: a labelled defect of {found} found, the good images have {wanted}: take it as they were taken, "
        "or take it out of the folder"
    )


def pixels_of(item: Item, pictures: Pictures, view: View) -> tuple[Pixels, int]:
    """Return (pixels, bit depth) of one image, in colour where the product is."""
    pixels, depth = pictures(item)
    if view.colour and pixels.ndim == 2:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    return pixels, depth


def glimpses(
    items: Sequence[Item], pictures: Pictures, photometric: Photometric, view: View, *, registered: bool
) -> list[Glimpse]:
    """Return the images in small: corrected, and as the sensor saw them where the correction changes anything."""
    sensor = None if photometric.is_identity else Pictures(Photometric())
    seen = []
    for item in items:
        pixels, depth = pixels_of(item, pictures, view)
        raw = None if sensor is None else pixels_of(item, sensor, view)[0]
        seen.append(glimpse(pixels, depth, view, registered=registered, sensor_pixels=raw))
    return seen
