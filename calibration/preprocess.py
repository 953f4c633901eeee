"""From a frame to what the detector sees: the one copy of this path, used in training and in production.

frame -> registration -> crop: region of interest, size, colour -> gamma -> batch (1, C, h, w) float32, reflectance 0..1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.errors import BadFrame
from calibration.frame import Pixels, gray, reflectance
from calibration.photometric import gamma_corrected
from calibration.registration import Reference, Registration


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of the reference view, in whole reference pixels."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int

    @property
    def right_px(self) -> int:
        """The first column to the right of it."""
        return self.x_px + self.width_px

    @property
    def low_px(self) -> int:
        """The first row below it."""
        return self.y_px + self.height_px


@dataclass(frozen=True, slots=True)
class View:
    """How a frame becomes the detector's input."""

    height: int  # of the detector's input, px
    width: int
    colour: bool
    reference_size: tuple[int, int]  # (height, width) of the reference view, px
    fixed_size: bool = True  # frames must have reference_size; False where the training images differed in size
    region: Rectangle | None = None  # region of interest; None: the whole reference view
    gamma: float = 1.0
    bit_depth: int = 8  # of the sensor: full scale is 2**bit_depth - 1

    @property
    def channels(self) -> int:
        """3 for colour, 1 for gray."""
        return 3 if self.colour else 1

    @property
    def rectangle(self) -> Rectangle:
        """The region of interest, or the whole reference view."""
        height, width = self.reference_size
        return self.region or Rectangle(0, 0, width, height)

    def reference_from_view(self) -> NDArray[np.float64]:
        """Return the (3, 3) transform from pixels of the detector's input to reference pixels."""
        box = self.rectangle
        return scaling(box.width_px / self.width, box.height_px / self.height, box.x_px, box.y_px)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One part, ready for the detector."""

    batch: NDArray[np.float32]  # (1, C, h, w), reflectance 0..1
    registration: Registration | None  # None where the recipe does not register

    @property
    def picture(self) -> NDArray[np.float32]:
        """What the detector sees, for people: (h, w) or (h, w, 3)."""
        return picture_of(self.batch)


def prepare(pixels: Pixels, bit_depth: int, view: View, reference: Reference | None) -> Prepared:
    """Return the detector's input for one frame.

    pixels: (H, W) or (H, W, 3), after photometric correction.

    Raises BadFrame if the frame does not fit the recipe, NotRegistered if the part cannot be aligned.
    """
    check_frame(pixels, bit_depth, view)
    registration = None if reference is None else reference.register(pixels, bit_depth)
    return Prepared(to_batch(pixels, bit_depth, view, registration), registration)


def to_batch(pixels: Pixels, bit_depth: int, view: View, registration: Registration | None) -> NDArray[np.float32]:
    """Return (1, C, h, w) float32: region of interest at the detector's size, in its colours, under its gamma."""
    return batch_of(to_crop(pixels, view, registration), bit_depth, view)


def to_crop(pixels: Pixels, view: View, registration: Registration | None) -> Pixels:
    """Return (h, w) or (h, w, 3), of the same type: region of interest at the detector's size, in its colours."""
    channels = pixels if view.colour else gray(pixels)
    return _resized(channels, view) if registration is None else _warped(channels, view, registration)


def batch_of(crop: Pixels, bit_depth: int, view: View) -> NDArray[np.float32]:
    """Return a crop as (1, C, h, w) float32, under the view's gamma."""
    picture = gamma_corrected(reflectance(crop, bit_depth), view.gamma)
    channels_first = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
    return np.ascontiguousarray(channels_first[None])


def picture_of(batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the one image of a batch (1, C, h, w) as people store it: (h, w) or (h, w, 3)."""
    channels_last: NDArray[np.float32] = batch[0].transpose(1, 2, 0)
    return channels_last[:, :, 0] if channels_last.shape[2] == 1 else channels_last


def check_frame(pixels: Pixels, bit_depth: int, view: View) -> None:
    """Raises BadFrame unless the frame has the size, depth and channels that the recipe was trained on."""
    if bit_depth != view.bit_depth:
        raise BadFrame(
            f"the frame has {bit_depth} bits, the recipe was trained on {view.bit_depth}: "
            "set the camera's pixel format as it was, or train a new recipe"
        )
    if view.fixed_size and pixels.shape[:2] != view.reference_size:
        found, wanted = pixels.shape[:2], view.reference_size
        raise BadFrame(
            f"the frame is {found[1]}x{found[0]} px, the recipe was trained on {wanted[1]}x{wanted[0]}: "
            "set the camera's region as it was, or train a new recipe"
        )
    if view.colour and pixels.ndim == 2:
        raise BadFrame("the frame is gray, the recipe was trained in colour: set the camera's pixel format to colour")


def in_view(mask: NDArray[np.uint8], view: View, registration: Registration | None) -> NDArray[np.bool_]:
    """Return a mask of the frame as the detector sees it, (h, w).

    mask: (H, W), nonzero inside; in image pixels, or already in reference pixels where registration is None.
    """
    transform = np.asarray(np.linalg.inv(view.reference_from_view()))
    if registration is not None:
        transform = transform @ registration.reference_from_image
    elif view.region is None and mask.shape != view.reference_size:  # images differ in size: each fills the view
        transform = scaling(view.width / mask.shape[1], view.height / mask.shape[0], 0, 0)
    soft = _resampled((mask > 0).astype(np.float32), transform, (view.height, view.width), cv2.BORDER_CONSTANT)
    return np.asarray(soft >= 0.5)


def scaling(scale_x: float, scale_y: float, offset_x: float, offset_y: float) -> NDArray[np.float64]:
    """Return the (3, 3) transform that scales about pixel corners, then shifts; pixel centres are whole numbers."""
    shift_x = offset_x + 0.5 * scale_x - 0.5
    shift_y = offset_y + 0.5 * scale_y - 0.5
    return np.array([[scale_x, 0.0, shift_x], [0.0, scale_y, shift_y], [0.0, 0.0, 1.0]])


def _resized(pixels: Pixels, view: View) -> Pixels:
    """Return region of interest at the detector's size; along a side that shrinks, every source pixel counts once.

    A side that is shorter than the view's is interpolated afterwards: OpenCV averages only where both sides shrink.
    """
    if view.region is not None:
        box = view.region
        if box.right_px > pixels.shape[1] or box.low_px > pixels.shape[0]:  # only where frames may differ in size
            raise BadFrame(
                f"the frame is {pixels.shape[1]}x{pixels.shape[0]} px, the region of interest reaches to "
                f"{box.right_px}x{box.low_px}: deliver frames of one size, or train a recipe without region"
            )
        pixels = pixels[box.y_px : box.low_px, box.x_px : box.right_px]
    size = (view.width, view.height)
    least = (min(size[0], pixels.shape[1]), min(size[1], pixels.shape[0]))
    resized: NDArray[Any] = cv2.resize(pixels, least, interpolation=cv2.INTER_AREA)
    if least != size:
        resized = cv2.resize(resized, size, interpolation=cv2.INTER_LINEAR)
    return resized


def _warped(pixels: Pixels, view: View, registration: Registration) -> Pixels:
    """Return the registered part at the detector's size, interpolated once."""
    view_from_image = np.linalg.inv(view.reference_from_view()) @ registration.reference_from_image
    size = (view.height, view.width)
    return _resampled(pixels, view_from_image, size, cv2.BORDER_REPLICATE)


def _reduction(transform: NDArray[np.float64]) -> tuple[int, int]:
    """Return by which whole factors (along x, along y) to average pixels so that the warp shrinks by less than 1.5."""
    along_x, along_y = np.hypot(transform[0, :2], transform[1, :2])  # result px per px
    return max(1, round(1.0 / float(along_x))), max(1, round(1.0 / float(along_y)))


def _averaged(pixels: NDArray[Any], factor_x: int, factor_y: int) -> NDArray[Any]:
    """Return the means of blocks of factor_x x factor_y pixels; the factors divide the sides.

    By halves as far as they go: OpenCV's 2x2 mean takes a fifth of the time of its general one (1024x1024 RGB to a
    quarter: 0.15 against 0.8 ms); but not for float32 RGB (1.7 against 0.8 ms).
    """
    halves = pixels.ndim == 2 or pixels.dtype != np.float32
    while halves and factor_x % 2 == 0 and factor_y % 2 == 0:
        pixels = _shrunk(pixels, 2, 2)
        factor_x, factor_y = factor_x // 2, factor_y // 2
    return pixels if factor_x == factor_y == 1 else _shrunk(pixels, factor_x, factor_y)


def _shrunk(pixels: NDArray[Any], factor_x: int, factor_y: int) -> NDArray[Any]:
    blocks = (pixels.shape[1] // factor_x, pixels.shape[0] // factor_y)
    return cv2.resize(pixels, blocks, interpolation=cv2.INTER_AREA)


def _needed(
    shape: tuple[int, ...], transform: NDArray[np.float64], size: tuple[int, int], factors: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (left, top, right, low): the whole blocks of pixels that the result can show, one more on each side."""
    height, width = size
    corners = np.array([[0, width - 1, 0, width - 1], [0, 0, height - 1, height - 1], [1, 1, 1, 1]])
    places = (np.linalg.inv(transform) @ corners)[:2]
    bounds = []
    for place, side, factor in zip(places, shape[1::-1], factors, strict=True):
        first = int(np.clip((place.min() // factor - 2) * factor, 0, side - 1)) // factor * factor
        bounds.append((first, int(np.clip((place.max() // factor + 3) * factor, first + factor, side))))
    (left, right), (top, low) = bounds
    return left, top, right, low


def _resampled(
    pixels: NDArray[Any], transform: NDArray[np.float64], size: tuple[int, int], border: int
) -> NDArray[Any]:
    """Return pixels under transform, averaged first where it shrinks, then interpolated once.

    transform: (3, 3), result from pixels. size: (height, width) of the result. border: what lies outside the pixels.
    """
    factor_x, factor_y = _reduction(transform)
    left, top, right, low = _needed(pixels.shape, transform, size, (factor_x, factor_y))
    pixels = pixels[top:low, left:right]
    transform = transform @ scaling(1, 1, left, top)
    if factor_x > 1 or factor_y > 1:
        beyond_y, beyond_x = -pixels.shape[0] % factor_y, -pixels.shape[1] % factor_x
        if beyond_y or beyond_x:  # a last block that is not full counts too
            pixels = cv2.copyMakeBorder(pixels, 0, beyond_y, 0, beyond_x, border)
        pixels = _averaged(pixels, factor_x, factor_y)
        transform = transform @ scaling(factor_x, factor_y, 0, 0)
    return cv2.warpAffine(pixels, transform[:2], size[::-1], flags=cv2.INTER_LINEAR, borderMode=border)
