"""Shared memory for frames on their way from a camera's process: one side fills slots, the other lends them out.

    head      one page: magic, slots, bytes of one, the last sign of life, the state of each slot
    slots     one frame each, at multiples of a page

Which slot holds what, the camera's process says over its socket. A slot is written while its state is FREE and read
while it is FULL, so that neither side waits for the other. The memory has no name: it is a memfd, handed over by
descriptor, gone with the last process that maps it; a frame that outlives its camera's process stays readable.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
import weakref
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from agent.errors import CameraError

PAGE = 4096
MAGIC = 0x7461_6B74_736C_6F74  # "taktslot"
MOST_SLOTS = 64
FREE, FULL = 0, 1

_MAGIC, _SLOTS, _SLOT_BYTES, _BEAT, _STATES = 0, 1, 2, 3, 8  # indices of the head's 8-byte numbers


class FrameSlots:
    """The shared memory. The writer calls `take`, `room`, `fill` and `beat`, the reader `lend` and `beat_ns`."""

    def __init__(self, descriptor: int) -> None:
        """Map what `make` made; the descriptor stays the caller's. Raises CameraError if it is none."""
        try:
            size = os.fstat(descriptor).st_size
            self._memory = mmap.mmap(descriptor, size)
        except (OSError, ValueError) as error:
            raise CameraError(
                f"the memory for frames cannot be mapped: {error}: free memory on this machine"
            ) from error
        self._head = memoryview(self._memory)[:PAGE].cast("Q")
        if self._head[_MAGIC] != MAGIC:
            raise CameraError(f"descriptor {descriptor} holds no frames: an internal error, report it")
        self.count, self.slot_bytes = self._head[_SLOTS], self._head[_SLOT_BYTES]
        self._next = 0

    @classmethod
    def make(cls, count: int, slot_bytes: int) -> tuple[FrameSlots, int]:
        """Return new slots, all free and all there from the start, and their descriptor.

        Raises CameraError if there is not that much memory.
        """
        assert 0 < count <= MOST_SLOTS
        slot_bytes = -(-slot_bytes // PAGE) * PAGE
        size = PAGE + count * slot_bytes
        descriptor = os.memfd_create("taktsight-frames", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
            os.pwrite(descriptor, struct.pack("<3Q", MAGIC, count, slot_bytes), 0)
        except OSError as error:
            os.close(descriptor)
            raise CameraError(
                f"{size / 1e6:.0f} MB for {count} frames wanted: {error.strerror}: free memory on this machine, or "
                "make camera.region smaller"
            ) from error
        return cls(descriptor), descriptor

    # The writer's side

    def take(self) -> int | None:
        """Return a free slot, None if the reader still has all of them."""
        for ahead in range(self.count):
            slot = (self._next + ahead) % self.count
            if self._head[_STATES + slot] == FREE:
                self._next = slot + 1
                return slot
        return None

    def room(self, slot: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array in a slot, to be written. Raises CameraError if a frame of this shape does not fit."""
        length = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if length > self.slot_bytes:
            raise CameraError(
                f"a frame of {length} bytes came, {self.slot_bytes} were agreed: the camera's region or format was "
                "changed while it ran"
            )
        return np.ndarray(shape, dtype, self._memory, PAGE + slot * self.slot_bytes)

    def fill(self, slot: int) -> None:
        """Give a slot to the reader, who gives it back."""
        self._head[_STATES + slot] = FULL

    def beat(self) -> None:
        """Say that the camera's process lives."""
        self._head[_BEAT] = time.monotonic_ns()

    # The reader's side

    @property
    def beat_ns(self) -> int:
        """When the camera's process last said that it lives, time.monotonic_ns(); 0: not yet."""
        return int(self._head[_BEAT])

    @property
    def full(self) -> int:
        """How many slots the reader has."""
        return sum(state == FULL for state in self._head[_STATES : _STATES + self.count])

    def lend(self, slot: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return the frame in a full slot, which is free again once nobody holds the array or a view of it.

        While half of the slots are out, a copy: who keeps frames for long must not leave the camera without room.
        """
        length = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not 0 <= slot < self.count or length > self.slot_bytes:
            raise CameraError(f"slot {slot} with {length} bytes was told, there are {self.count}: report it")
        lent = (ctypes.c_ubyte * length).from_buffer(self._memory, PAGE + slot * self.slot_bytes)
        buffer: Any = lent
        pixels: NDArray[Any] = np.ndarray(shape, dtype, buffer)
        if self.full > self.count // 2:
            pixels = pixels.copy()
            self._free(slot)
            return pixels
        # every view of the array holds `lent`, and `lent` holds the memory: its end is the end of all of them
        weakref.finalize(lent, self._free, slot).atexit = False
        return pixels

    def free(self, slot: int) -> None:
        """Give a slot back without having looked at it."""
        self._free(slot)

    def _free(self, slot: int) -> None:
        self._head[_STATES + slot] = FREE
