"""Parts that a PLC or a pin announces: each has one verdict, also where it is heard of late, or several at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pymodbus.client import ModbusTcpClient

from agent.cameras.simulated import SimulatedCamera
from agent.cameras.trigger import (
    COIL,
    COUNTER,
    INPUT,
    Announced,
    Announcements,
    PinSignal,
    PlcSignal,
    TriggerSourceSettings,
)
from agent.cameras.trigger_pin import PinTrigger
from agent.cameras.trigger_plc import COUNTER_WRAP
from agent.config import read_station
from agent.errors import CameraError
from agent.line.beat import Beat
from agent.line.loop import Line
from agent.outputs.gate import Gate, GateTiming
from agent.simulation.line import LineSettings, SimulatedLine
from agent.verdict import Outcome, Reason, Verdict
from calibration.errors import SettingsError
from calibration.preprocess import View
from tests.broker import free_port, wait_until
from tests.plant import Process
from tests.plc import Plc, RudePlc
from tests.recipes import SIDE, write_tiny_recipe
from tests.verdicts import archived

MS = 1_000_000


class Conveyor:
    """A PLC and what happens at it: pulses of a coil, steps of a register, written by a client of its own."""

    def __init__(self) -> None:
        self.plc = Plc(free_port()).start()
        self._client = ModbusTcpClient("127.0.0.1", port=self.plc.port, timeout=3)
        assert self._client.connect()

    def coil(self, *, on: bool) -> None:
        assert not self._client.write_coil(2, on).isError()

    def count(self, value: int) -> None:
        assert not self._client.write_register(0, value % COUNTER_WRAP).isError()

    def close(self) -> None:
        self._client.close()
        self.plc.kill()


@pytest.fixture
def conveyor():
    one = Conveyor()
    yield one
    one.close()


@pytest.fixture
def source(conveyor):
    """Return a function that starts a source at the conveyor's PLC; all are stopped in the end."""
    made = []

    def start(signal, least_gap_ms=0.0, **changes):
        address = 0 if signal == COUNTER else 2
        changes = {"within_ms": 3000.0, "answer_ms": 3000.0, **changes}
        plc = PlcSignal("127.0.0.1", port=conveyor.plc.port, signal=signal, address=address, **changes)
        made.append(TriggerSourceSettings(plc=plc, least_gap_ms=least_gap_ms).open())
        made[-1].start(lambda: None)
        return made[-1]

    yield start
    for one in made:
        one.stop()


def pulse(conveyor, source):
    """Switch the coil on and off, each for as long as the source needs to see it."""
    for is_on in (True, False):
        conveyor.coil(on=is_on)
        wait_until(lambda is_on=is_on: source._value == is_on)


def taken(source) -> list[Announced]:
    return list(iter(source.announcements.take, None))


def announced(source, count, timeout_s=10.0):
    """Return what was announced once so many parts were."""
    found = []

    def all_there():
        found.extend(taken(source))
        return sum(one.lost + one.opens for one in found) >= count

    wait_until(all_there, timeout_s)
    return found


def test_each_rising_edge_of_a_coil_is_a_part_at_its_moment(conveyor, source):
    conveyor.coil(on=True)  # a part that stands there when the agent starts is none that comes
    one = source(COIL)
    conveyor.coil(on=False)
    wait_until(lambda: one._value == 0)
    began_ns = time.monotonic_ns()
    found = []
    for _ in range(5):
        pulse(conveyor, one)
        found += announced(one, 1)
    assert [(each.lost, each.opens) for each in found] == [(0, True)] * 5
    moments = [began_ns, *(each.at_ns for each in found), time.monotonic_ns()]
    assert moments == sorted(moments)
    time.sleep(0.05)
    assert one.announcements.take() is None
    assert one.announcements.counters() == {
        "parts_announced": 5,
        "parts_announced_late": 0,
        "parts_too_near": 0,
        "trigger_source_losses": 0,
        "trigger_count_resets": 0,
    }


def test_a_counter_tells_of_parts_between_two_questions_and_over_its_end(conveyor, source):
    conveyor.count(65533)
    one = source(COUNTER, poll_ms=300.0)
    conveyor.count(65534)
    assert [(each.lost, each.opens) for each in announced(one, 1)] == [(0, True)]
    conveyor.count(65534 + 4)  # it has 16 bits: 2
    assert [(each.lost, each.opens) for each in announced(one, 4)] == [(3, True)]


def test_a_part_may_have_come_since_the_plc_was_asked_before(conveyor, source):
    one = source(COUNTER, poll_ms=300.0)
    before_ns = time.monotonic_ns()
    conveyor.count(1)
    after_ns = time.monotonic_ns()
    (part,) = announced(one, 1)
    assert part.since_ns < after_ns
    assert part.since_ns < part.at_ns
    assert part.at_ns > before_ns


def test_a_counter_that_begins_anew_is_not_taken_for_parts(conveyor, source):
    conveyor.count(20_000)
    one = source(COUNTER)
    conveyor.count(0)
    time.sleep(0.2)
    assert one.announcements.take() is None
    assert one.announcements.counters()["trigger_count_resets"] == 1
    conveyor.count(1)
    assert len(announced(one, 1)) == 1


def test_a_part_heard_of_too_late_is_lost_and_not_pictured_elsewhere(conveyor, source):
    one = source(COUNTER, within_ms=60.0)
    conveyor.plc.answers_after_s = 0.2
    time.sleep(0.1)
    conveyor.count(1)
    conveyor.plc.answers_after_s = 0.0
    (late,) = announced(one, 1)
    assert (late.lost, late.opens) == (1, False)
    time.sleep(0.3)
    conveyor.count(2)
    (timely,) = announced(one, 1)
    assert (timely.lost, timely.opens) == (0, True)


def test_parts_that_the_plc_counted_while_it_could_not_be_reached_are_lost(conveyor, source, monkeypatch):
    monkeypatch.setattr("agent.cameras.trigger_plc.RETRY_S", 3.0)
    one = source(COUNTER, within_ms=50.0)
    conveyor.plc.kill()
    wait_until(lambda: one.announcements.fault)
    assert "check the PLC" in one.announcements.fault
    conveyor.plc.start()
    with ModbusTcpClient("127.0.0.1", port=conveyor.plc.port, timeout=3) as again:
        again.write_register(0, 3)
    assert [(each.lost, each.opens) for each in announced(one, 3)] == [(3, False)]
    assert one.announcements.fault == ""
    assert one.announcements.counters()["trigger_source_losses"] == 1


@pytest.fixture
def rude():
    """Return a PLC without manners, and a function that starts a source at it; all are ended in the end."""
    plc, made = RudePlc(), []

    def start(signal, on_event=lambda: None):
        settings = PlcSignal("127.0.0.1", port=plc.port, signal=signal, within_ms=3000.0, answer_ms=3000.0)
        made.append(TriggerSourceSettings(plc=settings).open())
        made[-1].start(on_event)
        return made[-1]

    yield plc, start
    for one in made:
        one.stop()
    plc.close()


@pytest.mark.parametrize("signal", [COUNTER, COIL, INPUT])
@pytest.mark.parametrize(("fault", "told"), [("resets", "the connection broke"), ("cuts", "an answer without a value")])
def test_a_plc_that_resets_the_connection_or_answers_nothing_is_a_lost_signal_and_asked_again(
    rude, monkeypatch, signal, fault, told
):
    monkeypatch.setattr("agent.cameras.trigger_plc.RETRY_S", 0.05)
    plc, start = rude
    one = start(signal)
    setattr(plc, fault, True)
    wait_until(lambda: one.announcements.fault)
    assert told in one.announcements.fault
    plc.count, plc.is_on = 1, True
    setattr(plc, fault, False)
    assert sum(each.lost + each.opens for each in announced(one, 1)) == 1
    assert one.announcements.fault == ""


def test_an_error_that_nobody_foresaw_is_a_lost_signal_logged_once_and_the_plc_is_asked_again(
    rude, monkeypatch, caplog
):
    monkeypatch.setattr("agent.cameras.trigger_plc.RETRY_S", 0.05)
    plc, start = rude

    def on_event():
        if plc.count < 3:
            raise ArithmeticError("who takes them is broken")

    one = start(COUNTER, on_event)
    for count in (1, 2):
        plc.count = count
        announced(one, 1)
        wait_until(lambda count=count: one.announcements.counters()["trigger_source_losses"] == count)
    plc.count = 3
    announced(one, 1)
    assert one.announcements.fault == ""
    traced = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info[0] for record in traced] == [ArithmeticError]
    assert "trigger: counter 0 of 127.0.0.1" in traced[0].message


def test_edges_nearer_than_parts_can_be_are_counted_and_are_parts(conveyor, source):
    one = source(COIL, least_gap_ms=5000.0, poll_ms=1.0)
    for _ in range(3):
        pulse(conveyor, one)
    announced(one, 3)
    assert one.announcements.counters()["parts_too_near"] == 2


def test_a_signal_that_cannot_be_had_is_told_at_the_start(conveyor):
    with pytest.raises(CameraError, match=r"trigger: input 99 of 127\.0\.0\.1:\d+: refused .*name an address that"):
        _at(conveyor, address=99).start(lambda: None)
    conveyor.plc.kill()
    with pytest.raises(CameraError, match="no connection: check the PLC, its address and the cable"):
        _at(conveyor, address=0).start(lambda: None)


def _at(conveyor, address):
    plc = PlcSignal("127.0.0.1", port=conveyor.plc.port, signal=INPUT, address=address)
    return TriggerSourceSettings(plc=plc).open()


PIN = PinSignal(Path("/dev/gpiochip9"), 17)


class Edges:
    """The kernel's edges as a script says: lists of (number, moment), or what is raised."""

    def __init__(self, *script) -> None:
        self._script = list(script)
        self.is_released = False

    def wait(self, timeout_s):
        if not self._script:
            time.sleep(0.01)
            return ()
        item = self._script.pop(0)
        if isinstance(item, OSError):
            raise item
        return item

    def release(self):
        self.is_released = True


def test_each_edge_of_a_pin_is_a_part_and_a_number_that_is_missing_is_one_that_is_lost(monkeypatch):
    monkeypatch.setattr("agent.cameras.trigger_pin.RETRY_S", 0.01)
    lives = [Edges([(1, 100), (2, 200)], [(5, 500)], OSError(5, "Input/output error")), Edges([(1, 900)])]
    given = iter(lives)
    one = PinTrigger(PIN, Announcements(), lambda _: next(given))
    one.start(lambda: None)
    found = announced(one, 6)
    assert found == [Announced(100), Announced(200), Announced(500, lost=2), Announced(900)]
    one.stop()
    assert [life.is_released for life in lives] == [True, True]
    assert one.announcements.counters()["trigger_source_losses"] == 1
    assert one.announcements.fault == ""


def test_a_pin_that_cannot_be_had_is_told():
    with pytest.raises(CameraError, match="trigger: /dev/gpiochip9 line 17: No such file or directory: name a line"):
        TriggerSourceSettings(pin=PIN).open().start(lambda: None)


class Scripted:
    """A source that announces what a test says."""

    def __init__(self, within_ms=30_000.0) -> None:
        self.announcements = Announcements(within_ms=within_ms)

    def start(self, on_event):
        self.announcements.on_event = on_event

    def stop(self):
        pass

    def put(self, lost=0, opens=True, ago_ms=0.0):
        self.announcements.put(Announced(time.monotonic_ns() - round(ago_ms * MS), lost=lost, opens=opens))


class Noting(SimulatedCamera):
    """A simulated camera that notes for which parts it was triggered, and until when each of them stands there."""

    def __init__(self) -> None:
        super().__init__(SimulatedLine(LineSettings(width_px=64, height_px=64)))
        self.given: dict[int, int] = {}

    def trigger(self, trigger_id, until_ns=None):
        self.given[trigger_id] = until_ns
        super().trigger(trigger_id, until_ns)


class Passing:
    """Passes every part."""

    def inspect(self, frame, deadline_ns=None):
        return Verdict(frame.trigger_id, Outcome.PASS, Reason.SCORE, score=0.0, threshold=1.0)


def run_line(announce, count=None, output=None, **line):
    """Return the verdicts of a line whose parts `announce(source, line)` announces, in a thread of its own."""
    settled, scripted = [], Scripted()
    camera = SimulatedCamera(SimulatedLine(LineSettings(width_px=64, height_px=64, **line)))
    beat = Beat(takt_ms=400.0, deadline_ms=400.0, queue_length=4, source=scripted)
    one = Line(camera, Passing(), beat, settled.extend, output=output)

    def act():
        wait_until(lambda: one.heartbeat_ns)
        announce(scripted, one)
        one.stop()

    thread = threading.Thread(target=act)
    thread.start()
    one.run(count)
    thread.join()
    verdicts = [one.verdict for one in settled]
    assert sorted(verdict.trigger_id for verdict in verdicts) == list(range(1, len(verdicts) + 1))
    return {verdict.trigger_id: verdict for verdict in verdicts}


def test_announced_parts_are_triggered_and_counted_from_their_moment():
    def announce(source, line):
        for ago_ms in (0.0, 150.0):
            source.put(ago_ms=ago_ms)
            wait_until(lambda: line.tally.verdicts == line.tally.triggers > 0)
        wait_until(lambda: line.tally.verdicts == 2)

    verdicts = run_line(announce)
    assert [verdict.outcome for verdict in verdicts.values()] == [Outcome.PASS, Outcome.PASS]
    assert verdicts[2].latency_ms >= 150.0


SLOW = {"takt_ms": 20_000.0, "deadline_ms": 30_000.0}  # a picture after 10 s would still be in time for the deadline


def test_of_two_edges_that_are_read_after_a_stall_the_part_that_has_gone_by_is_not_pictured():
    now_ns = time.monotonic_ns()
    edges = Edges([(1, now_ns - 10_000 * MS), (2, now_ns)])
    settings = replace(PIN, within_ms=5000.0)
    pin = PinTrigger(settings, Announcements(within_ms=settings.within_ms), lambda _: edges)
    camera, settled = Noting(), []
    Line(camera, Passing(), Beat(**SLOW, source=pin), settled.extend).run(2)
    verdicts = {one.verdict.trigger_id: one.verdict for one in settled}
    assert (verdicts[1].outcome, verdicts[1].reason) == (Outcome.NO_VERDICT, Reason.FRAME_LOST)
    assert "came to this part too late for a picture" in verdicts[1].detail
    assert verdicts[2].outcome is Outcome.PASS
    assert camera.given == {2: now_ns + 5000 * MS}


def test_a_part_that_may_have_come_long_before_it_was_heard_of_is_not_pictured():
    source, camera, settled = Scripted(within_ms=5000.0), Noting(), []
    now_ns = time.monotonic_ns()
    source.announcements.put(Announced(now_ns, since_ns=now_ns - 10_000 * MS))
    Line(camera, Passing(), Beat(**SLOW, source=source), settled.extend).run(1)
    assert [one.verdict.reason for one in settled] == [Reason.FRAME_LOST]
    assert camera.given == {}


def test_parts_that_go_by_while_the_camera_starts_are_not_heard_of_and_pictured_later():
    class Listening(Scripted):
        is_on = False

        def start(self, on_event):
            super().start(on_event)
            self.is_on = True
            self.put()

    class Starting(Noting):
        def start(self):
            if source.is_on:
                source.put(ago_ms=1000.0)
            super().start()

    source, camera, settled = Listening(), Starting(), []
    Line(camera, Passing(), Beat(**SLOW, source=source), settled.extend).run(1)
    assert [one.verdict.outcome for one in settled] == [Outcome.PASS]
    assert len(camera.given) == 1
    assert len(taken(source)) == 0


def test_a_signal_that_cannot_be_had_lets_the_camera_go_again():
    class Absent(Scripted):
        def start(self, on_event):
            raise CameraError("the PLC is away")

    camera = Noting()
    with pytest.raises(CameraError, match="the PLC is away"):
        Line(camera, Passing(), Beat(**SLOW, source=Absent()), lambda batch: None).run(1)
    with pytest.raises(CameraError, match="not started"):
        camera.trigger(1)


def test_parts_that_are_announced_as_lost_get_their_verdict_at_once_and_in_order():
    def announce(source, line):
        source.put(lost=3)
        wait_until(lambda: line.tally.verdicts == 4)
        source.put(lost=1, opens=False)
        wait_until(lambda: line.tally.verdicts == 5)

    verdicts = run_line(announce)
    assert [verdict.reason for verdict in verdicts.values()] == [Reason.FRAME_LOST] * 3 + [
        Reason.SCORE,
        Reason.FRAME_LOST,
    ]
    assert "too late for a picture" in verdicts[1].detail


class Still:
    """A gate that can be driven."""

    idle_ns = 0

    def drive(self, *, is_open):
        pass

    def close(self):
        pass


def test_however_many_parts_have_gone_by_they_do_not_halt_a_line_with_parts_on_their_way_to_the_gate():
    gate = Gate(Still(), GateTiming(at_ms=600_000.0, pulse_ms=100.0))
    halted = []

    def announce(source, line):
        for number in (1, 2, 3):
            source.put()
            wait_until(lambda number=number: line.tally.verdicts == number)
        source.put(lost=2500, opens=False)
        wait_until(lambda: line.tally.verdicts == 2503)
        source.put()
        wait_until(lambda: line.tally.verdicts == 2504)
        halted.append(line.held)

    verdicts = run_line(announce, output=gate)
    assert halted == [None]
    reasons = [verdicts[number].reason for number in sorted(verdicts)]
    assert reasons == [Reason.SCORE] * 3 + [Reason.FRAME_LOST] * 2500 + [Reason.SCORE]


def test_a_burst_is_overrun_beyond_what_may_wait_and_a_frame_that_is_lost_is_told_at_the_deadline():
    def announce(source, line):
        source.put()
        wait_until(lambda: line.tally.verdicts == 1)
        for _ in range(12):
            source.put()
        wait_until(lambda: line.tally.verdicts == 13)

    verdicts = run_line(announce, lost=(1,))
    assert verdicts[1].reason is Reason.FRAME_LOST
    assert verdicts[1].latency_ms == pytest.approx(400.0, abs=100.0)
    reasons = Counter(verdict.reason for number, verdict in verdicts.items() if number > 1)
    assert reasons[Reason.OVERRUN] >= 1
    assert set(reasons) <= {Reason.OVERRUN, Reason.SCORE}


def test_a_line_that_has_all_its_parts_takes_no_more():
    def announce(source, line):
        for _ in range(3):
            source.put(lost=2)
        wait_until(lambda: line.tally.verdicts == 4)
        time.sleep(0.2)

    verdicts = run_line(announce, count=4)
    assert len(verdicts) == 4


STATION = """
station: cell7
recipe: tiny.recipe
recipes: {{unsigned: allow}}
takt_ms: 100
camera: {{kind: simulated, width_px: 64, height_px: 64, seed: 1}}
trigger: {{kind: modbus, host: 127.0.0.1, port: {port}, signal: counter, address: 0, within_ms: 3000, answer_ms: 3000}}
engine: {{kind: onnxruntime, threads: 1}}
archive: {{folder: archive, pictures: none}}
health: {{port: 0}}
"""


def test_a_station_gives_each_part_that_the_plc_counts_one_verdict(conveyor, tmp_path):
    write_tiny_recipe(tmp_path / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(64, 64)))
    (tmp_path / "station.yaml").write_text(STATION.format(port=conveyor.plc.port))
    agent = Process(["-m", "agent", "run", str(tmp_path / "station.yaml")], tmp_path / "log")
    agent.start()
    try:
        wait_until(lambda: "ready: " in agent.output, 60)
        time.sleep(0.5)
        for step in (1, 2, 5, 6):  # 3 and 4 between two questions
            conveyor.count(step)
            time.sleep(0.25)
    finally:
        agent.stop()
    verdicts = {message["trigger"]: message["reason"] for message in archived(tmp_path / "archive")}
    assert list(verdicts) == [1, 2, 3, 4, 5, 6]
    assert [trigger for trigger, reason in verdicts.items() if reason == "frame_lost"] == [3, 4]


def test_capture_takes_the_parts_that_the_plc_announces_and_not_one_per_takt(conveyor, tmp_path):
    station = (
        "station: cell7\ntakt_ms: 10\ncamera: {kind: simulated, width_px: 64, height_px: 64}\n"  # no recipe yet
        f"trigger: {{kind: modbus, host: 127.0.0.1, port: {conveyor.plc.port}, signal: counter, address: 0, "
        "answer_ms: 3000, within_ms: 3000}\n"
    )
    (tmp_path / "station.yaml").write_text(station)
    recording = tmp_path / "recording"
    words = ["-m", "agent", "capture", str(tmp_path / "station.yaml"), str(recording), "--count", "3"]
    capture = Process(words, tmp_path / "log")
    capture.start()
    try:
        wait_until(lambda: "waiting for a part on counter 0 of 127.0.0.1" in capture.output, 60)
        assert list(recording.glob("*.png")) == []
        for step in (1, 2, 3):
            conveyor.count(step)
            wait_until(lambda step=step: len(list(recording.glob("*.png"))) == step, 20)
        wait_until(lambda: "recording: " in capture.output, 20)
    finally:
        capture.stop()


@pytest.mark.parametrize(
    ("trigger", "told"),
    [
        ("{kind: modbus, signal: coil, address: 1}", r"trigger\.host: missing"),
        ("{kind: modbus, host: plc, signal: level, address: 1}", r"trigger\.signal: 'level' found, need one of input"),
        ("{kind: gpio, line: 1, host: plc}", r"trigger\.host: unknown key"),
        ("{kind: encoder}", r"trigger\.kind: 'encoder' found, need one of modbus, gpio"),
        (
            "{kind: modbus, host: plc, signal: counter, address: 1, poll_ms: 60}",
            r"trigger\.poll_ms: 60 found, need less than within_ms \(50\)",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(tmp_path, trigger, told):
    lines = "station: a\nrecipe: a\nrecipes: {unsigned: allow}\ntakt_ms: 500\ncamera: {kind: simulated}\n"
    (tmp_path / "station.yaml").write_text(f"{lines}trigger: {trigger}\n")
    with pytest.raises(SettingsError, match=told):
        read_station(tmp_path / "station.yaml")


def test_a_camera_with_a_trigger_of_its_own_has_no_other_source(tmp_path):
    camera = "camera: {kind: genicam, trigger: {source: Line1}}"
    text = f"station: a\nrecipe: a\nrecipes: {{unsigned: allow}}\ntakt_ms: 500\n{camera}\n"
    (tmp_path / "station.yaml").write_text(text + "trigger: {kind: gpio, line: 4, active: low, debounce_us: 200}\n")
    with pytest.raises(SettingsError, match="trigger: the camera has a trigger of its own: leave it out"):
        read_station(tmp_path / "station.yaml")
    software = (tmp_path / "station.yaml").read_text().replace("Line1", "Software")
    (tmp_path / "station.yaml").write_text(software)
    wanted = replace(PIN, chip=Path("/dev/gpiochip0"), line=4, is_active_low=True, debounce_us=200.0)
    assert read_station(tmp_path / "station.yaml").trigger == TriggerSourceSettings(pin=wanted)


def test_how_long_a_part_stands_before_the_camera_can_be_said_of_a_pin_too(tmp_path):
    lines = "station: a\nrecipe: a\nrecipes: {unsigned: allow}\ntakt_ms: 500\ncamera: {kind: simulated}\n"
    (tmp_path / "station.yaml").write_text(f"{lines}trigger: {{kind: gpio, line: 4, within_ms: 20}}\n")
    settings = read_station(tmp_path / "station.yaml").trigger
    assert settings.pin.within_ms == 20.0
    assert settings.open().announcements.within_ns == 20 * MS
    plc = PlcSignal("plc", within_ms=30.0)
    assert TriggerSourceSettings(plc=plc).open().announcements.within_ns == 30 * MS
