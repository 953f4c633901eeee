"""Learning the reference view of a product from its good parts, and whether registering it is worth while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.errors import CalibrationError, NotRegistered
from calibration.frame import Pixels, gray, reflectance
from calibration.pyramid import Floats, Level, gradient
from calibration.registration import Reference, Registration, RegistrationSettings

Attempt = Registration | NotRegistered
Gray = NDArray[np.uint8]  # (H, W)

MAX_LEARNED = 48  # images averaged; all images are registered against the average
ANCHORS, ANCHOR_TRIALS = 4, 6  # single images tried as first reference, on how many others each
JUDGE_SIDE_PX = 256  # about what a detector sees of the image
MIN_IMAGES = 3  # fewer cannot show whether parts move
FLOOR_SIMILARITY = 0.5  # unrelated images reach 0.48 at most (benchmarks/registration.py --wrong)
CEILING_SIMILARITY = 0.85
MARGIN_SIMILARITY = 0.1  # good parts must stay this far above the floor for registration to be on
REGISTERED_SHARE = 0.95
SLIDING_FIRMNESS = 0.03  # a rail that leaves the field at both ends has 0.01, a ball screw 0.12
ROUND_FIRMNESS = 0.03  # a plain ring has 0.01 to 0.02, one with six bolt holes 0.11
STANDS_STILL = 0.7  # consistency of an edge over unaligned images above which it does not move


@dataclass(frozen=True, slots=True)
class _Worthwhile:
    """What registration must achieve on the good images to be on."""

    motion_px: float  # parts lie at least this far apart, at JUDGE_SIDE_PX
    variance_left: float  # at most this share of the variance near the contour remains


WORTHWHILE = _Worthwhile(motion_px=1.0, variance_left=0.45)
WORTHWHILE_DESPITE_STILL_EDGES = _Worthwhile(motion_px=8.0, variance_left=0.3)
"""Edges that stand still are taken for a fixture only on strong evidence: drawn parts in fixtures leave 1 to 5 %; 45 %
remain where the still edges are the part's own outline (bottles) and only reflections move."""


@dataclass(frozen=True, slots=True)
class LearnedReference:
    """A reference, how the images it was learned from fit it, and whether to use it."""

    reference: Reference
    registrations: tuple[Attempt, ...]  # one per image, in order
    trustworthy: bool  # whether registration should be on for this product
    why: str  # one sentence for the user


@dataclass(frozen=True, slots=True)
class _Stack:
    """Good images laid over one another in the view of one of them."""

    mean: NDArray[np.uint8]  # (H, W)
    consistency: Floats  # (H, W) 0..1, mean resultant length of the gradient direction, free of small-sample bias


def learn_reference(
    images: Sequence[Pixels], bit_depth: int, settings: RegistrationSettings, *, seed: int = 0
) -> LearnedReference:
    """Return the reference view learned from good parts.

    images: good parts, gray or RGB, the part wholly in view; 5 are enough, sizes may differ. One image serves as first
    reference; the others are aligned to it and averaged, contour points are weighted by how consistent the direction
    of the gradient is over the aligned images, twice. What does not move with the part (belt, fixture, reflections)
    blurs and so drops out. Where static surroundings hold the alignment in place, it is learned again without them.

    Raises CalibrationError if there is no image, or none with a contour.
    """
    if len(images) == 0:
        raise CalibrationError("no good images to learn the reference from: collect at least 5")
    pictures = [_eight_bit(image, bit_depth) for image in images]
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pictures))[:MAX_LEARNED]
    chosen = [pictures[index] for index in order]
    learned = _without_spin(pictures, chosen, settings, None)
    if learned.trustworthy or len(chosen) < MIN_IMAGES:
        return learned
    still = _stack(chosen, [np.eye(3)] * len(chosen), learned.reference.image.shape).consistency
    if not 0.1 < _share_standing_still(chosen, still, settings) < 0.95:
        return learned
    try:
        moving = _without_spin(pictures, chosen, settings, still)
    except CalibrationError:
        return learned
    return moving if moving.trustworthy else learned


def _share_standing_still(chosen: list[Gray], still: Floats, settings: RegistrationSettings) -> float:
    """Return which share of one image's contour lies where all images agree unaligned."""
    try:
        alone = Reference(chosen[0], np.full_like(chosen[0], 255), settings, 0.0, np.inf)
    except CalibrationError:
        return 0.0
    columns, rows = _contour_pixels(alone)
    agreed = np.asarray(cv2.resize(still, chosen[0].shape[::-1]))
    return float((agreed[rows, columns] > STANDS_STILL).mean())


def _without_spin(
    pictures: list[Gray], chosen: list[Gray], settings: RegistrationSettings, still: Floats | None
) -> LearnedReference:
    """Return what is learned, with the angle left alone where turning a round part does not help.

    Nothing but noise would set the angle of a plain disc, and every part would be turned for nothing.
    """
    learned = _learned(pictures, chosen, settings, still)
    if learned.reference.firmness[1] > ROUND_FIRMNESS or settings.max_angle_deg <= 0 or len(chosen) < MIN_IMAGES:
        return learned
    upright = _learned(pictures, chosen, replace(settings, max_angle_deg=0.0), still)
    turned_left, upright_left = (_variance_left(each.reference, _found(pictures, each)) for each in (learned, upright))
    return learned if turned_left < 0.9 * upright_left else upright


def _found(pictures: list[Gray], learned: LearnedReference) -> list[tuple[Gray, Registration]]:
    pairs = zip(pictures, learned.registrations, strict=True)
    return [(picture, each) for picture, each in pairs if isinstance(each, Registration)]


def _learned(
    pictures: list[Gray],
    chosen: list[Gray],
    settings: RegistrationSettings,
    still: Floats | None,
) -> LearnedReference:
    reference = _first_reference(chosen, settings, still)
    for _ in range(2):
        fits = _good_fits(chosen, [_attempt(reference, picture) for picture in chosen])
        if len(fits) < min(2, len(chosen)):
            break
        try:
            reference = _average(fits, reference, still)
        except CalibrationError:  # nothing is common to the images: `_judgement` will say so
            break
    reference, registrations = _with_limits(reference, pictures)
    wanted = WORTHWHILE if still is None else WORTHWHILE_DESPITE_STILL_EDGES
    trustworthy, why = _judgement(reference, pictures, registrations, wanted)
    return LearnedReference(reference, registrations, trustworthy, why)


def _first_reference(chosen: list[Gray], settings: RegistrationSettings, still: Floats | None) -> Reference:
    """Return the image that the others fit best, as a reference whose whole contour counts."""
    best: tuple[float, Reference] | None = None
    failure: CalibrationError | None = None
    for number, picture in enumerate(chosen[:ANCHORS]):
        try:
            candidate = Reference(picture, _first_weight(picture, still), settings, 0.0, np.inf)
        except CalibrationError as error:
            failure = error
            continue
        others = [chosen[(number + step) % len(chosen)] for step in range(1, 1 + min(ANCHOR_TRIALS, len(chosen) - 1))]
        attempts = [_attempt(candidate, other) for other in others]
        score = sum(each.similarity for each in attempts if isinstance(each, Registration))
        if best is None or score > best[0]:
            best = score, candidate
    if best is None:
        raise failure or CalibrationError("no contour in the good images")
    return best[1]


def _first_weight(picture: Gray, still: Floats | None) -> NDArray[np.uint8]:
    """Return 255 everywhere, or less where edges stand still over the unaligned images."""
    if still is None:
        return np.full_like(picture, 255)
    moving = 1 - np.asarray(cv2.resize(still, picture.shape[::-1]), np.float32)
    strength = np.hypot(*gradient(_smooth(picture, 1.5)))
    edges = moving[strength >= np.quantile(strength, 0.95)]
    return _as_weight(moving / max(float(np.quantile(edges, 0.9)), 0.05))


def _smooth(picture: Gray | Level, sigma_px: float) -> Level:
    return np.asarray(cv2.GaussianBlur(picture.astype(np.float32), (0, 0), sigma_px), np.float32)


def _as_weight(share: Floats) -> NDArray[np.uint8]:
    return np.asarray(np.clip(share * 255, 0, 255).round(), np.uint8)


def _attempt(reference: Reference, picture: Gray) -> Attempt:
    try:
        return reference.register(picture)
    except NotRegistered as refusal:
        return refusal


def _good_fits(pictures: list[Gray], attempts: list[Attempt]) -> list[tuple[Gray, Registration]]:
    """Return the images that fit about as well as most do."""
    fits = [(picture, each) for picture, each in zip(pictures, attempts, strict=True) if isinstance(each, Registration)]
    if not fits:
        return []
    usual = float(np.quantile([each.similarity for _, each in fits], 0.75))
    return [(picture, each) for picture, each in fits if each.similarity >= 0.6 * usual]


def _average(fits: list[tuple[Gray, Registration]], old: Reference, still: Floats | None) -> Reference:
    """Return the reference averaged over the images, in the view of the one that lies most centrally."""
    view = fits[_most_central([each for _, each in fits], old)][1].image_from_reference
    matrices = [view @ each.reference_from_image for _, each in fits]
    stack = _stack([picture for picture, _ in fits], matrices, old.image.shape, still)
    return Reference(stack.mean, _as_weight(stack.consistency), old.settings, 0.0, np.inf)


def _most_central(registrations: list[Registration], reference: Reference) -> int:
    """Return the index of the pose nearest to the middle of all; angles count where parts prefer one."""
    shift = np.array([complex(each.dx_px, each.dy_px) for each in registrations])
    turn = np.exp(1j * np.radians([each.angle_deg for each in registrations]))
    distance = np.abs(shift - complex(np.median(shift.real), np.median(shift.imag)))
    if abs(turn.mean()) > 0.7:
        distance = distance + max(reference.image.shape) / 2 * np.abs(np.angle(turn / turn.mean()))
    return int(np.argmin(distance))


def _stack(
    pictures: Sequence[Gray],
    matrices: Sequence[NDArray[np.float64]],
    shape: tuple[int, ...],
    still: Floats | None = None,
) -> _Stack:
    """Return mean and consistency of the pictures warped by matrices (reference px from image px) to shape.

    still: (H, W) 0..1, edges of the unwarped pictures to leave out of the consistency.
    """
    total, seen = np.zeros(shape, np.float32), np.full(shape, 1e-6, np.float32)
    direction = np.zeros(shape, np.complex64)
    for picture, matrix in zip(pictures, matrices, strict=True):
        level = _warped(picture.astype(np.float32), matrix, shape)
        inside = cv2.warpAffine(np.ones(picture.shape, np.float32), matrix[:2], shape[::-1]) > 0.99
        counted = inside if still is None else inside & (_warped(still, matrix, shape) < STANDS_STILL)
        total += np.where(inside, level, 0)
        seen += inside
        direction += np.where(counted, _unit_gradient(level), 0)
    known = seen >= 0.5 * len(pictures)
    mean = total / seen
    mean[~known] = mean[known].mean() if known.any() else 0
    consistency = _unbiased(np.abs(direction) / seen, seen) if len(pictures) > 1 else np.ones(shape, np.float32)
    surely = cv2.erode(known.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0  # the rim of what is known is no edge
    return _Stack(np.asarray(mean.round(), np.uint8), np.where(surely, consistency, 0))


def _unbiased(resultant: Floats, count: Floats) -> Floats:
    """Return the mean resultant length without what count random directions would reach (Mardia & Jupp 2000, 9.3)."""
    count = np.maximum(count, 1)
    squared = (count * resultant**2 - 1) / np.maximum(count - 1, 1e-6)
    return np.asarray(np.sqrt(np.clip(squared, 0, 1)))


def _warped(picture: NDArray[Any], matrix: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the picture in the reference view, edge pixels repeated outside."""
    size = (shape[1], shape[0])
    return np.asarray(cv2.warpAffine(picture, matrix[:2], size, borderMode=cv2.BORDER_REPLICATE), picture.dtype)


def _unit_gradient(level: Level) -> NDArray[np.complex64]:
    """Return the direction of the gradient as a unit complex number, shorter where the gradient is weak."""
    x, y = gradient(_smooth(level, max(1.0, max(level.shape) / 512)))
    strength = np.hypot(x, y)
    floor = 0.1 * float(np.quantile(strength[::4, ::4], 0.98)) + 0.1
    return np.asarray((x + 1j * y) / np.maximum(strength, floor), np.complex64)


def _with_limits(reference: Reference, pictures: list[Gray]) -> tuple[Reference, tuple[Attempt, ...]]:
    """Return the reference with limits that its good parts keep with room to spare, and their registrations.

    A defect may hide a fifth of the contour; a flange turned by half its bolt pitch still shows three quarters.
    """
    fits = _good_fits(pictures, [_attempt(reference, picture) for picture in pictures])
    similarity = float(np.quantile([each.similarity for _, each in fits], 0.05)) if fits else 0.0
    residual = float(np.quantile([each.residual_px for _, each in fits], 0.95)) if fits else 0.0
    min_similarity = float(np.clip(0.8 * similarity, FLOOR_SIMILARITY, CEILING_SIMILARITY))
    max_residual_px = max(3 * residual, 0.75 * reference.level_factor)
    final = Reference(reference.image, reference.weight, reference.settings, min_similarity, max_residual_px)
    return final, tuple(_attempt(final, picture) for picture in pictures)


def _judgement(
    reference: Reference, pictures: list[Gray], registrations: tuple[Attempt, ...], wanted: _Worthwhile
) -> tuple[bool, str]:
    """Return whether registration removes pose variation from these good images, and a sentence that says why."""
    found = [(p, each) for p, each in zip(pictures, registrations, strict=True) if isinstance(each, Registration)]
    if len(pictures) < MIN_IMAGES:
        return False, f"{len(pictures)} good images cannot show whether parts move, need {MIN_IMAGES}"
    similarity = float(np.quantile([each.similarity for _, each in found], 0.05)) if found else 0.0
    if len(found) < REGISTERED_SHARE * len(pictures) or similarity < FLOOR_SIMILARITY + MARGIN_SIMILARITY:
        return False, (
            f"{len(found)} of {len(pictures)} good images register (contour found to {similarity:.0%}): "
            "the product has no outline that is the same on every part"
        )
    if reference.firmness[0] < SLIDING_FIRMNESS:
        return False, "the contour is parallel edges only: the part slides along them, its place cannot be told"
    motion = _motion_px(reference, [each for _, each in found])
    if motion < wanted.motion_px:
        return (
            False,
            f"the parts already lie within {motion / JUDGE_SIDE_PX:.1%} of the picture's side of one another",
        )
    left = _variance_left(reference, found[:MAX_LEARNED])
    if left > wanted.variance_left:
        return (
            False,
            f"aligning leaves {left:.0%} of the variation near the contour: it does not make the images more alike",
        )
    return True, (
        f"parts move by {motion / JUDGE_SIDE_PX:.0%} of the picture's side, "
        f"aligning takes away {1 - left:.0%} of the variation near the contour"
    )


def _motion_px(reference: Reference, registrations: list[Registration]) -> float:
    """Return the 90 % quantile of how far a part's rim lies from where it usually does, at JUDGE_SIDE_PX."""
    x, y = reference.centre_px
    radius = reference.radius_px
    rim = np.array([[x + dx * radius, y + dy * radius, 1] for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1))]).T
    places = np.stack([(each.image_from_reference @ rim)[:2] for each in registrations])  # (n, 2, 4)
    distance = np.linalg.norm(places - np.median(places, axis=0), axis=1).mean(axis=1)
    return float(np.quantile(distance, 0.9) * JUDGE_SIDE_PX / max(reference.image.shape))


def _variance_left(reference: Reference, found: list[tuple[Gray, Registration]]) -> float:
    """Return the variance between images near the contour after aligning, as a share of that before."""
    shape = reference.image.shape
    if not found:
        return np.inf
    near = _near_contour(reference)
    aligned = [_warped(picture, each.reference_from_image, shape) for picture, each in found]
    still = [np.asarray(cv2.resize(picture, (shape[1], shape[0])), np.uint8) for picture, _ in found]
    return _spread(aligned, near) / max(_spread(still, near), 1e-9)


def _near_contour(reference: Reference) -> NDArray[np.bool_]:
    """Return the band of the contour at JUDGE_SIDE_PX."""
    mask = np.zeros(reference.image.shape, np.uint8)
    columns, rows = _contour_pixels(reference)
    mask[rows, columns] = 255
    radius = max(2, round(2 * max(mask.shape) / JUDGE_SIDE_PX))
    band = cv2.dilate(mask, np.ones((2 * radius + 1, 2 * radius + 1), np.uint8))
    return np.asarray(_judged(np.asarray(band, np.uint8)) > 127)


def _contour_pixels(reference: Reference) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return (columns, rows) of the contour points."""
    height, width = reference.image.shape
    columns, rows = reference.contour_px.round().astype(np.intp).T
    return columns.clip(0, width - 1), rows.clip(0, height - 1)


def _judged(picture: Gray) -> Level:
    """Return the picture as a detector would see it, slightly smoothed."""
    ratio = min(1.0, JUDGE_SIDE_PX / max(picture.shape))
    small = cv2.resize(picture, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
    return _smooth(np.asarray(small, np.float32), 0.8)


def _spread(pictures: list[Gray], near: NDArray[np.bool_]) -> float:
    """Return the mean variance over pictures, each freed of its own brightness and contrast."""
    values = np.stack([_judged(picture)[near] for picture in pictures])  # (n, pixels)
    values = values - values.mean(axis=1, keepdims=True)
    values = values / np.maximum(values.std(axis=1, keepdims=True), 1e-6)
    return float(values.var(axis=0).mean())


def _eight_bit(image: Pixels, bit_depth: int) -> NDArray[np.uint8]:
    if image.dtype == np.uint8 and bit_depth == 8:
        return np.asarray(gray(image), np.uint8)
    return np.asarray(np.clip(reflectance(gray(image), bit_depth) * 255, 0, 255).round(), np.uint8)
