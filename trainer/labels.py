"""Defective images that a user has labelled: which there are, whether they suffice, which are kept apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.errors import NotRegistered
from trainer.data import Item, types_of
from trainer.errors import TrainingError
from trainer.learning import Defects, Material

FOLDS = 5
FEWEST_OF_A_TYPE = 2  # parts: one to learn from, one to see whether it was learnt
LEARNT, SYNTHETIC = "labels", "synthetic"  # Learned.learnt_defects
FOLD_ORDER = (2, 1, 0, 3, 4)  # of a type's parts: the first is learnt from, the second never


def counted(labels: Iterable[str]) -> dict[str, int]:
    """Return how many images show each type, by name; a part with two types counts for both."""
    return dict(sorted(Counter(kind for label in labels for kind in types_of(label)).items()))


def defect_folds(labels: Sequence[str], parts: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """Return the fold 0..count-1 of each image: images of one part share it, parts of a type are spread evenly.

    The first part of a type falls into fold 2, the second into fold 1: two suffice to learn and to be measured. A part
    with several types falls where the fewest of all of them are.
    """
    generator = np.random.default_rng(seed)
    order = [fold for fold in FOLD_ORDER if fold < count]
    shown: dict[str, set[str]] = {}  # part -> labels of its images
    for label, part in zip(labels, parts, strict=True):
        shown.setdefault(part, set()).add(label)
    alike: dict[tuple[str, ...], list[str]] = {}  # labels -> parts that show just these
    for part, found in shown.items():
        alike.setdefault(tuple(sorted(found)), []).append(part)
    fold_of: dict[str, int] = {}
    filled: Counter[tuple[str, int]] = Counter()  # (type, fold) -> parts
    for found, same in sorted(alike.items()):
        kinds = {kind for label in found for kind in types_of(label) or (label,)}
        for index in generator.permutation(len(same)):
            fold_of[same[index]] = chosen = min(order, key=lambda fold: sum(filled[kind, fold] for kind in kinds))
            filled.update((kind, chosen) for kind in kinds)
    return np.array([fold_of[part] for part in parts], dtype=np.int64)


def prepared_defects(
    items: Sequence[Item], prepare: Callable[[Item], NDArray[np.float32]], seed: int
) -> tuple[Defects | None, list[str]]:
    """Return the defects as the detector sees them, None without any, and notes on those that cannot be registered.

    prepare: gives one image (C, h, w), as `trainer.prepared.prepared_defect`; what it raises else is raised.
    """
    images, shown, missing = [], [], []
    for item in items:
        try:
            images.append(prepare(item))
            shown.append(item)
        except NotRegistered as error:
            missing.append(f"{item.name} ({error})")
    notes = []
    if missing:
        notes.append(f"{len(missing)} of {len(items)} labelled defects could not be registered: {missing[0]}")
    if not images:
        return None, notes
    labels, parts = tuple(item.label for item in shown), tuple(item.part for item in shown)
    fold = defect_folds(labels, parts, FOLDS, seed)
    return Defects(torch.from_numpy(np.stack(images)), labels, parts, fold), notes


def labelled(material: Material, method: str) -> Defects:
    """Return the labelled defects. Raises TrainingError if there are none, a type has too few parts, or in tiles."""
    defects = material.defects
    if defects is not None and len(defects) == 0:
        raise TrainingError(
            f"{method} learns from labelled defects, but a label says nothing of a single tile: leave --tiles out, or "
            "choose a detector that needs no labels"
        )
    if defects is None:
        raise TrainingError(
            f"{method} needs labelled defects, none found: put defective images into train/DEFECT beside "
            "train/good, or choose a detector that needs none"
        )
    shown = zip(defects.labels, defects.parts, strict=True)
    parts = Counter(kind for kind, _ in sorted({(kind, part) for label, part in shown for kind in types_of(label)}))
    for kind, n in parts.items():
        if n < FEWEST_OF_A_TYPE:
            raise TrainingError(
                f"defect type {kind!r} has {n} part, need at least {FEWEST_OF_A_TYPE}, better 20: add images to "
                f"train/{kind}, or take the folder away"
            )
    return defects
