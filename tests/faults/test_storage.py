"""A station whose disk refuses verdicts halts, says so, and goes on only when a person says so and there is room."""

from __future__ import annotations

import threading
import time

import pytest
from broker import free_port, wait_until
from plant import STATION
from recipes import SIDE, write_tiny_recipe

from agent.config import read_station
from agent.errors import OutboxFull
from agent.station import RunningStation
from calibration.preprocess import View


@pytest.fixture
def running(tmp_path):
    """A station at work, with a disk that a test can fill."""
    write_tiny_recipe(tmp_path / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(64, 64)))
    settings = tmp_path / "station.yaml"
    text = STATION.format(takt_ms=20, root="a/b/c/d/e", port=free_port(), consumers='["mes"]')
    settings.write_text(text + "commands: {allow: [resume]}\n")
    station = Fillable(read_station(settings))
    results = []
    thread = threading.Thread(target=lambda: results.append(station.run(None)))
    thread.start()
    wait_until(lambda: station.stored >= 5)
    yield station
    station.line.stop()
    thread.join()
    assert results


class Fillable(RunningStation):
    """A station whose outbox can be made to refuse, as on a full disk."""

    def __init__(self, settings):
        super().__init__(settings)
        self.is_full = False
        self.stored = 0
        self.messages = []
        honest = self._outbox.store

        def store(batch):
            if self.is_full:
                raise OutboxFull("disk full")
            messages = honest(batch)
            self.stored += len(messages)
            self.messages += messages
            return messages

        self._outbox.store = store

    def reasons(self):
        """Return the reason of every stored verdict, by trigger."""
        return {message["trigger"]: message["reason"] for message in self.messages}


def test_a_full_disk_halts_the_station_and_no_verdict_is_lost_once_there_is_room(running):
    running.is_full = True
    wait_until(lambda: running.line.held is not None and running.lost >= 5)
    assert "disk full" in running.line.held.detail
    refused = running.stored
    running.is_full = False
    wait_until(lambda: running.lost == 0 and running.stored > refused + 5)
    assert sorted(running.reasons()) == list(range(1, max(running.reasons()) + 1))
    assert running.reasons()[max(running.reasons())] == "halted"  # room alone does not end it
    running.line.release()
    wait_until(lambda: running.reasons()[max(running.reasons())] == "score")


def test_a_station_that_ends_with_verdicts_it_could_not_store_says_how_many(running):
    running.is_full = True
    wait_until(lambda: running.lost >= 3)
    running.line.stop()
    time.sleep(0.2)
    assert running.lost >= 3


def test_what_waits_in_memory_is_bounded(running, monkeypatch):
    monkeypatch.setattr("agent.station.MOST_UNSTORED", 4)
    running.is_full = True
    wait_until(lambda: running.lost >= 8)
    assert len(running._unstored) <= 4
    running.is_full = False
    wait_until(lambda: running._unstored == [])
    assert running.lost >= 4  # given up for good, and still told
