"""A gate on a line of the camera: it says when it cannot open, and when nobody knows whether it rests."""

from __future__ import annotations

import time

import pytest

from agent.errors import CameraError, OutputError
from agent.outputs.camera import CameraLine
from agent.outputs.gate import Gate, GateTiming
from tests.broker import wait_until


class Lines:
    """A camera's outputs."""

    def __init__(self):
        self.set, self.is_away = [], False

    def set_line(self, name, *, on):
        if self.is_away:
            raise CameraError("the cable is out")
        self.set.append((name, on))


def test_the_line_is_on_while_the_gate_is_open_and_off_in_the_end():
    camera = Lines()
    gate = CameraLine(camera, "UserOutput0")
    gate.drive(is_open=True)
    gate.drive(is_open=False)
    gate.close()
    assert camera.set == [("UserOutput0", True), ("UserOutput0", False), ("UserOutput0", False)]


def test_a_gate_that_was_never_opened_rests_without_the_camera_which_comes_up_with_it_off():
    camera = Lines()
    gate, camera.is_away = CameraLine(camera, "UserOutput0"), True
    gate.drive(is_open=False)
    gate.close()
    with pytest.raises(OutputError, match="UserOutput0 cannot be opened: the cable is out"):
        gate.drive(is_open=True)


def test_a_gate_that_may_be_open_rests_only_when_the_camera_says_so():
    """A camera that has power keeps its outputs as they are, whoever lost the connection."""
    camera = Lines()
    gate = CameraLine(camera, "UserOutput0")
    gate.drive(is_open=True)
    camera.is_away = True
    for _ in range(2):
        with pytest.raises(OutputError, match="UserOutput0 may be open, it is not confirmed to rest: the cable is out"):
            gate.drive(is_open=False)
    camera.is_away = False
    gate.drive(is_open=False)
    camera.is_away = True
    gate.drive(is_open=False)
    assert camera.set == [("UserOutput0", True), ("UserOutput0", False)]


def test_a_gate_that_is_open_when_the_agent_ends_without_the_camera_is_told_in_the_log(caplog):
    camera = Lines()
    gate = CameraLine(camera, "UserOutput0")
    gate.drive(is_open=True)
    camera.is_away = True
    gate.close()
    assert "the gate on the camera's UserOutput0 may be open" in caplog.text


def test_a_camera_that_goes_while_its_gate_is_open_is_told_with_the_next_part_and_rests_when_it_is_back(monkeypatch):
    monkeypatch.setattr("agent.outputs.gate.RETRY_NS", 20_000_000)
    camera = Lines()
    gate = Gate(CameraLine(camera, "UserOutput0"), GateTiming(0.0, 60_000.0))
    gate.act(1, "accept", time.monotonic_ns())
    wait_until(lambda: gate.counters()["gate_opened"] == 1)
    camera.is_away = True
    gate.act(2, "divert", time.monotonic_ns())
    wait_until(lambda: gate._fault)
    with pytest.raises(OutputError, match="UserOutput0 may be open"):
        gate.act(3, "divert", time.monotonic_ns())
    camera.is_away = False
    wait_until(lambda: not gate._fault)
    assert camera.set[-1] == ("UserOutput0", False)
    gate.close()
