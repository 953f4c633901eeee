"""Parts that a pin of this computer announces, by the edge events of the kernel's GPIO devices (libgpiod 2).

The kernel notes each edge with the moment and a number, so that one which it had no room for is a part that is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import gpiod
from gpiod.line import Direction, Edge

from agent.cameras.trigger import Announced, Announcements, PinSignal
from agent.errors import CameraError

CONSUMER = "taktsight"
POLL_S = 0.1
RETRY_S = 0.5


class Edges(Protocol):
    """The edges of one line of a chip."""

    def wait(self, timeout_s: float) -> Sequence[tuple[int, int]]:
        """Return (number from 1, time.monotonic_ns()) of each edge since the call before. Raises OSError."""

    def release(self) -> None:
        """Let go of the line. Raises OSError."""


class PinTrigger:
    """A trigger source; one thread waits for the pin."""

    def __init__(
        self,
        settings: PinSignal,
        announcements: Announcements,
        request: Callable[[PinSignal], Edges] | None = None,
    ) -> None:
        """request: gives the edges; raises OSError."""
        self._settings = settings
        self.announcements = announcements
        self._request = request or _KernelEdges
        self._named = f"trigger: {settings.chip} line {settings.line}"
        self._edges: Edges | None = None
        self._number = 0  # of the last edge
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, on_event: Callable[[], object]) -> None:
        """Announce parts from now on. Raises CameraError if the pin cannot be had."""
        self.announcements.on_event = on_event
        self._take_line()
        self._thread = threading.Thread(target=self._run, name="trigger", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let go of the pin."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._release()

    def _take_line(self) -> Edges:
        """Return the edges of our line, from now on. Raises CameraError."""
        try:
            self._edges = self._request(self._settings)
        except (OSError, ValueError) as error:  # ValueError: the chip has no such line
            raise CameraError(
                f"{self._named}: {_told(error)}: name a line that is free (gpioinfo lists them), and give the agent's "
                "user the chip's group"
            ) from error
        self._number = 0
        return self._edges

    def _release(self) -> None:
        edges, self._edges = self._edges, None
        if edges is not None:
            with suppress(OSError):
                edges.release()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                found = (self._edges or self._take_line()).wait(POLL_S)
            except (OSError, CameraError) as error:
                told = str(error) if isinstance(error, CameraError) else f"{self._named}: {_told(error)}"
                self.announcements.note(told)
                self._release()
                self._ended.wait(RETRY_S)
                continue
            self.announcements.note("")
            for number, at_ns in found:
                lost, self._number = number - self._number - 1, number
                self.announcements.put(Announced(at_ns, lost=max(lost, 0)))


class _KernelEdges:
    """Held for as long as we live: nobody else can have the line meanwhile."""

    def __init__(self, settings: PinSignal) -> None:
        wanted = gpiod.LineSettings(
            direction=Direction.INPUT,
            edge_detection=Edge.RISING,  # to active, whichever level that is
            active_low=settings.is_active_low,
            debounce_period=timedelta(microseconds=settings.debounce_us),
        )
        self._request = gpiod.request_lines(str(settings.chip), {settings.line: wanted}, consumer=CONSUMER)

    def wait(self, timeout_s: float) -> Sequence[tuple[int, int]]:
        if not self._request.wait_edge_events(timeout_s):
            return ()
        return [(event.line_seqno, event.timestamp_ns) for event in self._request.read_edge_events()]

    def release(self) -> None:
        self._request.release()


def _told(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
