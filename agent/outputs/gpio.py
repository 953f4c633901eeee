"""A gate on a pin of this computer, by the kernel's GPIO devices (libgpiod 2).

This file and `agent.cameras.trigger_pin`, which reads one, alone import gpiod.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import gpiod
from gpiod.line import Direction, Value

from agent.errors import OutputError
from agent.outputs.settings import GpioSettings

CONSUMER = "taktsight"


class Pin(Protocol):
    """One line of a chip, as an output that we hold."""

    def set(self, *, is_active: bool) -> None:
        """Set it. Raises OSError."""

    def release(self) -> None:
        """Let go of it. Raises OSError."""


class GpioDriver:
    """Opens the gate while the line is active."""

    idle_ns = 0

    def __init__(self, settings: GpioSettings, request: Callable[[GpioSettings], Pin] | None = None) -> None:
        """request: gives the pin, inactive; raises OSError.

        Raises OutputError if the pin cannot be had.
        """
        self._named = f"{settings.chip} line {settings.line}"
        try:
            self._pin = (request or _KernelPin)(settings)
        except (OSError, ValueError) as error:  # ValueError: the chip has no such line
            raise OutputError(
                f"{self._named}: {_told(error)}: name a line that is free (gpioinfo lists them), and give the agent's "
                "user the chip's group"
            ) from error

    def drive(self, *, is_open: bool) -> None:
        """Set the pin. Raises OutputError."""
        try:
            self._pin.set(is_active=is_open)
        except OSError as error:
            raise OutputError(f"{self._named}: {_told(error)}: check the chip's driver") from error

    def idle(self) -> None:
        """Do nothing: the kernel holds the level."""

    def close(self) -> None:
        """Let the gate rest, then let go of the pin."""
        with suppress(OSError):
            self._pin.set(is_active=False)
        with suppress(OSError):
            self._pin.release()


class _KernelPin:
    """Held for as long as we live: nobody else can drive it meanwhile."""

    def __init__(self, settings: GpioSettings) -> None:
        wanted = gpiod.LineSettings(
            direction=Direction.OUTPUT, active_low=settings.is_active_low, output_value=Value.INACTIVE
        )
        self._line = settings.line
        self._request = gpiod.request_lines(str(settings.chip), {settings.line: wanted}, consumer=CONSUMER)

    def set(self, *, is_active: bool) -> None:
        self._request.set_value(self._line, Value.ACTIVE if is_active else Value.INACTIVE)

    def release(self) -> None:
        self._request.release()


def _told(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
