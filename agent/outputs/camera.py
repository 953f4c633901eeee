"""A gate on a line of the camera: where neither a PLC nor a pin of this computer is at hand.

A driver of `agent.outputs.gate`.

A camera that is away lets its gate rest: an output is off without power, and off whenever the camera comes up. Only
opening it can fail.
"""

from __future__ import annotations

from contextlib import suppress

from agent.cameras.genicam import GenicamCamera
from agent.errors import CameraError, OutputError


class CameraLine:
    """Drives one output of the camera, such as UserOutput0: on is open."""

    idle_ns = 0  # the camera's process looks after it

    def __init__(self, camera: GenicamCamera, name: str) -> None:
        self._camera = camera
        self._name = name

    def drive(self, *, is_open: bool) -> None:
        """Open the gate, or let it rest; return when the camera confirms it. Raises OutputError."""
        try:
            self._camera.set_line(self._name, on=is_open)
        except CameraError as error:
            if is_open:
                raise OutputError(f"the gate on the camera's {self._name} cannot be opened: {error}") from error

    def idle(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Let the gate rest."""
        with suppress(CameraError):
            self._camera.set_line(self._name, on=False)
