"""Image files come back exactly as stored, or are refused with a word on what to do."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from calibration.errors import InputError
from calibration.images import decode_image, encode_png, image_files, labelled_images, read_image

GRAY, RGB, GRAY_ALPHA, RGBA = 0, 2, 4, 6  # PNG colour types


def png(pixels: np.ndarray, colour_type: int) -> bytes:
    """Return (H, W, channels) as a PNG, written by hand from the specification, independently of OpenCV."""
    height, width = pixels.shape[:2]
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def noise(shape: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def opaque(pixels: np.ndarray) -> np.ndarray:
    alpha = np.full((*pixels.shape[:2], 1), np.iinfo(pixels.dtype).max, pixels.dtype)
    return np.concatenate([pixels, alpha], axis=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("colour_type", "channels"), [(GRAY, 1), (RGB, 3)])
def test_a_png_comes_back_bit_for_bit_with_red_first(dtype, colour_type, channels):
    pixels = noise((5, 7, channels), dtype)
    found = decode_image(png(pixels, colour_type), "x.png")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels if channels == 3 else pixels[:, :, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_opaque_alpha_channel_is_dropped(dtype):
    gray, colour = noise((5, 7, 1), dtype), noise((5, 7, 3), dtype)
    np.testing.assert_array_equal(decode_image(png(opaque(gray), GRAY_ALPHA), "x.png"), gray[:, :, 0])
    np.testing.assert_array_equal(decode_image(png(opaque(colour), RGBA), "x.png"), colour)


def test_a_colour_image_of_a_gray_part_stays_colour_under_its_alpha_channel():
    gray_part = np.repeat(noise((5, 7, 1)), 3, axis=2)
    assert decode_image(png(opaque(gray_part), RGBA), "x.png").shape == (5, 7, 3)


@pytest.mark.parametrize(("colour_type", "channels"), [(GRAY_ALPHA, 1), (RGBA, 3)])
def test_one_transparent_pixel_is_refused(colour_type, channels):
    pixels = opaque(noise((5, 7, channels)))
    pixels[4, 6, -1] = 254
    with pytest.raises(InputError, match=r"^x\.png: the image is partly transparent: flatten it"):
        decode_image(png(pixels, colour_type), "x.png")


@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_encoding_loses_nothing(shape, dtype):
    pixels = noise(shape, dtype)
    found = decode_image(encode_png(pixels), "x.png")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".ppm"])
def test_other_lossless_formats_come_back_with_red_first(tmp_path: Path, suffix):
    pixels = noise((5, 7, 3))
    path = tmp_path / f"x{suffix}"
    cv2.imwrite(str(path), pixels[:, :, ::-1])
    np.testing.assert_array_equal(read_image(path), pixels)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_cut_at_any_length_is_refused(suffix, capfd):
    data = cv2.imencode(suffix, cv2.GaussianBlur(noise((40, 60, 3)), (0, 0), 2))[1].tobytes()
    for length in (9, len(data) // 4, len(data) // 2, len(data) - 3):
        with pytest.raises(InputError, match=rf"cut off after {length} bytes: copy it again or remove it"):
            decode_image(data[:length], "x")
    assert capfd.readouterr().err == ""  # found before OpenCV prints its own complaint


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_what_follows_a_whole_image_does_not_matter(suffix):
    pixels = cv2.GaussianBlur(noise((40, 60, 3)), (0, 0), 2)
    data = cv2.imencode(suffix, pixels)[1].tobytes()
    film = noise((5000,)).tobytes()  # as in the motion photos of phones
    np.testing.assert_array_equal(decode_image(data + film, "x"), decode_image(data, "x"))


def test_a_cut_photo_is_not_taken_for_whole_because_of_its_thumbnail(capfd):
    data, thumbnail = (
        cv2.imencode(".jpg", cv2.GaussianBlur(noise(shape), (0, 0), 2))[1].tobytes() for shape in ((40, 60), (8, 12))
    )
    headers = struct.pack(">BBH", 0xFF, 0xE1, 2 + len(thumbnail)) + thumbnail + b"\xff"  # one filling byte
    photo = data[:2] + headers + data[2:]
    assert decode_image(photo, "x").shape == (40, 60)
    cut = photo[: len(photo) * 3 // 4]
    assert thumbnail in cut
    with pytest.raises(InputError, match=rf"cut off after {len(cut)} bytes"):
        decode_image(cut, "x")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".pgm"])
def test_a_cut_file_without_an_end_mark_is_refused_too(suffix):
    data = cv2.imencode(suffix, noise((40, 60)))[1].tobytes()
    with pytest.raises(InputError, match=r"not a readable image .* copy it again or remove it"):
        decode_image(data[: len(data) // 2], "x")


def test_a_flipped_bit_in_the_pixels_of_a_png_is_refused():
    data = bytearray(png(noise((20, 20, 1)), GRAY))
    data[60] ^= 0x10
    with pytest.raises(InputError, match="not a readable image"):
        decode_image(bytes(data), "x")


def test_a_file_that_is_no_image_is_refused_with_its_size():
    with pytest.raises(InputError, match=r"^notes\.png: not a readable image \(11 bytes\): copy it again or remove it"):
        decode_image(b"not a photo", "notes.png")


def test_an_empty_file_is_refused(tmp_path: Path):
    (tmp_path / "x.png").touch()
    with pytest.raises(InputError, match=r"x\.png: the file is empty \(0 bytes\): copy it again or remove it"):
        read_image(tmp_path / "x.png")


def test_pixels_that_are_not_8_or_16_bits_are_refused(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "x.tif"), np.zeros((4, 4), np.float32))
    with pytest.raises(InputError, match=r"pixels are float32, need 8 or 16 bits unsigned: convert the file"):
        read_image(tmp_path / "x.tif")


def test_a_path_that_is_no_file_or_not_there_is_refused(tmp_path: Path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(InputError, match=r"x\.png: Is a directory: give an image file that you can read"):
        read_image(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"y\.png: No such file or directory: give an image file"):
        read_image(tmp_path / "y.png")


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch):
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.png").write_bytes(encode_png(noise((4, 4))))
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read all: the system's answer is played
    with pytest.raises(InputError, match=r"x\.png: Permission denied: give an image file that you can read"):
        read_image(tmp_path / "x.png")


def test_files_come_in_natural_order(tmp_path: Path):
    wanted = ["1.png", "2.PNG", "10.jpg", "a2b9.png", "a2b10.png", "a10b1.png", "part-9.png", "part-010.png"]
    for name in reversed(wanted):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == wanted


def test_equal_numbers_written_differently_still_have_one_order(tmp_path: Path):
    for name in ("07.png", "7.png", "007.png"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["007.png", "07.png", "7.png"]


def test_only_image_files_directly_in_the_folder_are_listed(tmp_path: Path):
    (tmp_path / "below.png").mkdir()
    (tmp_path / "below.png" / "1.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "1.png").touch()
    assert [path.name for path in image_files(tmp_path)] == ["1.png"]


def test_a_name_that_is_not_utf8_is_refused_before_it_ends_a_training(tmp_path: Path):
    (tmp_path / "Prüfung 1.png").touch()
    assert len(image_files(tmp_path)) == 1
    (tmp_path / os.fsdecode(b"Pr\xfcfung 2.png")).touch()
    with pytest.raises(InputError, match=r"the name of Pr\ufffdfung 2\.png is not UTF-8, .*: rename it") as refused:
        image_files(tmp_path)
    str(refused.value).encode()  # can be printed


def test_a_label_that_is_not_utf8_is_refused(tmp_path: Path):
    for name in (b"good", "défaut".encode()):
        (tmp_path / os.fsdecode(name)).mkdir()
        (tmp_path / os.fsdecode(name) / "1.png").touch()
    (tmp_path / os.fsdecode(b"empt\xe9")).mkdir()  # no label
    assert [label for _, label in labelled_images(tmp_path)] == ["défaut", "good"]
    (tmp_path / os.fsdecode(b"empt\xe9") / "1.png").touch()
    with pytest.raises(InputError, match=r"the name of empt\ufffd is not UTF-8, .*: rename it") as refused:
        labelled_images(tmp_path)
    str(refused.value).encode()  # can be printed


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="No such file or directory: give a folder of images that you can read"):
        image_files(tmp_path / "none")
