"""A gate on a coil of a PLC, by Modbus/TCP over loopback: order, a PLC that is slow, dies and comes back."""

from __future__ import annotations

import threading
import time

import pytest

from agent.cameras.simulated import SimulatedCamera
from agent.errors import OutputError
from agent.line.beat import Beat
from agent.line.loop import Line
from agent.outputs.gate import GateTiming
from agent.outputs.settings import ModbusSettings, OutputSettings
from agent.simulation.line import LineSettings, SimulatedLine
from agent.verdict import Outcome, Reason, Verdict
from tests.broker import free_port, wait_until
from tests.plc import Plc, RudePlc

MS = 1_000_000
COIL, HEARTBEAT = 3, 5


@pytest.fixture
def plc():
    plc = Plc(free_port()).start()
    yield plc
    plc.kill()


@pytest.fixture
def gate(plc):
    """Returns a function that makes a gate on the PLC's coil 3; all are closed in the end."""
    made = []

    def make(at_ms=30.0, pulse_ms=200.0, **changes):
        coil = ModbusSettings("127.0.0.1", port=plc.port, coil=COIL, **{"confirm_ms": 3000.0, **changes})
        made.append(OutputSettings(modbus=coil, timing=GateTiming(at_ms, pulse_ms)).open())
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_parts_open_the_gate_in_order_each_at_its_moment(gate, plc):
    one = gate(at_ms=500.0, pulse_ms=120.0)
    began_ns = time.monotonic_ns()
    for number in (1, 0, 3, 5, 2, 4):  # 0 and 3 diverted
        one.act(number, "accept" if number % 3 else "divert", began_ns + number * 250 * MS)
    wait_until(lambda: plc.of_coil(COIL) == [False] + [True, False] * 4)
    opened_ns = [at_ns - began_ns for at_ns, coil, is_on in plc.writes if coil == COIL and is_on]
    assert all(at_ns >= (500 + 250 * number) * MS for at_ns, number in zip(opened_ns, (1, 2, 4, 5), strict=True))
    assert one.counters()["gate_opened"] == 4


def test_at_the_end_the_coil_is_off(gate, plc):
    one = gate(at_ms=0.0, pulse_ms=60_000.0)
    one.act(1, "accept", time.monotonic_ns())
    wait_until(lambda: plc.of_coil(COIL) == [False, True])
    one.close()
    assert plc.of_coil(COIL) == [False, True, False]


def test_a_line_whose_plc_is_not_there_does_not_start(gate, plc):
    plc.kill()
    with pytest.raises(OutputError, match="no connection: check the PLC, its address and the cable"):
        gate()


def test_a_coil_that_the_plc_does_not_have_is_told(plc):
    coil = ModbusSettings("127.0.0.1", port=plc.port, coil=99)
    with pytest.raises(OutputError, match="coil 99 refused"):
        OutputSettings(modbus=coil, timing=GateTiming(0.0, 1.0)).open()


def test_a_plc_that_confirms_too_late_makes_the_next_part_fail_safe_and_its_part_count(gate, plc):
    one = gate(at_ms=0.0, confirm_ms=50.0)
    plc.answers_after_s = 0.3
    one.act(1, "accept", time.monotonic_ns())
    wait_until(lambda: one.counters()["gate_failed"] == 1)
    with pytest.raises(OutputError, match="coil 3 not confirmed within 50 ms: check the PLC and the network"):
        one.act(2, "divert", time.monotonic_ns())


def test_a_plc_that_dies_and_comes_back_is_used_again_at_rest_first(gate, plc, monkeypatch):
    monkeypatch.setattr("agent.outputs.gate.RETRY_NS", 20 * MS)
    one = gate(at_ms=0.0)
    one.act(1, "accept", time.monotonic_ns())
    wait_until(lambda: plc.of_coil(COIL) == [False, True, False])
    plc.kill()
    one.act(2, "accept", time.monotonic_ns())
    wait_until(lambda: one.counters()["gate_failed"] == 1)
    with pytest.raises(OutputError, match=r"the connection broke|no connection"):
        one.act(3, "accept", time.monotonic_ns())
    wait_until(lambda: one.counters()["gate_failed"] == 2)
    plc.start()
    wait_until(lambda: plc.of_coil(COIL) == [False, True, False, False])
    wait_until(lambda: not one._fault)
    one.act(4, "accept", time.monotonic_ns())
    wait_until(lambda: plc.of_coil(COIL) == [False, True, False, False, True, False])
    assert one.counters()["gate_opened"] == 2


def test_the_heartbeat_coil_changes_with_and_without_parts_and_stands_still_when_the_agent_ends(gate, plc):
    one = gate(heartbeat_coil=HEARTBEAT, heartbeat_ms=50.0)
    wait_until(lambda: plc.of_coil(HEARTBEAT)[:4] == [True, False, True, False])
    one.close()
    count = len(plc.of_coil(HEARTBEAT))
    time.sleep(0.15)
    assert len(plc.of_coil(HEARTBEAT)) == count


def test_a_lost_heartbeat_is_a_failed_gate_before_any_part_comes(gate, plc):
    one = gate(heartbeat_coil=HEARTBEAT, heartbeat_ms=50.0)
    wait_until(lambda: plc.of_coil(HEARTBEAT))
    plc.kill()
    wait_until(lambda: one._fault)
    with pytest.raises(OutputError, match=r"the connection broke|no connection"):
        one.act(1, "divert", time.monotonic_ns())


def test_a_host_that_can_be_none_is_a_gate_that_cannot_be_had():
    coil = ModbusSettings(70 * "a", coil=COIL)
    with pytest.raises(OutputError, match=r"the connection broke|no connection"):
        OutputSettings(modbus=coil, timing=GateTiming(0.0, 60_000.0)).open()


def opened_on(plc):
    """Return a gate on this PLC that has let a part pass, and is open."""
    coil = ModbusSettings("127.0.0.1", port=plc.port, coil=COIL, confirm_ms=3000.0)
    one = OutputSettings(modbus=coil, timing=GateTiming(0.0, 60_000.0)).open()
    one.act(1, "accept", time.monotonic_ns())
    wait_until(lambda: plc.is_on)
    return one


@pytest.mark.parametrize(("fault", "told"), [("resets", "the connection broke"), ("cuts", "coil 3 not confirmed")])
def test_a_plc_that_resets_the_connection_or_answers_nonsense_is_a_failed_gate_and_used_again(monkeypatch, fault, told):
    monkeypatch.setattr("agent.outputs.gate.RETRY_NS", 20 * MS)
    plc = RudePlc()
    one = opened_on(plc)
    setattr(plc, fault, True)
    one.act(2, "divert", time.monotonic_ns())
    wait_until(lambda: one._fault)
    with pytest.raises(OutputError, match=told):
        one.act(3, "divert", time.monotonic_ns())
    setattr(plc, fault, False)
    wait_until(lambda: not one._fault)
    assert not plc.is_on
    one.act(4, "accept", time.monotonic_ns())
    wait_until(lambda: plc.is_on)
    plc.resets = True
    one.close()
    plc.close()


def test_a_gate_whose_connection_was_lost_is_let_rest_over_a_new_one_when_the_agent_ends(monkeypatch):
    monkeypatch.setattr("agent.outputs.gate.RETRY_NS", 60_000 * MS)
    plc = RudePlc()
    one = opened_on(plc)
    plc.resets = True
    one.act(2, "divert", time.monotonic_ns())
    wait_until(lambda: one._fault and one._retry_ns > time.monotonic_ns())  # the attempt at once has failed, too
    plc.resets = False
    one.close()
    assert not plc.is_on
    plc.close()


class Judge:
    """Passes odd parts, rejects even ones."""

    def inspect(self, frame, deadline_ns=None):
        is_good = frame.trigger_id % 2
        outcome = Outcome.PASS if is_good else Outcome.REJECT
        return Verdict(frame.trigger_id, outcome, Reason.SCORE, score=0.0 if is_good else 1.0, threshold=0.5)


def test_a_line_whose_plc_dies_halts_and_goes_on_by_resume_when_it_is_back(gate, plc, monkeypatch):
    monkeypatch.setattr("agent.outputs.gate.RETRY_NS", 20 * MS)
    verdicts = {}
    one = gate(at_ms=180.0, pulse_ms=100.0)
    camera = SimulatedCamera(SimulatedLine(LineSettings(width_px=64, height_px=64)))
    beat = Beat(takt_ms=200.0, deadline_ms=180.0)

    def deliver(batch):
        verdicts.update({settled.verdict.trigger_id: settled.verdict for settled in batch})

    line = Line(camera, Judge(), beat, deliver, output=one)
    runs = threading.Thread(target=line.run, daemon=True)
    runs.start()
    wait_until(lambda: one.counters()["gate_opened"] >= 3)
    plc.kill()
    wait_until(lambda: line.held is not None)
    assert (line.held.reason, "the output cannot be driven" in line.held.detail) == (Reason.HALTED, True)
    wait_until(lambda: verdicts and verdicts[max(verdicts)].reason is Reason.HALTED)
    plc.start()
    wait_until(lambda: not one._fault)
    before = one.counters()["gate_opened"]
    line.release()
    wait_until(lambda: one.counters()["gate_opened"] >= before + 3)
    line.stop()
    runs.join(10)
    assert plc.of_coil(COIL)[-1] is False
    assert sorted(verdicts) == list(range(1, max(verdicts) + 1))
