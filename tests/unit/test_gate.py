"""A gate moves when a part is before it, whatever happens to the parts around it, and rests at divert."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from agent.errors import OutputError
from agent.outputs.gate import Gate, GateTiming
from agent.outputs.gpio import GpioDriver
from agent.outputs.settings import GpioSettings

MS = 1_000_000


class Recorder:
    """A gate that notes when it moved; `refuse` lets it fail. Its beats tell that all that was due before is done."""

    idle_ns = 1

    def __init__(self):
        self.now_ns = 0
        self.moves = []  # (at ms, open)
        self.beats = 0
        self.refuse = False
        self.is_closed = False

    def drive(self, *, is_open):
        if self.refuse:
            raise OutputError("the PLC is silent")
        self.moves.append((self.now_ns // MS, is_open))

    def idle(self):
        self.beats += 1

    def close(self):
        self.is_closed = True


class Clocked:
    """A gate whose time stands still until the test lets it go on."""

    def __init__(self, driver, at_ms, pulse_ms):
        self.driver = driver
        self.gate = Gate(driver, GateTiming(at_ms, pulse_ms), lambda: driver.now_ns)

    def act(self, trigger, action, opened_ms):
        self.gate.act(trigger, action, opened_ms * MS)

    def until(self, at_ms):
        """Let the time go on to this, a millisecond at a time; return all moves after the first rest."""
        while self.driver.now_ns < at_ms * MS:
            self.step()
        return self.driver.moves[1:]

    def step(self):
        beats = self.driver.beats
        self.driver.now_ns += MS
        with self.gate._changed:
            self.gate._changed.notify()
        if not self.driver.refuse:
            wait_until(lambda: self.driver.beats > beats)


@pytest.fixture
def gate():
    """Returns a function that makes a gate; all are closed in the end."""
    made = []

    def make(driver=None, at_ms=50, pulse_ms=20):
        made.append(Clocked(driver or Recorder(), at_ms, pulse_ms))
        return made[-1]

    yield make
    for one in made:
        one.gate.close()


def wait_until(holds, timeout_s=30.0):
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.0005)


def test_a_gate_rests_from_the_start_opens_for_an_accepted_part_at_its_moment_and_rests_again(gate):
    one = gate()
    assert one.driver.moves == [(0, False)]
    one.act(1, "accept", 3)
    assert one.until(80) == [(53, True), (73, False)]


def test_a_diverted_part_moves_nothing(gate):
    one = gate()
    one.act(1, "divert", 0)
    assert one.until(80) == []
    assert one.gate.counters() == {"gate_opened": 0, "gate_late": 0, "gate_failed": 0}


def test_parts_between_camera_and_gate_meet_it_in_the_order_of_their_triggers_whatever_the_order_of_their_verdicts(
    gate,
):
    one = gate(at_ms=100, pulse_ms=10)
    for number in (3, 0, 2, 1):  # the third one diverted
        one.act(number, "divert" if number == 2 else "accept", number * 30)
    assert one.until(210) == [(100, True), (110, False), (130, True), (140, False), (190, True), (200, False)]


def test_a_pulse_that_reaches_the_next_part_ends_where_that_part_is_diverted_and_goes_on_where_it_is_accepted(gate):
    one = gate(at_ms=20, pulse_ms=2000)
    one.act(1, "accept", 0)
    one.act(2, "accept", 20)
    one.act(3, "divert", 40)
    assert one.until(70) == [(20, True), (60, False)]
    assert one.gate.counters()["gate_opened"] == 2


def test_a_part_that_has_gone_by_before_its_verdict_does_not_open_the_gate_for_another(gate):
    one = gate(at_ms=1, pulse_ms=5)
    one.until(10)
    one.act(1, "accept", 0)
    assert one.until(12) == []
    assert one.gate.counters() == {"gate_opened": 0, "gate_late": 1, "gate_failed": 1}


def test_act_returns_at_once_while_the_driver_takes_its_time(gate):
    released = threading.Event()

    class Slow(Recorder):
        def drive(self, *, is_open):
            super().drive(is_open=is_open)
            if is_open:
                released.wait(30)

    one = gate(Slow(), at_ms=0)
    one.act(1, "accept", 0)
    wait_until(lambda: len(one.driver.moves) == 2)
    one.act(2, "accept", 0)  # else it would hang here
    released.set()


def test_a_driver_that_fails_is_told_with_the_next_part_counted_and_tried_again(gate, monkeypatch):
    monkeypatch.setattr("agent.outputs.gate.RETRY_NS", 20 * MS)
    one = gate(at_ms=0)
    one.driver.refuse = True
    one.act(1, "accept", 0)
    wait_until(lambda: one.gate.counters()["gate_failed"] == 1)
    with pytest.raises(OutputError, match="the PLC is silent"):
        one.act(2, "accept", 0)
    wait_until(lambda: one.gate.counters()["gate_failed"] == 2)
    one.driver.refuse = False
    one.driver.now_ns += 20 * MS
    one.step()
    assert one.driver.moves[1:] == [(21, False)]  # back: it rests first
    one.act(3, "accept", 25)
    assert one.until(30)[1:] == [(25, True)]


def test_a_driver_that_cannot_rest_does_not_start_and_is_let_go():
    driver = Recorder()
    driver.refuse = True
    with pytest.raises(OutputError, match="the PLC is silent"):
        Gate(driver, GateTiming(0.0, 1.0))
    assert driver.is_closed


def test_the_driver_is_asked_to_show_that_we_live_with_or_without_parts(gate):
    one = gate()
    one.until(5)
    assert one.driver.beats >= 5


def test_at_the_end_it_rests_and_parts_on_their_way_are_diverted(gate):
    one = gate()
    one.act(1, "accept", 0)
    one.gate.close()
    one.gate.close()
    assert one.driver.is_closed
    assert one.driver.moves == [(0, False)]


def test_more_parts_than_can_be_between_camera_and_gate_are_refused(gate, monkeypatch):
    monkeypatch.setattr("agent.outputs.gate.MOST_WAITING", 2)
    one = gate()
    one.act(1, "accept", 0)
    one.act(2, "accept", 0)
    with pytest.raises(OutputError, match=r"2 parts wait for their moment: is output\.at_ms right\?"):
        one.act(3, "accept", 0)


class FakePin:
    def __init__(self, settings):
        self.settings = settings
        self.levels = []
        self.error = None

    def set(self, *, is_active):
        if self.error is not None:
            raise self.error
        self.levels.append(is_active)

    def release(self):
        self.levels.append("released")


PIN = GpioSettings(Path("/dev/gpiochip9"), 17)


def test_a_pin_is_active_while_the_gate_is_open_and_inactive_when_it_is_let_go():
    pins = []
    driver = GpioDriver(PIN, lambda settings: pins.append(FakePin(settings)) or pins[0])
    driver.drive(is_open=True)
    driver.drive(is_open=False)
    driver.close()
    assert pins[0].levels == [True, False, False, "released"]
    assert pins[0].settings == PIN


def test_a_pin_that_fails_or_is_not_there_is_told():
    pin = FakePin(PIN)
    driver = GpioDriver(PIN, lambda _: pin)
    pin.error = OSError(5, "Input/output error")
    with pytest.raises(OutputError, match="gpiochip9 line 17: Input/output error: check the chip's driver"):
        driver.drive(is_open=True)
    driver.close()
    with pytest.raises(OutputError, match="gpiochip9 line 17: No such file or directory: name a line that is free"):
        GpioDriver(PIN)
