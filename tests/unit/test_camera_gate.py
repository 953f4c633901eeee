"""A gate on a line of the camera rests without the camera, and says when it cannot open."""

from __future__ import annotations

import pytest

from agent.errors import CameraError, OutputError
from agent.outputs.camera import CameraLine


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


def test_a_camera_that_is_away_lets_its_gate_rest_and_cannot_open_it():
    camera = Lines()
    gate, camera.is_away = CameraLine(camera, "UserOutput0"), True
    gate.drive(is_open=False)
    gate.close()
    with pytest.raises(OutputError, match="UserOutput0 cannot be opened: the cable is out"):
        gate.drive(is_open=True)
