"""Image files: which there are, and their pixels exactly as stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.errors import InputError
from calibration.frame import Pixels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".pgm", ".ppm")
JPEG_END = b"\xff\xd9"
MARKER, START_OF_SCAN = 0xFF, 0xDA  # first and second byte of what the parts of a JPEG begin with
PNG_END = b"IEND\xaeB`\x82"
PNG_COLOUR_TYPE, PNG_GRAY_ALPHA = 25, 4  # offset in the file, value: gray with an alpha channel
LEAST_OF_16_BITS = 2**14  # the brightest pixel of a true 16-bit camera is not below: a quarter of full scale


def image_files(folder: Path) -> list[Path]:
    """Return the image files directly in folder, in natural order (2.png before 10.png).

    Raises InputError for a folder that cannot be read, and for a name that no report or JSON file could hold.
    """
    try:
        found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    except OSError as error:
        raise InputError(f"{folder}: {_reason(error)}: give a folder of images that you can read") from error
    for path in found:
        check_name(path)
    return sorted(found, key=natural_key)


def check_name(path: Path) -> None:
    """Raises InputError for a file or folder whose own name no report or JSON file could hold."""
    if path.name != printable(path.name):
        raise InputError(
            f"{printable(str(path.parent))}: the name of {printable(path.name)} is not UTF-8, need one that is: rename "
            "it, or all of them with convmv -r -f cp1252 -t utf8 --notest FOLDER"
        )


def printable(name: str) -> str:
    """Return a name as UTF-8 can hold it, other bytes replaced by U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def check_depth(pixels: Pixels, bit_depth: int | None, name: str) -> None:
    """Raises InputError if the pixels of a file are not of the depth that was given for them; None: none was given."""
    if bit_depth is None:
        return
    brightest = int(pixels.max())
    if brightest >= 2**bit_depth or (pixels.dtype == np.uint8 and bit_depth > 8):
        raise InputError(
            f"{name}: {8 * pixels.dtype.itemsize}-bit image whose brightest pixel is {brightest}, "
            f"{bit_depth} bits were given: give the sensor's depth with --bit-depth, none for 8-bit images"
        )


def check_16_bits(brightest: int) -> None:
    """Raises InputError if 16-bit images without a given depth look like those of a sensor of fewer bits.

    brightest: of all pixels of such images; 0 where there are none.
    """
    if 0 < brightest < LEAST_OF_16_BITS:
        raise InputError(
            f"16-bit images whose brightest pixel is {brightest}: a {max(9, brightest.bit_length())}-bit camera? "
            "Give the sensor's depth with --bit-depth"
        )


def natural_key(path: Path) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which the numbers inside a file name count as numbers."""
    parts: list[tuple[int, int, str]] = []
    word = ""
    digits = ""
    for letter in path.name + "\0":
        if letter.isdecimal():
            digits += letter
            continue
        if digits:
            parts += [(0, 0, word), (1, int(digits), digits)]
            word, digits = "", ""
        word += letter
    return (*parts, (0, 0, word))


def read_image(path: Path) -> Pixels:
    """Return the pixels of one image file: (H, W) or (H, W, 3) RGB, uint8 or uint16.

    An alpha channel is dropped where it is fully opaque. The EXIF orientation is not applied: a camera sets none.

    Raises InputError if the file is unreadable, truncated, of another bit depth or partly transparent.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}: give an image file that you can read") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Pixels:
    """Return the pixels of an encoded image; name appears in error messages. Else as `read_image`."""
    if not data:
        raise InputError(f"{name}: the file is empty (0 bytes): copy it again or remove it")
    _refuse_truncated(data, name)
    pixels = _decoded(data)
    if pixels is None:
        raise InputError(f"{name}: not a readable image ({len(data)} bytes): copy it again or remove it")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{name}: pixels are {pixels.dtype}, need 8 or 16 bits unsigned: convert the file")
    return _without_alpha(pixels, name, _is_gray_alpha(data))


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """Return pixels ((H, W) or (H, W, 3) RGB) as a PNG at compression level 1: lossless and quick."""
    stored = pixels if pixels.ndim == 2 else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    done, data = cv2.imencode(".png", stored, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise InputError(f"pixels of shape {pixels.shape} and type {pixels.dtype} cannot be stored as PNG")
    return data.tobytes()


def _refuse_truncated(data: bytes, name: str) -> None:
    """OpenCV fills the missing part of a cut JPEG with gray and only warns: look for the end mark ourselves.

    What follows the mark is no part of the image, such as the film in a phone's motion photo.
    """
    cut_jpeg = data.startswith(b"\xff\xd8") and data.find(JPEG_END, _scan_place(data)) < 0
    cut_png = data.startswith(b"\x89PNG") and PNG_END not in data
    if cut_jpeg or cut_png:
        raise InputError(f"{name}: the image is cut off after {len(data)} bytes: copy it again or remove it")


def _scan_place(data: bytes) -> int:
    """Return where a JPEG's pixels start: behind its headers, whose thumbnail has an end mark of its own.

    In coded pixels an end mark cannot occur by chance: 0xff is always followed by 0x00 or a restart mark there.
    """
    place = 2
    while place + 4 <= len(data) and data[place] == MARKER and data[place + 1] != START_OF_SCAN:
        filled = data[place + 1] == MARKER  # markers may be preceded by any number of 0xff
        place += 1 if filled else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return place


def _decoded(data: bytes) -> NDArray[Any] | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # more pixels than OpenCV allows, or nonsense in the header
        return None


def _is_gray_alpha(data: bytes) -> bool:
    """OpenCV hands a PNG of gray + alpha over as four channels: look at how it is stored."""
    return data.startswith(b"\x89PNG") and data[PNG_COLOUR_TYPE] == PNG_GRAY_ALPHA


def _without_alpha(pixels: NDArray[Any], name: str, gray_alpha: bool) -> Pixels:
    if pixels.ndim == 2:
        return pixels
    channels = pixels.shape[2]
    if channels in (2, 4):
        alpha = pixels[:, :, -1]
        if int(alpha.min()) != np.iinfo(alpha.dtype).max:
            raise InputError(f"{name}: the image is partly transparent: flatten it, a camera delivers no transparency")
        pixels = pixels[:, :, : channels - 1]
    if pixels.shape[2] == 1 or gray_alpha:
        return np.ascontiguousarray(pixels[:, :, 0])
    if pixels.shape[2] != 3:
        raise InputError(f"{name}: {channels} channels found, need 1 (gray) or 3 (colour): convert the file")
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def labelled_images(root: Path) -> list[tuple[Path, str]]:
    """Return (file, label) of a folder of images (label "") or of one folder of images per label.

    Raises InputError if root holds no image, or holds both, and for a label that is not UTF-8.
    """
    if not root.is_dir():
        raise InputError(f"{root}: {'not a folder' if root.exists() else 'not found'}: give a folder of images")
    plain = [(file, "") for file in image_files(root)]
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    labelled = [(file, folder.name) for folder in folders for file in image_files(folder)]
    for folder in {file.parent: None for file, _ in labelled}:
        check_name(folder)
    if plain and labelled:
        raise InputError(f"{root}: {len(plain)} images found beside folders of images: give one folder, or its parent")
    if not plain and not labelled:
        below = ", ".join(folder.name for folder in folders[:4])
        raise InputError(f"{root}: no images found{f' (it holds {below}: give one of these)' if below else ''}")
    return plain or labelled
