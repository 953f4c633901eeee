"""Port: where verdicts go. `agent.mqtt` is the real one; `MemoryPublisher` is the fake that ships."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from agent.messages import HeatmapPayload

MAX_HEATMAP_BYTES = 32 * 2**20  # of waiting heatmaps; 3.7 KB each is usual, so about 9000 of them


@dataclass(frozen=True, slots=True)
class Undelivered:
    """What was handed to a publisher and never confirmed: lost, refused, or still waiting when it stopped."""

    verdicts: int
    heatmaps: int


class Publisher(Protocol):
    """Carries messages of `agent.messages` away from the line.

    No call blocks on the network, none raises because the receiver is away. Any thread may call.
    """

    def start(self) -> None:
        """Begin to connect; returns at once. Settings that can never work were refused at construction."""

    def publish_verdict(self, message: dict[str, Any], heatmap: HeatmapPayload | None) -> None:
        """Take over one verdict message and its heatmap; later changes to the dict have no effect."""

    def publish_status(self, message: dict[str, Any]) -> None:
        """Make this the station's status from now on."""

    def stop(self, timeout_s: float) -> Undelivered:
        """Deliver what waits for at most timeout_s, disconnect, and return what was never confirmed.

        Never raises, may be called twice.
        """


class MemoryPublisher:
    """Keeps everything in lists: for tests, and for a station without a broker."""

    def __init__(self) -> None:
        self.verdicts: list[dict[str, Any]] = []
        self.heatmaps: dict[int, HeatmapPayload] = {}  # by seq
        self.statuses: list[dict[str, Any]] = []
        self.running = False

    def start(self) -> None:
        """Note that it was started."""
        self.running = True

    def publish_verdict(self, message: dict[str, Any], heatmap: HeatmapPayload | None) -> None:
        """Keep a copy of the message, and its heatmap by seq."""
        self.verdicts.append(dict(message))
        if heatmap is not None:
            self.heatmaps[int(message["seq"])] = heatmap

    def publish_status(self, message: dict[str, Any]) -> None:
        """Keep a copy of the status."""
        self.statuses.append(dict(message))

    def stop(self, timeout_s: float) -> Undelivered:  # noqa: ARG002 (nothing to wait for)
        """Note that it was stopped; everything was delivered."""
        self.running = False
        return Undelivered(verdicts=0, heatmaps=0)


class Kind(StrEnum):
    """What a parcel carries."""

    VERDICT = "verdict"
    HEATMAP = "heatmap"
    STATUS = "status"


@dataclass(frozen=True, slots=True)
class Parcel:
    """One encoded message on its way to the broker."""

    kind: Kind
    topic: str
    payload: bytes
    content_type: str


class Backlog:
    """Parcels that wait for the network: verdicts before heatmaps, each kind oldest first. Any thread may call.

    Verdicts and heatmaps share max_parcels places. A newcomer without a place sheds the oldest heatmap; where no
    heatmap is left, the oldest verdict is dropped. Both are counted in `dropped`.
    """

    def __init__(self, max_parcels: int) -> None:
        self._max_parcels = max_parcels
        self._verdicts: deque[Parcel] = deque()
        self._heatmaps: deque[Parcel] = deque()
        self._heatmap_bytes = 0
        self._lock = threading.Lock()  # never held while anything of the network runs
        self.handed: Counter[Kind] = Counter()
        self.dropped: Counter[Kind] = Counter()

    def put(self, verdict: Parcel, heatmap: Parcel | None) -> None:
        """Take in a verdict and its heatmap, making room as the class says."""
        with self._lock:
            self.handed[Kind.VERDICT] += 1
            self._verdicts.append(verdict)
            if heatmap is not None:
                self.handed[Kind.HEATMAP] += 1
                self._heatmaps.append(heatmap)
                self._heatmap_bytes += len(heatmap.payload)
            self._make_room()

    def take(self) -> Parcel | None:
        """Return the parcel that goes next, or None; it is the caller's from now on."""
        with self._lock:
            if self._verdicts:
                return self._verdicts.popleft()
            return self._take_heatmap() if self._heatmaps else None

    def waiting(self, kind: Kind) -> int:
        """Return how many parcels of this kind wait."""
        return len(self._verdicts if kind is Kind.VERDICT else self._heatmaps)

    def _make_room(self) -> None:
        while self._heatmaps and (self._is_too_full() or self._heatmap_bytes > MAX_HEATMAP_BYTES):
            self._take_heatmap()
            self.dropped[Kind.HEATMAP] += 1
        while self._is_too_full():
            self._verdicts.popleft()
            self.dropped[Kind.VERDICT] += 1

    def _is_too_full(self) -> bool:
        return len(self._verdicts) + len(self._heatmaps) > self._max_parcels

    def _take_heatmap(self) -> Parcel:
        heatmap = self._heatmaps.popleft()
        self._heatmap_bytes -= len(heatmap.payload)
        return heatmap
