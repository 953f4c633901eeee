"""Shared memory between the inspect and the publish process: one writes, one reads, neither ever waits for the other.

    head      one page: when the run began, positions, and the table of triggers that are open
    board     two pages: the newest word of the writer about itself, in two places by turns
    slots     a ring of records of bounded size, each with its CRC-32
    pictures  a ring of bytes for what belongs to the records: maps, pictures, frames

The memory has no name: it is a memfd, inherited by descriptor, and gone with the last process that holds it. What was
written stays when the writer is killed, and what was read but not released stays when the reader is.

The numbers in the head are 8 bytes each, aligned, and have one writer each: loads and stores of them are atomic on
x86-64 and aarch64. A record counts once `written` says so; on a processor that reorders stores the CRC finds a record
that is not all there yet, and the reader asks again.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from agent.errors import StorageError

PAGE = 4096
MAGIC = 0x7461_6B74_7269_6E67  # "taktring"
MOST_OPEN = 384  # triggers without a verdict in the ring; the table has no room for more
BOARD_BYTES = 4 * PAGE  # of one place
MOST_PICTURES = 4  # of one record
TRY_AGAIN_S = 0.002
TRIES = 50
ALIGN = 64

# number, crc, length, pictures' end, trigger, (start, length)..., how many of them
_SLOT = struct.Struct(f"<QIIQQ{2 * MOST_PICTURES}QI4x")
_BOARD = struct.Struct("<QIIQ")  # number, crc, length, unused


class _Place:
    """Indices of the head's 8-byte numbers; writer's and reader's in cache lines of their own."""

    MAGIC, SLOTS, SLOT_BYTES, PICTURE_BYTES, BEGAN = range(5)
    WRITTEN, PICTURES_WRITTEN, BOARD, OPEN_LOST, LOST_CLOSED = 8, 9, 10, 11, 12
    READ, PICTURES_READ, READER_BEAT = 16, 17, 18
    OPEN = 64


class Picture(NamedTuple):
    """A place in the ring of pictures."""

    start: int
    length: int


class _Slot(NamedTuple):
    """A record as it lies in its slot."""

    data: bytes
    pictures_end: int  # where the next record's pictures may begin
    trigger_id: int
    pictures: list[Picture]


@dataclass(frozen=True, slots=True)
class Record:
    """What the reader gets. `pictures` are views into shared memory: use or copy them before `release`."""

    number: int
    data: bytes
    pictures: tuple[memoryview, ...]


class Ring:
    """The shared memory. One thread of one process writes, one of another reads; see each method."""

    def __init__(self, descriptor: int) -> None:
        """Map a ring that `make` made. Raises StorageError if the descriptor is none."""
        self.descriptor = descriptor
        try:
            size = os.fstat(descriptor).st_size
        except OSError as error:
            raise StorageError(f"descriptor {descriptor}: {error.strerror}: an internal error, report it") from error
        if size < PAGE:
            raise StorageError(
                f"descriptor {descriptor}: {size} bytes found, need a ring: an internal error, report it"
            )
        self._memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._view = memoryview(self._memory)
        self._head = self._view[:PAGE].cast("Q")
        if self._head[_Place.MAGIC] != MAGIC:
            raise StorageError(f"descriptor {descriptor} is no ring: an internal error, report it")
        self._slots, self._slot_bytes = self._head[_Place.SLOTS], self._head[_Place.SLOT_BYTES]
        self._room = self._head[_Place.PICTURE_BYTES]
        self._board_at = PAGE
        self._slots_at = self._board_at + 2 * BOARD_BYTES
        self._pictures_at = self._slots_at + self._slots * self._slot_bytes
        self._free_places = deque(range(MOST_OPEN))
        self._open_places: dict[int, int] = {}
        self._placeless: set[int] = set()  # open, but the table was full
        self._seen = self._head[_Place.READ]  # records read, released or not
        self._let_go = weakref.finalize(self, os.close, descriptor)  # whoever forgets to close

    @classmethod
    def make(cls, *, slots: int, slot_bytes: int, picture_bytes: int) -> Ring:
        """Make a ring whose memory is all there from the start: no page is missing when the first part comes.

        slot_bytes: a multiple of 64. Raises StorageError if there is not that much memory.
        """
        assert slot_bytes % ALIGN == 0
        size = PAGE + 2 * BOARD_BYTES + slots * slot_bytes + picture_bytes
        descriptor = os.memfd_create("taktsight-ring", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
            numbers = (MAGIC, slots, slot_bytes, picture_bytes, time.monotonic_ns())
            os.pwrite(descriptor, struct.pack("<5Q", *numbers), 0)
            return cls(descriptor)
        except OSError as error:
            os.close(descriptor)
            raise StorageError(
                f"{size / 1e6:.0f} MB of shared memory wanted: {error.strerror}: free memory on this machine"
            ) from error

    @property
    def began_ns(self) -> int:
        """When the ring was made, time.monotonic_ns(): the same for every reader of one run; for either side."""
        return int(self._head[_Place.BEGAN])

    @property
    def pending(self) -> int:
        """Records that were written and not released yet; for either side."""
        return int(self._head[_Place.WRITTEN] - self._head[_Place.READ])

    @property
    def released(self) -> int:
        """Records released so far, which is the number of the next one that is not; for either side."""
        return int(self._head[_Place.READ])

    @property
    def slots(self) -> int:
        """How many records there is room for."""
        return int(self._slots)

    @property
    def most_bytes(self) -> int:
        """How long a record may be."""
        return int(self._slot_bytes) - _SLOT.size

    @property
    def picture_share(self) -> float:
        """Share of the pictures' room in use, 0..1; for either side."""
        used = self._head[_Place.PICTURES_WRITTEN] - self._head[_Place.PICTURES_READ]
        return float(used / self._room) if self._room else 1.0

    def close(self) -> None:
        """Let go of the memory. Views into it must be gone."""
        self._head.release()
        self._view.release()
        self._memory.close()
        self._let_go()

    # The writer's side

    def write(self, data: bytes, pictures: Sequence[memoryview] = (), trigger_id: int = 0) -> bool:
        """Write a record with all of its pictures; False, and nothing is written, where there is no room.

        data: at most `most_bytes`. pictures: at most 4, as contiguous bytes; each that fits into half of their room
        finds a place once all is released. trigger_id: the trigger that the record speaks for, which is not open any
        more from now on, though only `note_closed` gives its place in the table back. One thread.
        """
        number = self._head[_Place.WRITTEN]
        if number - self._head[_Place.READ] >= self._slots:
            return False
        places, end = self._reserved([len(picture) for picture in pictures])
        if places is None:
            return False
        for place, picture in zip(places, pictures, strict=True):
            start = self._pictures_at + place.start % self._room
            self._view[start : start + place.length] = picture
        numbers = [part for place in places for part in place] + [0, 0] * (MOST_PICTURES - len(places))
        at = self._slot_at(number)
        body = _SLOT.pack(number, 0, len(data), end, trigger_id, *numbers, len(places))[12:] + data
        self._view[at + 12 : at + 12 + len(body)] = body
        struct.pack_into("<QI", self._memory, at, number, zlib.crc32(body))
        self._head[_Place.PICTURES_WRITTEN] = end
        self._head[_Place.WRITTEN] = number + 1
        return True

    def post(self, data: bytes) -> None:
        """Replace the writer's word about itself, at most `BOARD_BYTES` - 24 bytes. One thread."""
        number = self._head[_Place.BOARD] + 1
        at = self._board_at + number % 2 * BOARD_BYTES
        self._view[at + _BOARD.size : at + _BOARD.size + len(data)] = data
        _BOARD.pack_into(self._memory, at, number, zlib.crc32(data), len(data), 0)
        self._head[_Place.BOARD] = number

    def note_open(self, trigger_id: int) -> None:
        """Keep a trigger in mind that has no record yet. One thread; `note_closed` may be called by another."""
        try:
            place = self._free_places.popleft()
        except IndexError:
            self._placeless.add(trigger_id)
            self._head[_Place.OPEN_LOST] += 1
            return
        self._open_places[trigger_id] = place
        self._head[_Place.OPEN + place] = trigger_id

    def note_closed(self, trigger_id: int) -> None:
        """Forget a trigger: its record is written, or it never was one."""
        place = self._open_places.pop(trigger_id, None)
        if place is not None:
            self._head[_Place.OPEN + place] = 0
            self._free_places.append(place)
        elif trigger_id in self._placeless:
            self._placeless.remove(trigger_id)
            self._head[_Place.LOST_CLOSED] += 1

    @property
    def reader_beat_ns(self) -> int:
        """When the reader last said that it lives, time.monotonic_ns(); 0: not yet."""
        return int(self._head[_Place.READER_BEAT])

    # The reader's side

    def read(self, most: int) -> list[Record]:
        """Return the next records after those read already, in order; they stay until `release`. One thread.

        A record that something else has overwritten comes without data.
        """
        written = self._head[_Place.WRITTEN]
        found = [self._record(number) for number in range(self._seen, min(written, self._seen + most))]
        self._seen += len(found)
        return found

    def release(self, count: int) -> None:
        """Give the room of the next `count` records back: what they said is safe."""
        read = self._head[_Place.READ]
        for number in range(read, read + count):
            slot = self._slot(number)
            if slot is not None:  # the next one gives back the room of one that is damaged
                self._head[_Place.PICTURES_READ] = slot.pictures_end
            self._head[_Place.READ] = number + 1

    def board(self) -> bytes:
        """Return the writer's newest word about itself, b"" if there is none yet. Any number of readers."""
        for _ in range(TRIES):
            number = self._head[_Place.BOARD]
            if number == 0:
                return b""
            at = self._board_at + number % 2 * BOARD_BYTES
            found, crc, length, _ = _BOARD.unpack_from(self._memory, at)
            data = bytes(self._view[at + _BOARD.size : at + _BOARD.size + min(length, BOARD_BYTES - _BOARD.size)])
            if found == number and zlib.crc32(data) == crc:
                return data
            time.sleep(TRY_AGAIN_S)
        return b""

    def open_triggers(self) -> list[int]:
        """Return the triggers that have no record, in order. Right once the writer is gone and all was read."""
        triggers = {trigger for trigger in self._head[_Place.OPEN : _Place.OPEN + MOST_OPEN] if trigger}
        written = self._head[_Place.WRITTEN]
        last = self._slot(written - 1) if written else None
        if last is not None:  # a writer that was killed between `write` and `note_closed`
            triggers.discard(last.trigger_id)
        return sorted(triggers)

    @property
    def open_lost(self) -> int:
        """How many triggers without a record found no place in the table of open ones."""
        return int(self._head[_Place.OPEN_LOST] - self._head[_Place.LOST_CLOSED])

    def beat(self) -> None:
        """Say that the reader lives."""
        self._head[_Place.READER_BEAT] = time.monotonic_ns()

    def _reserved(self, lengths: list[int]) -> tuple[list[Picture] | None, int]:
        """Return a contiguous place for each, and where the next one may begin; None where there is no room."""
        end, limit = self._head[_Place.PICTURES_WRITTEN], self._head[_Place.PICTURES_READ] + self._room
        places = []
        for length in lengths:
            start = -(-end // ALIGN) * ALIGN
            if start % self._room + length > self._room:  # not in one piece before the ring begins again
                start += self._room - start % self._room
            end = start + length
            if length > self._room or end > limit:
                return None, 0
            places.append(Picture(start, length))
        return places, end

    def _slot_at(self, number: int) -> int:
        return int(self._slots_at + number % self._slots * self._slot_bytes)

    def _record(self, number: int) -> Record:
        for _ in range(TRIES):
            slot = self._slot(number)
            if slot is not None:
                starts = [(self._pictures_at + start % self._room, length) for start, length in slot.pictures]
                return Record(number, slot.data, tuple(self._view[at : at + length] for at, length in starts))
            time.sleep(TRY_AGAIN_S)
        return Record(number, b"", ())

    def _slot(self, number: int) -> _Slot | None:
        """Return the record of this number; None where its slot holds another, half of it, or something else."""
        at = self._slot_at(number)
        found, crc, length, end, trigger_id, *places, count = _SLOT.unpack_from(self._memory, at)
        body = bytes(self._view[at + 12 : at + min(_SLOT.size + length, self._slot_bytes)])
        if found != number or count > MOST_PICTURES or zlib.crc32(body) != crc:
            return None
        pictures = [Picture(*place) for place in zip(places[: 2 * count : 2], places[1 : 2 * count : 2], strict=True)]
        return _Slot(body[_SLOT.size - 12 :], end, trigger_id, pictures)
