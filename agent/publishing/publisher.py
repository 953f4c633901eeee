"""Port: how what the outbox holds gets away from the line. `agent.mqtt.publisher` is the real one.

`MemoryPublisher` is the fake that ships: for tests, and for a station without a broker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

KEPT = 1000  # statuses that the fake keeps


@dataclass(frozen=True, slots=True)
class Undelivered:
    """What still waits when a publisher stops: it stays in the outbox and goes out in the next run."""

    verdicts: int
    heatmaps: int


@dataclass(frozen=True, slots=True)
class Incoming:
    """A command as it came, unchecked."""

    name: str  # the last word of its topic
    payload: bytes
    retained: bool
    correlation: bytes | None  # MQTT 5: goes back with the reply


OnCommand = Callable[[Incoming], None]  # must return at once; called on the publisher's thread


class Publisher(Protocol):
    """Carries what the outbox holds away from the line.

    No call blocks on the network or the disk, none raises because the receiver is away. Any thread may call.
    """

    def start(self) -> None:
        """Begin to connect; returns at once. Settings that can never work were refused at construction."""

    def wake(self) -> None:
        """Something new was stored in the outbox."""

    def publish_status(self, message: dict[str, Any]) -> None:
        """Make this the station's status from now on; the publisher adds what it knows of the delivery."""

    def stop(self, timeout_s: float) -> Undelivered:
        """Deliver what waits for at most timeout_s, say `stopped`, disconnect, and return what still waits.

        Never raises, may be called twice.
        """


class MemoryPublisher:
    """Keeps the latest statuses: for tests, and for a station without a broker."""

    def __init__(self) -> None:
        self.statuses: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.wakes = 0
        self.running = False

    def start(self) -> None:
        """Note that it was started."""
        self.running = True

    def wake(self) -> None:
        """Count the call."""
        self.wakes += 1

    def publish_status(self, message: dict[str, Any]) -> None:
        """Keep a copy of the status."""
        self.statuses.append(dict(message))

    def stop(self, timeout_s: float) -> Undelivered:  # noqa: ARG002 (nothing to wait for)
        """Note that it was stopped; nothing waits."""
        self.running = False
        return Undelivered(verdicts=0, heatmaps=0)
