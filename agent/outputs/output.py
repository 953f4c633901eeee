"""Port: the gate, the PLC, whatever acts on a verdict.

It is told as soon as the verdict is decided, at the deadline at the latest, before anything is stored or published.
The rest position of a gate is divert: an output that hears nothing of a part must not let it pass.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from agent.errors import OutputError


class Output(Protocol):
    """Called once per part, by the thread that decided; returns at once."""

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        """Let the part through or not. action: `accept` | `divert`; opened_ns: time.monotonic_ns() of its trigger.

        Raises OutputError if it cannot be done: the line then fails safe.
        """

    def counters(self) -> dict[str, int]:
        """Return what was counted since the start, by names as in the status."""

    def close(self) -> None:
        """Back to the rest position; never raises."""


class NoOutput:
    """The line acts on the messages of the MES alone."""

    def counters(self) -> dict[str, int]:
        """Return none."""
        return {}

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class FileOutput:
    """Writes down what a gate would have been told, one line per part: for commissioning, and for benchmarks.

    trigger action ms-after-trigger
    """

    def __init__(self, path: Path) -> None:
        """Raises OutputError if the file cannot be written."""
        try:
            self._file = path.open("a", buffering=1, encoding="ascii")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}: give output.file a path it can write") from error

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        """Append a line."""
        after_ms = (time.monotonic_ns() - opened_ns) / 1e6
        try:
            self._file.write(f"{trigger_id} {action} {after_ms:.3f}\n")
        except OSError as error:
            raise OutputError(f"{self._file.name}: {error.strerror}: free the disk") from error

    def counters(self) -> dict[str, int]:
        """Return none: the file has a line for each part."""
        return {}

    def close(self) -> None:
        """Close the file; what was written is there already, what the disk refused is not."""
        with suppress(OSError):
            self._file.close()
