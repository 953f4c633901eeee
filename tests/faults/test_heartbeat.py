"""The heartbeat of a line: goes on with parts and without, stands still as soon as one of its threads hangs."""

import queue
import threading
import time

import numpy as np
import pytest
from recipes import LEVEL, SIDE, tiny_recipe

from agent.engines.engine import EngineSettings, open_engine
from agent.line.loop import Beat, Line
from agent.line.pipeline import Pipeline
from agent.verdict import Reason
from calibration.frame import Frame
from tests.beats import be_patient

MS = 1_000_000


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    be_patient(monkeypatch)


class Camera:
    """Shows an even gray part at every trigger; `hang` keeps the driver from coming back."""

    def __init__(self):
        self.triggered = queue.SimpleQueue()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def start(self):
        pass

    def trigger(self, trigger_id, until_ns=None):
        self.triggered.put(trigger_id)

    def next_frame(self, timeout_s):
        self.may_answer.wait()
        try:
            number = self.triggered.get(timeout=timeout_s)
        except queue.Empty:
            return None
        pixels = np.full((SIDE, SIDE), round(LEVEL * 255), np.uint8)
        return Frame(pixels, number, number, 0, time.monotonic_ns())

    def stop(self):
        pass


class Running:
    """A line at work whose engine, camera and outlet can be made to hang."""

    def __init__(self, takt_ms):
        recipe = tiny_recipe()
        self.pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime", threads=1)))
        self.camera = Camera()
        self.engine_may_answer, self.outlet_may_answer = threading.Event(), threading.Event()
        self.engine_may_answer.set()
        self.outlet_may_answer.set()
        self.verdicts, self.rounds = [], []
        beat = Beat(takt_ms, min(0.9 * takt_ms, 100.0))
        self.line = Line(self.camera, self, beat, self.deliver, self.rounds.append)
        self._thread = threading.Thread(target=self.line.run)

    def inspect(self, frame, deadline_ns=None):
        self.engine_may_answer.wait()
        return self.pipeline.inspect(frame)

    def deliver(self, batch):
        self.outlet_may_answer.wait()
        self.verdicts += [settled.verdict for settled in batch]

    def moved(self, duration_s):
        """Return how many different heartbeats were told in the next seconds."""
        told = len(self.rounds)
        time.sleep(duration_s)
        return len(set(self.rounds[told:]))

    def __enter__(self):
        self._thread.start()
        time.sleep(0.2)
        return self

    def __exit__(self, *_error):
        for event in (self.engine_may_answer, self.outlet_may_answer, self.camera.may_answer):
            event.set()
        self.line.stop()
        self._thread.join()


def test_a_line_with_parts_has_a_heartbeat():
    with Running(takt_ms=20.0) as running:
        assert running.moved(0.4) > 2
        assert time.monotonic_ns() - running.line.heartbeat_ns < 300 * MS


def test_a_line_without_parts_and_a_held_one_have_a_heartbeat_too():
    with Running(takt_ms=600_000.0) as running:
        assert running.moved(0.4) > 2
        running.line.hold(Reason.PAUSED, "shift change")
        assert running.moved(0.4) > 2


def test_a_hung_engine_stops_the_heartbeat_while_its_parts_go_on_being_late():
    with Running(takt_ms=20.0) as running:
        running.engine_may_answer.clear()
        time.sleep(0.2)
        settled = len(running.verdicts)
        assert running.moved(0.4) <= 1
        late = running.verdicts[settled:]
        assert len(late) > 5
        assert {verdict.reason for verdict in late} <= {Reason.LATE, Reason.OVERRUN}


@pytest.mark.parametrize("what", ["camera", "outlet"])
def test_a_hung_camera_or_outlet_stops_the_heartbeat(what):
    with Running(takt_ms=20.0) as running:
        event = running.camera.may_answer if what == "camera" else running.outlet_may_answer
        event.clear()
        time.sleep(0.2)
        assert running.moved(0.4) <= 1
        event.set()
        time.sleep(0.1)
        assert running.moved(0.4) > 2


def test_an_outlet_that_fails_each_time_is_no_sign_of_life():
    with Running(takt_ms=20.0) as running:
        running.verdicts = None  # what is delivered raises from now on
        time.sleep(0.1)
        before = len(running.rounds)
        time.sleep(0.3)
        assert len(running.rounds) <= before + 1
        running.verdicts = []
