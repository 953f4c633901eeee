"""Finding a known contour in a gray picture: search over every pose, then sub-pixel refinement.

Poses are pairs of complex numbers, so that a similarity transform is one product and one sum: the reference's point
at `offset` from the part's centre lies in the picture at `position + turn * offset`, with |turn| the scale and
arg(turn) the angle. All lengths here are pixels of the level (the reduced picture) at hand.

Sources: search by gradient direction, Steger 2002 (Occlusion, clutter and illumination invariant object recognition);
refinement after inverse-compositional Lucas-Kanade, Baker & Matthews 2004, on profiles across the contour.
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
    solver: Floats  # (P, S, 2) profile -> (gain, gain * shift)
    variance: Floats  # (P,) of gain * shift, px^2, for pixel noise of RELATIVE_NOISE
    design: Floats  # (P, 4) shift along the normal by x, y, angle, log scale

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


@dataclass(frozen=True, slots=True)
class Templates:
    """The contour at every angle and scale of the search, as spectra; two templates share one complex spectrum."""

    turn: Complexes  # (A,) A is even
    spectrum_x: Complexes  # (A / 2, h, w)
    spectrum_y: Complexes  # (A / 2, h, w)


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
        solver.astype(np.float32),
        (noise**2 * variance).astype(np.float32),
        design.astype(np.float32),
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


def templates(shape: Contour, turn: Complexes, size: tuple[int, int]) -> Templates:
    """Return the contour drawn at every turn, centre at (0, 0), on a periodic picture of size (height, width)."""
    if turn.size % 2:
        turn = np.concatenate([turn, turn[-1:]])
    fields_x, fields_y = [], []
    for each in turn:
        direction = shape.weight * each * shape.normal / abs(each) / shape.weight.sum()
        fields_x.append(_splat(each * shape.offset, direction.real, size))
        fields_y.append(_splat(each * shape.offset, direction.imag, size))
    return Templates(turn, _paired_spectra(np.stack(fields_x)), _paired_spectra(np.stack(fields_y)))


def _splat(points: Complexes, values: Floats, size: tuple[int, int]) -> Floats:
    """Return a periodic picture with values shared out bilinearly at points."""
    height, width = size
    picture = np.zeros(height * width)
    left, top = np.floor(points.real), np.floor(points.imag)
    right_share, low_share = points.real - left, points.imag - top
    for down, row_share in ((0, 1 - low_share), (1, low_share)):
        for across, column_share in ((0, 1 - right_share), (1, right_share)):
            index = ((top + down) % height) * width + (left + across) % width
            picture += np.bincount(index.astype(np.intp), values * row_share * column_share, picture.size)
    return picture.reshape(size)


def _paired_spectra(fields: Floats) -> Complexes:
    """Return conjugate spectra (A / 2, h, w): field 2k in the real part of the result, 2k + 1 in the imaginary."""
    spectra = np.conj(np.fft.fft2(fields))
    return np.asarray(spectra[0::2] + 1j * spectra[1::2], np.complex64)


def search(level: Level, shapes: Templates, largest_shift_px: float, home: complex) -> tuple[Floats, Poses]:
    """Return for every turn of the search the best score (A,) and its pose.

    Score: mean cosine over the contour, gradients near the picture's mean strength counted half. The part's centre is
    looked for inside the frame, at most largest_shift_px from home.
    """
    rows, columns = shapes.spectrum_x.shape[1:]
    height, width = level.shape
    x, y = gradient(level)
    strength = np.hypot(x, y)
    strength += strength.mean() + 1e-3
    spectrum_x, spectrum_y = (_spectrum(each / strength, (rows, columns)) for each in (x, y))
    far = _outside(height, width, home, largest_shift_px)
    score = np.empty(shapes.turn.size)
    position = np.empty(shapes.turn.size, complex)
    for pair, (across, down) in enumerate(zip(shapes.spectrum_x, shapes.spectrum_y, strict=True)):
        product = (spectrum_x * across + spectrum_y * down).view(np.float32).reshape(rows, columns, 2)
        both = cv2.dft(product, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)[:height, :width]
        for side in (0, 1):
            plane = both[:, :, side]  # a view: cv2.split and cv2.minMaxLoc take five times as long
            if far is not None:
                plane[far] = -1
            row, column = divmod(int(plane.argmax()), width)
            score[2 * pair + side] = plane[row, column]
            position[2 * pair + side] = complex(column, row)
    return score, Poses(shapes.turn, position)


def _spectrum(field: Floats, size: tuple[int, int]) -> Complexes:
    padded = np.zeros(size, np.float32)
    padded[: field.shape[0], : field.shape[1]] = field
    spectrum = cv2.dft(padded, flags=cv2.DFT_COMPLEX_OUTPUT)
    return np.asarray(spectrum).view(np.complex64)[:, :, 0]


def _outside(height: int, width: int, home: complex, largest_shift_px: float) -> NDArray[np.bool_] | None:
    if largest_shift_px >= np.hypot(height, width):
        return None
    rows, columns = np.ogrid[:height, :width]
    return np.asarray(np.hypot(columns - home.real, rows - home.imag) > largest_shift_px)


def refine(level: Level, poses: Poses, shape: Contour, iterations: int, freedom: Freedom) -> tuple[Poses, Floats]:
    """Return the poses after some Gauss-Newton steps, and the last displacements across the contour (P, K).

    Every contour point compares its own profile with the reference's, free in gain and offset, and so measures its
    shift along the normal; a robust rigid fit (Geman-McClure) of all shifts moves the pose. NaN = point not seen.
    """
    turn, position = poses.turn, poses.position
    unknowns = freedom.unknowns
    step = np.zeros((turn.size, 4))
    shift: Floats = np.zeros((shape.offset.size, turn.size))
    for _ in range(iterations):
        shift, trust = _shifts(level, Poses(turn, position), shape)
        step[:, unknowns], rest = _rigid_step(shift, trust, shape.design[:, unknowns])
        position = position + turn * (step[:, 0] + 1j * step[:, 1])
        turn = turn * np.exp(step[:, 3] + 1j * step[:, 2])
        shift = np.where(trust > 0, rest, np.nan)
    return Poses(turn, position), shift


def _shifts(level: Level, poses: Poses, shape: Contour) -> tuple[Floats, Floats]:
    """Return how far each point must move along its normal (P, K) and how much to trust that (P, K)."""
    reach = np.arange(-REACH_PX, REACH_PX + 1, dtype=np.float32)
    place = _places(poses, shape.offset)  # (P, K)
    across = shape.normal[:, None] * poses.turn[None, :].astype(np.complex64)
    profiles = sample(level, place[:, :, None] + across[:, :, None] * reach)  # (P, K, S)
    gain, moved = np.moveaxis(np.matmul(profiles, shape.solver), 2, 0)
    seen = (gain > MIN_GAIN) & in_frame(level, place)
    gain = np.where(seen, gain, np.float32(1))
    shift = np.clip(-moved / gain, -REACH_PX / 2, REACH_PX / 2)
    spread = np.float32(MODEL_ERROR_PX**2) + shape.variance[:, None] / gain**2
    return shift, np.where(seen, shape.weight[:, None] / spread, np.float32(0))


def _rigid_step(shift: Floats, trust: Floats, design: Floats) -> tuple[Floats, Floats]:
    """Return the rigid motion (K, 3 or 4) that explains the shifts (P, K), and what it leaves of them (P, K)."""
    first = _weighted_fit(shift, trust, design)
    rest = shift - design @ first.T
    scale = 1.5 * (trust * np.abs(rest)).sum(axis=0) / (trust.sum(axis=0) + 1e-9) + 0.1
    step = _weighted_fit(shift, trust / (1 + (rest / scale) ** 2) ** 2, design)
    step = np.clip(step, -REACH_PX, REACH_PX)  # a contour hardly seen holds nothing: keep it near the picture
    return step, shift - design @ step.T


def _weighted_fit(shift: Floats, trust: Floats, design: Floats) -> Floats:
    unknowns = design.shape[1]
    squares = (design[:, :, None] * design[:, None, :]).reshape(-1, unknowns * unknowns)
    normal = (trust.T @ squares).reshape(-1, unknowns, unknowns).astype(np.float64)
    right = (trust * shift).T @ design
    size = np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-9
    return np.asarray(np.linalg.solve(normal + 1e-9 * size * np.eye(unknowns), right[:, :, None])[:, :, 0])


def _places(poses: Poses, offset: Complexes) -> Complexes:
    """Return where the points at offset (P,) lie in the picture, (P, K)."""
    place = poses.position[None, :] + offset[:, None] * poses.turn[None, :]
    return np.asarray(place, np.complex64)


def agreement(level: Level, poses: Poses, shape: Contour) -> Agreement:
    """Return how much of the contour is found with the right gradient direction, whatever the light."""
    place = _places(poses, shape.offset)
    steps = np.array([1, -1, 1j, -1j], np.complex64)
    right, left, below, above = np.moveaxis(sample(level, place[:, :, None] + steps), 2, 0)
    slope = (right - left) / 2 + 0.5j * (below - above)
    expected = shape.normal[:, None] * (poses.turn / np.abs(poses.turn))[None, :]
    noise_floor = 0.1 * np.median(shape.strength)
    cosine = (np.conj(expected) * slope).real / np.maximum(np.abs(slope), noise_floor)
    weight = shape.weight[:, None] * in_frame(level, place)
    seen = weight.sum(axis=0)
    return Agreement((weight * cosine).sum(axis=0) / np.maximum(seen, 1e-9), seen / shape.weight.sum())


@dataclass(frozen=True, slots=True)
class Texture:
    """The reference's gray values inside the part, for telling apart poses between which the contour cannot choose."""

    offset: Complexes  # (M,) from the part's centre
    value: Floats  # (M,) mean 0, length 1
    ring: Complexes  # (POLAR_RINGS, POLAR_BINS) offsets of a polar grid from the part's axis
    ring_spectrum: Complexes  # (POLAR_RINGS, POLAR_BINS / 2 + 1) conjugate

    def correlation(self, level: Level, poses: Poses) -> Floats:
        """Return the zero-mean normalised cross-correlation of K poses, (K,)."""
        values = sample(level, _places(poses, self.offset))
        values = values - values.mean(axis=0)
        return np.asarray(self.value @ values / np.maximum(np.linalg.norm(values, axis=0), 1e-6))

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
