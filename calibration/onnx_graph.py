"""Whether an ONNX graph stands alone: one that names other files would make the engine open them.

A tensor of ONNX may say that its values lie in another file, at any path. This walks the protobuf wire format down to
every tensor, subgraphs and functions included, and needs neither the onnx package nor the engine.
Source: onnx.proto3 of ONNX 1.17; protobuf encoding, protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

from calibration.errors import RecipeError

MOST_DEPTH = 64
# message -> field number -> message found there; fields that hold no tensors below them are not listed
_BELOW = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def require_self_contained(graph: bytes) -> None:
    """Raises RecipeError if the graph is no protobuf message, or a tensor of it lies in another file."""
    waiting = [("model", memoryview(graph), 0)]
    if not graph:
        raise RecipeError("its graph is empty: train it again")
    while waiting:
        message, data, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise RecipeError(f"its graph is nested more than {MOST_DEPTH} deep: do not use it")
        for number, value in _fields(data):
            if message == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
                raise RecipeError("its graph takes weights from another file: do not use it, export it as one file")
            below = _BELOW[message].get(number)
            if below is not None and isinstance(value, memoryview):
                waiting.append((below, value, depth + 1))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of one message: numbers as int, everything that has a length as bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            size, place = _varint(data, place)
        if number == 0 or size is None or place + size > len(data):
            raise RecipeError("its graph is no ONNX graph: train it again")
        yield number, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise RecipeError("its graph is no ONNX graph: train it again")
