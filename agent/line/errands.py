"""What others ask of the inspection thread between two parts."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TypeVar

POLL_S = 0.05  # how soon the one who asks notices that nobody will come

Answer = TypeVar("Answer")


class Errands:
    """Any thread asks, one runs what was asked."""

    def __init__(self, has_ended: Callable[[], bool]) -> None:
        """has_ended: whether nobody runs errands any more."""
        self._has_ended = has_ended
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def ask(self, errand: Callable[[], Answer], timeout_s: float) -> Answer:
        """Return what the errand returns, or raise what it raises.

        Raises TimeoutError if its turn did not come in time; it then never runs.
        """
        promise: Future[Answer] = Future()

        def run() -> None:
            if promise.set_running_or_notify_cancel():
                try:
                    promise.set_result(errand())
                except BaseException as error:  # noqa: BLE001 goes to the one who asked, not to the line
                    promise.set_exception(error)

        self._waiting.put(run)
        give_up_s = time.monotonic() + timeout_s
        while not promise.done():
            wait([promise], timeout=POLL_S)
            too_late = self._has_ended() or time.monotonic() >= give_up_s
            if too_late and promise.cancel():  # one that has begun cannot be cancelled: wait for its end
                raise TimeoutError("the line did not come between two parts")
        return promise.result()

    def run(self) -> None:
        """Run what was asked so far."""
        with suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()()
