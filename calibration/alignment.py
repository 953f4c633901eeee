"""A known contour in a gray picture: how well a pose explains what is seen, and sub-pixel refinement of it.

Poses are pairs of complex numbers, so that a similarity transform is one product and one sum: the reference's point
at `offset` from the part's centre lies in the picture at `position + turn * offset`, with |turn| the scale and
arg(turn) the angle. All lengths here are pixels of the level (the reduced picture) at hand.

Source: refinement after inverse-compositional Lucas-Kanade, Baker & Matthews 2004, on profiles across the contour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.pyramid import Complexes, Floats, Level, gradient, in_frame, sample

Indices = NDArray[np.signedinteger[Any]]

REACH_PX = 5  # profiles across the contour reach this far to both sides
MODEL_ERROR_PX = 0.15  # no single contour point is trusted better than this
RELATIVE_NOISE = 0.04  # pixel noise as a share of the contour's median contrast: only sets relative weights
MIN_GAIN = 0.12  # contrast against the reference below which a contour point counts as not seen
SETTLED_PX = 0.002  # refinement ends where no point moves further: the noise is ten times that
MIN_WEIGHT = 0.6  # random directions reach it by chance in 9 % of the pixels of 5 images, 0.7 % of 12
POLAR_BINS = 512  # 0.7 degrees
POLAR_RINGS = 24
NEARLY_AS_HIGH = 0.8  # share of the highest polar crest below which an angle is out of the question


@dataclass(frozen=True, slots=True)
class Poses:
    """K places where the part may lie."""

    turn: Complexes  # (K,)
    position: Complexes  # (K,) of the part's centre

    def __getitem__(self, index: NDArray[np.intp]) -> Poses:
        return Poses(self.turn[index], self.position[index])

    @staticmethod
    def joined(first: Poses, second: Poses) -> Poses:
        """Return both."""
        return Poses(np.append(first.turn, second.turn), np.append(first.position, second.position))

    def at_scale(self, ratio: float) -> Poses:
        """Return the same places in the pixels of a level that has ratio times as many per side."""
        return Poses(self.turn, (self.position + (0.5 + 0.5j)) * ratio - (0.5 + 0.5j))


@dataclass(frozen=True, slots=True)
class Freedom:
    """What may move besides the place."""

    angle: bool
    scale: bool

    @property
    def unknowns(self) -> list[int]:
        """Columns of `Contour.design` to solve for."""
        return [0, 1] + [2] * self.angle + [3] * self.scale


@dataclass(frozen=True, slots=True)
class Contour:
    """P edge points of the reference, with all that can be computed before a frame arrives."""

    offset: Complexes  # (P,) from the part's centre
    normal: Complexes  # (P,) unit direction of the gradient
    strength: Floats  # (P,) gradient, gray levels / px
    weight: Floats  # (P,) 0..1
    solver: Floats  # (2, S, P) profile -> gain, gain * shift
    variance: Floats  # (P,) of gain * shift, px^2, for pixel noise of RELATIVE_NOISE
    design: Floats  # (P, 4) shift along the normal by x, y, angle, log scale
    radius_px: float  # largest distance of a point from the part's centre

    @property
    def rms_radius_px(self) -> float:
        """Root mean square distance of the points from the part's centre."""
        return float(np.sqrt(np.mean(np.abs(self.offset) ** 2)))

    @property
    def width_px(self) -> float:
        """Extent across the narrow direction: four standard deviations of the points."""
        points = np.stack([self.offset.real, self.offset.imag])
        return float(4 * np.sqrt(max(0.0, np.linalg.eigvalsh(np.cov(points))[0])))

    def firmness(self) -> tuple[float, float]:
        """Return how firmly the contour holds the part's place and its angle, each 0..1.

        Place: 0.5 = equally in all directions, 0 = it slides along parallel edges. Angle: share of the contour that
        a turn moves sideways, 0 = round, whatever the place does.
        """
        design = self.design[:, :3].astype(np.float64) / [1, 1, self.rms_radius_px]
        held = (design * self.weight[:, None]).T @ design / self.weight.sum()
        place, cross = held[:2, :2], held[:2, 2]
        turning = held[2, 2] - cross @ np.linalg.solve(place + 1e-9 * np.eye(2), cross)
        return float(np.linalg.eigvalsh(place)[0]), float(turning)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well K poses explain the picture."""

    similarity: Floats  # (K,) mean cosine between reference and picture gradient over the points in view
    in_view: Floats  # (K,) share of the points inside the frame


def edge_points(level: Level, weight: Floats, limit: int) -> tuple[Indices, Indices]:
    """Return (rows, columns) of at most limit crest points of the gradient, evenly spread over all of them.

    weight: (h, w) 0..1; points under MIN_WEIGHT are left out. Points weaker than a fifth of the strong contour (the
    200th strongest point) are noise or texture.
    """
    x, y = gradient(level)
    strength = np.hypot(x, y)
    unit = (x + 1j * y) / np.maximum(strength, 1e-6)
    rows, columns = np.mgrid[: level.shape[0], : level.shape[1]]
    place = columns + 1j * rows
    crest = (strength >= sample(strength, place + unit)) & (strength > sample(strength, place - unit))
    crest &= weight >= MIN_WEIGHT
    crest[[0, 1, -2, -1], :] = crest[:, [0, 1, -2, -1]] = False
    strengths = np.sort(np.append(strength[crest], 0))
    strong = strengths[-min(200, strengths.size)]
    found = np.argwhere(crest & (strength > max(0.2 * strong, 0.5)))
    chosen = found[np.linspace(0, len(found) - 1, min(limit, len(found))).astype(np.intp)]
    return chosen[:, 0], chosen[:, 1]


def contour(level: Level, weight: Floats, centre: complex, limit: int) -> Contour:
    """Return at most limit contour points of the reference picture; weight as in `edge_points`."""
    rows, columns = edge_points(level, weight, limit)
    x, y = gradient(level)
    slope = (x + 1j * y)[rows, columns]
    place = columns + 1j * rows
    normal = slope / np.maximum(np.abs(slope), 1e-6)
    reach = np.arange(-REACH_PX - 1, REACH_PX + 2)
    profiles = sample(level, place[:, None] + (reach + 0j) * normal[:, None])
    solver, variance = _profile_solver(profiles.astype(np.float64))
    noise = RELATIVE_NOISE * float(np.median(np.ptp(profiles, axis=1)))
    offset = place - centre
    lever = np.conj(normal) * offset
    design = np.stack([normal.real, normal.imag, -lever.imag, lever.real], axis=1)
    return Contour(
        offset.astype(np.complex64),
        normal.astype(np.complex64),
        np.abs(slope),
        weight[rows, columns],
        np.ascontiguousarray(solver.transpose(2, 1, 0), np.float32),
        (noise**2 * variance).astype(np.float32),
        design.astype(np.float32),
        float(np.abs(offset).max(initial=0)),
    )


def _profile_solver(profiles: NDArray[np.float64]) -> tuple[Floats, Floats]:
    """Return the least-squares solver of picture(s) = gain * reference(s + shift) + offset, one per point.

    profiles: (P, S + 2). Returns (P, S, 2) and the variance (P,) of gain * shift for pixel noise of variance 1. A
    profile that is a plain ramp cannot tell shift from offset: its variance is huge and the point weighs nothing.
    """
    values = profiles[:, 1:-1] - profiles[:, 1:-1].mean(axis=1, keepdims=True)
    slopes = (profiles[:, 2:] - profiles[:, :-2]) / 2
    basis = np.stack([values, slopes, np.ones_like(values)], axis=2)  # (P, S, 3)
    normal = basis.transpose(0, 2, 1) @ basis
    size = np.trace(normal, axis1=1, axis2=2)
    inverse = np.linalg.inv(normal + 1e-6 * size[:, None, None] * np.eye(3) + 1e-9 * np.eye(3))
    return (basis @ inverse)[:, :, :2], inverse[:, 1, 1]


def refine(
    level: Level, poses: Poses, shape: Contour, iterations: int, freedom: Freedom, *, settled_px: float = SETTLED_PX
) -> tuple[Poses, Floats]:
    """Return the poses after some Gauss-Newton steps, and the last displacements across the contour (K, P).

    Every contour point compares its own profile with the reference's, free in gain and offset, and so measures its
    shift along the normal; a robust rigid fit (Geman-McClure) of all shifts moves the pose. NaN = point not seen.
    The steps end early where none moves any point across the contour by more than settled_px.
    """
    turn, position = poses.turn, poses.position
    unknowns = freedom.unknowns
    design = np.ascontiguousarray(shape.design[:, unknowns])  # (P, U)
    squares = (design[:, :, None] * design[:, None, :]).reshape(-1, len(unknowns) ** 2)
    step = np.zeros((turn.size, 4))
    shift: Floats = np.zeros((turn.size, shape.offset.size), np.float32)
    trust = shift
    for _ in range(iterations):
        shift, trust = _shifts(level, Poses(turn, position), shape)
        step[:, unknowns] = _rigid_step(shift, trust, design, squares)
        moved = step[:, unknowns].astype(np.float32) @ design.T
        shift -= moved
        position = position + turn * (step[:, 0] + 1j * step[:, 1])
        turn = turn * np.exp(step[:, 3] + 1j * step[:, 2])
        if np.abs(moved).max(initial=0) < settled_px:
            break
    return Poses(turn, position), np.where(trust > 0, shift, np.float32(np.nan))


def _shifts(level: Level, poses: Poses, shape: Contour) -> tuple[Floats, Floats]:
    """Return how far each point must move along its normal (K, P) and how much to trust that (K, P)."""
    place = _places(poses, shape.offset)  # (K, P)
    across = poses.turn.astype(np.complex64)[:, None] * shape.normal
    profiles = sample(level, _profile_places(place, across))  # (S, K, P)
    gain, moved = np.einsum("skp,tsp->tkp", profiles, shape.solver)
    seen = gain > MIN_GAIN
    if not _surely_inside(level, poses, shape.radius_px):
        seen &= in_frame(level, place)
    gain = np.where(seen, gain, np.float32(1))
    shift = moved / gain
    np.negative(shift, out=shift)
    np.minimum(np.maximum(shift, -REACH_PX / 2, out=shift), REACH_PX / 2, out=shift)
    gain *= gain
    spread = np.divide(shape.variance, gain, out=gain)
    spread += np.float32(MODEL_ERROR_PX**2)
    trust = np.divide(shape.weight, spread, out=spread)
    trust *= seen
    return shift, trust


def _profile_places(place: Complexes, across: Complexes) -> Complexes:
    """Return the places (S, K, P) of the profiles through place (K, P), across (K, P) being 1 px."""
    reach = np.arange(-REACH_PX, REACH_PX + 1, dtype=np.float32)
    pairs = np.multiply.outer(reach, across.view(np.float32))  # as floats: twice as fast as complex numbers
    pairs += place.view(np.float32)
    return pairs.view(np.complex64)


def _surely_inside(level: Level, poses: Poses, radius_px: float) -> bool:
    """Return whether every pose holds a circle of radius_px about the part's centre inside the picture."""
    height, width = level.shape
    for turn, position in zip(poses.turn.tolist(), poses.position.tolist(), strict=True):
        reach = radius_px * abs(turn)
        if not (reach <= position.real <= width - 1 - reach and reach <= position.imag <= height - 1 - reach):
            return False
    return True


def _rigid_step(shift: Floats, trust: Floats, design: Floats, squares: Floats) -> Floats:
    """Return the rigid motion (K, U) that explains the shifts (K, P)."""
    rest = shift - _weighted_fit(shift, trust, design, squares).astype(np.float32) @ design.T
    size = np.einsum("kp,kp->k", trust, np.abs(rest)) / (trust.sum(axis=1) + 1e-9)
    rest /= (1.5 * size + 0.1).astype(np.float32)[:, None]
    rest *= rest
    rest += 1
    rest *= rest
    step = _weighted_fit(shift, np.divide(trust, rest, out=rest), design, squares)
    return np.clip(step, -REACH_PX, REACH_PX)  # a contour hardly seen holds nothing: keep it near the picture


def _weighted_fit(shift: Floats, trust: Floats, design: Floats, squares: Floats) -> Floats:
    """Return the least-squares motion (K, U); squares (P, U * U) are the products of the design's columns."""
    unknowns = design.shape[1]
    normal = (trust @ squares).reshape(-1, unknowns, unknowns).astype(np.float64)
    right = (trust * shift) @ design
    diagonal = normal.reshape(-1, unknowns**2)[:, :: unknowns + 1]
    diagonal += 1e-9 * (diagonal.sum(axis=1, keepdims=True) + 1e-9)
    return np.asarray(np.linalg.solve(normal, right[:, :, None])[:, :, 0])


def _places(poses: Poses, offset: Complexes) -> Complexes:
    """Return where the points at offset (P,) lie in the picture, (K, P)."""
    place = poses.turn.astype(np.complex64)[:, None] * offset.astype(np.complex64, copy=False)
    place += poses.position.astype(np.complex64)[:, None]
    return place


def agreement(level: Level, poses: Poses, shape: Contour) -> Agreement:
    """Return how much of the contour is found with the right gradient direction, whatever the light."""
    place = _places(poses, shape.offset)  # (K, P)
    steps = np.array([1, -1, 1j, -1j], np.complex64)
    right, left, below, above = sample(level, place + steps[:, None, None])
    across, down = right - left, below - above  # twice the slope
    expected = (poses.turn / np.abs(poses.turn)).astype(np.complex64)[:, None] * shape.normal
    noise_floor = np.float32(0.2 * np.median(shape.strength))
    cosine = expected.real * across + expected.imag * down
    cosine /= np.maximum(np.sqrt(across * across + down * down), noise_floor)
    weight = shape.weight * in_frame(level, place)
    seen = weight.sum(axis=1)
    return Agreement(np.einsum("kp,kp->k", weight, cosine) / np.maximum(seen, 1e-9), seen / shape.weight.sum())


def distinct(poses: Poses, rank: Floats, count: int) -> NDArray[np.intp]:
    """Return the indices of the best poses, best first, without near copies of a better one."""
    chosen: list[int] = []
    for index in np.argsort(rank)[::-1]:
        if rank[index] == -np.inf:
            break
        turn, position = poses.turn[index], poses.position[index]
        if all(abs(turn - poses.turn[c]) > 0.06 or abs(position - poses.position[c]) > 3 for c in chosen):
            chosen.append(int(index))
        if len(chosen) == count:
            break
    return np.array(chosen, np.intp)


@dataclass(frozen=True, slots=True)
class Texture:
    """The reference's gray values inside the part, for telling apart poses between which the contour cannot choose."""

    offset: Complexes  # (M,) from the part's centre
    value: Floats  # (M,) mean 0, length 1
    ring: Complexes  # (POLAR_RINGS, POLAR_BINS) offsets of a polar grid from the part's axis
    ring_spectrum: Complexes  # (POLAR_RINGS, POLAR_BINS / 2 + 1) conjugate

    def correlation(self, level: Level, poses: Poses) -> Floats:
        """Return the zero-mean normalised cross-correlation of K poses, (K,)."""
        values = sample(level, _places(poses, self.offset))  # (K, M)
        values -= values.mean(axis=1, keepdims=True)
        return np.asarray(values @ self.value / np.maximum(np.sqrt(np.einsum("km,km->k", values, values)), 1e-6))

    def angles(self, level: Level, axis: complex, count: int, largest_angle: float) -> Floats:
        """Return the likely angles (rad, at most largest_angle; at most count) of a part whose axis is known."""
        polar = sample(level, axis + self.ring)
        spectrum = np.fft.rfft(polar, axis=1) * self.ring_spectrum
        score = np.fft.irfft(spectrum.sum(axis=0), POLAR_BINS)
        before, after = np.roll(score, 1), np.roll(score, -1)
        bend = np.minimum(before + after - 2 * score, -1e-9)
        lean = np.clip((before - after) / (2 * bend), -0.5, 0.5)  # crest of the parabola, bins
        height = score - (after - before) ** 2 / (8 * bend)
        angle = np.angle(np.exp(2j * np.pi * (np.arange(POLAR_BINS) + lean) / POLAR_BINS))
        crest = (score >= before) & (score > after) & (np.abs(angle) <= largest_angle + 0.03)
        best = np.argsort(np.where(crest, height, -np.inf))[::-1][:count]
        return np.asarray(angle[best[crest[best] & (height[best] >= NEARLY_AS_HIGH * height[best[0]])]])


def texture(level: Level, centre: complex, axis: complex, hull: NDArray[np.bool_], limit: int) -> Texture:
    """Return gray samples of the reference at up to limit places where hull (h, w) is true.

    axis: what the part might be turned about, in the picture like centre.
    """
    places = np.argwhere(hull)
    rows, columns = places[np.linspace(0, len(places) - 1, min(limit, len(places))).astype(np.intp)].T
    place = columns + 1j * rows
    value = sample(level, place)
    value = value - value.mean()
    radii = np.linspace(0.1, 1, POLAR_RINGS) * np.quantile(np.abs(place - axis), 0.98)
    ring = radii[:, None] * np.exp(2j * np.pi * np.arange(POLAR_BINS) / POLAR_BINS)[None, :]
    polar = sample(level, axis + ring)
    polar = (polar - polar.mean(axis=1, keepdims=True)) * radii[:, None]
    spectrum = np.conj(np.fft.rfft(polar, axis=1))
    return Texture(place - centre, value / max(float(np.linalg.norm(value)), 1e-6), ring, spectrum)


def hull(level: Level, shape: Contour, centre: complex) -> NDArray[np.bool_]:
    """Return (h, w) true inside the convex hull of the contour; centre: of the part, in the picture."""
    place = shape.offset + centre
    corners = cv2.convexHull(np.stack([place.real, place.imag], axis=1).astype(np.float32))
    inside = np.zeros(level.shape, np.uint8)
    cv2.fillConvexPoly(inside, corners.round().astype(np.int32), 1)
    return inside > 0
