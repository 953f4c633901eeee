"""What the doctor says about the gate of a station."""

import socket

import pytest

from agent.doctor.output import output
from tests.machines import grades, looking, only


@pytest.fixture
def found(tmp_path):
    """Returns a function that has the doctor look at a station with this `output`."""
    return looking(tmp_path, output, "output")


def test_a_station_without_an_output_and_one_with_a_file_are_fine(found):
    assert grades(found("")) == {"output": "ok"}
    assert "no gate moves" in only(found("kind: file, file: gate.log"), "output").found


def test_a_plc_that_takes_connections_is_fine_and_nothing_is_written_to_it(found):
    with socket.create_server(("127.0.0.1", 0)) as plc:
        port = plc.getsockname()[1]
        block = f"kind: modbus, host: 127.0.0.1, port: {port}, coil: 3, pulse_ms: 50"
        assert grades(found(f"{block}, heartbeat_coil: 4")) == {"output": "ok"}
        assert grades(found(block)) == {"output": "ok", "output.heartbeat": "warn"}
        connection, _ = plc.accept()
        with connection:
            assert connection.recv(10) == b""


def test_a_plc_that_is_not_there_fails(found):
    with socket.create_server(("127.0.0.1", 0)) as plc:
        port = plc.getsockname()[1]
    finding = only(found(f"kind: modbus, host: 127.0.0.1, port: {port}, coil: 3, pulse_ms: 50"), "output")
    assert (finding.grade, finding.action) == ("fail", "check its address, power and cable")


def test_a_chip_that_is_not_there_or_is_a_file_fails(found, tmp_path):
    (tmp_path / "chip").touch()
    for chip in ("none", "chip"):
        finding = only(found(f"kind: gpio, line: 3, chip: {chip}, pulse_ms: 50"), "output")
        assert (finding.grade, "no such device" in finding.found) == ("fail", True)
    assert grades(found("kind: gpio, line: 3, chip: /dev/null, pulse_ms: 50")) == {"output": "ok"}


def test_a_package_that_is_not_installed_fails_and_is_named(found, monkeypatch):
    monkeypatch.setattr("agent.doctor.plant.version_of", lambda _: None)
    assert only(found("kind: gpio, line: 3"), "output").action == "pip install 'taktsight[gpio]'"
    assert only(found("kind: modbus, host: plc, coil: 1"), "output").action == "pip install 'taktsight[modbus]'"


def test_a_pulse_that_lasts_longer_than_the_takt_is_warned_of(found):
    assert grades(found("kind: gpio, line: 3, chip: /dev/null, pulse_ms: 60000"))["output.timing"] == "warn"
