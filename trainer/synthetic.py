"""Defects made from good images, for methods that learn from defects when nobody has labelled any.

Four kinds in turn: a piece of a part pasted elsewhere (cut-paste, Li et al. 2021, arXiv:2104.04015), a soft dark or
bright blob, a scratch, and the texture of another place blended in under a ragged outline. What a detector learns from
them is where a picture was changed, not what a real defect of the product looks like: the recipe says so.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import TrainingError

Picture = NDArray[np.float32]  # (h, w, C) reflectance 0..1
Cover = NDArray[np.float32]  # (h, w) 0..1, how much of the picture is replaced
SMALLEST, LARGEST = 0.002, 0.04  # share of the view that a defect covers
LEAST_CHANGE = 0.04  # mean absolute change under the defect, reflectance; below it one is drawn again
TRIES = 12


def synthetic_defects(images: Tensor, keep: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (defective images (count, C, h, w), masks (count, h, w) bool) made from images (n, C, h, w).

    keep: (h, w), 0 where no defect may lie. Raises TrainingError if the pictures are so even that none is visible.
    """
    generator = np.random.default_rng(seed)
    pictures = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
    made, masks = [], []
    for number in range(count):
        source = pictures[int(generator.integers(len(pictures)))]
        other = pictures[int(generator.integers(len(pictures)))]
        changed, mask = _one(source, other, keep.numpy() > 0, number, generator)
        made.append(changed.transpose(2, 0, 1))
        masks.append(mask)
    return torch.from_numpy(np.stack(made)), torch.from_numpy(np.stack(masks))


def _one(
    source: Picture, other: Picture, keep: NDArray[np.bool_], number: int, generator: np.random.Generator
) -> tuple[Picture, NDArray[np.bool_]]:
    for attempt in range(TRIES):
        kind = KINDS[(number + attempt) % len(KINDS)]
        filling, cover = kind(source, other, generator)
        cover = (cover * keep).astype(np.float32)
        changed = source + cover[:, :, None] * (filling - source)
        mask = cover > 0.1
        if mask.any() and float(np.abs(changed - source)[mask].mean()) >= LEAST_CHANGE:
            return np.clip(changed, 0.0, 1.0).astype(np.float32), mask
    raise TrainingError(
        f"no visible defect could be made from the good images in {TRIES} tries: are they of one even tone?"
    )


def cut_paste(source: Picture, other: Picture, generator: np.random.Generator) -> tuple[Picture, Cover]:
    """Return a rectangle of the other picture laid elsewhere, a little brighter or darker."""
    height, width = source.shape[:2]
    area, aspect = _area(source, generator), float(np.exp(generator.uniform(-1.1, 1.1)))
    rows = int(np.clip(np.sqrt(area / aspect), 2, height // 2))
    columns = int(np.clip(np.sqrt(area * aspect), 2, width // 2))
    top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
    from_top, from_left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
    filling, cover = source.copy(), np.zeros((height, width), np.float32)
    piece = other[from_top : from_top + rows, from_left : from_left + columns]
    filling[top : top + rows, left : left + columns] = piece * generator.uniform(0.7, 1.3)
    cover[top : top + rows, left : left + columns] = 1.0
    return filling, cover


def blob(source: Picture, other: Picture, generator: np.random.Generator) -> tuple[Picture, Cover]:  # noqa: ARG001
    """Return a soft ellipse of one tone."""
    height, width = source.shape[:2]
    area, aspect = _area(source, generator), float(np.exp(generator.uniform(-0.7, 0.7)))
    axes = (max(2, round(np.sqrt(area * aspect / np.pi))), max(2, round(np.sqrt(area / aspect / np.pi))))
    centre = (int(generator.integers(width)), int(generator.integers(height)))
    drawn = np.zeros((height, width), np.uint8)
    cv2.ellipse(drawn, centre, axes, float(generator.uniform(0, 180)), 0, 360, 255, -1)
    return _toned(source, generator), _softened(drawn, max(1.0, min(axes) / 4))


def scratch(source: Picture, other: Picture, generator: np.random.Generator) -> tuple[Picture, Cover]:  # noqa: ARG001
    """Return a thin bent line of one tone."""
    height, width = source.shape[:2]
    side = min(height, width)
    length, heading = generator.uniform(0.1, 0.5) * side, generator.uniform(0, 2 * np.pi)
    place = np.array([generator.uniform(0, width), generator.uniform(0, height)])
    points = [place]
    for _ in range(6):
        heading += generator.normal(0, 0.25)
        place = place + length / 6 * np.array([np.cos(heading), np.sin(heading)])
        points.append(place)
    drawn = np.zeros((height, width), np.uint8)
    thickness = int(generator.integers(1, max(2, side // 64) + 1))
    cv2.polylines(drawn, [np.rint(points).astype(np.int32)], False, 255, thickness)
    return _toned(source, generator), _softened(drawn, 0.6)


def texture(source: Picture, other: Picture, generator: np.random.Generator) -> tuple[Picture, Cover]:
    """Return another place's texture, turned and blended in under a ragged outline."""
    height, width = source.shape[:2]
    moved = np.roll(other, (int(generator.integers(height)), int(generator.integers(width))), (0, 1))
    filling = moved[::-1, ::-1] if generator.random() < 0.5 else moved[:, ::-1]
    coarse = generator.normal(size=(height, width)).astype(np.float32)
    waves = cv2.GaussianBlur(coarse, (0, 0), max(1.0, np.sqrt(_area(source, generator)) / 3))
    _, box = blob(source, other, generator)
    nearby = cv2.GaussianBlur(box, (0, 0), max(1.0, min(height, width) / 16))
    ragged = waves / max(1e-9, float(waves.std())) + 4.0 * nearby / max(1e-9, float(nearby.max()))
    share = generator.uniform(SMALLEST, LARGEST)
    cover = (ragged > np.quantile(ragged, 1.0 - share)).astype(np.float32)
    return filling, _softened((cover * 255).astype(np.uint8), 0.8) * np.float32(generator.uniform(0.6, 1.0))


KINDS: tuple[Callable[[Picture, Picture, np.random.Generator], tuple[Picture, Cover]], ...] = (
    cut_paste,
    blob,
    scratch,
    texture,
)


def _area(source: Picture, generator: np.random.Generator) -> float:
    """Return the area of a defect, px: small ones as often as large ones."""
    share = np.exp(generator.uniform(np.log(SMALLEST), np.log(LARGEST)))
    return float(share * source.shape[0] * source.shape[1])


def _toned(source: Picture, generator: np.random.Generator) -> Picture:
    """Return the picture much darker or brighter, every channel a little differently."""
    shift = generator.choice([-1.0, 1.0]) * generator.uniform(0.15, 0.6)
    return np.clip(source + shift + generator.normal(0, 0.05, source.shape[2]), 0.0, 1.0).astype(np.float32)


def _softened(drawn: NDArray[np.uint8], sigma_px: float) -> Cover:
    return (cv2.GaussianBlur(drawn, (0, 0), sigma_px) / 255.0).astype(np.float32)
