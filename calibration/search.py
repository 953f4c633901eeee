"""The coarse search for a contour: over every angle, scale and place, by gradient direction.

Source: Steger 2002 (Occlusion, clutter and illumination invariant object recognition), as correlations by Fourier
transform.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.alignment import Contour, Poses
from calibration.pyramid import Complexes, Floats, Slopes

FEWEST_PAIRS = 8  # of turns that are looked at closely: fewer are not worth choosing from


@dataclass(frozen=True, slots=True)
class Templates:
    """The contour at every angle and scale of the search, as spectra; two templates share one complex spectrum."""

    turn: Complexes  # (A,) A is even
    spectrum_x: Complexes  # (A / 2, h, w)
    spectrum_y: Complexes  # (A / 2, h, w)
    low_x: Complexes  # (A / 2, h', w') the low frequencies of the same, about half per side
    low_y: Complexes  # (A / 2, h', w')


def templates(shape: Contour, turn: Complexes, size: tuple[int, int]) -> Templates:
    """Return the contour drawn at every turn, centre at (0, 0), on a periodic picture of size (height, width)."""
    if turn.size % 2:
        turn = np.concatenate([turn, turn[-1:]])
    fields_x, fields_y = [], []
    for each in turn:
        direction = shape.weight * each * shape.normal / abs(each) / shape.weight.sum()
        fields_x.append(_splat(each * shape.offset, direction.real, size))
        fields_y.append(_splat(each * shape.offset, direction.imag, size))
    across, down = _paired_spectra(np.stack(fields_x)), _paired_spectra(np.stack(fields_y))
    low = tuple(cv2.getOptimalDFTSize(-(-side // 2)) for side in size)
    return Templates(turn, across, down, _low(across, low), _low(down, low))


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


def search(
    slopes: Slopes, shapes: Templates, largest_shift_px: float, home: complex, share: float = 1.0
) -> tuple[Floats, Poses]:
    """Return for every turn of the search the best score (A,) and its pose.

    Score: mean cosine over the contour, gradients near the picture's mean strength counted half. The part's centre is
    looked for inside the frame, at most largest_shift_px from home. share: only this share of the turns, the best at
    half the resolution, is looked at closely; the others score -inf.
    """
    rows, columns = shapes.spectrum_x.shape[1:]
    strength = slopes.strength + (slopes.strength.mean() + np.float32(1e-3))
    spectrum_x, spectrum_y = (_spectrum(each / strength, (rows, columns)) for each in (slopes.x, slopes.y))
    far = _outside(strength.shape, home, largest_shift_px)
    pairs = np.arange(len(shapes.spectrum_x))
    wanted = max(FEWEST_PAIRS, int(np.ceil(share * pairs.size)))
    if wanted < pairs.size:
        rough = _rough_scores(spectrum_x, spectrum_y, shapes, strength.shape, far)
        pairs = np.argsort(rough)[::-1][:wanted]
    score = np.full(shapes.turn.size, -np.inf)
    position = np.zeros(shapes.turn.size, complex)
    for pair in pairs:
        both = _correlation(spectrum_x, spectrum_y, shapes.spectrum_x[pair], shapes.spectrum_y[pair])
        both = both[: strength.shape[0], : strength.shape[1]]
        for side, plane in enumerate((both.real, both.imag)):
            if far is not None:
                plane[far] = -1
            row, column = divmod(int(plane.argmax()), strength.shape[1])
            score[2 * pair + side] = plane[row, column]
            position[2 * pair + side] = complex(column, row)
    return score, Poses(shapes.turn, position)


def _rough_scores(
    spectrum_x: Complexes,
    spectrum_y: Complexes,
    shapes: Templates,
    shape: tuple[int, ...],
    far: NDArray[np.bool_] | None,
) -> Floats:
    """Return about the better score of each pair of templates (A / 2,), times a constant."""
    low = shapes.low_x.shape[1:]
    low_x, low_y = _low(spectrum_x, low), _low(spectrum_y, low)
    height, width = (-(-side * small // whole) for side, small, whole in zip(shape, low, spectrum_x.shape, strict=True))
    best = np.empty(len(shapes.low_x))
    near = None if far is None else ~cv2.resize(far.astype(np.uint8), (width, height)).astype(bool)
    for pair, (across, down) in enumerate(zip(shapes.low_x, shapes.low_y, strict=True)):
        both = _correlation(low_x, low_y, across, down)[:height, :width]
        planes = (both.real, both.imag) if near is None else (both.real[near], both.imag[near])
        best[pair] = max(float(plane.max(initial=-np.inf)) for plane in planes)
    return best


def _correlation(spectrum_x: Complexes, spectrum_y: Complexes, across: Complexes, down: Complexes) -> Complexes:
    """Return the correlations of the picture (h, w) with a pair of templates, as real and imaginary part."""
    product = spectrum_x * across
    product += spectrum_y * down
    pairs = product.view(np.float32).reshape(*product.shape, 2)
    cv2.dft(pairs, pairs, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)
    return product


def _low(spectra: Complexes, size: tuple[int, ...]) -> Complexes:
    """Return the (h', w') = size lowest frequencies of spectra (..., h, w)."""
    kept = [
        np.r_[: side - side // 2, whole - side // 2 : whole]
        for side, whole in zip(size, spectra.shape[-2:], strict=True)
    ]
    return np.ascontiguousarray(spectra[..., kept[0][:, None], kept[1]])


def _spectrum(field: Floats, size: tuple[int, int]) -> Complexes:
    padded = np.zeros(size, np.float32)
    padded[: field.shape[0], : field.shape[1]] = field
    spectrum = cv2.dft(padded, flags=cv2.DFT_COMPLEX_OUTPUT)
    return np.asarray(spectrum).view(np.complex64)[:, :, 0]


def _outside(shape: tuple[int, ...], home: complex, largest_shift_px: float) -> NDArray[np.bool_] | None:
    height, width = shape
    if largest_shift_px >= np.hypot(height, width):
        return None
    rows, columns = np.ogrid[:height, :width]
    return np.asarray(np.hypot(columns - home.real, rows - home.imag) > largest_shift_px)
