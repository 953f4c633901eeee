"""Sparkplug B payloads as bytes: the part of Google protobuf's wire format that an edge node needs.

Written out by hand, because no package offers it that works with paho 2. Of `sparkplug_b.proto` (proto2):

    Payload { 1 timestamp u64, 2 repeated Metric, 3 seq u64 }
    Metric  { 1 name, 2 alias u64, 3 timestamp u64, 4 datatype u32, 5 is_historical, 7 is_null,
              10 int u32, 11 long u64, 12 float, 13 double, 14 boolean, 15 string, 16 bytes }

Source: Eclipse Sparkplug 3.0.0, section 6.4. Times are milliseconds since 1970, UTC.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from calibration.errors import TaktsightError

_MASK_64 = (1 << 64) - 1
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which the format never had

Value = bool | int | float | str | bytes | None


class MalformedPayload(TaktsightError):
    """These bytes are no Sparkplug B payload, or no STATE of a host application: ignore the message, count it."""


class DataType(IntEnum):
    """The datatypes that a station sends; those it may get from others are plain integers."""

    INT64 = 4
    DOUBLE = 10
    BOOLEAN = 11
    STRING = 12


_SIGNED_BITS = {1: 32, 2: 32, 3: 32, 4: 64}  # datatype -> bits of its two's complement on the wire: Int8 to Int64


@dataclass(frozen=True, slots=True)
class Metric:
    """One named value. Whatever a sender left out is None, a value of a kind that we do not read as well."""

    name: str | None
    datatype: int | None
    value: Value  # None: is_null
    timestamp_ms: int | None = None
    historical: bool = False
    alias: int | None = None


@dataclass(frozen=True, slots=True)
class Payload:
    """One Sparkplug B message."""

    timestamp_ms: int | None  # when it was published
    metrics: tuple[Metric, ...]
    seq: int | None = None  # 0..255; NDEATH and NCMD have none


# Bytes out


def encode(payload: Payload, *, with_datatypes: bool = True) -> bytes:
    """Return the bytes that Google protobuf makes of the payload.

    with_datatypes: births define datatypes; in DDATA they SHOULD NOT be repeated (payloads-metric-datatype-not-req).

    Raises ValueError on a metric that has a value and none of our datatypes.
    """
    out = bytearray()
    if payload.timestamp_ms is not None:
        out += _number_field(1, payload.timestamp_ms)
    for metric in payload.metrics:
        out += _bytes_field(2, _encode_metric(metric, with_datatypes))
    if payload.seq is not None:
        out += _number_field(3, payload.seq)
    return bytes(out)


def _encode_metric(metric: Metric, with_datatype: bool) -> bytes:
    out = bytearray()
    if metric.name is not None:
        out += _bytes_field(1, _utf8(metric.name))
    if metric.alias is not None:
        out += _number_field(2, metric.alias)
    if metric.timestamp_ms is not None:
        out += _number_field(3, metric.timestamp_ms)
    if with_datatype and metric.datatype is not None:
        out += _number_field(4, metric.datatype)
    if metric.historical:
        out += _number_field(5, 1)
    return bytes(out + _encode_value(metric))


def _encode_value(metric: Metric) -> bytes:
    match metric.datatype, metric.value:
        case _, None:
            return _number_field(7, 1)
        case DataType.INT64, int(number):
            return _number_field(11, number)
        case DataType.DOUBLE, float(number):
            return _tag(13, _FIXED_64) + struct.pack("<d", number)
        case DataType.BOOLEAN, bool(flag):
            return _number_field(14, int(flag))
        case DataType.STRING, str(text):
            return _bytes_field(15, _utf8(text))
    raise ValueError(f"metric {metric.name}: {metric.value!r} is no value of datatype {metric.datatype}")


def _number_field(field: int, number: int) -> bytes:
    return _tag(field, _VARINT) + _varint(number)


def _bytes_field(field: int, data: bytes) -> bytes:
    return _tag(field, _LENGTH) + _varint(len(data)) + data


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint(number: int) -> bytes:
    number &= _MASK_64  # two's complement of what is negative
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")  # a lone surrogate has no UTF-8, and one name must not stop the rest


# Bytes in


def decode(data: bytes) -> Payload:
    """Return the payload in these bytes, as protobuf reads them; fields and kinds that we do not know are skipped.

    Raises MalformedPayload, and nothing else, on whatever is not one.
    """
    timestamp_ms = seq = None
    metrics: list[Metric] = []
    for field, wire_type, value in _fields(data):
        match field, wire_type, value:
            case 1, 0, int():
                timestamp_ms = value
            case 2, 2, bytes():
                metrics.append(_decode_metric(value))
            case 3, 0, int():
                seq = value
            case 4, 2, bytes():
                _text(value)  # uuid
    return Payload(timestamp_ms, tuple(metrics), seq)


def _decode_metric(data: bytes) -> Metric:
    seen: dict[int, int | bytes] = {}
    value_field = 0
    for field, wire_type, value in _fields(data):
        if _METRIC_WIRE_TYPES.get(field) == wire_type:
            seen[field] = value
            if 10 <= field <= 19:  # `oneof value`: the last one holds
                value_field = field
    name, alias, timestamp_ms, datatype = (seen.get(field) for field in (1, 2, 3, 4))
    kind = None if datatype is None else _whole(datatype) & 0xFFFF_FFFF
    held = None if seen.get(7) or not value_field else _decode_value(value_field, seen[value_field], kind)
    return Metric(
        name=None if name is None else _text(name),
        datatype=kind,
        value=held,
        timestamp_ms=None if timestamp_ms is None else _whole(timestamp_ms),
        historical=bool(seen.get(5)),
        alias=None if alias is None else _whole(alias),
    )


# fields of Metric -> wire type; 17 to 19 (data sets, templates, extensions) are known as values that we do not read
_METRIC_WIRE_TYPES = {
    **dict.fromkeys((2, 3, 4, 5, 6, 7, 10, 11, 14), _VARINT),
    **dict.fromkeys((1, 15, 16, 17, 18, 19), _LENGTH),
    12: _FIXED_32,
    13: _FIXED_64,
}


def _decode_value(field: int, raw: int | bytes, datatype: int | None) -> Value:
    """Return the value, or None for a kind that we do not read: data set, template, extension."""
    value: Value = None
    match field, raw:
        case ((10 | 11), int()):
            number = raw & 0xFFFF_FFFF if field == 10 else raw
            bits = _SIGNED_BITS.get(datatype or 0, 0)
            value = number - (1 << bits) if bits and number >> (bits - 1) else number
        case 12, bytes():
            value = struct.unpack("<f", raw)[0]
        case 13, bytes():
            value = struct.unpack("<d", raw)[0]
        case 14, int():
            value = bool(raw)
        case 15, bytes():
            value = _text(raw)
        case 16, bytes():
            value = raw
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield (field number, wire type, value): numbers of 64 bits for varints, the bytes themselves for the rest."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        field, wire_type = tag >> 3, tag & 7
        if not 1 <= field < 1 << 29:
            raise MalformedPayload(f"field number {field} before byte {at}, need 1 to 2^29-1")
        if wire_type == _VARINT:
            number, at = _read_varint(data, at)
            yield field, wire_type, number
            continue
        if wire_type == _LENGTH:
            length, at = _read_varint(data, at)
        elif wire_type in (_FIXED_32, _FIXED_64):
            length = 4 if wire_type == _FIXED_32 else 8
        else:
            raise MalformedPayload(f"wire type {wire_type} before byte {at}, need 0, 1, 2 or 5")
        if length > len(data) - at:
            raise MalformedPayload(f"{length} bytes announced at byte {at}, {len(data) - at} there")
        yield field, wire_type, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (number, where it ends); bits beyond the 64th are lost, as protobuf does."""
    number = 0
    for shift, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number & _MASK_64, at + shift + 1
    raise MalformedPayload(f"the number at byte {at} does not end")


def _whole(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    raise MalformedPayload(f"{len(value)} bytes found, need a number")


def _text(value: int | bytes) -> str:
    try:
        return bytes(value).decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise MalformedPayload(f"a text is not UTF-8: {error}") from error
