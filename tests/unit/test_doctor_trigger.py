"""What the doctor says about what announces a station's parts."""

import pytest

from agent.doctor.trigger import trigger
from tests.broker import free_port
from tests.machines import grades, looking, only
from tests.plc import Plc


@pytest.fixture
def found(tmp_path):
    """Returns a function that has the doctor look at a station with this `trigger`."""
    return looking(tmp_path, trigger, "trigger")


@pytest.fixture
def plc():
    one = Plc(free_port()).start()
    yield one
    one.kill()


def test_a_station_on_the_beat_has_nothing_to_be_looked_at(found):
    assert found("") == []


@pytest.mark.parametrize("signal", ["input", "coil", "counter"])
def test_a_plc_that_tells_the_signal_is_fine_and_is_left_as_it_was(found, plc, signal):
    block = f"kind: modbus, host: 127.0.0.1, port: {plc.port}, signal: {signal}, address: 0, within_ms: 5000"
    assert grades(found(block)) == {"trigger": "ok"}
    assert plc.writes == []


def test_an_address_that_the_plc_has_not_fails_and_a_slow_answer_is_warned_of(found, plc):
    block = f"kind: modbus, host: 127.0.0.1, port: {plc.port}, signal: coil"
    assert "name an address that the PLC has" in only(found(f"{block}, address: 99"), "trigger").found
    plc.answers_after_s = 0.1
    assert grades(found(f"{block}, address: 0, answer_ms: 5000, within_ms: 50")) == {
        "trigger": "ok",
        "trigger.within": "warn",
    }


def test_a_plc_that_is_not_there_fails(found):
    block = f"kind: modbus, host: 127.0.0.1, port: {free_port()}, signal: coil, address: 0"
    finding = only(found(block), "trigger")
    assert finding.grade == "fail"
    assert "no connection: check the PLC, its address and the cable" in finding.found


def test_a_chip_that_is_not_there_fails_and_one_that_is_there_is_not_touched(found):
    assert "no such device" in only(found("kind: gpio, line: 3, chip: none"), "trigger").found
    assert grades(found("kind: gpio, line: 3, chip: /dev/null")) == {"trigger": "ok"}


def test_a_package_that_is_not_installed_fails_and_is_named(found, monkeypatch):
    monkeypatch.setattr("agent.doctor.plant.version_of", lambda _: None)
    assert only(found("kind: gpio, line: 3"), "trigger").action == "pip install 'taktsight[gpio]'"
    settings = "kind: modbus, host: plc, signal: coil, address: 1"
    assert only(found(settings), "trigger").action == "pip install 'taktsight[modbus]'"
