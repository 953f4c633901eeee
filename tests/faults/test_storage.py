"""A station whose disk refuses verdicts halts, says so, and goes on only when a person says so and there is room."""

from __future__ import annotations

import json
import os
import threading

import pytest
from broker import free_port, wait_until
from plant import STATION
from recipes import SIDE, write_tiny_recipe

from agent.between.control import Answering, Asking, pair
from agent.between.publish_process import Ended
from agent.between.ring import Ring
from agent.config import read_station
from agent.errors import OutboxFull
from agent.health.message import GAUGES
from agent.line import inspection
from agent.publishing.process import as_hello
from agent.publishing.publication import Publication
from calibration.preprocess import View


class PublishThread:
    """A publish process that is a thread of this one, with a disk that a test can fill."""

    def __init__(self, station_file, settings, ring, wake, *, hello, asked, told):
        self._ours, self._theirs = pair()
        self._answering = Answering(self._ours, asked, told)
        station = read_station(station_file, settings)
        self._make = lambda: Publication(
            station,
            Ring(os.dup(ring.descriptor)),
            wake,
            Asking(self._theirs),
            as_hello(json.dumps(hello(True)).encode()),
        )
        self._results = []
        self.restarts = 0
        self.is_full = False
        self.messages = []

    def start(self):
        self.publication = self._make()
        honest = self.publication._outbox.store

        def store(batch, taken=None):
            if self.is_full:
                raise OutboxFull("disk full")
            messages = honest(batch, taken)
            self.messages += messages
            return messages

        self.publication._outbox.store = store
        self._thread = threading.Thread(target=lambda: self._results.append(self.publication.run()))
        self._thread.start()

    def look_after(self):
        pass

    def end(self, given_up=0, goes_on=None):
        self._thread.join()
        self._answering.close()
        self._theirs.close()
        return Ended(*self._results[0])


class Station:
    """A whole station in this process."""

    def __init__(self, folder, monkeypatch, takt_ms=20):
        monkeypatch.setattr(inspection, "PublishProcess", PublishThread)
        write_tiny_recipe(folder / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(64, 64)))
        settings = folder / "station.yaml"
        text = STATION.format(takt_ms=takt_ms, root="a/b/c/d/e", port=free_port(), consumers='["mes"]')
        settings.write_text(text + "commands: {allow: [resume]}\n")
        self.inspection = inspection.Inspection(settings, read_station(settings))
        self.disk = self.inspection._publisher
        self.line = self.inspection.line
        self.ended = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        _, self.ended = self.inspection.run(None)

    @property
    def unstored(self):
        """How many verdicts wait for the disk."""
        return self.disk.publication.unstored

    def reasons(self):
        """Return the reason of every stored verdict, by trigger."""
        return {message["trigger"]: message["reason"] for message in self.disk.messages}

    def resume(self):
        """What the command does."""
        return self.disk.publication._commands._commands._operations.resume()

    def stop(self):
        self.inspection.stop()
        self._thread.join()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a station; it is stopped in any case, or its threads would keep the tests from ending."""
    found = []

    def start(**changes):
        found.append(Station(tmp_path, monkeypatch, **changes))
        wait_until(lambda: len(found[0].disk.messages) >= 5)
        return found[0]

    yield start
    for one in found:
        one.stop()


@pytest.fixture
def station(started):
    """A station at work."""
    one = started()
    yield one
    one.stop()
    assert one.ended is not None


def test_a_station_sets_every_figure_of_its_own_that_is_named_and_no_other(station):
    health = station.disk.publication._reporter._health
    wait_until(lambda: health.gauges)
    assert set(health.gauges) == set(GAUGES)


def test_pictures_that_the_line_or_the_handover_sheds_are_one_figure(station):
    reporter = station.disk.publication._reporter
    line = {**reporter._about_line, "counters": {"shed_pictures": 2, "shed_images": 3}}
    reporter._about_line = line
    reporter._publish("running")
    assert reporter._health.gauges["shed_pictures_total"] == 5.0


def test_parts_that_went_by_unseen_are_a_figure_a_counter_and_an_alarm(station):
    reporter = station.disk.publication._reporter
    wait_until(lambda: reporter._health.gauges)
    assert reporter._health.gauges["parts_unseen_total"] == 0.0
    assert "parts_unseen" not in [alarm["code"] for alarm in reporter._about_line["alarms"]]
    station.line.tally.parts_unseen = 3999
    wait_until(lambda: reporter._about_line["counters"]["parts_unseen"] == 3999)
    (alarm,) = [alarm for alarm in reporter._about_line["alarms"] if alarm["code"] == "parts_unseen"]
    assert alarm["detail"].startswith("3999 parts of the beat went by")
    reporter._publish("running")
    assert reporter._health.gauges["parts_unseen_total"] == 3999.0


def test_a_full_disk_halts_the_station_and_no_verdict_is_lost_once_there_is_room(station):
    station.disk.is_full = True
    wait_until(lambda: station.line.held is not None and station.unstored >= 5)
    assert "disk full" in station.line.held.detail
    with pytest.raises(Exception, match="still cannot be stored"):
        station.resume()
    refused = len(station.disk.messages)
    station.disk.is_full = False
    wait_until(lambda: station.unstored == 0 and len(station.disk.messages) > refused + 5)
    assert sorted(station.reasons()) == list(range(1, max(station.reasons()) + 1))
    assert station.reasons()[max(station.reasons())] == "halted"  # room alone does not end it
    assert (station.resume().before, station.line.held) == ("halted", None)
    wait_until(lambda: station.reasons()[max(station.reasons())] == "score")


def test_a_station_that_ends_with_verdicts_it_could_not_store_says_how_many(station):
    station.disk.is_full = True
    wait_until(lambda: station.unstored >= 3)
    station.stop()
    assert station.ended.lost >= 3
    assert station.ended.lost == station.line.tally.triggers - len(station.disk.messages)


def test_what_waits_in_memory_is_bounded_and_the_line_does_not_wait_for_it(started, monkeypatch):
    monkeypatch.setattr("agent.between.handover.MOST_WAITING", 4)
    monkeypatch.setattr("agent.line.inspection.SLOTS", 8)
    station = started(takt_ms=200)  # a part is late after 180 ms: by the disk, not by what else the machine does
    station.disk.is_full = True
    handover = station.inspection._handover
    wait_until(lambda: handover.given_up >= 8)
    assert len(handover._waiting) <= 4
    assert station.line.tally.reasons["late"] == 0
    station.disk.is_full = False
    wait_until(lambda: not handover._waiting)
    station.stop()
    assert station.ended.lost == handover.given_up
    assert station.ended.lost == station.line.tally.triggers - len(station.disk.messages)
    assert station.disk.publication.damaged == 0
