"""Photometric correction: what the lamp, the lens and the sensor did to the picture, undone.

Dark field, flat field and gain belong to one station and its lamp; gamma belongs to the product (it is part of the
recipe's view), because the detector learns from pictures after it.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.errors import BadFrame, CalibrationError, InputError
from calibration.frame import Pixels, reflectance

PHOTOMETRIC_FILE = "photometric.npz"  # beside a recording's index
MIN_FLAT = 0.02  # reflectance above dark: below this the flat field divides noise by noise
MOST_DEAD = 1e-4  # share of a flat field's pixels below it that are taken for dead ones of the sensor
SATURATED = 0.98  # of full scale: from here a white sheet is taken for clipped, and its flat field for too flat
MOST_SATURATED = 1e-3  # share of a frame's pixels

EMPTY_BYTES = 22  # of an .npz file that holds nothing
DAMAGE = (  # what a damaged or foreign .npz file ends in; RuntimeError: flags of encryption or of another compression
    OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error, CalibrationError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReferencePatch:
    """A place in every frame that shows the same fixed target, such as a white ceramic tile beside the part."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int
    level: float  # reflectance 0..1 that the patch should read
    min_gain: float = 0.5  # outside min_gain..max_gain the lamp is at fault, not the part
    max_gain: float = 2.0

    def __post_init__(self) -> None:
        """Raises CalibrationError where no frame could have such a patch."""
        if min(self.x_px, self.y_px) < 0 or min(self.width_px, self.height_px) < 1:
            raise CalibrationError(
                f"reference patch {self.x_px},{self.y_px},{self.width_px},{self.height_px} found, need x and y from 0 "
                "and at least 1x1 px: measure it in a frame"
            )
        if not 0.0 < self.level <= 1.0 or not 0.0 < self.min_gain <= self.max_gain < np.inf:
            raise CalibrationError(
                f"reference patch with level {self.level:g} and gain {self.min_gain:g}..{self.max_gain:g} found, need "
                "a level above 0 and up to 1 and gains above 0 in order: give what the patch should read"
            )

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the patch in a frame."""
        return slice(self.y_px, self.y_px + self.height_px), slice(self.x_px, self.x_px + self.width_px)


@dataclass(frozen=True, slots=True)
class Photometric:
    """One station's correction; the default leaves pixels as they are."""

    dark: NDArray[np.float32] | None = None  # (H, W) or (H, W, 3), reflectance with the lens covered
    flat: NDArray[np.float32] | None = None  # same shape, reflectance of an even white sheet
    patch: ReferencePatch | None = None
    _gain: NDArray[np.float32] | None = field(init=False, repr=False, compare=False, default=None)
    _offset: NDArray[np.float32] | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        """Raises CalibrationError where dark and flat do not fit together."""
        if self.flat is None:
            object.__setattr__(self, "_offset", self.dark)
            return
        light = _light(self.flat, self.dark)
        if not float(light.min()) >= MIN_FLAT:  # `not >=`: a NaN must fail too
            raise CalibrationError(
                f"the flat field reads {float(light.min()):.3f} above dark at its darkest pixel, "
                f"need {MIN_FLAT}: capture an even white sheet that fills the view"
            )
        gain = np.asarray(np.float32(light.mean()) / light, dtype=np.float32)
        object.__setattr__(self, "_gain", gain)
        object.__setattr__(self, "_offset", None if self.dark is None else self.dark * gain)

    @property
    def is_identity(self) -> bool:
        """True where `correct` returns its input untouched."""
        return self.dark is None and self.flat is None and self.patch is None

    def correct(self, pixels: Pixels, bit_depth: int) -> Pixels:
        """Return pixels as reflectance, float32; unchanged (and in their own type) where nothing is set.

        (x - dark) / (flat - dark), rescaled to the flat's mean so that brightness stays what it was; then the gain of
        the patch.

        Raises BadFrame if the frame has another shape than the fields, or if the gain is out of range.
        """
        if self.is_identity:
            return pixels
        fields = self.flat if self.flat is not None else self.dark
        if fields is not None and fields.shape != pixels.shape:
            raise BadFrame(f"the frame is {pixels.shape}, dark and flat field are {fields.shape}: capture them again")
        lamp = 1.0
        if self.patch is not None:
            _refuse_out_of_view(self.patch, pixels.shape)
            lamp = _gain_of(self._corrected(pixels, bit_depth, 1.0, self.patch.window), self.patch)
        return self._corrected(pixels, bit_depth, lamp, (slice(None), slice(None)))

    def _corrected(
        self, pixels: Pixels, bit_depth: int, lamp: float, window: tuple[slice, slice]
    ) -> NDArray[np.float32]:
        """Return a window of the frame as lamp * (pixels * gain - offset), nothing below zero.

        Three passes of OpenCV over one new array: a sixth of the time of NumPy's temporaries at 1 megapixel in colour.
        """
        scale = lamp / (1.0 if pixels.dtype == np.float32 else 2**bit_depth - 1)
        corrected: Any
        if self._gain is None:
            corrected = np.multiply(pixels[window], np.float32(scale), dtype=np.float32)
        else:
            corrected = cv2.multiply(pixels[window], self._gain[window], scale=scale, dtype=cv2.CV_32F)
        if self._offset is not None:
            cv2.scaleAdd(self._offset[window], -lamp, corrected, corrected)
        if self._offset is not None or pixels.dtype == np.float32:  # otherwise nothing can be negative
            cv2.threshold(corrected, 0.0, 0.0, cv2.THRESH_TOZERO, corrected)  # a NaN stays one; cv2.max would hide it
        return np.asarray(corrected, np.float32)


def patch_gain(pixels: NDArray[np.float32], patch: ReferencePatch) -> float:
    """Return the factor that brings the patch to its level.

    pixels: (H, W) or (H, W, 3) reflectance. Raises BadFrame if the patch is out of view or the gain out of range.
    """
    _refuse_out_of_view(patch, pixels.shape)
    return _gain_of(pixels[patch.window], patch)


def _refuse_out_of_view(patch: ReferencePatch, shape: tuple[int, ...]) -> None:
    if patch.x_px + patch.width_px > shape[1] or patch.y_px + patch.height_px > shape[0]:
        raise BadFrame(f"the reference patch is not inside the frame of {shape[1]}x{shape[0]} px")


def _gain_of(seen: NDArray[np.float32], patch: ReferencePatch) -> float:
    level = float(np.median(seen))
    gain = patch.level / max(level, 1e-6)
    if not patch.min_gain <= gain <= patch.max_gain:
        raise BadFrame(
            f"the reference patch reads {level:.3f}, should read {patch.level:.3f}: gain {gain:.2f} is outside "
            f"{patch.min_gain}..{patch.max_gain}: check the lamp, the exposure and whether the patch is covered"
        )
    return gain


def gamma_corrected(pixels: NDArray[np.float32], gamma: float) -> NDArray[np.float32]:
    """Return pixels ** gamma: above 1 it spreads the bright tones apart, below 1 the dark ones.

    pixels: any shape, reflectance 0..1. Source: paper 000, sec. 4.1 "Gamma Correction" (there gamma = 6).
    """
    if gamma == 1.0:
        return pixels
    return np.asarray(np.power(np.clip(pixels, 0.0, 1.0), np.float32(gamma)), dtype=np.float32)


def mean_field(frames: Iterable[Pixels], bit_depth: int) -> NDArray[np.float32]:
    """Return the mean reflectance of frames: a dark or flat field with the sensor's noise averaged out.

    One frame at a time is in memory beside their sum.
    Raises CalibrationError if there is no frame or their shapes differ.
    """
    shapes: Counter[tuple[int, ...]] = Counter()
    total = np.zeros(0)
    for frame in frames:
        if not shapes:
            total = np.zeros(frame.shape)
        shapes[frame.shape] += 1
        if len(shapes) == 1:
            total += reflectance(frame, bit_depth)
    if len(shapes) != 1:
        raise CalibrationError(f"{shapes.total()} frames of {len(shapes)} shapes found, need at least 1 of one shape")
    return np.asarray(total / shapes.total(), dtype=np.float32)


def flat_field(frames: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the mean of frames of an even white sheet, (H, W) or (H, W, 3) reflectance.

    Raises CalibrationError as `mean_field` does, and if a frame is saturated: it would tell of no vignetting there.
    """
    return mean_field(map(_exposed, frames), 8)


def _exposed(white: NDArray[np.float32]) -> NDArray[np.float32]:
    share = float(_of_pixels(white >= SATURATED).mean())
    if share > MOST_SATURATED:
        raise CalibrationError(
            f"{share:.3%} of a white frame's pixels read {SATURATED:.0%} of full scale or more, need at most "
            f"{MOST_SATURATED:.1%}: shorten the exposure and capture the white sheet again"
        )
    return white


def without_dead_pixels(flat: NDArray[np.float32], dark: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], int]:
    """Return the flat field with its dead pixels at the median of their neighbours, and how many they are.

    flat, dark: as `Photometric` takes them. Dead: less than MIN_FLAT above dark, in one of its colours at least.

    Raises CalibrationError if dark and flat do not fit together, or more than MOST_DEAD are dead; one always may be.
    """
    light = _light(flat, dark)
    unlit = ~(light >= MIN_FLAT)  # `not >=`: a NaN is dead too
    dead = _of_pixels(unlit)
    count = int(dead.sum())
    if count > min(dead.size - 1, max(1, int(MOST_DEAD * dead.size))):
        raise CalibrationError(
            f"{count} of {dead.size} pixels of the flat field ({count / dead.size:.3%}) read less than {MIN_FLAT} "
            f"above dark, need at most {MOST_DEAD:.2%}: capture an even white sheet that fills the view"
        )
    mended = flat.copy()
    for place in zip(*np.nonzero(unlit), strict=True):
        mended[place] = _beside(light, unlit, place) + (0.0 if dark is None else dark[place])
    return mended, count


def _beside(light: NDArray[np.float32], unlit: NDArray[np.bool_], place: tuple[int, ...]) -> float:
    """Return the median of the nearest square of lit pixels round a place: (row, column) or (row, column, colour)."""
    row, column, *colour = place
    reach, lit = 0, light[:0]
    while lit.size == 0:
        reach += 1
        window: tuple[Any, ...] = (*(slice(max(0, at - reach), at + reach + 1) for at in (row, column)), *colour)
        lit = light[window][~unlit[window]]
    return float(np.median(lit))


def _of_pixels(marked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (H, W): the pixels that are marked in one of their colours at least."""
    return marked if marked.ndim == 2 else np.asarray(marked.any(axis=2))


def _light(flat: NDArray[np.float32], dark: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return what a white sheet reads above dark. Raises CalibrationError if the two have other shapes."""
    if dark is None:
        return flat
    if dark.shape != flat.shape:
        raise CalibrationError(f"dark is {dark.shape}, flat is {flat.shape}: capture both the same way")
    return np.asarray(flat - dark)


def write_photometric(path: Path, photometric: Photometric) -> None:
    """Store a station's correction as one .npz file without pickles, in one step.

    Raises InputError if the file cannot be written.
    """
    arrays = {name: value for name in ("dark", "flat") if (value := getattr(photometric, name)) is not None}
    if photometric.patch is not None:
        arrays["patch"] = np.array(astuple(photometric.patch), dtype=np.float64)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:  # given a path, np.savez would add .npz to another ending
            np.savez(file, allow_pickle=False, **arrays)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a file that can be written") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_photometric(path: Path) -> Photometric:
    """Return what `write_photometric` stored. Raises InputError if the file cannot be used."""
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        if not arrays and path.stat().st_size > EMPTY_BYTES:
            raise ValueError("its list of arrays is empty")
        if not set(arrays) <= {"dark", "flat", "patch"}:
            raise ValueError(f"it holds {', '.join(sorted(arrays))}")
        return Photometric(_field(arrays.get("dark")), _field(arrays.get("flat")), _patch(arrays.get("patch")))
    except DAMAGE as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(
            f"{path}: not a photometric calibration ({reason}): make it with taktsight-calibration photometric"
        ) from error


def recorded_photometric(folder: Path) -> Photometric:
    """Return the correction that a recording was captured under; the identity where it has none."""
    path = folder / PHOTOMETRIC_FILE
    return read_photometric(path) if path.is_file() else Photometric()


def _field(values: NDArray[Any] | None) -> NDArray[np.float32] | None:
    if values is not None and (values.dtype != np.float32 or values.ndim not in (2, 3)):
        raise ValueError(f"a field of shape {values.shape} and type {values.dtype}, need (H, W) or (H, W, 3) float32")
    return values


def _patch(values: NDArray[Any] | None) -> ReferencePatch | None:
    if values is None:
        return None
    if values.dtype != np.float64 or values.shape != (7,) or not np.isfinite(values).all():
        raise ValueError(f"a patch of shape {values.shape} and type {values.dtype}, need 7 finite float64")
    x, y, width, height, level, least, most = values.tolist()
    return ReferencePatch(int(x), int(y), int(width), int(height), level, least, most)
