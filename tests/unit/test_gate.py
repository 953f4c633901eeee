"""A gate moves when a part is before it, whatever happens to the parts around it, and rests at divert."""

from __future__ import annotations

import logging
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


class Unconfirmed(Recorder):
    """A gate that opens, and says so too late."""

    def drive(self, *, is_open):
        super().drive(is_open=is_open)
        if is_open:
            raise OutputError("not confirmed within 100 ms")


def test_an_opening_that_is_not_confirmed_is_taken_back_at_once_for_each_reject_and_when_it_can_no_longer_be_overtaken(
    gate,
):
    one = gate(Unconfirmed(), at_ms=0)
    one.act(1, "accept", 0)
    wait_until(lambda: one.driver.moves[1:] == [(0, True), (0, False)])
    for number, action in ((2, "divert"), (3, "accept"), (4, "divert")):  # an opening yet to be carried out may follow
        with pytest.raises(OutputError, match="not confirmed within 100 ms"):
            one.act(number, action, 0)
    wait_until(lambda: one.driver.moves[3:] == [(0, False)] * 2)
    one.driver.now_ns = 499 * MS
    one.step()
    assert one.driver.moves[5:] == [(500, False)]
    one.act(5, "divert", 500)
    assert one.gate.counters()["gate_failed"] == 2


def test_a_gate_that_stands_open_rests_at_once_when_it_cannot_be_shown_that_we_live(gate):
    class Mute(Recorder):
        def idle(self):
            if (self.now_ns // MS) == 60:
                raise OutputError("the heartbeat is not confirmed")
            super().idle()

    one = gate(Mute())
    one.act(1, "accept", 0)
    assert one.until(59) == [(50, True)]
    one.driver.now_ns = 60 * MS
    with one.gate._changed:
        one.gate._changed.notify()
    wait_until(lambda: one.driver.moves[2:] == [(60, False)])
    with pytest.raises(OutputError, match="the heartbeat is not confirmed"):
        one.act(2, "divert", 60)


def test_an_error_that_nobody_foresaw_is_a_failed_gate_told_once_with_its_origin_and_the_gate_is_driven_again(
    gate, caplog
):
    class Wrong(Recorder):
        def drive(self, *, is_open):
            if self.refuse:
                self.beats += 1  # of attempts
                raise ValueError("no such coil")
            super().drive(is_open=is_open)

    one = gate(Wrong(), at_ms=0)
    wait_until(lambda: one.driver.beats == 1)
    one.driver.refuse = True
    one.act(1, "accept", 0)
    wait_until(lambda: one.gate.counters()["gate_failed"] == 1 and one.driver.beats == 3)  # to open, and to rest
    with pytest.raises(OutputError, match="ValueError: no such coil"):
        one.act(2, "divert", 0)
    wait_until(lambda: one.driver.beats == 4)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [(record.message, record.exc_info[0]) for record in errors] == [
        ("the gate failed: ValueError: no such coil", ValueError)
    ]
    one.driver.refuse = False
    one.driver.now_ns = 999 * MS
    one.step()
    one.act(3, "accept", 1005)
    assert one.until(1005)[-1] == (1005, True)


def test_an_error_beside_the_driver_does_not_end_the_gate_either():
    class Clock:
        now_ns, is_broken = 0, False

        def __call__(self):
            if self.is_broken:
                self.is_broken = False
                raise ArithmeticError("the clock is broken")
            return self.now_ns

    driver, clock = Recorder(), Clock()
    one = Gate(driver, GateTiming(0.0, 20.0), clock)
    clock.is_broken = True
    one.act(1, "divert", 0)
    wait_until(lambda: one._fault)
    with pytest.raises(OutputError, match="ArithmeticError: the clock is broken"):
        one.act(2, "divert", 0)
    clock.now_ns = 500 * MS
    wait_until(lambda: not one._fault)
    one.act(3, "accept", 500 * MS)
    wait_until(lambda: one.counters()["gate_opened"] == 1)
    one.close()


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


def test_however_many_parts_are_lost_at_one_moment_they_leave_room_for_those_that_come(gate):
    one = gate(at_ms=100, pulse_ms=10)
    for number in range(3):
        one.act(number, "accept", 30 * number)
    for number in range(3, 6000):
        one.act(number, "divert", 65)
    one.act(6000, "accept", 75)
    moves = [(100, True), (110, False), (130, True), (140, False), (160, True), (165, False), (175, True), (185, False)]
    assert one.until(190) == moves


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
