"""One trigger, one verdict, whatever happens to the frame."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from recipes import LEVEL, SIDE, tiny_recipe

from agent.cameras.folder import FolderCamera
from agent.cameras.simulated import SimulatedCamera
from agent.engines.engine import EngineSettings, open_engine
from agent.errors import CameraError, EndOfFrames
from agent.line.loop import Beat, Deliver, Line, Settled, Tally
from agent.line.pipeline import Pipeline
from agent.outputs.camera import CameraLine
from agent.outputs.gate import Gate, GateTiming
from agent.outputs.output import NoOutput
from agent.simulation.line import LineSettings, SimulatedLine
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame
from calibration.images import encode_png
from tests.beats import be_patient
from tests.broker import wait_until

TAKT_MS = 100.0
GOOD = np.full((SIDE, SIDE), round(LEVEL * 255), np.uint8)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the clock is in time for its parts is tested in test_beat.py."""
    be_patient(monkeypatch)


class ScriptedCamera:
    """A camera whose frames come as a script says: {trigger_id: delay in ms, or None for never}; 1 ms otherwise."""

    def __init__(self, script: dict[int, float | None] | None = None, *, parts: int = 10**9) -> None:
        self.script = script or {}
        self.parts = parts
        self.due: list[tuple[float, int]] = []
        self.lock = threading.Lock()
        self.down = threading.Event()
        self.stopped = False
        self.triggered: list[int] = []

    def start(self) -> None:
        pass

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
        if trigger_id > self.parts:
            raise EndOfFrames("no more parts")
        self.triggered.append(trigger_id)
        delay_ms = self.script.get(trigger_id, 1.0)
        if delay_ms is not None:
            with self.lock:
                self.due.append((time.monotonic() + delay_ms / 1e3, trigger_id))

    def next_frame(self, timeout_s: float) -> Frame | None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.down.is_set():
                raise CameraError("the cable is out: plug it in")
            with self.lock:
                ready = sorted(item for item in self.due if item[0] <= time.monotonic())
                if ready:
                    self.due.remove(ready[0])
                    return Frame(GOOD.copy(), ready[0][1], ready[0][1], 0, time.monotonic_ns())
            time.sleep(0.001)
        return None

    def stop(self) -> None:
        self.stopped = True


class Slow:
    """A pipeline that takes its time, or fails, before it asks the real one."""

    def __init__(self, before: Callable[[Frame], None]) -> None:
        recipe = tiny_recipe()
        self.real = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime", threads=1)))
        self.before = before

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        self.before(frame)
        return self.real.inspect(frame)


def run(
    camera: ScriptedCamera,
    count: int | None = 8,
    before: Callable[[Frame], None] = lambda frame: None,
    **beat: float,
) -> tuple[dict[int, Verdict], Tally, Line]:
    """Run a line and return its verdicts by trigger, after checking that no trigger was answered twice."""
    verdicts: list[Verdict] = []
    settings = Beat(**{"takt_ms": TAKT_MS, "deadline_ms": TAKT_MS * 0.9, **beat})
    line = Line(camera, Slow(before), settings, collect(verdicts))
    tally = line.run(count)
    twice = [trigger for trigger, times in Counter(verdict.trigger_id for verdict in verdicts).items() if times > 1]
    assert twice == []
    assert len(verdicts) == tally.verdicts == tally.triggers
    assert camera.stopped
    return {verdict.trigger_id: verdict for verdict in verdicts}, tally, line


def collect(verdicts: list[Verdict]) -> Deliver:
    """Return an outlet that keeps verdicts."""
    return lambda batch: verdicts.extend(settled.verdict for settled in batch)


def reasons(verdicts: dict[int, Verdict]) -> dict[int, Reason]:
    return {trigger: verdict.reason for trigger, verdict in verdicts.items() if verdict.reason is not Reason.SCORE}


def test_every_trigger_of_a_quiet_line_gets_its_verdict_in_order() -> None:
    verdicts, _, _ = run(ScriptedCamera())
    assert list(verdicts) == list(range(1, 9))
    assert {verdict.outcome for verdict in verdicts.values()} == {Outcome.PASS}


def test_a_frame_lost_in_transport_is_reported_as_no_verdict() -> None:
    verdicts, _, _ = run(ScriptedCamera({3: None, 6: None}))
    assert reasons(verdicts) == {3: Reason.FRAME_LOST, 6: Reason.FRAME_LOST}


def test_a_frame_after_the_deadline_is_never_taken_for_the_next_part() -> None:
    verdicts, tally, _ = run(ScriptedCamera({3: TAKT_MS * 1.5}))
    assert reasons(verdicts) == {3: Reason.FRAME_LOST}
    assert tally.stale_frames == 1


def test_a_late_answer_is_no_verdict_at_the_deadline_and_not_a_pass_afterwards() -> None:
    verdicts, tally, _ = run(
        ScriptedCamera(), before=lambda frame: time.sleep(TAKT_MS * 1.2e-3 if frame.trigger_id == 4 else 0)
    )
    assert reasons(verdicts)[4] is Reason.LATE
    assert tally.late_results == 1
    assert verdicts[4].score is None


def test_an_inspection_slower_than_the_takt_never_passes_a_part() -> None:
    verdicts, _, _ = run(ScriptedCamera(), before=lambda frame: time.sleep(TAKT_MS * 1.5e-3), queue_length=2)
    assert {verdict.outcome for verdict in verdicts.values()} == {Outcome.NO_VERDICT}
    assert set(reasons(verdicts).values()) <= {Reason.LATE, Reason.OVERRUN}


def test_frames_that_find_the_queue_full_are_no_verdict() -> None:
    verdicts, _, _ = run(
        ScriptedCamera(dict.fromkeys(range(1, 9), 1.0)),
        before=lambda frame: time.sleep(0.05),
        takt_ms=10.0,
        deadline_ms=10_000.0,
        queue_length=1,
    )
    said = Counter(reasons(verdicts).values())
    assert said[Reason.OVERRUN] >= 2
    assert set(said) == {Reason.OVERRUN}


def test_an_engine_that_raises_costs_one_part_its_verdict_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def fail_once(frame: Frame) -> None:
        if frame.trigger_id == 2:
            raise ZeroDivisionError("boom")

    verdicts, _, _ = run(ScriptedCamera(), before=fail_once)
    assert reasons(verdicts) == {2: Reason.FAULT}
    assert "ZeroDivisionError: boom" in verdicts[2].detail


def test_parts_before_a_camera_that_is_down_are_no_verdict_and_it_comes_back() -> None:
    camera = ScriptedCamera()

    def pull_the_cable() -> None:
        time.sleep(TAKT_MS * 2.5e-3)
        camera.down.set()
        time.sleep(TAKT_MS * 3e-3)
        camera.down.clear()

    helper = threading.Thread(target=pull_the_cable)
    helper.start()
    verdicts, _, _ = run(camera, count=14)
    helper.join()
    said = reasons(verdicts)
    assert Reason.CAMERA_DOWN in said.values()
    assert set(said.values()) <= {Reason.CAMERA_DOWN, Reason.FRAME_LOST}
    assert verdicts[14].outcome is Outcome.PASS


def test_a_trigger_that_the_camera_refuses_is_camera_down_at_once() -> None:
    class Refusing(ScriptedCamera):
        def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
            if trigger_id == 2:
                raise CameraError("not armed")
            super().trigger(trigger_id, until_ns)

    verdicts, _, _ = run(Refusing())
    assert reasons(verdicts) == {2: Reason.CAMERA_DOWN}
    assert verdicts[2].latency_ms is not None
    assert verdicts[2].latency_ms < TAKT_MS * 0.9


def test_an_outlet_that_fails_costs_one_delivery_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    delivered: list[int] = []

    def deliver(batch: Sequence[Settled]) -> None:
        for settled in batch:
            if settled.verdict.trigger_id == 2:
                raise OSError("disk full")
            delivered.append(settled.verdict.trigger_id)

    tally = Line(ScriptedCamera(), Slow(lambda frame: None), Beat(TAKT_MS, TAKT_MS * 0.9), deliver).run(4)
    assert delivered == [1, 3, 4]
    assert tally.delivery_faults == 1
    assert "these parts could not be delivered: 2" in caplog.text


def test_outlets_that_are_behind_lose_pictures_and_never_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.line.delivery.MOST_PICTURES", 2)
    delivered: list[tuple[int, bool]] = []

    def deliver(batch: Sequence[Settled]) -> None:
        time.sleep(0.1 * len(batch))
        delivered.extend((settled.verdict.trigger_id, settled.frame is not None) for settled in batch)

    tally = Line(ScriptedCamera(), Slow(lambda frame: None), Beat(20.0, 19.0), deliver).run(12)
    assert [trigger for trigger, _ in delivered] == list(range(1, 13))
    assert tally.shed_pictures > 0
    assert [pictured for _, pictured in delivered].count(False) >= tally.shed_pictures


def test_a_source_that_ends_stops_the_line_cleanly() -> None:
    verdicts, tally, _ = run(ScriptedCamera(parts=5), count=None)
    assert list(verdicts) == [1, 2, 3, 4, 5]
    assert tally.triggers == 5


def test_stop_gives_the_open_trigger_its_verdict_first() -> None:
    started: list[Line] = []

    def stop_at_three(frame: Frame) -> None:
        if frame.trigger_id == 3:
            started[0].stop()

    verdicts: list[Verdict] = []
    line = Line(ScriptedCamera(), Slow(stop_at_three), Beat(TAKT_MS, TAKT_MS * 0.9), collect(verdicts))
    started.append(line)
    tally = line.run(None)
    assert tally.triggers == 3
    assert [verdict.outcome for verdict in verdicts] == [Outcome.PASS] * 3


def test_a_station_told_to_stop_on_no_verdict_stops() -> None:
    verdicts, tally, _ = run(ScriptedCamera({2: None}), count=50, on_no_verdict="stop")
    assert reasons(verdicts) == {2: Reason.FRAME_LOST}
    assert tally.triggers < 6


def during(line: Line, trigger: int, act: Callable[[], None]) -> Callable[[Frame], None]:
    """Return a hook that acts, on a thread of its own, while this trigger is being inspected."""

    def hook(frame: Frame) -> None:
        if frame.trigger_id == trigger:
            threading.Thread(target=act).start()
            time.sleep(0.01)

    return hook


def held_line(act: Callable[[Line], None], count: int = 10) -> dict[int, Verdict]:
    """Return the verdicts of a line with which something is done while part 3 is inspected."""
    verdicts: list[Verdict] = []
    inspector = Slow(lambda frame: None)
    line = Line(ScriptedCamera(), inspector, Beat(TAKT_MS, TAKT_MS * 0.9, on_no_verdict="stop"), collect(verdicts))
    inspector.before = during(line, 3, lambda: act(line))
    line.run(count)
    return {verdict.trigger_id: verdict for verdict in verdicts}


def test_a_held_line_answers_every_trigger_at_once_and_inspects_again_when_released() -> None:
    def pause_for_three_parts(line: Line) -> None:
        line.hold(Reason.PAUSED, "shift change")
        time.sleep(TAKT_MS * 3.5e-3)
        line.release()

    verdicts = held_line(pause_for_three_parts)
    said = reasons(verdicts)
    assert set(said.values()) == {Reason.PAUSED}
    assert 2 <= len(said) <= 5
    assert all(verdicts[trigger].detail == "shift change" for trigger in said)
    assert verdicts[10].outcome is Outcome.PASS


def test_a_halt_is_not_softened_to_a_pause() -> None:
    def halt_then_pause(line: Line) -> None:
        line.hold(Reason.HALTED, "disk full")
        line.hold(Reason.PAUSED, "shift change")

    said = reasons(held_line(halt_then_pause))
    assert set(said.values()) == {Reason.HALTED}
    assert set(range(5, 11)) <= set(said)


class Told(NoOutput):
    """A gate that notes what it is told."""

    def __init__(self) -> None:
        self.actions: list[str] = []

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        self.actions.append(action)


@pytest.mark.parametrize(("reason", "action"), [(Reason.HALTED, "divert"), (Reason.PAUSED, "accept")])
def test_a_halted_line_passes_nothing_whatever_the_policy_and_a_paused_one_goes_by_it(
    reason: Reason, action: str
) -> None:
    told, verdicts = Told(), []
    beat = Beat(20.0, 20.0, on_no_verdict="pass")
    line = Line(ScriptedCamera(), Slow(lambda frame: None), beat, collect(verdicts), output=told)
    line.hold(reason, "the gate does not answer")
    line.run(3)
    assert [verdict.reason for verdict in verdicts] == [reason] * 3
    assert told.actions == [action] * 3


def test_a_file_that_is_no_picture_is_named_by_its_parts_verdict_at_once(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in (1, 2, 3)]
    for file in files:
        file.write_bytes(encode_png(GOOD))
    files[1].write_bytes(b"")
    verdicts: list[Verdict] = []
    deadline_ms = 30_000.0
    Line(FolderCamera(files), Slow(lambda frame: None), Beat(20.0, deadline_ms), collect(verdicts)).run(3)
    said = {verdict.trigger_id: verdict for verdict in verdicts}
    assert {trigger: verdict.outcome for trigger, verdict in said.items()} == {
        1: Outcome.PASS,
        2: Outcome.NO_VERDICT,
        3: Outcome.PASS,
    }
    assert said[2].reason is Reason.BAD_FRAME
    assert said[2].detail.startswith(f"{files[1]}: ")
    assert said[2].latency_ms < deadline_ms


def test_an_errand_runs_between_two_parts_and_its_answer_comes_back() -> None:
    inspecting = threading.Event()
    found: list[bool] = []
    verdicts: list[Verdict] = []

    def slowly(frame: Frame) -> None:
        inspecting.set()
        if frame.trigger_id == 3:
            threading.Thread(target=ask).start()
        time.sleep(0.02)
        inspecting.clear()

    def ask() -> None:
        found.append(line.between_parts(inspecting.is_set, 5.0))

    line = Line(ScriptedCamera(), Slow(slowly), Beat(TAKT_MS, TAKT_MS * 0.9), collect(verdicts))
    line.run(8)
    assert found == [False]
    assert reasons({verdict.trigger_id: verdict for verdict in verdicts}) == {}


def test_an_errand_that_raises_tells_the_one_who_asked_and_no_part_suffers() -> None:
    told: list[Exception] = []

    def ask(line: Line) -> None:
        try:
            line.between_parts(lambda: 1 / 0, 5.0)
        except ZeroDivisionError as error:
            told.append(error)

    assert reasons(held_line(ask, count=6)) == {}
    assert len(told) == 1


def test_an_errand_whose_turn_does_not_come_never_runs() -> None:
    ran: list[int] = []
    line = Line(ScriptedCamera(), Slow(lambda frame: None), Beat(TAKT_MS, TAKT_MS * 0.9), lambda batch: None)
    with pytest.raises(TimeoutError):
        line.between_parts(lambda: ran.append(1), 0.05)
    line.run(2)
    assert ran == []


def test_each_verdict_names_the_inspector_that_was_in_charge() -> None:
    settled: list[Settled] = []
    first, second = Slow(lambda frame: None), Slow(lambda frame: None)
    line = Line(ScriptedCamera(), first, Beat(TAKT_MS, TAKT_MS * 0.9), settled.extend)
    first.before = during(line, 3, lambda: line.between_parts(lambda: line.put_in_charge(second), 5.0))
    line.run(7)
    names = ["first" if one.inspector is first else "second" for one in settled]
    assert names == ["first"] * 3 + ["second"] * 4


def test_the_simulated_line_end_to_end_answers_each_kind_of_part_as_it_should() -> None:
    line = SimulatedLine(LineSettings(seed=3, width_px=64, height_px=64, lost=(2,), late=(4,), late_ms=400.0))
    recipe = tiny_recipe(view=tiny_view(64))
    verdicts: list[Verdict] = []
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime", threads=1)))
    beat = Beat(takt_ms=150.0, deadline_ms=140.0)
    Line(SimulatedCamera(line), pipeline, beat, collect(verdicts)).run(6)
    said = {verdict.trigger_id: verdict for verdict in verdicts}
    assert sorted(said) == [1, 2, 3, 4, 5, 6]
    assert said[2].reason is Reason.FRAME_LOST
    assert said[4].reason is Reason.FRAME_LOST
    assert said[1].part_id == line.plan(1).part_id


def tiny_view(side: int) -> object:
    from calibration.preprocess import View

    return View(SIDE, SIDE, colour=False, reference_size=(side, side))


class WithLines(ScriptedCamera):
    """A camera with outputs, which can be set from its start to its end."""

    is_up = is_on = False

    def start(self) -> None:
        self.is_up = True

    def set_line(self, name: str, *, on: bool) -> None:
        if not self.is_up:
            raise CameraError("not started")
        self.is_on = on

    def stop(self) -> None:
        super().stop()
        self.is_up = False


def test_a_gate_on_the_cameras_output_rests_when_the_line_has_ended() -> None:
    camera = WithLines()
    gate = Gate(CameraLine(camera, "UserOutput0"), GateTiming(at_ms=0.0, pulse_ms=60_000.0))

    def deliver(batch: Sequence[Settled]) -> None:
        wait_until(lambda: camera.is_on)

    Line(camera, Slow(lambda frame: None), Beat(2000.0, 1900.0), deliver, output=gate).run(1)
    assert gate.counters()["gate_opened"] == 1
    assert (camera.is_on, camera.stopped) == (False, True)


def test_a_gate_that_fails_in_the_end_leaves_no_camera_behind() -> None:
    class Broken(NoOutput):
        def close(self) -> None:
            raise OSError("no contact")

    camera = WithLines()
    line = Line(camera, Slow(lambda frame: None), Beat(2000.0, 1900.0), lambda batch: None, output=Broken())
    with pytest.raises(OSError, match="no contact"):
        line.run(1)
    assert camera.stopped
