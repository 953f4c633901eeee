"""A recipe measured on labelled images, through the path that runs beside the line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.condition import glimpse, measured
from calibration.errors import BadFrame, NotRegistered
from calibration.images import read_image
from calibration.preprocess import in_view
from calibration.recipe import Recipe
from trainer.data import GOOD, Item, Pictures
from trainer.export import ReferenceRuntime
from trainer.fit import FitResult, pixels_of, prepared_item
from trainer.learning import Progress
from trainer.metrics import ScoredImage


def scored_images(recipe: Recipe, items: Sequence[Item], pictures: Pictures, progress: Progress) -> list[ScoredImage]:
    """Return what the exported graph says of each image: prepared as in production, float32 in ONNX Runtime."""
    runtime = ReferenceRuntime(recipe.graph)
    scored = []
    for count, item in enumerate(items, 1):
        scored.append(_scored(recipe, runtime, item, pictures))
        progress("evaluate", count, len(items))
    return scored


def held_out_images(result: FitResult) -> list[ScoredImage]:
    """Return the good images of a training with the scores that they got from a model that never saw them."""
    return [
        ScoredImage(item.name, GOOD, float(score), anomaly_map=anomaly_map, view=_channels_last(picture))
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
            view=_channels_last(suspect.picture),
        )
        for suspect in result.suspects
    ]


def _scored(recipe: Recipe, runtime: ReferenceRuntime, item: Item, pictures: Pictures) -> ScoredImage:
    try:
        complaint = _complaint(recipe, item, pictures)
        if complaint:
            return ScoredImage(item.name, item.label, None, reason=complaint)
        prepared = prepared_item(item, pictures, recipe.view, recipe.reference)
    except (NotRegistered, BadFrame) as error:
        return ScoredImage(item.name, item.label, None, reason=str(error))
    anomaly_map, score = runtime(prepared.batch)
    mask = None
    if item.mask is not None:
        drawn = read_image(item.mask)
        flat = drawn.max(axis=2) if drawn.ndim == 3 else drawn
        mask = in_view((flat > 0).astype(np.uint8), recipe.view, prepared.registration)
    return ScoredImage(item.name, item.label, score, "", anomaly_map, mask, prepared.picture)


def _complaint(recipe: Recipe, item: Item, pictures: Pictures) -> str:
    """Return what is wrong with the light or the focus of an image, as the line would say it; empty if nothing is."""
    if recipe.condition is None:
        return ""
    pixels, depth = pixels_of(item, pictures, recipe.view)
    seen = measured(glimpse(pixels, depth, recipe.view, registered=recipe.reference is not None))
    complaint = recipe.condition.complaint(seen)
    return "" if complaint is None else f"{complaint.cause.replace('_', ' ')}: {complaint.detail}"


def _channels_last(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    return picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
