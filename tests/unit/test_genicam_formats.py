"""Pixels come out of a buffer exact to the bit, red stays red, and sizes that contradict each other are refused."""

from __future__ import annotations

import numpy as np
import pytest

from agent.cameras.genicam_formats import FORMATS, Layout, decode, pixel_format
from agent.errors import CameraError

CODES = {form.name: code for code, form in FORMATS.items()}
WIDTHS = (16, 20, 21)  # 21: the last group of a packed format is not full


def bits_first_low(values, bits):
    """Pack values as PFNC's "p" formats do: one stream of bits, the lowest first. Slow, bit by bit."""
    stream = [int(value) >> bit & 1 for value in values for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return bytes(sum(bit << place for place, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8))


def gige_packed(values, bits):
    """Pack pairs of values as GigE Vision 1.x does: high bytes outside, low bits together in the middle."""
    low, out = bits - 8, bytearray()
    for index in range(0, len(values), 2):
        first, second = int(values[index]), int(values[index + 1]) if index + 1 < len(values) else 0
        mask = (1 << low) - 1
        out += bytes((first >> low, first & mask | (second & mask) << 4, second >> low))
    return bytes(out)


def filled(values, form):
    """Return the bytes that a camera sends, and how many of them count."""
    flat = values.reshape(-1)
    if form.name.endswith("p"):
        return bits_first_low(flat, form.bit_depth)
    if form.name.endswith("Packed"):
        return gige_packed(flat, form.bit_depth)
    return flat.astype(np.uint16).tobytes() if form.bit_depth > 8 else flat.astype(np.uint8).tobytes()


def unpacked(buffer, layout):
    form = pixel_format(layout.code)
    out = np.empty(form.shape(layout.width, layout.height), form.dtype)
    decode(buffer, layout, out)
    return out


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [name for name in CODES if name.startswith("Mono")])
def test_gray_values_are_those_that_were_packed(name, width):
    form = FORMATS[CODES[name]]
    values = np.random.default_rng(1).integers(0, 2**form.bit_depth, (7, width), np.uint16)
    buffer = filled(values, form)
    wanted = -(-values.size * form.bits_per_pixel // 8)
    out = unpacked(buffer, Layout(CODES[name], width, 7, wanted))
    np.testing.assert_array_equal(out, values)
    assert out.dtype == (np.uint8 if form.bit_depth == 8 else np.uint16)


@pytest.mark.parametrize("name", ["Mono8", "Mono12p", "Mono16"])
@pytest.mark.parametrize("width", [16, 21])
def test_padding_behind_the_rows_is_not_taken_for_pixels(name, width):
    form = FORMATS[CODES[name]]
    values = np.random.default_rng(2).integers(0, 2**form.bit_depth, (5, width), np.uint16)
    rows = [filled(row, form) for row in values]
    buffer = b"".join(row + b"\xff\xff\xff" for row in rows)
    out = unpacked(buffer, Layout(CODES[name], width, 5, len(buffer), padding_x=3))
    np.testing.assert_array_equal(out, values)


PATTERNS = {"BayerRG8": "RGGB", "BayerGR8": "GRBG", "BayerGB8": "GBRG", "BayerBG8": "BGGR"}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("colour", "rgb"), [("R", (200, 0, 0)), ("G", (0, 200, 0)), ("B", (0, 0, 200))])
def test_a_patch_of_one_colour_keeps_it_whatever_the_sensors_pattern(name, colour, rgb):
    pattern = PATTERNS[name]
    sensor = np.zeros((16, 16), np.uint8)
    for place, letter in enumerate(pattern):
        sensor[place // 2 :: 2, place % 2 :: 2] = 200 if letter == colour else 0
    out = unpacked(sensor.tobytes(), Layout(CODES[name], 16, 16, 256))
    assert np.all(out[4:-4, 4:-4] == rgb)


@pytest.mark.parametrize(("name", "order"), [("RGB8", [0, 1, 2]), ("BGR8", [2, 1, 0])])
def test_rgb_and_bgr_are_told_apart(name, order):
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    out = unpacked(pixels.tobytes(), Layout(CODES[name], 8, 6, pixels.size))
    np.testing.assert_array_equal(out, pixels[..., order])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(CODES["Mono8"], 10, 10, 99), "99 bytes came, 10 x 10 px of Mono8 take 100"),
        (Layout(CODES["Mono8"], 10, 10, 110), "110 bytes came"),  # a byte behind each row that nobody told of
        (Layout(CODES["Mono8"], 0, 10, 0), "0 bytes came"),
        (Layout(0x0220_0016, 10, 10, 400), "pixel format 0x02200016 came, need one of Mono8"),
    ],
)
def test_a_buffer_that_contradicts_itself_is_refused(layout, message):
    with pytest.raises(CameraError, match=message):
        decode(bytes(4096), layout, np.empty((10, 10), np.uint8))


def test_bytes_behind_the_image_are_no_contradiction_where_chunks_follow_or_fewer_than_rows():
    for layout in (Layout(CODES["Mono8"], 10, 10, 140, has_chunks=True), Layout(CODES["Mono8"], 10, 10, 104)):
        out = np.empty((10, 10), np.uint8)
        decode(bytes(range(200)), layout, out)
        assert out[9, 9] == 99
