"""What a command does to a running line."""

from __future__ import annotations

import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from recipes import LEVEL, SIDE, write_tiny_recipe

from agent.between import control
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
from tests.beats import be_patient

TAKT_MS = 20.0


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    be_patient(monkeypatch)


class EvenCamera:
    """Shows an even gray part at every trigger."""

    def __init__(self, level):
        self.level = level
        self.triggered = queue.SimpleQueue()

    def start(self):
        pass

    def trigger(self, trigger_id, until_ns=None):
        self.triggered.put(trigger_id)

    def next_frame(self, timeout_s):
        try:
            number = self.triggered.get(timeout=timeout_s)
        except queue.Empty:
            return None
        pixels = np.full((SIDE, SIDE), round(self.level * 255), np.uint8)
        return Frame(pixels, number, number, 0, time.monotonic_ns())

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
        self.line_operations = operations = LineOperations(
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
    assert station.changeover.first().score_threshold == 0.1


class Held:
    """A function that stands still in the middle until it may go on."""

    def __init__(self, function):
        self._function = function
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def __call__(self, *arguments):
        self.begun.set()
        assert self.goes_on.wait(60)
        return self._function(*arguments)


@pytest.mark.parametrize(
    ("remember", "command", "argument"),
    [("remember_recipe", "change_recipe", "second"), ("remember_threshold", "set_threshold", 0.18)],
)
def test_no_part_waits_for_the_disk_that_remembers_a_command(station, remember, command, argument):
    held = Held(getattr(station.changeover, remember))
    setattr(station.changeover, remember, held)
    with ThreadPoolExecutor(1) as pool:
        change = pool.submit(getattr(station.operations, command), argument)
        assert held.begun.wait(60)
        verdicts = [station.next_verdict() for _ in range(3)]
        held.goes_on.set()
        change.result(60)
    assert [(one.reason, one.outcome) for one in verdicts] == [(Reason.SCORE, Outcome.REJECT)] * 3
    assert station.next_verdict().outcome is Outcome.PASS


def test_a_change_of_recipe_that_the_line_did_not_make_is_forgotten(station, monkeypatch):
    monkeypatch.setattr("agent.commands.operations.BETWEEN_PARTS_S", 0.05)
    held = Held(station.pipeline.engine.infer)
    station.pipeline.engine.infer = held
    assert held.begun.wait(60)
    with pytest.raises(CommandError, match="nothing was changed"):
        station.operations.change_recipe("second")
    held.goes_on.set()
    assert station.next_verdict().outcome is Outcome.REJECT
    assert station.changeover.first().recipe.product == "tiny"


def test_a_choice_that_cannot_be_forgotten_is_told(station, monkeypatch):
    monkeypatch.setattr("agent.commands.operations.BETWEEN_PARTS_S", 0.05)

    def full():
        raise StorageError("disk full")

    monkeypatch.setattr(station.changeover, "remember_threshold", lambda *_: full)
    held = Held(station.pipeline.engine.infer)
    station.pipeline.engine.infer = held
    assert held.begun.wait(60)
    with pytest.raises(CommandError, match=r"will hold from the next start on.*\(disk full\)"):
        station.operations.set_threshold(0.18)
    held.goes_on.set()
    assert station.next_verdict().threshold == 0.1


def test_a_command_that_was_not_done_in_time_is_not_done_later(station, monkeypatch):
    held = Held(station.changeover.to)
    monkeypatch.setattr(station.changeover, "to", held)
    with monkeypatch.context() as patch:
        patch.setattr(control, "CARRY_OUT_S", 0.1)
        patch.setattr(control, "ANSWER_S", 0.1)
        with pytest.raises(CommandError, match="whether it was done is not known, later it will not be"):
            station.operations.change_recipe("second")
    held.goes_on.set()
    assert station.operations.self_test().after  # comes after it
    assert station.next_verdict().outcome is Outcome.REJECT
    assert station.changeover.first().recipe.product == "tiny"


def test_a_command_that_was_remembered_too_late_is_forgotten(station, monkeypatch):
    now = SimpleNamespace(ns=4)
    monkeypatch.setattr("agent.commands.operations.time", SimpleNamespace(monotonic_ns=lambda: now.ns))
    honest = station.changeover.remember_recipe

    def slow_disk(*arguments):
        take_back = honest(*arguments)
        assert station.changeover.first().recipe.product == "second"
        now.ns = 5
        return take_back

    monkeypatch.setattr(station.changeover, "remember_recipe", slow_disk)
    with pytest.raises(CommandError, match="could not be done in time: nothing was changed"):
        station.line_operations.change_recipe("second", give_up_ns=5)
    assert station.next_verdict().outcome is Outcome.REJECT
    assert station.changeover.first().recipe.product == "tiny"


def test_a_command_whose_turn_comes_too_late_changes_nothing_and_says_so(station, monkeypatch):
    monkeypatch.setattr(control, "CARRY_OUT_S", 0.0)
    for ask in (
        lambda: station.operations.change_recipe("second"),
        lambda: station.operations.pause("shift change"),
        station.operations.resume,
        lambda: station.operations.capture(3),
        lambda: station.operations.set_threshold(0.18),
        station.operations.self_test,
    ):
        with pytest.raises(CommandError, match="could not be done in time: nothing was changed"):
            ask()
    assert station.next_verdict().threshold == 0.1
    assert station.wanted_frames == []


def test_a_capture_that_the_line_was_not_told_of_does_not_keep_the_next_one_from_beginning(station, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(control, "CARRY_OUT_S", 0.0)
        with pytest.raises(CommandError, match="nothing was changed"):
            station.operations.capture(5)
    station.operations.capture(2)
    assert (station.capture.left, station.wanted_frames) == (2, [2])


def test_a_command_that_a_dead_publish_process_left_under_way_is_ended_before_the_next_one(station):
    held = Held(station.changeover.to)
    station.changeover.to = held
    operations = station.line_operations
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(operations.change_recipe, "second")
        assert held.begun.wait(60)
        second = pool.submit(operations.set_threshold, 0.18)
        assert station.next_verdict().reason is Reason.SCORE
        assert not second.done()
        held.goes_on.set()
        assert first.result(60).after["product"] == "second"
        assert second.result(60).after == 0.18
    assert station.line.inspector.recipe.product == "second"
    assert station.next_verdict().threshold == 0.18
