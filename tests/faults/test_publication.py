"""What outbox, archive and ring do together: also where the publish process is killed, or the disk runs short."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
from recipes import write_tiny_station
from verdicts import archived

from agent.between.control import Asking, pair
from agent.between.record import Charge, Part, encoded
from agent.between.ring import Ring
from agent.config import read_station
from agent.publishing.archive import PICTURES
from agent.publishing.messages import Origin
from agent.publishing.publication import Hello, Publication
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame

RUN = "0123456789ab"
CHARGE = Charge(Origin("cell7", RUN, "tiny", "d" * 64, "onnxruntime f32", simulated=True, on_no_verdict="reject"), 0.2)
PARTS = 12
ARCHIVE = "archive: {folder: archive, pictures: all}\n"


class KilledHere(BaseException):
    """The process ends at this place: no code of ours catches it."""


class Run:
    """A ring with parts, and the publish processes that read it, one after the other."""

    def __init__(self, station) -> None:
        self.station = station
        self.ring = Ring.make(slots=64, slot_bytes=4096, picture_bytes=100_000)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.publication: Publication | None = None

    def inspect(self, first: int, last: int) -> None:
        """Write the records of these triggers."""
        for trigger_id in range(first, last + 1):
            verdict = Verdict(trigger_id, Outcome.REJECT, Reason.SCORE, score=1.0, threshold=0.5)
            frame = Frame(np.full((16, 16), 90, np.uint8), 1, trigger_id, 0, 0)
            data, pictures = encoded(Part(verdict, frame, CHARGE), self.ring.most_bytes)
            assert self.ring.write(data, pictures, trigger_id)

    def start(self) -> None:
        ours, self.theirs = pair()
        hello = Hello(RUN, CHARGE, {}, is_first=False)
        self.publication = Publication(self.station, Ring(os.dup(self.ring.descriptor)), self.wake, Asking(ours), hello)

    def publish(self) -> None:
        self.publication._catch_up()
        while self.publication._take():
            pass

    def kill(self) -> None:
        """Let go of what the kernel would take back."""
        self.publication._outbox.close()
        self.publication._inspection.close()
        self.publication._ring._let_go()
        self.theirs.close()

    def die_at(self, owner: object, name: str, count: int, *, afterwards: bool) -> None:
        """End the process at a call, the count-th one."""
        honest, calls = getattr(owner, name), Counter()

        def call(*arguments):
            calls[name] += 1
            if calls[name] == count and not afterwards:
                raise KilledHere
            result = honest(*arguments)
            if calls[name] == count:
                raise KilledHere
            return result

        setattr(owner, name, call)


@pytest.fixture(params=["", "mqtt: {topic: a/b, port: 1, heatmaps: false}"], ids=["memory", "mqtt"])
def run(request, tmp_path):
    """Return a run of a station without a broker, and with one."""
    write_tiny_station(tmp_path, ARCHIVE + request.param)
    made = Run(read_station(tmp_path / "station.yaml"))
    yield made
    made.kill()
    made.ring.close()
    os.close(made.wake)


PLACES = [
    ("_outbox", "store", 1, False),
    ("_outbox", "store", 1, True),
    ("_archive", "store", 1, True),
    ("_archive", "store", 5, False),
    ("_archive", "store", 5, True),
    ("_archive", "store", PARTS, True),
    ("_ring", "release", 1, False),
    ("_ring", "release", 1, True),
]


@pytest.mark.parametrize(("owner", "name", "count", "afterwards"), PLACES)
def test_a_kill_leaves_no_trigger_out_of_the_archive_and_none_twice(
    run, tmp_path, *, owner, name, count, afterwards
) -> None:
    run.inspect(1, PARTS)
    run.start()
    run.die_at(getattr(run.publication, owner), name, count, afterwards=afterwards)
    with pytest.raises(KilledHere):
        run.publish()
    run.kill()
    run.inspect(PARTS + 1, PARTS + 3)
    for _ in range(2):  # and once more where all is done
        run.start()
        run.publish()
        run.kill()
    run.start()
    messages = archived(tmp_path / "archive")
    assert [message["trigger"] for message in messages] == list(range(1, PARTS + 4))
    assert run.ring.pending == 0
    if run.station.mqtt is not None:
        assert [message["seq"] for message in messages] == list(range(1, PARTS + 4))
        assert run.publication._outbox.last_seq == PARTS + 3
        named = {path.name for path in (tmp_path / "archive" / PICTURES).iterdir()}
        assert named == {message["pictures"]["frame"].partition("/")[2] for message in messages}


def test_a_kill_while_what_was_left_over_is_archived_leaves_nothing_out_either(run, tmp_path) -> None:
    run.inspect(1, PARTS)
    for count in (3, 3, 3):
        run.start()
        run.die_at(run.publication._archive, "store", count, afterwards=True)
        with pytest.raises(KilledHere):
            run.publish()
        run.kill()
    run.start()
    run.publish()
    assert [message["trigger"] for message in archived(tmp_path / "archive")] == list(range(1, PARTS + 1))


def test_a_line_that_the_kill_cut_off_is_written_anew(run, tmp_path) -> None:
    run.inspect(1, PARTS)
    run.start()
    run.die_at(run.publication._archive, "store", 5, afterwards=True)
    with pytest.raises(KilledHere):
        run.publish()
    run.kill()
    file = tmp_path / "archive" / "verdicts.jsonl"
    file.write_bytes(file.read_bytes()[:-100])
    run.start()
    run.publish()
    assert [message["trigger"] for message in archived(tmp_path / "archive")] == list(range(1, PARTS + 1))


def test_archived_pictures_go_before_the_outbox_is_asked_to_store(run, tmp_path) -> None:
    def pictures() -> int:
        return len(list((tmp_path / "archive" / PICTURES).iterdir()))

    run.inspect(1, 3)
    run.start()
    run.publish()
    archive, outbox, there = run.publication._archive, run.publication._outbox, [pictures()]
    archive._free_bytes = lambda _: 8e6 if run.station.mqtt is None else 24e6  # as much as is left to others
    run.inspect(4, 6)
    assert run.publication._take()
    there.append(pictures())
    archive._free_bytes = lambda folder, honest=archive._free_bytes: honest(folder) - 1e6
    honest = outbox.store

    def store(batch, taken=None):
        there.append(pictures())
        return honest(batch, taken)

    outbox.store = store
    run.inspect(7, 9)
    assert run.publication._take()
    assert [*there, pictures()] == [3, 6, 0, 0]
    assert [len(message["pictures"]) for message in archived(tmp_path / "archive")] == [1] * 6 + [0] * 3
