"""What a command does to a running line."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from recipes import LEVEL, SIDE, write_tiny_recipe

from agent.between.control import Answering, Asking, pair
from agent.commands.operations import LineOperations
from agent.commands.remote import RemoteOperations
from agent.engines.engine import EngineSettings
from agent.errors import CommandError, EngineError, StorageError
from agent.line.capture import FrameCapture
from agent.line.inspection import ASKED, _asked
from agent.line.loop import Beat, Line
from agent.recipes.changeover import Changeover, ChangeoverSettings
from agent.recipes.trust import Trust
from agent.verdict import Outcome, Reason
from calibration.errors import InputError
from calibration.frame import Frame
from calibration.photometric import Photometric

TAKT_MS = 20.0


class EvenCamera:
    """Shows an even gray part at every trigger."""

    def __init__(self, level):
        self.level = level
        self.triggered = threading.Semaphore(0)
        self.number = 0

    def start(self):
        pass

    def trigger(self, trigger_id):
        self.triggered.release()

    def next_frame(self, timeout_s):
        if not self.triggered.acquire(timeout=timeout_s):
            return None
        self.number += 1
        pixels = np.full((SIDE, SIDE), round(self.level * 255), np.uint8)
        return Frame(pixels, self.number, self.number, 0, time.monotonic_ns())

    def stop(self):
        pass


class Station:
    """A line at work with its operations, those that a command reaches: through the socket between two processes."""

    def __init__(self, tmp_path, level=LEVEL + 0.13):
        (tmp_path / "recipes").mkdir()
        write_tiny_recipe(tmp_path / "first.recipe")
        write_tiny_recipe(tmp_path / "recipes" / "second.recipe", product="second", level=level)
        settings = ChangeoverSettings(
            tmp_path / "first.recipe",
            EngineSettings("onnxruntime", threads=1),
            Photometric(),
            tmp_path / "recipes",
            Trust(unsigned=True),
        )
        self.changeover = Changeover(settings)
        self.settled = []
        self.unstored = 0
        self.pipeline = self.changeover.first()
        self.line = Line(EvenCamera(level), self.pipeline, Beat(TAKT_MS, 1000.0, queue_length=50), self.settled.extend)
        self.capture = FrameCapture(tmp_path / "captures", Photometric())
        self.wanted_frames = []
        operations = LineOperations(
            self.line,
            self.pipeline,
            changeover=self.changeover,
            tolerance=1e-3,
            send_frames=self.wanted_frames.append,
        )
        ours, theirs = pair()
        self._asking = Asking(theirs)
        self._answering = Answering(ours, {name: _asked(getattr(operations, name)) for name in ASKED}, {})
        self.operations = RemoteOperations(self._asking, self.capture, lambda: self.unstored)
        self._thread = threading.Thread(target=self.line.run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self.line.stop()
        self._thread.join()
        self._answering.close()
        self._asking.close()

    def next_verdict(self):
        """Return the verdict of a part that came after this call."""
        seen = len(self.settled) + 1  # one may be under way
        while len(self.settled) <= seen:
            time.sleep(0.002)
        return self.settled[seen].verdict


@pytest.fixture
def station(tmp_path):
    with Station(tmp_path) as one:
        yield one


def test_a_change_of_recipe_holds_from_the_next_part(station):
    assert station.next_verdict().outcome is Outcome.REJECT
    change = station.operations.change_recipe("second")
    assert (change.before["product"], change.after["product"]) == ("tiny", "second")
    assert station.next_verdict().outcome is Outcome.PASS


def test_a_recipe_that_is_not_there_changes_nothing(station):
    with pytest.raises(InputError):
        station.operations.change_recipe("absent")
    assert station.next_verdict().outcome is Outcome.REJECT


def test_a_threshold_holds_from_the_next_part_and_goes_back_with_none(station):
    assert station.operations.set_threshold(0.18).before == 0.1
    verdict = station.next_verdict()
    assert (verdict.outcome, verdict.threshold) == (Outcome.PASS, 0.18)
    station.operations.set_threshold(None)
    assert station.next_verdict().outcome is Outcome.REJECT


def test_a_paused_station_passes_nothing_until_it_resumes(station):
    assert station.operations.pause("shift change").before == "running"
    verdict = station.next_verdict()
    assert (verdict.outcome, verdict.reason, verdict.detail) == (Outcome.NO_VERDICT, Reason.PAUSED, "shift change")
    assert station.operations.resume().before == "paused"
    assert station.next_verdict().reason is Reason.SCORE


def test_the_self_test_runs_between_parts_and_says_what_it_measured(station):
    after = station.operations.self_test().after
    assert 0 <= after["difference"] <= after["tolerance"]
    assert station.next_verdict().reason is Reason.SCORE


def test_an_engine_that_fails_its_self_test_halts_the_station_until_it_passes_again(station):
    honest = station.pipeline.engine.infer
    station.pipeline.engine.infer = lambda batch: (honest(batch)[0], honest(batch)[1] + 1.0)
    with pytest.raises(EngineError, match="differs from the trainer's answers"):
        station.operations.self_test()
    assert station.next_verdict().reason is Reason.HALTED
    with pytest.raises(EngineError):
        station.operations.resume()
    with pytest.raises(CommandError, match="halted, which is more than paused"):
        station.operations.pause("lunch")
    station.pipeline.engine.infer = honest
    station.operations.resume()
    assert station.next_verdict().reason is Reason.SCORE


def test_a_station_whose_verdicts_cannot_be_stored_does_not_resume(station):
    station.line.hold(Reason.HALTED, "disk full")
    station.unstored = 3
    with pytest.raises(CommandError, match="3 verdicts still cannot be stored"):
        station.operations.resume()
    assert station.next_verdict().reason is Reason.HALTED


def test_a_capture_says_where_the_frames_go_and_asks_the_line_for_them(station):
    after = station.operations.capture(5).after
    assert after["count"] == 5
    assert station.capture.left == 5
    assert station.wanted_frames == [5]


def test_a_capture_that_cannot_begin_asks_the_line_for_nothing(station):
    station.operations.capture(5)
    with pytest.raises(StorageError, match="5 frames to come goes on"):
        station.operations.capture(2)
    assert station.wanted_frames == [5]


def test_a_choice_that_cannot_be_remembered_is_not_applied(station, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="nothing was changed"):
            station.operations.set_threshold(0.18)
    assert station.next_verdict().threshold == 0.1


def test_a_line_that_hangs_changes_nothing(station, monkeypatch):
    monkeypatch.setattr("agent.commands.operations.BETWEEN_PARTS_S", 0.05)
    hanging = threading.Event()
    honest = station.pipeline.engine.infer

    def hang(batch):
        hanging.wait(5)
        return honest(batch)

    station.pipeline.engine.infer = hang
    time.sleep(TAKT_MS * 3e-3)
    with pytest.raises(CommandError, match="nothing was changed"):
        station.operations.set_threshold(0.18)
    hanging.set()
    station.pipeline.engine.infer = honest
    assert station.next_verdict().threshold == 0.1
