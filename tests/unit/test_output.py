"""What acts on the verdicts: what the gate would have been told, in a file, and what station.yaml makes of a gate."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from agent.cameras.simulated import SimulatedCamera
from agent.config import read_station
from agent.errors import OutputError
from agent.outputs.gate import GateTiming
from agent.outputs.output import FileOutput
from agent.outputs.settings import GpioSettings, ModbusSettings, OutputSettings
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.errors import MissingPackage, SettingsError


def test_each_part_is_a_line_that_is_there_at_once_and_a_run_appends(tmp_path):
    path = tmp_path / "gate"
    path.write_text("1 accept 2.000\n")
    output = FileOutput(path)
    output.act(2, "divert", time.monotonic_ns() - 5_000_000)
    before, line = path.read_text().splitlines()
    assert before == "1 accept 2.000"
    trigger, action, after_ms = line.split()
    assert (trigger, action) == ("2", "divert")
    assert float(after_ms) >= 5.0
    output.close()


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"Is a directory: give output.file a path it can write"):
        FileOutput(tmp_path)


def test_a_full_disk_is_told_and_the_end_raises_nothing():
    output = FileOutput(Path("/dev/full"))
    with pytest.raises(OutputError, match="No space left on device: free the disk"):
        output.act(1, "accept", 0)
    output.close()


@pytest.fixture
def read(tmp_path):
    """Returns a function that reads `output` of a station with a takt of 500 ms."""

    def read(block):
        lines = "station: cell7\nrecipe: a\nrecipes: {unsigned: allow}\ntakt_ms: 500\ncamera: {kind: simulated}\n"
        (tmp_path / "station.yaml").write_text(f"{lines}output: {{{block}}}\n")
        return read_station(tmp_path / "station.yaml").output

    return read


def test_a_gate_is_at_the_camera_where_nobody_says_how_far_it_is(read):
    assert read("kind: modbus, host: plc, coil: 0").timing == GateTiming(at_ms=450.0, pulse_ms=100.0)


def test_each_kind_is_read_with_its_own_keys(read, tmp_path):
    assert read("kind: file, file: gate.log") == OutputSettings(file=tmp_path / "gate.log")
    coil = read("kind: modbus, host: plc, port: 1502, unit: 2, coil: 7, confirm_ms: 50, heartbeat_coil: 8, at_ms: 900")
    assert coil.modbus == ModbusSettings("plc", 1502, 2, 7, 50.0, 8, 500.0)
    assert coil.timing == GateTiming(900.0, 100.0)
    pin = read("kind: gpio, line: 17, active: low")
    assert pin.gpio == GpioSettings(Path("/dev/gpiochip0"), 17, is_active_low=True)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("kind: modbus, host: plc, coil: 0, at_ms: 449", "output.at_ms: 449"),  # before every part has its verdict
        ("kind: modbus, host: plc", "output.coil: "),
        ("kind: gpio, line: 17, host: plc", "output.host: unknown key"),
        ("kind: relay", "output.kind: 'relay'"),
        (
            "kind: modbus, host: plc, coil: 3, heartbeat_coil: 3",
            "output.heartbeat_coil: coil 3 of plc:502 unit 1 is output.coil, too: give it its own",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(read, block, told):
    with pytest.raises(SettingsError) as refusal:
        read(block)
    assert told.split(" found")[0] in str(refusal.value)


def test_a_pin_that_announces_parts_moves_no_gate(read):
    trigger = "}}\ntrigger: {{kind: gpio, line: {}"
    assert read("kind: gpio, line: 17" + trigger.format(18)).gpio.line == 17
    with pytest.raises(SettingsError, match=r"output\.line: /dev/gpiochip0 17 is trigger\.line, too: give it its own"):
        read("kind: gpio, line: 17" + trigger.format(17))


def test_a_kind_whose_package_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "agent.outputs.gpio", None)
    output = OutputSettings(gpio=GpioSettings(Path("/dev/gpiochip0"), 1), timing=GateTiming(0.0, 1.0))
    with pytest.raises(MissingPackage, match=r"pip install 'taktsight\[gpio\]'"):
        output.open()


def test_a_line_of_the_camera_needs_a_camera_that_has_lines(read):
    settings = read("kind: camera, at_ms: 900")
    assert settings.user_output == "UserOutput0"
    with pytest.raises(SettingsError, match=r"this camera has no outputs: it needs camera\.kind genicam"):
        settings.open(SimulatedCamera(SimulatedLine(LineSettings())))
