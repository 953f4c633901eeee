"""A recipe measured on labelled images, through the path that runs beside the line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.condition import glimpse, measured
from calibration.errors import BadFrame, InputError, NotRegistered
from calibration.frame import Pixels, reflectance
from calibration.images import read_image
from calibration.preprocess import check_frame, in_view, prepare
from calibration.recipe import Recipe
from trainer.data import GOOD, Item, Pictures
from trainer.export import ReferenceRuntime
from trainer.fit import FitResult
from trainer.learning import Progress
from trainer.metrics import ScoredImage


def scored_images(recipe: Recipe, items: Sequence[Item], pictures: Pictures, progress: Progress) -> list[ScoredImage]:
    """Return what the exported graph says of each image: prepared as in production, float32 in ONNX Runtime.

    What a station refuses has no verdict here either, gray images of a colour product among it.

    Raises InputError naming the first file that cannot be read, or a mask of another size than its image.
    """
    runtime = ReferenceRuntime(recipe.graph)
    scored = []
    for count, item in enumerate(items, 1):
        scored.append(_scored(recipe, runtime, item, pictures))
        progress("evaluate", count, len(items))
    return scored


def held_out_images(result: FitResult) -> list[ScoredImage]:
    """Return the good images of a training with the scores that they got from a model that never saw them."""
    return [
        ScoredImage(item.name, GOOD, float(score), anomaly_map=anomaly_map, picture=_channels_last(picture))
        for item, score, anomaly_map, picture in zip(
            result.good_items, result.good_scores, result.good_maps, result.good_pictures, strict=True
        )
    ]


def left_out_images(result: FitResult) -> list[ScoredImage]:
    """Return the good images that were left out of a training, worst first."""
    return [
        ScoredImage(
            suspect.item.name,
            GOOD,
            suspect.score,
            reason="left out of the training",
            anomaly_map=suspect.anomaly_map,
            picture=_channels_last(suspect.picture),
        )
        for suspect in result.suspects
    ]


def _scored(recipe: Recipe, runtime: ReferenceRuntime, item: Item, pictures: Pictures) -> ScoredImage:
    try:
        pixels, depth = pictures(item)
        check_frame(pixels, depth, recipe.view)
        complaint = _complaint(recipe, pixels, depth)
        if complaint:
            return ScoredImage(item.name, item.label, None, reason=complaint)
        prepared = prepare(pixels, depth, recipe.view, recipe.reference)
    except (NotRegistered, BadFrame) as error:
        return ScoredImage(item.name, item.label, None, reason=str(error))
    anomaly_map, score = runtime(prepared.batch)
    mask = None
    if item.mask is not None:
        mask = in_view(_drawn(item.mask, pixels.shape[:2]), recipe.view, prepared.registration)
    return ScoredImage(item.name, item.label, score, "", anomaly_map, mask, packed(prepared.picture))


def _drawn(mask: Path, size: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a mask (H, W), 1 inside. size: (height, width) of its image. Raises InputError if the mask has another."""
    drawn = read_image(mask)
    flat = drawn.max(axis=2) if drawn.ndim == 3 else drawn
    if flat.shape != size:
        raise InputError(
            f"{mask}: the mask is {flat.shape[1]}x{flat.shape[0]} px, its image {size[1]}x{size[0]}: draw it on a "
            "picture of that size, or take it away"
        )
    return np.asarray(flat > 0, np.uint8)


def packed(picture: NDArray[np.float32]) -> NDArray[np.float32] | NDArray[np.uint8]:
    """Return a picture in reflectance as bytes where these are the very same: a quarter of the memory.

    They are for a camera of 8 bits without photometric correction and gamma. All tested parts are held until the report
    is written: 1000 parts of 5x4 tiles in colour take 3.2 GB instead of 12.8.
    """
    levels = np.rint(picture * 255.0).clip(0, 255).astype(np.uint8)
    return levels if np.array_equal(reflectance(levels, 8), picture) else picture


def _complaint(recipe: Recipe, pixels: Pixels, depth: int) -> str:
    """Return what is wrong with the light or the focus of an image, as the line would say it; empty if nothing is."""
    if recipe.condition is None:
        return ""
    seen = measured(glimpse(pixels, depth, recipe.view, registered=recipe.reference is not None))
    complaint = recipe.condition.complaint(seen)
    return "" if complaint is None else f"{complaint.cause.replace('_', ' ')}: {complaint.detail}"


def _channels_last(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    return picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
