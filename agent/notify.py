"""What the service manager is told: the protocol of sd_notify(3), spoken without a library.

Where nobody listens (a terminal, a container without NOTIFY_SOCKET), every call does nothing.

The watchdog is never fed by a timer. `heartbeat` passes on that the line moves: once every thread of the line has come
round since the feed before. A hung engine stops that, although its parts still get their verdicts (`late`) in time.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 0.2  # the service manager reads at once, unless it is in trouble itself; what failed is said again
FEEDS_PER_INTERVAL = 4  # sd_watchdog_enabled(3) asks for two at least


class Supervisor:
    """The service manager that watches over this process, or nobody. Any thread may call; no call raises."""

    def __init__(
        self,
        address: str | None = None,
        watchdog_s: float | None = None,
        *,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Without an address it is silent. watchdog_s: ends the process when not fed for so long; None: it does not."""
        self._address = address
        self.watchdog_s = watchdog_s
        self._monotonic_ns = monotonic_ns
        self._is_ready = False
        self._fed_ns = 0
        self._failing = False

    @property
    def is_there(self) -> bool:
        """True where somebody listens."""
        return self._address is not None

    def heartbeat(self, moved_ns: int) -> None:
        """Say READY=1 at the first heartbeat, then feed the watchdog with each that is newer than the feed before.

        moved_ns: `Line.heartbeat_ns`, when the slowest thread last came round; 0: not yet.
        """
        now_ns = self._monotonic_ns()
        if moved_ns <= self._fed_ns:
            return
        if not self._is_ready:
            self._is_ready = self._send("READY=1")
            self._fed_ns = now_ns if self._is_ready else 0
        elif self.watchdog_s is not None and now_ns - self._fed_ns >= self.watchdog_s * 1e9 / FEEDS_PER_INTERVAL:
            self._fed_ns = now_ns if self._send("WATCHDOG=1") else self._fed_ns

    def status(self, text: str) -> None:
        """Show this line in `systemctl status`."""
        self._send(f"STATUS={' '.join(text.split())}")

    def stopping(self) -> None:
        """Say that the end has begun: the watchdog is not fed any more."""
        self._send("STOPPING=1")

    def extend(self, more_s: float) -> None:
        """Ask not to be killed within the next so many seconds, while stopping."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(more_s * 1e6)}")

    def _send(self, text: str) -> bool:
        """Return whether it was said; there is nobody to miss it where nobody listens."""
        if self._address is None:
            return True
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.settimeout(SEND_TIMEOUT_S)
                out.connect(address)
                out.send(text.encode())
        except OSError as error:
            if not self._failing:
                log.warning("the service manager cannot be told %s: %s", text.partition("=")[0], error)
            self._failing = True
            return False
        self._failing = False
        return True


def supervisor(environment: Mapping[str, str] = os.environ) -> Supervisor:
    """Return the service manager that started this process, as its variables say; a silent one where there is none."""
    address = environment.get("NOTIFY_SOCKET") or None
    if address is not None and address[0] not in "@/":
        log.warning("NOTIFY_SOCKET=%s is no socket that we can speak to", address)
        address = None
    meant_for_us = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    interval_us = environment.get("WATCHDOG_USEC", "")
    watched = address is not None and meant_for_us and interval_us.isdecimal() and int(interval_us) > 0
    return Supervisor(address, int(interval_us) / 1e6 if watched else None)
