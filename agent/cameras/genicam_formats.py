"""Pixel formats of GenICam cameras (PFNC 2.4): from the bytes of a buffer to the pixels of a frame, exact to the bit.

Formats are known by the code that comes with each buffer. Gray stays gray, Bayer becomes RGB, 10 and 12 bits become
uint16 that count from 0 to 1023 or 4095.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import CameraError

Bytes = NDArray[np.uint8]
Unpack = Callable[[Bytes, NDArray[Any]], None]


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """One format of the table below."""

    name: str
    bits_per_pixel: int  # in the buffer
    bit_depth: int  # of one value
    channels: int  # of the frame: 1 or 3
    unpack: Unpack

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Type of the frame's values."""
        return np.uint8 if self.bit_depth == 8 else np.uint16

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return the frame's shape."""
        return (height, width) if self.channels == 1 else (height, width, self.channels)

    def frame_bytes(self, width: int, height: int) -> int:
        """Return how much memory a frame takes."""
        return height * width * self.channels * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """How an image lies in its buffer, as the producer tells."""

    code: int  # PFNC
    width: int
    height: int
    filled_bytes: int  # all that came, chunk data too
    padding_x: int = 0  # bytes behind each row
    has_chunks: bool = False


def pixel_format(code: int) -> PixelFormat:
    """Return the format with this code. Raises CameraError for those that are not known here."""
    found = FORMATS.get(code)
    if found is None:
        known = ", ".join(form.name for form in FORMATS.values())
        raise CameraError(f"pixel format {code:#010x} came, need one of {known}: set camera.pixel_format")
    return found


def decode(buffer: Any, layout: Layout, out: NDArray[Any]) -> None:
    """Write the image into `out`, which has the shape and type of its format.

    buffer: anything with the buffer protocol, the image at its start. Raises CameraError where the sizes contradict
    each other: nothing is guessed.
    """
    form = pixel_format(layout.code)
    row_bits = layout.width * form.bits_per_pixel
    if layout.padding_x:
        row_bytes = -(-row_bits // 8)
        wanted = (row_bytes + layout.padding_x) * layout.height
    else:
        wanted = -(-row_bits * layout.height // 8)
    excess = layout.filled_bytes - wanted
    if layout.width < 1 or layout.height < 1 or excess < 0 or (excess >= layout.height and not layout.has_chunks):
        raise CameraError(
            f"{layout.filled_bytes} bytes came, {layout.width} x {layout.height} px of {form.name} take {wanted}: "
            "another producer or firmware; nothing is guessed"
        )
    raw = np.frombuffer(buffer, np.uint8, wanted)
    if layout.padding_x:
        raw = np.ascontiguousarray(raw.reshape(layout.height, -1)[:, : -layout.padding_x])
        if row_bits % 8:  # each row begins with a whole byte
            for row, line in zip(raw, out, strict=True):
                form.unpack(row, line[np.newaxis])
            return
    form.unpack(raw.reshape(-1), out)


def _copy(raw: Bytes, out: NDArray[Any]) -> None:
    np.copyto(out, raw.view(np.dtype(out.dtype).newbyteorder("<")).reshape(out.shape))


def _reversed_channels(raw: Bytes, out: NDArray[Any]) -> None:
    cv2.cvtColor(raw.reshape(out.shape), cv2.COLOR_BGR2RGB, dst=out)


def _bayer(conversion: int) -> Unpack:
    def unpack(raw: Bytes, out: NDArray[Any]) -> None:
        cv2.cvtColor(raw.reshape(out.shape[:2]), conversion, dst=out)

    return unpack


def _grouped(
    raw: Bytes, out: NDArray[Any], group_bytes: int, group_pixels: int
) -> tuple[list[Any], NDArray[np.uint16]]:
    """Return the bytes of each group of pixels as uint16, by their place, and room for (groups, pixels)."""
    groups = -(-out.size // group_pixels)
    if raw.size < groups * group_bytes:
        raw = np.pad(raw, (0, groups * group_bytes - raw.size))
    wide = raw.reshape(groups, group_bytes)
    room = out.reshape(-1)
    values = (
        room.reshape(groups, group_pixels)
        if out.size % group_pixels == 0
        else np.empty((groups, group_pixels), np.uint16)
    )
    return [wide[:, place].astype(np.uint16) for place in range(group_bytes)], values


def _ended(values: NDArray[np.uint16], out: NDArray[Any]) -> None:
    """Copy what was unpacked beside `out`, because its last group is not full."""
    if not np.may_share_memory(values, out):
        out.reshape(-1)[:] = values.reshape(-1)[: out.size]


def _unpack_10p(raw: Bytes, out: NDArray[Any]) -> None:
    """Four pixels in five bytes, lowest bits first."""
    (a, b, c, d, e), values = _grouped(raw, out, 5, 4)
    values[:, 0] = a | (b & 0x03) << 8
    values[:, 1] = b >> 2 | (c & 0x0F) << 6
    values[:, 2] = c >> 4 | (d & 0x3F) << 4
    values[:, 3] = d >> 6 | e << 2
    _ended(values, out)


def _unpack_12p(raw: Bytes, out: NDArray[Any]) -> None:
    """Two pixels in three bytes, lowest bits first."""
    (a, b, c), values = _grouped(raw, out, 3, 2)
    values[:, 0] = a | (b & 0x0F) << 8
    values[:, 1] = b >> 4 | c << 4
    _ended(values, out)


def _unpack_10_packed(raw: Bytes, out: NDArray[Any]) -> None:
    """Two pixels in three bytes, their lowest bits together in the middle one (GigE Vision 1.x)."""
    (a, b, c), values = _grouped(raw, out, 3, 2)
    values[:, 0] = a << 2 | b & 0x03
    values[:, 1] = c << 2 | b >> 4 & 0x03
    _ended(values, out)


def _unpack_12_packed(raw: Bytes, out: NDArray[Any]) -> None:
    (a, b, c), values = _grouped(raw, out, 3, 2)
    values[:, 0] = a << 4 | b & 0x0F
    values[:, 1] = c << 4 | b >> 4
    _ended(values, out)


FORMATS = {
    0x0108_0001: PixelFormat("Mono8", 8, 8, 1, _copy),
    0x0110_0003: PixelFormat("Mono10", 16, 10, 1, _copy),
    0x010A_0046: PixelFormat("Mono10p", 10, 10, 1, _unpack_10p),
    0x010C_0004: PixelFormat("Mono10Packed", 12, 10, 1, _unpack_10_packed),
    0x0110_0005: PixelFormat("Mono12", 16, 12, 1, _copy),
    0x010C_0047: PixelFormat("Mono12p", 12, 12, 1, _unpack_12p),
    0x010C_0006: PixelFormat("Mono12Packed", 12, 12, 1, _unpack_12_packed),
    0x0110_0007: PixelFormat("Mono16", 16, 16, 1, _copy),
    0x0108_0008: PixelFormat("BayerGR8", 8, 8, 3, _bayer(cv2.COLOR_BayerGRBG2RGB)),
    0x0108_0009: PixelFormat("BayerRG8", 8, 8, 3, _bayer(cv2.COLOR_BayerRGGB2RGB)),
    0x0108_000A: PixelFormat("BayerGB8", 8, 8, 3, _bayer(cv2.COLOR_BayerGBRG2RGB)),
    0x0108_000B: PixelFormat("BayerBG8", 8, 8, 3, _bayer(cv2.COLOR_BayerBGGR2RGB)),
    0x0218_0014: PixelFormat("RGB8", 24, 8, 3, _copy),
    0x0218_0015: PixelFormat("BGR8", 24, 8, 3, _reversed_channels),
}  # fmt: skip
