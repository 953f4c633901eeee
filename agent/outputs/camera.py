"""A gate on a line of the camera: where neither a PLC nor a pin of this computer is at hand.

A driver of `agent.outputs.gate`.

An output is off without power, and off whenever the camera comes up: one that was never opened needs no confirmation to
rest, whether the camera is there or not. One that was opened keeps its level while the connection is broken: until the
camera confirms that it is off, the gate may be open.
"""

from __future__ import annotations

import logging

from agent.cameras.genicam import GenicamCamera
from agent.errors import CameraError, OutputError

log = logging.getLogger(__name__)


class CameraLine:
    """Drives one output of the camera, such as UserOutput0: on is open."""

    idle_ns = 0  # the camera's process looks after it

    def __init__(self, camera: GenicamCamera, name: str) -> None:
        self._camera = camera
        self._name = name
        self._may_be_open = False  # told to be, and not confirmed to rest since

    def drive(self, *, is_open: bool) -> None:
        """Open the gate, or let it rest; return when the camera confirms it. Raises OutputError."""
        self._may_be_open = self._may_be_open or is_open
        try:
            self._camera.set_line(self._name, on=is_open)
        except CameraError as error:
            if self._may_be_open:
                told = "cannot be opened" if is_open else "may be open, it is not confirmed to rest"
                raise OutputError(f"the gate on the camera's {self._name} {told}: {error}") from error
        else:
            self._may_be_open = is_open

    def idle(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Let the gate rest; the log tells where the camera does not confirm it."""
        try:
            self.drive(is_open=False)
        except OutputError as error:
            log.warning("%s: switch the camera off, or look at the gate", error)
