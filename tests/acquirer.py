"""A camera of tests through harvesters: pictures for it, an acquirer that is closed again, and frames as they came."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gentl import Linecam, producer, write_picture

pytest.importorskip("harvesters", reason="harvesters is not installed: pip install harvesters==1.4.3 genicam==1.6.0")
from genicam import gentl as transport
from harvesters.core import Harvester

HEIGHT, WIDTH = 37, 53  # pixels; odd, so that packed rows end within a byte
PICTURES = 7
FORMATS = {  # bits of a sample, and how it is packed
    "Mono8": 8,
    "Mono10": 10,
    "Mono12": 12,
    "Mono16": 16,
    "Mono10p": 10,
    "Mono12p": 12,
    "Mono10Packed": 10,
    "Mono12Packed": 12,
    "BayerRG8": 8,
    "BayerGB8": 8,
    "BayerGR8": 8,
    "BayerBG8": 8,
    "RGB8": 8,
    "BGR8": 8,
}
TRIGGERED = {"TriggerMode": "On", "TriggerSource": "Software", "ExposureTime": 1.0}


def folder_of(folder: Path, shape: tuple[int, ...], dtype: Any) -> Path:
    folder.mkdir()
    for number in range(PICTURES):
        write_picture(folder / f"{number}.p{'g' if len(shape) == 2 else 'p'}m", noise(number, shape, dtype))
    return folder


def noise(number: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(number).integers(0, int(np.iinfo(dtype).max) + 1, shape, dtype=dtype)


@contextlib.contextmanager
def harvester() -> Iterator[Harvester]:
    found = Harvester()
    found.add_file(str(producer()))
    found.update()
    try:
        yield found
    finally:
        found.reset()


@contextlib.contextmanager
def opened(camera: Linecam, **nodes: object) -> Iterator[Any]:
    """Yield an acquirer of this camera, with the nodes set."""
    with harvester() as found:
        acquirer = found.create({"serial_number": camera.serial})
        acquirer.num_buffers = 8
        for name, value in nodes.items():
            getattr(acquirer.remote_device.node_map, name).value = value
        try:
            yield acquirer
        finally:
            with contextlib.suppress(transport.GenericException):  # the camera may be dead
                acquirer.stop()
            acquirer.destroy()


def triggered(acquirer: Any) -> tuple[np.ndarray, int]:
    """Return the bytes of the frame that a software trigger gives, and its id."""
    __tracebackhide__ = True  # pytest would print the acquirer, which crashes once the camera is closed
    acquirer.remote_device.node_map.TriggerSoftware.execute()
    return fetched(acquirer)


def fetched(acquirer: Any, timeout_s: float = 3.0) -> tuple[np.ndarray, int]:
    """Return the bytes of the next frame as they came, and its id: harvesters' pictures cannot be packed and odd."""
    __tracebackhide__ = True
    buffer = acquirer.try_fetch(timeout=timeout_s, is_raw=True)
    assert buffer is not None, "no complete frame came"
    pixels, frame_id = np.frombuffer(buffer.raw_buffer, np.uint8).copy()[: buffer.size_filled], int(buffer.frame_id)
    buffer.parent.queue_buffer(buffer)
    return pixels, frame_id


def scaled(samples: np.ndarray, bits: int) -> np.ndarray:
    """Return samples of full 8 or 16 bits as these bits, rounded half up."""
    brightest, maximum = (1 << bits) - 1, int(np.iinfo(samples.dtype).max)
    return ((samples.astype(np.int64) * brightest + maximum // 2) // maximum).astype(np.uint16)


def bayer(pixels: np.ndarray, tile: str) -> np.ndarray:
    """Return what a sensor behind these filters sees of an RGB picture; tile: colours of the first 2 x 2 pixels."""
    mosaic = np.empty(pixels.shape[:2], pixels.dtype)
    for (row, column), colour in zip(itertools.product((0, 1), (0, 1)), tile, strict=True):
        mosaic[row::2, column::2] = pixels[row::2, column::2, "RGB".index(colour)]
    return mosaic


def packed(samples: np.ndarray, pixel_format: str) -> np.ndarray:
    """Return flat samples as the bytes of a format; written from PFNC and GigE Vision, not from linecam."""
    bits = FORMATS[pixel_format]
    if pixel_format.endswith("p"):  # one stream of bits, the least significant first
        stream = (samples[:, None] >> np.arange(bits)) & 1
        return np.packbits(stream.ravel().astype(np.uint8), bitorder="little")
    if pixel_format.endswith("Packed"):  # two pixels in three bytes, the low bits of both in the middle
        even = np.append(samples, 0) if len(samples) % 2 else samples
        first, second, low = even[0::2], even[1::2], (1 << (bits - 8)) - 1
        groups = np.stack([first >> (bits - 8), (first & low) | (second & low) << 4, second >> (bits - 8)], axis=1)
        return groups.ravel().astype(np.uint8)[: -(-len(samples) * 3 // 2)]
    return samples.astype("<u2").view(np.uint8) if bits > 8 else samples.astype(np.uint8)


def expected(pixels: np.ndarray, pixel_format: str) -> np.ndarray:
    if pixel_format.startswith("Bayer"):
        tile = {"RG": "RGGB", "GB": "GBRG", "GR": "GRBG", "BG": "BGGR"}[pixel_format[5:7]]
        pixels = bayer(pixels, tile)
    elif pixel_format == "BGR8":
        pixels = pixels[..., ::-1]
    return packed(scaled(pixels, FORMATS[pixel_format]).ravel(), pixel_format)
