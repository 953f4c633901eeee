"""A frame in shared memory stays as it is while anybody looks at it, and its slot is free when nobody does."""

from __future__ import annotations

import os

import numpy as np
import pytest

from agent.cameras.slots import FrameSlots
from agent.errors import CameraError

SHAPE = (20, 30)


@pytest.fixture
def sides():
    """Return the writer's and the reader's view of four slots."""
    writer, descriptor = FrameSlots.make(4, 600)
    reader = FrameSlots(descriptor)
    os.close(descriptor)
    return writer, reader


def written(writer, value):
    slot = writer.take()
    writer.room(slot, SHAPE, np.uint8)[:] = value
    writer.fill(slot)
    return slot


def test_what_was_written_is_what_is_lent(sides):
    writer, reader = sides
    pixels = reader.lend(written(writer, 7), SHAPE, np.uint8)
    assert pixels.shape == SHAPE
    assert np.all(pixels == 7)
    assert reader.full == 1


def test_a_view_of_a_frame_keeps_its_slot_when_the_frame_itself_is_gone(sides):
    writer, reader = sides
    pixels = reader.lend(written(writer, 5), SHAPE, np.uint8)
    corner = pixels[2:4, ::2].T
    del pixels
    assert reader.full == 1
    for _ in range(3):  # the writer goes round the others
        reader.free(written(writer, 9))
    assert np.all(corner == 5)
    del corner
    assert reader.full == 0


def test_with_half_of_the_slots_out_a_frame_is_copied(sides):
    writer, reader = sides
    held = [reader.lend(written(writer, value), SHAPE, np.uint8) for value in range(6)]
    assert reader.full == 2
    assert [int(pixels[0, 0]) for pixels in held] == list(range(6))


def test_no_slot_is_taken_twice(sides):
    writer, _ = sides
    slots = []
    while (slot := writer.take()) is not None:
        writer.fill(slot)
        slots.append(slot)
    assert sorted(slots) == [0, 1, 2, 3]


def test_a_frame_outlives_the_process_that_took_it():
    writer, descriptor = FrameSlots.make(2, 600)
    reader = FrameSlots(descriptor)
    os.close(descriptor)
    pixels = reader.lend(written(writer, 3), SHAPE, np.uint8)
    del writer, reader
    assert np.all(pixels == 3)


def test_a_frame_that_is_too_large_is_refused(sides):
    writer, reader = sides
    with pytest.raises(CameraError, match="region or format was changed"):
        writer.room(0, (100, 100), np.uint8)
    with pytest.raises(CameraError, match="slot 4"):
        reader.lend(4, SHAPE, np.uint8)


def test_the_sign_of_life_is_seen_by_the_other_side(sides):
    writer, reader = sides
    assert reader.beat_ns == 0
    writer.beat()
    assert reader.beat_ns > 0


def test_a_descriptor_of_something_else_is_refused():
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, 8192)
    with pytest.raises(CameraError, match="holds no frames"):
        FrameSlots(descriptor)
    os.close(descriptor)
