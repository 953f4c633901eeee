"""The port behind which verdicts are kept: what a store is told, and what it must remember.

Tables, the same in every store:
    verdict      one row per part, key (station, epoch, seq); `position` counts rows in the order in which they came
    gap          parts that will never come, first..last, and why
    progress     per station and epoch: everything up to `upto` is in `verdict` or `gap`. Rows below may be deleted
    rejected     messages that could not be read, the newest ones
    handed_over  per consumer: every verdict up to this position has been through its loop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from taktsight_subscribe.coverage import Range
from taktsight_subscribe.messages import Key, Verdict

SCHEMA_VERSION = 1
MAX_REJECTED = 10_000  # rows; the ones not seen for longest go first
MAX_REJECTED_BYTES = 65_536  # kept of each
MAX_REJECTED_TOPIC_CHARACTERS = 250  # part of a key: an index takes some 2700 bytes


@dataclass(frozen=True, slots=True)
class Gap:
    """Verdicts that will never come."""

    station: str
    epoch: str
    first: int
    last: int
    reason: str
    noted_utc: datetime


@dataclass(frozen=True, slots=True)
class Rejected:
    """A message that could not be read."""

    topic: str  # its first MAX_REJECTED_TOPIC_CHARACTERS
    sha256: str  # of the whole payload
    reason: str
    size_bytes: int
    payload: bytes  # its first MAX_REJECTED_BYTES
    received_utc: datetime


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one epoch of one station is accounted for."""

    station: str
    epoch: str
    root: str  # the station's topic, where acknowledgements go
    begins: int | None  # first seq that was ours to receive; None until known
    upto: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What is stored in one transaction, all of it or nothing."""

    verdicts: Sequence[Verdict] = ()
    new_gaps: Sequence[Gap] = ()
    closed_gaps: Sequence[Gap] = ()  # these rows go: something of them came after all
    rejected: Sequence[Rejected] = ()
    progress: Sequence[Progress] = ()

    def __bool__(self) -> bool:
        return bool(self.verdicts or self.new_gaps or self.closed_gaps or self.rejected or self.progress)


@dataclass(frozen=True, slots=True)
class StoredEpoch:
    """Everything a store remembers of one epoch."""

    progress: Progress
    above: Sequence[Range] = field(default=())  # stored verdicts beyond upto
    gaps: Sequence[Gap] = field(default=())


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored verdict and its place in the order of arrival."""

    position: int
    verdict: Verdict


class Store(Protocol):
    """Where verdicts are kept. Every verb may raise StoreError, and then nothing has happened.

    Verbs may be called from any thread, one at a time waits for the other.
    """

    def open(self) -> None:
        """Connect, and make the tables where there are none. May be called again after `close`."""

    def close(self) -> None:
        """Let go; does nothing if not open."""

    def commit(self, batch: Batch) -> None:
        """Store the batch durably, all or nothing; a verdict that is there already stays as it is.

        Raises RowRefused if the contents can never be stored.
        """

    def epochs(self) -> list[StoredEpoch]:
        """Return every epoch, in the order in which they were first seen."""

    def find(self, key: Key) -> Verdict | None:
        """Return one verdict."""

    def after(self, position: int, limit: int) -> list[Placed]:
        """Return the next verdicts in the order of arrival."""

    def handed_over(self, consumer: str) -> int:
        """Return the position up to which the consumer's loop has had everything; 0 at first."""

    def set_handed_over(self, consumer: str, position: int) -> None:
        """Remember that."""


def ranges(numbers: Sequence[int]) -> list[Range]:
    """Return sorted numbers as ranges."""
    found: list[Range] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
