"""A line whose parts are opened by the camera's own trigger: one part, one verdict, also without a frame."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest

from agent.errors import CameraError
from agent.line.beat import Beat
from agent.line.loop import Line
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame

GAP_S = 0.01


class OwnTrigger:
    """A camera that announces parts by a script: a number is a frame of that part, None a lost one."""

    def __init__(self, script, lag_ms=0.0):
        self.script, self.lag_ns, self.parts = deque(script), round(lag_ms * 1e6), 0
        self.triggered = []

    def start(self):
        pass

    def trigger(self, trigger_id, until_ns=None):
        self.triggered.append(trigger_id)

    def next_frame(self, timeout_s):
        time.sleep(min(GAP_S, timeout_s))
        step = self.script.popleft() if self.script else 0
        if isinstance(step, Exception):
            raise step
        if step is None:
            self.parts += 1
        if not step:
            return None
        self.parts = step
        return Frame(np.full((4, 4), step, np.uint8), step, step, 0, time.monotonic_ns())

    def stop(self):
        pass


class Passing:
    def __init__(self, takes_s=0.0):
        self.takes_s, self.seen = takes_s, []

    def inspect(self, frame, deadline_ns=None):
        time.sleep(self.takes_s)
        self.seen.append((frame.trigger_id, int(frame.pixels[0, 0])))
        return Verdict(frame.trigger_id, Outcome.PASS, Reason.SCORE, score=0.0, threshold=1.0)


def run(camera, count, inspector=None, before=lambda line: None, **beat):
    verdicts = []
    settings = Beat(**{"takt_ms": 20.0, "deadline_ms": 200.0, "by_camera": True, **beat})
    inspector = inspector or Passing()
    line = Line(camera, inspector, settings, lambda batch: verdicts.extend(settled.verdict for settled in batch))
    before(line)
    tally = line.run(count)
    assert camera.triggered == []
    assert sorted(verdict.trigger_id for verdict in verdicts) == list(range(1, tally.triggers + 1))
    return {verdict.trigger_id: verdict for verdict in verdicts}, tally, inspector


def test_each_frame_opens_its_part_and_answers_it():
    verdicts, tally, inspector = run(OwnTrigger([1, 2, 3, 4, 5]), 5)
    assert {verdict.outcome for verdict in verdicts.values()} == {Outcome.PASS}
    assert inspector.seen == [(part, part) for part in range(1, 6)]
    assert tally.stale_frames == 0


def test_a_number_that_is_skipped_is_no_verdict_for_exactly_that_part():
    verdicts, _, inspector = run(OwnTrigger([1, 2, 5, 6]), 6)
    assert [part for part, verdict in verdicts.items() if verdict.reason is Reason.FRAME_LOST] == [3, 4]
    assert inspector.seen == [(part, part) for part in (1, 2, 5, 6)]
    assert max(verdicts[part].latency_ms for part in (3, 4)) < 100.0  # at once, not at the deadline


def test_a_part_whose_frame_is_lost_is_answered_without_waiting_for_the_next():
    verdicts, _, _ = run(OwnTrigger([1, None]), 2)
    assert verdicts[2].reason is Reason.FRAME_LOST
    assert verdicts[2].latency_ms < 50.0


def test_the_deadline_counts_from_the_trigger_and_not_from_the_frame():
    verdicts, _, _ = run(OwnTrigger([1], lag_ms=500.0), 1)
    assert verdicts[1].reason is Reason.LATE
    assert verdicts[1].latency_ms >= 500.0


def test_a_held_line_answers_parts_that_come_by_themselves_and_counts_no_frame_as_stale():
    verdicts, tally, inspector = run(
        OwnTrigger([1, 2, 3]), 3, before=lambda line: line.hold(Reason.PAUSED, "shift change")
    )
    assert {verdict.reason for verdict in verdicts.values()} == {Reason.PAUSED}
    assert inspector.seen == []
    assert tally.stale_frames == 0


def test_a_burst_beyond_the_queue_is_overrun():
    verdicts, _, _ = run(OwnTrigger(range(1, 9)), 8, Passing(0.1), queue_length=2, deadline_ms=5000.0)
    said = [verdict.reason for verdict in verdicts.values()]
    assert said.count(Reason.OVERRUN) >= 3
    assert said.count(Reason.SCORE) >= 2


def test_a_camera_that_is_away_opens_nothing_and_goes_on_when_it_is_back():
    verdicts, tally, _ = run(OwnTrigger([1, CameraError("away"), CameraError("away"), 2]), 2)
    assert [verdict.outcome for verdict in verdicts.values()] == [Outcome.PASS] * 2
    assert tally.triggers == 2


@pytest.mark.parametrize("takes_s", [0.0, 0.05])
def test_when_it_is_stopped_every_part_that_came_has_its_verdict(takes_s):
    class Stopping(Passing):
        def inspect(self, frame, deadline_ns=None):
            if frame.trigger_id == 3:
                lines[0].stop()
            return super().inspect(frame)

    lines = []
    verdicts, tally, _ = run(OwnTrigger(range(1, 1000)), None, Stopping(takes_s), before=lines.append)
    assert 3 <= tally.triggers == len(verdicts) < 100
