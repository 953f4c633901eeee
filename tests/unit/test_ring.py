"""Shared memory between two processes: all that was written is read once, in order, whoever dies."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.between.ring import BOARD_BYTES, MOST_OPEN, MOST_PICTURES, PAGE, Ring
from agent.errors import StorageError

SLOTS, SLOT_BYTES, PICTURE_BYTES = 8, 256, 4096
RECORDS = 20_000
WAIT_S = 0.0002  # for the other process


def small_ring(slots=SLOTS, slot_bytes=SLOT_BYTES, picture_bytes=PICTURE_BYTES):
    return Ring.make(slots=slots, slot_bytes=slot_bytes, picture_bytes=picture_bytes)


def other_side(ring):
    """Return the same memory as another process sees it."""
    return Ring(os.dup(ring.descriptor))


def contents(number):
    """Return (data, pictures) of which each byte depends on the number."""
    dice = random.Random(number)
    data = b"%d " % number + dice.randbytes(dice.randrange(60))
    return data, [dice.randbytes(dice.randrange(300)) for _ in range(dice.randrange(MOST_PICTURES + 1))]


def write(ring, number):
    data, pictures = contents(number)
    return ring.write(data, [memoryview(picture) for picture in pictures], number + 1)


def seen(record):
    return record.data, [bytes(picture) for picture in record.pictures]


@pytest.fixture
def ring():
    ring = small_ring()
    yield ring
    ring.close()


class Model(RuleBasedStateMachine):
    """Any order of write, read, release and begin again, against a list."""

    @initialize(room=st.integers(0, 40), seed=st.integers(0, 2**32))
    def begin(self, room, seed):
        self.room = 100 * room
        self.writer = small_ring(picture_bytes=self.room)
        self.reader = other_side(self.writer)
        self.dice = random.Random(seed)
        self.written = []  # (data, pictures)
        self.read = self.released = 0

    @rule(
        size=st.integers(0, SLOT_BYTES - 104),
        lengths=st.lists(st.integers(0, 2000), max_size=MOST_PICTURES),
    )
    def write(self, size, lengths):
        data, pictures = self.dice.randbytes(size), [self.dice.randbytes(length) for length in lengths]
        has_slot = len(self.written) - self.released < SLOTS
        has_room = self.writer._reserved(lengths)[0] is not None
        done = self.writer.write(data, [memoryview(picture) for picture in pictures])
        assert done == (has_slot and has_room)
        live = sum(len(picture) for _, kept in self.written[self.released :] for picture in kept)
        if done:
            self.written.append((data, pictures))
            assert live + sum(lengths) <= self.room
        elif self.released == len(self.written):  # nothing waits: what was refused is large
            assert 2 * sum(lengths) + 64 * len(lengths) > self.room

    @rule(most=st.integers(0, SLOTS + 2))
    def read(self, most):
        found = self.reader.read(most)
        expected = self.written[self.read : self.read + most]
        assert [seen(record) for record in found] == expected
        assert [record.number for record in found] == list(range(self.read, self.read + len(expected)))
        self.read += len(found)

    @precondition(lambda self: self.read > self.released)
    @rule(share=st.floats(0, 1))
    def release(self, share):
        count = round(share * (self.read - self.released))
        self.reader.release(count)
        self.released += count

    @rule()
    def another_reader(self):
        self.reader.close()
        self.reader = other_side(self.writer)
        self.read = self.released

    @invariant()
    def both_sides_see_the_same(self):
        if not hasattr(self, "writer"):
            return
        for side in (self.writer, self.reader):
            assert side.pending == len(self.written) - self.released
            assert side.released == self.released
            assert self.room == 0 or 0 <= side.picture_share <= 1

    @invariant()
    def nothing_that_waits_was_written_over(self):
        if hasattr(self, "writer"):
            looking = other_side(self.writer)
            assert [seen(record) for record in looking.read(SLOTS)] == self.written[self.released :]
            looking.close()

    def teardown(self):
        if hasattr(self, "writer"):
            self.reader.close()
            self.writer.close()


TestAnyOrder = Model.TestCase
TestAnyOrder.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_a_new_ring_is_empty(ring):
    assert (ring.pending, ring.released, ring.slots, ring.picture_share) == (0, 0, SLOTS, 0.0)
    assert (ring.read(10), ring.board(), ring.open_triggers(), ring.open_lost) == ([], b"", [], 0)
    assert ring.reader_beat_ns == 0


def test_a_record_as_long_as_it_may_be_fits_and_harms_no_neighbour(ring):
    longest = [bytes([number]) * ring.most_bytes for number in range(SLOTS)]
    assert all(ring.write(data) for data in longest)
    assert [record.data for record in ring.read(SLOTS)] == longest


def test_a_full_ring_refuses_and_changes_nothing_until_one_is_released(ring):
    assert all(ring.write(b"%d" % number) for number in range(SLOTS))
    assert not ring.write(b"one more")
    ring.read(1)
    assert not ring.write(b"read is not released")
    ring.release(1)
    assert ring.write(b"one more")
    assert [record.data for record in ring.read(SLOTS)] == [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"one more"]


def test_a_picture_without_room_is_refused_whole_and_the_record_alone_is_not(ring):
    large = memoryview(bytes(PICTURE_BYTES - 64))
    assert ring.write(b"a", [large])
    assert not ring.write(b"b", [memoryview(bytes(10)), large])
    assert ring.pending == 1
    assert ring.write(b"b", [memoryview(bytes(10))])
    assert ring.write(b"c")
    assert [(record.data, len(record.pictures)) for record in ring.read(9)] == [(b"a", 1), (b"b", 1), (b"c", 0)]


def test_a_picture_of_half_the_room_always_fits_once_all_is_released(ring):
    for length in (PICTURE_BYTES // 2, 100, 1500, PICTURE_BYTES // 2, 900, PICTURE_BYTES // 2):
        assert ring.write(b"x", [memoryview(bytes(length))])
        ring.release(len(ring.read(1)))


def test_pictures_lie_at_multiples_of_64_bytes():
    ring = small_ring(picture_bytes=1000)  # no multiple itself
    for number in range(20):
        assert ring.write(b"", [memoryview(bytes([number]) * 33), memoryview(b"x" * 70)])
        (record,) = ring.read(1)
        assert bytes(record.pictures[0]) == bytes([number]) * 33
        ring.release(1)
        del record
    ring.close()


def in_a_fork(work):
    """Run work in a child process; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 a child never returns into pytest
        print(error, file=sys.stderr)
        os._exit(1)


def wait_for(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def killed(pid):
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def write_all(ring, count):
    for number in range(count):
        while not write(ring, number):
            time.sleep(WAIT_S)


def read_checked(ring, number, most=5):
    """Read on from this number, compare and release; return the next number."""
    for record in ring.read(most):
        assert record.number == number
        assert seen(record) == contents(number)
        ring.release(1)
        number += 1
    return number


def test_20000_records_through_a_small_ring_come_once_each_in_order_and_whole():
    ring = small_ring(slots=64, picture_bytes=32 * 1024)
    reader = other_side(ring)
    pid = in_a_fork(lambda: write_all(ring, RECORDS))
    number, give_up_s = 0, time.monotonic() + 60
    while number < RECORDS and time.monotonic() < give_up_s:
        before, number = number, read_checked(reader, number, most=50)
        if number == before:
            time.sleep(WAIT_S)
    wait_for(pid)
    assert (number, reader.read(1), reader.pending) == (RECORDS, [], 0)
    reader.close()
    ring.close()


READER = """
import os, sys, time, zlib
from agent.between.ring import Ring
ring, count = Ring(int(sys.argv[1])), int(sys.argv[2])
check = number = 0
while number < count:
    time.sleep(0.0002)
    for record in ring.read(3):
        check = zlib.crc32(record.data + b"".join(map(bytes, record.pictures)), check)
        number += 1
        ring.release(1)
        del record
print(check)
"""


def test_another_program_reads_through_the_inherited_descriptor(ring):
    command = [sys.executable, "-c", READER, str(ring.descriptor), "300"]
    with subprocess.Popen(command, pass_fds=[ring.descriptor], stdout=subprocess.PIPE, text=True) as process:
        write_all(ring, 300)
        told, _ = process.communicate(timeout=30)
    check = 0
    for number in range(300):
        data, pictures = contents(number)
        check = zlib.crc32(data + b"".join(pictures), check)
    assert int(told) == check


@pytest.mark.parametrize("after_ms", [1, 3, 7, 20])
def test_what_a_killed_writer_wrote_is_there_and_its_open_triggers_are_those_without_a_record(after_ms):
    ring = small_ring(slots=64, picture_bytes=64 * 1500)
    reader = other_side(ring)

    def work():
        for number in range(10**9):
            ring.note_open(number + 1)
            ring.note_open(10**9 + number)
            while not write(ring, number):
                time.sleep(WAIT_S)
            ring.note_closed(number + 1)
            ring.note_closed(10**9 + number)

    pid = in_a_fork(work)
    number = 0
    while number < 20:
        number = read_checked(reader, number)
    end_s = time.monotonic() + after_ms / 1e3
    while time.monotonic() < end_s:
        number = read_checked(reader, number)
    killed(pid)
    while reader.pending:
        number = read_checked(reader, number)
    assert set(reader.open_triggers()) <= {number + 1, 10**9 + number - 1, 10**9 + number}
    assert reader.open_lost == 0
    reader.close()
    ring.close()


def test_a_writer_killed_between_a_record_and_the_note_that_it_is_closed_left_no_open_trigger(ring):
    reader = other_side(ring)
    for trigger_id in (7, 8):
        ring.note_open(trigger_id)
    ring.write(b"the verdict on 7", trigger_id=7)
    assert reader.open_triggers() == [8]
    reader.read(1)
    reader.release(1)
    assert reader.open_triggers() == [8]
    reader.close()


def test_every_reader_of_a_ring_is_told_the_same_beginning(ring):
    before_ns = time.monotonic_ns()
    second = other_side(ring)
    assert 0 < ring.began_ns == second.began_ns <= before_ns
    second.close()


def test_a_killed_reader_takes_nothing_with_it(ring):
    stop, told = os.pipe()

    def read_some():
        reader = other_side(ring)
        number = 0
        while True:
            number = read_checked(reader, number, most=3)
            reader.read(2)  # read, never released
            reader.close()
            reader = other_side(ring)
            if number > 100:
                os.write(told, b"x")
                time.sleep(60)  # until the end

    pid = in_a_fork(read_some)
    wrote = 0
    while not select.select([stop], [], [], 0)[0]:
        wrote += write(ring, wrote)
    killed(pid)
    second = other_side(ring)
    number = second.released
    assert 100 < number <= wrote
    while second.pending:
        number = read_checked(second, number)
    assert number == wrote
    assert write(ring, wrote)
    assert read_checked(second, wrote) == wrote + 1
    second.close()
    os.close(stop)
    os.close(told)


@pytest.mark.parametrize("place", range(0, 130, 5))
def test_a_damaged_slot_is_a_record_without_data_and_the_others_are_whole(ring, monkeypatch, place):
    monkeypatch.setattr("agent.between.ring.TRIES", 2)
    reader = other_side(ring)
    body = b"x" * 60
    for mark in (b"a", b"b", b"c"):
        assert ring.write(mark + body, [memoryview(mark * 1000)])
    at = ring._slot_at(1) + place
    (value,) = os.pread(ring.descriptor, 1, at)
    os.pwrite(ring.descriptor, bytes([value ^ 0x40]), at)
    first, damaged, third = reader.read(3)
    assert (first.data, third.data) == (b"a" + body, b"c" + body)
    assert (damaged.number, damaged.data, damaged.pictures) == (1, b"", ())
    reader.release(2)
    assert 0 < reader.picture_share < 1
    for _ in range(4):
        ring.write(b"d", [memoryview(b"d" * 1000)])
    assert bytes(third.pictures[0]) == b"c" * 1000, "still waits, and was not written over"
    reader.release(1)
    del first, third
    reader.release(len(reader.read(9)))
    assert (reader.pending, reader.picture_share) == (0, 0.0)
    assert ring.write(b"after", [memoryview(b"e" * 2000)])
    assert seen(reader.read(1)[0]) == (b"after", [b"e" * 2000])
    reader.close()


def test_a_record_of_a_lap_before_is_not_taken_for_the_new_one(ring, monkeypatch):
    monkeypatch.setattr("agent.between.ring.TRIES", 2)
    for number in range(SLOTS):
        ring.write(b"%d" % number)
    ring.release(len(ring.read(SLOTS)))
    ring._head[8] += 1  # as if a slow store of the record followed the one of its number
    assert ring.read(1)[0].data == b""


def test_the_board_shows_the_newest_word_to_any_number_of_readers(ring):
    reader = other_side(ring)
    for word in (b"one", b"two", b"x" * (BOARD_BYTES - 24), b"three"):
        ring.post(word)
        assert reader.board() == ring.board() == word
    reader.close()


def test_a_torn_word_is_never_shown(ring):
    def post():
        for number in range(10**9):
            ring.post(b"%d," % number * (1 + number % 400))

    pid = in_a_fork(post)
    newest, words, end_s = -1, 0, time.monotonic() + 20.0
    try:
        while time.monotonic() < end_s and (words <= 500 or newest <= 100):
            if word := ring.board():
                numbers = word.rstrip(b",").split(b",")
                assert len(set(numbers)) == 1
                assert len(numbers) == 1 + int(numbers[0]) % 400
                assert int(numbers[0]) >= newest
                newest, words = int(numbers[0]), words + 1
    finally:
        killed(pid)
    assert words > 20
    assert newest > 100


def test_a_word_that_stays_torn_is_none(ring, monkeypatch):
    monkeypatch.setattr("agent.between.ring.TRIES", 3)
    ring.post(b"a word")
    os.pwrite(ring.descriptor, b"?", PAGE + BOARD_BYTES + 24)
    assert ring.board() == b""
    ring.post(b"the next")
    assert ring.board() == b"the next"


def test_triggers_are_open_until_they_are_closed(ring):
    for trigger_id in (3, 1, 2**40):
        ring.note_open(trigger_id)
    ring.note_closed(3)
    ring.note_closed(77)
    assert ring.open_triggers() == [1, 2**40]


def test_triggers_beyond_the_table_are_counted_while_they_are_open(ring):
    for trigger_id in range(1, MOST_OPEN + 11):
        ring.note_open(trigger_id)
    assert ring.open_triggers() == list(range(1, MOST_OPEN + 1))
    assert ring.open_lost == 10
    for trigger_id in range(MOST_OPEN - 4, MOST_OPEN + 8):
        ring.note_closed(trigger_id)
    assert (len(ring.open_triggers()), ring.open_lost) == (MOST_OPEN - 5, 3)
    for trigger_id in range(1001, 1006):
        ring.note_open(trigger_id)
    assert (len(ring.open_triggers()), ring.open_lost) == (MOST_OPEN, 3)
    assert write(ring, 0), "the table ends where the head does, the ring begins behind it"
    assert seen(ring.read(1)[0]) == contents(0)


def test_the_readers_beat_is_seen_by_the_writer(ring):
    reader = other_side(ring)
    before = time.monotonic_ns()
    reader.beat()
    assert before <= ring.reader_beat_ns <= time.monotonic_ns()
    reader.close()


def test_the_memory_is_all_there_from_the_start(ring):
    begun = os.fstat(ring.descriptor)
    assert begun.st_blocks * 512 >= begun.st_size >= SLOTS * SLOT_BYTES + PICTURE_BYTES
    for number in range(200):
        while not write(ring, number):
            ring.release(len(ring.read(SLOTS)))
    assert os.fstat(ring.descriptor).st_blocks == begun.st_blocks


def test_a_ring_without_enough_memory_is_not_made(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with pytest.raises(StorageError, match=r"^50 MB of shared memory wanted: Cannot allocate memory: free memory"):
        Ring.make(slots=1, slot_bytes=64, picture_bytes=50 * 10**6)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


def test_a_closed_ring_lets_go_of_its_descriptor_and_the_other_side_keeps_the_memory():
    ring = small_ring()
    reader = other_side(ring)
    write(ring, 5)
    ring.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ring.descriptor)
    assert seen(reader.read(1)[0]) == contents(5)
    reader.close()


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda: os.memfd_create("empty"), "0 bytes found"),
        (lambda: os.open(os.devnull, os.O_RDWR), "0 bytes found"),
    ],
    ids=["empty", "device"],
)
def test_a_descriptor_that_is_no_ring_is_refused(made, found):
    descriptor = made()
    try:
        with pytest.raises(StorageError, match=found):
            Ring(descriptor)
    finally:
        os.close(descriptor)


def test_a_file_of_something_else_and_a_closed_descriptor_are_refused():
    descriptor = os.memfd_create("other")
    os.write(descriptor, struct.pack("<4Q", 1, 2, 3, 4) + bytes(PAGE))
    with pytest.raises(StorageError, match="is no ring"):
        Ring(descriptor)
    os.close(descriptor)
    with pytest.raises(StorageError, match="Bad file descriptor"):
        Ring(descriptor)
