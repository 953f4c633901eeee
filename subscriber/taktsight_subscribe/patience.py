"""A word about a store that does not answer: the thread that waits for it cannot say so itself."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from taktsight_subscribe.quiet import Quiet

log = logging.getLogger(__name__)

PATIENCE_S = 10.0  # a turn takes milliseconds; a server ends a statement after 30 s, where it still can
POLL_S = 1.0


class Patience:
    """Warns from a thread of its own, at most once a minute, while a `with` block lasts longer than PATIENCE_S."""

    def __init__(self) -> None:
        self._began_s: float | None = None  # of the block that is under way
        self._ended = threading.Event()
        self._warn = Quiet(log)
        self._thread = threading.Thread(target=self._work, name="taktsight-patience", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End soon."""
        self._ended.set()

    def __enter__(self) -> None:
        self._began_s = time.monotonic()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._began_s = None

    def _work(self) -> None:
        while not self._ended.wait(POLL_S):
            began_s = self._began_s
            waited_s = 0.0 if began_s is None else time.monotonic() - began_s
            if waited_s > PATIENCE_S:
                text = "the store has not answered for %.0f s, is it frozen? Nothing is acknowledged until it does"
                self._warn("slow", text, waited_s)
