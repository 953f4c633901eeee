"""What can be said of a frame before its part is judged: is the light as it was, is it in focus.

Everything is measured on one small gray picture of the frame (whole frame, or the region of interest where the product
is not registered), shrunk by a whole factor to about the detector's scale and at most 320 px per side. All of it takes
0.3 ms on a gray frame of 1 megapixel, 0.6 ms in colour (benchmarks/condition.py).

    brightness       mean, share of full scale
    dark_level       a tenth of the picture is darker than this, share of full scale
    bright_level     a tenth of the picture is brighter than this, share of full scale
    saturated_share  share of the sensor's own picture, before correction, at 98 % of full scale or above
    sharpness        gradient energy after a Gaussian of 1 px over that after 2 px, 1 = nothing finer than 2 px is there

Sharpness does not change with the light, the contrast or a part's turn, and hardly with its place: 2 for an ideal step
edge, 1.6 for one as soft as lenses draw it (1 px), 1.2 for one blurred by 2.5 px; textures and noise lie above.

Limits come from good parts alone: what they would read under 30 % less and 30 % more light, and three quarters of the
fine detail of the least sharp of them, but 1.6 at most: energies add, so no defect with edges in focus can bring a
frame below, whatever fine texture it covers.

A frame is too dark only if its dark places are darker too: where no part lies, the ground still shows the lamp. Where
the ground is black anyway, or white, an empty field cannot be told from a lamp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.errors import CalibrationError
from calibration.frame import Pixels, gray, reflectance
from calibration.preprocess import View

MOST_SIDE_PX = 320  # of the small picture
SATURATED_LEVEL = 250  # of 255
DARKER, BRIGHTER = 0.7, 1.3  # times the light that good parts had
BLACK = 0.03  # share of full scale; what is darker tells nothing of the lamp
DETAIL_KEPT = 0.75  # of what the least sharp good part shows beyond 1
FINE_PX, COARSE_PX = 1.0, 2.0  # Gaussians between which detail is fine
LEAST_ENERGY = 0.05  # (gray levels / px)^2 after the coarse one; below, the frame shows nothing to focus on
SATURATED_ROOM = 0.05  # share of the frame
EDGE_SHARPNESS = 1.6  # of a step edge under a Gaussian of 1 px, sqrt(5 / 2)
BLURRED_PX = 2.5  # a Gaussian at the detector's scale: focus that is lost beyond doubt


@dataclass(frozen=True, slots=True)
class Condition:
    """What was measured on one frame; the units are at the top of this file."""

    brightness: float
    dark_level: float
    bright_level: float
    saturated_share: float
    sharpness: float | None  # None where the frame shows nothing to focus on


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why a frame cannot be judged."""

    cause: str  # a stable word for machines: `too_dark`, `saturated` or `blurred`
    detail: str  # one sentence: what was measured, what was wanted, what to do


@dataclass(frozen=True, slots=True)
class ConditionLimits:
    """Between which values frames of one product can be judged."""

    least_brightness: float
    most_brightness: float
    dark_level: float  # too dark only where the frame's dark level lies below too
    bright_level: float  # too bright only where the frame's bright level reaches it too
    most_saturated_share: float
    least_sharpness: float

    def complaint(self, found: Condition) -> Complaint | None:
        """Return why this frame cannot be judged, None if it can. The lamp comes before the focus."""
        if found.brightness < self.least_brightness and found.dark_level < self.dark_level:
            return Complaint(
                "too_dark",
                f"brightness {found.brightness:.3f}, need {self.least_brightness:.3f}: check the lamp and the exposure",
            )
        if found.bright_level >= self.bright_level:
            if found.saturated_share > self.most_saturated_share:
                return Complaint(
                    "saturated",
                    f"{found.saturated_share:.1%} of the frame at full scale, at most "
                    f"{self.most_saturated_share:.1%} expected: check the exposure, the lamp and stray light",
                )
            if found.brightness > self.most_brightness:
                return Complaint(
                    "saturated",
                    f"brightness {found.brightness:.3f}, at most {self.most_brightness:.3f} expected: "
                    "check the exposure, the lamp and stray light",
                )
        if found.sharpness is not None and found.sharpness < self.least_sharpness:
            return Complaint(
                "blurred",
                f"sharpness {found.sharpness:.2f}, need {self.least_sharpness:.2f}: check focus, lens and "
                "whether the part moves during exposure",
            )
        return None


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A frame in small."""

    gray: NDArray[np.uint8]  # (h, w), as the detector gets it: after photometric correction
    peak: NDArray[np.uint8]  # (h, w), brightest channel as the sensor delivered it


def glimpse(
    pixels: Pixels, bit_depth: int, view: View, *, registered: bool, sensor_pixels: Pixels | None = None
) -> Glimpse:
    """Return a frame in small.

    pixels: (H, W) or (H, W, 3) after photometric correction. registered: whether the part is looked for in the whole
    frame. sensor_pixels: same shape, before the correction; None where nothing was corrected.
    """
    small = _shrunk(pixels, bit_depth, view, registered)
    raw = small if sensor_pixels is None else _shrunk(sensor_pixels, bit_depth, view, registered)
    return Glimpse(np.asarray(gray(small), np.uint8), _peak(raw))


def measured(seen: Glimpse) -> Condition:
    """Return what a frame in small tells of light and focus."""
    counts = cv2.calcHist([seen.gray], [0], None, [256], [0, 256]).ravel()
    below = np.cumsum(counts)
    dark, bright = np.searchsorted(below, (0.1 * below[-1], 0.9 * below[-1]))
    return Condition(
        brightness=cv2.mean(seen.gray)[0] / 255,
        dark_level=float(dark) / 255,
        bright_level=float(bright) / 255,
        saturated_share=cv2.countNonZero(cv2.inRange(seen.peak, SATURATED_LEVEL, 255)) / seen.peak.size,
        sharpness=_sharpness(seen.gray),
    )


def learn_limits(good: Sequence[Glimpse]) -> ConditionLimits:
    """Return the limits that good parts leave room for. Raises CalibrationError if they are fewer than two."""
    if len(good) < 2:
        raise CalibrationError(
            f"{len(good)} good frames found, need 2 to learn light and focus from: capture good parts"
        )
    darker = [measured(_under_light(seen, DARKER)) for seen in good]
    brighter = [measured(_under_light(seen, BRIGHTER)) for seen in good]
    detail = [value - 1 for seen in good if (value := _sharpness(seen.gray)) is not None]
    return ConditionLimits(
        least_brightness=_lowest([found.brightness for found in darker]),
        most_brightness=_highest([found.brightness for found in brighter]),
        dark_level=max(BLACK, _lowest([found.dark_level for found in darker])),
        bright_level=max(found.bright_level for found in brighter),
        most_saturated_share=SATURATED_ROOM + max(found.saturated_share for found in brighter),
        least_sharpness=min(EDGE_SHARPNESS, 1 + DETAIL_KEPT * _lowest(detail)) if len(detail) > 1 else 0.0,
    )


def noticed(good: Sequence[Glimpse], limits: ConditionLimits) -> dict[str, float]:
    """Return which share of good frames is refused once something has happened to them; a drawn fault, no real one.

    Keys: "half the light", "twice the light", "a blur of 2.5 px" at the detector's scale.
    """
    happened = {
        "half the light": lambda seen: _under_light(seen, 0.5),
        "twice the light": lambda seen: _under_light(seen, 2.0),
        f"a blur of {BLURRED_PX:g} px": _blurred,
    }
    return {
        name: sum(limits.complaint(measured(harm(seen))) is not None for seen in good) / len(good)
        for name, harm in happened.items()
    }


def _shrunk(pixels: Pixels, bit_depth: int, view: View, registered: bool) -> NDArray[np.uint8]:
    """Return (h, w) or (h, w, 3) uint8, means of whole blocks of the part of the frame that counts."""
    height, width = pixels.shape[:2]
    box = view.region
    if box is not None:
        height, width = box.height_px, box.width_px
        if not registered and box.right_px <= pixels.shape[1] and box.low_px <= pixels.shape[0]:
            pixels = pixels[box.y_px : box.low_px, box.x_px : box.right_px]
    rows, columns = pixels.shape[:2]
    factor = max(1, round(min(height / view.height, width / view.width)), -(-max(rows, columns) // MOST_SIDE_PX))
    means = _block_means(pixels, min(factor, rows, columns))
    if means.dtype == np.uint8 and bit_depth == 8:
        return np.asarray(means, np.uint8)
    levels = np.clip(reflectance(means, bit_depth) * np.float32(255) + np.float32(0.5), 0, 255)
    return np.asarray(levels, np.uint8)


def _block_means(pixels: Pixels, factor: int) -> Pixels:
    """Return the means of whole blocks of factor x factor px, by halves as far as they go: that is 7 times as fast."""
    rows, columns = (side // factor * factor for side in pixels.shape[:2])
    means: Any = pixels[:rows, :columns]
    while factor > 1:
        step = 2 if factor % 2 == 0 else factor
        means = cv2.resize(means, (means.shape[1] // step, means.shape[0] // step), interpolation=cv2.INTER_AREA)
        factor //= step
    return np.asarray(means)


def _peak(small: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if small.ndim == 2:
        return small
    red, green, blue = cv2.split(small)
    return np.asarray(cv2.max(cv2.max(red, green), blue), np.uint8)


def _sharpness(small: NDArray[np.uint8]) -> float | None:
    fine, coarse = (_gradient_energy(small, sigma_px) for sigma_px in (FINE_PX, COARSE_PX))
    return None if coarse < LEAST_ENERGY else fine / coarse


def _gradient_energy(small: NDArray[np.uint8], sigma_px: float) -> float:
    """Return the mean squared gradient, (gray levels / px)^2, after a Gaussian."""
    smooth: NDArray[Any] = cv2.GaussianBlur(small.astype(np.float32), (0, 0), sigma_px)
    across = cv2.norm(smooth[:, 1:], smooth[:, :-1], cv2.NORM_L2SQR)
    down = cv2.norm(smooth[1:], smooth[:-1], cv2.NORM_L2SQR)
    return float(across + down) / small.size


def _under_light(seen: Glimpse, gain: float) -> Glimpse:
    """Return what the frame would have been under `gain` times the light."""
    grayer, peak = (cv2.convertScaleAbs(picture, alpha=gain) for picture in (seen.gray, seen.peak))
    return Glimpse(np.asarray(grayer, np.uint8), np.asarray(peak, np.uint8))


def _blurred(seen: Glimpse) -> Glimpse:
    return Glimpse(np.asarray(cv2.GaussianBlur(seen.gray, (0, 0), BLURRED_PX), np.uint8), seen.peak)


def _lowest(values: Sequence[float]) -> float:
    """Return how low good parts go: the lowest seen, or further where a few parts differ much; values above 0."""
    logs = np.log(np.maximum(values, 1e-4))
    return float(np.exp(min(logs.min(), logs.mean() - _room(len(logs)) * logs.std(ddof=1))))


def _highest(values: Sequence[float]) -> float:
    """Return how high good parts go: the highest seen, or further where a few parts differ much; at most 1."""
    return float(min(1.0, max(np.max(values), np.mean(values) + _room(len(values)) * np.std(values, ddof=1))))


def _room(n_good: int) -> float:
    """Return how many standard deviations good parts may lie off: more where few of them told the deviation."""
    return 3 + 18 / n_good
