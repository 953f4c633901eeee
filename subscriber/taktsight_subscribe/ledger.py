"""The book of one consumer: what has come of each epoch, what to store next, how far to acknowledge.

It knows neither broker nor database: `plan` takes what has arrived and returns what to store, and nothing counts
before `adopt` is told that it was stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from taktsight_subscribe.coverage import Coverage, Range, without
from taktsight_subscribe.messages import (
    Elsewhere,
    Missing,
    Status,
    Unreadable,
    Verdict,
    read_missing,
    read_status,
    read_verdict,
    storable,
)
from taktsight_subscribe.store import (
    MAX_REJECTED_BYTES,
    MAX_REJECTED_TOPIC_CHARACTERS,
    Batch,
    Gap,
    Progress,
    Rejected,
    StoredEpoch,
)

NO_LONGER_KEPT = "lost: never came, and the station no longer keeps it"
EPOCH_ENDED = "lost: never came, and the station has begun another epoch"

EpochKey = tuple[str, str]  # (station, epoch)


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message as it came."""

    root: str  # topic of its station
    kind: str  # "verdict" | "missing" | "status"
    payload: bytes
    received_utc: datetime
    refused: str = ""  # why the database cannot take it; empty: nobody knows yet


@dataclass(slots=True)
class EpochBook:
    """What has come of one epoch of one station."""

    station: str
    epoch: str
    root: str
    begins: int | None = None  # first seq that was ours to receive; None until the station has said
    coverage: Coverage = field(default_factory=Coverage)
    gaps: list[Gap] = field(default_factory=list)

    @property
    def key(self) -> EpochKey:
        """Its identity."""
        return self.station, self.epoch

    def progress(self) -> Progress:
        """Return what the store keeps of it."""
        return Progress(self.station, self.epoch, self.root, self.begins, self.coverage.upto)

    def copy(self) -> EpochBook:
        """Return another one that may be changed on its own."""
        return replace(self, coverage=self.coverage.copy(), gaps=list(self.gaps))


@dataclass(slots=True)
class Plan:
    """What follows from the arrivals: what to store, and how the book stands once that is stored."""

    verdicts: list[Verdict] = field(default_factory=list)
    new_gaps: list[Gap] = field(default_factory=list)
    closed_gaps: list[Gap] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    elsewhere: list[Rejected] = field(default_factory=list)  # of them, those of a station that is known elsewhere
    books: dict[EpochKey, EpochBook] = field(default_factory=dict)  # those that were touched
    statuses: dict[str, Status] = field(default_factory=dict)  # by root
    repeated: dict[EpochKey, Verdict] = field(default_factory=dict)  # the last duplicate of each epoch
    new_epochs: list[EpochBook] = field(default_factory=list)

    def batch(self, before: dict[EpochKey, EpochBook]) -> Batch:
        """Return what is to be stored; empty where nothing is."""
        moved = [
            book.progress()
            for key, book in self.books.items()
            if key not in before or before[key].progress() != book.progress()
        ]
        return Batch(self.verdicts, self.new_gaps, self.closed_gaps, self.rejected, moved)


class Ledger:
    """All epochs of all stations that one consumer hears of."""

    def __init__(self, stored: Iterable[StoredEpoch] = ()) -> None:
        self.books: dict[EpochKey, EpochBook] = {}  # in the order in which they were first seen
        self.statuses: dict[str, Status] = {}  # the latest, by root
        for epoch in stored:
            was = epoch.progress
            coverage = Coverage(was.upto, [*epoch.above, *((gap.first, gap.last) for gap in epoch.gaps)])
            book = EpochBook(was.station, was.epoch, was.root, was.begins, coverage, list(epoch.gaps))
            self.books[book.key] = book

    def plan(self, arrivals: Sequence[Arrived]) -> Plan:
        """Return what follows from the arrivals; the ledger stays as it is."""
        plan = Plan()
        for arrived in arrivals:
            try:
                self._take(plan, arrived)
            except Unreadable as error:
                plan.rejected.append(_rejected(arrived, str(error)))
                plan.elsewhere += plan.rejected[-1:] if isinstance(error, Elsewhere) else []
        return plan

    def plan_losses(self, key: EpochKey, lost: Sequence[Range], now_utc: datetime) -> Plan:
        """Return what follows from giving up these ranges of one epoch."""
        plan = Plan()
        book = self._book(plan, key, self.books[key].root)
        reason = EPOCH_ENDED if self._is_over(book) else NO_LONGER_KEPT
        for hole in lost:
            _give_up(plan, book, hole, reason, now_utc)
        return plan

    def adopt(self, plan: Plan) -> None:
        """Let the plan, which is stored now, count."""
        self.books.update(plan.books)
        self.statuses.update(plan.statuses)

    def holes(self, key: EpochKey) -> list[Range]:
        """Return what is missing of an epoch: below what came, and below what its station says it has."""
        book = self.books[key]
        status = self.statuses.get(book.root)
        promised = status.last_seq or 0 if status is not None and status.epoch == book.epoch else 0
        return book.coverage.missing(1, max(book.coverage.highest, promised))

    def no_longer_kept(self, key: EpochKey) -> list[Range]:
        """Return the holes that the station cannot fill any more."""
        book = self.books[key]
        if self._is_over(book):
            return self.holes(key)
        status = self.statuses.get(book.root)
        if status is None or status.first_seq is None:
            return []
        return book.coverage.missing(1, status.first_seq - 1)

    def current(self) -> dict[str, EpochBook]:
        """Return the newest epoch of every station, by root."""
        newest: dict[str, EpochBook] = {}
        for book in self.books.values():
            newest[book.root] = book
        for root, status in self.statuses.items():
            said = self.books.get((status.station, status.epoch or ""))
            if said is not None and said.root == root:
                newest[root] = said
        return newest

    def _is_over(self, book: EpochBook) -> bool:
        """Return whether the station has said that it is in another epoch now."""
        status = self.statuses.get(book.root)
        return status is not None and (status.station, status.epoch) != book.key

    def _take(self, plan: Plan, arrived: Arrived) -> None:
        if arrived.kind == "verdict":
            self._take_verdict(plan, arrived)
        elif arrived.kind == "missing":
            self._take_missing(plan, read_missing(arrived.payload), arrived)
        else:
            self._take_status(plan, read_status(arrived.payload), arrived)

    def _take_verdict(self, plan: Plan, arrived: Arrived) -> None:
        verdict = read_verdict(arrived.payload, arrived.received_utc)
        book = self._book(plan, (verdict.station, verdict.epoch), arrived.root)
        gap = next((gap for gap in book.gaps if gap.first <= verdict.seq <= gap.last), None)
        if gap is None and verdict.seq in book.coverage:
            plan.repeated[book.key] = verdict
            if book.begins is not None and verdict.seq < book.begins:  # the broker kept it, and a status overtook it
                _put(plan, arrived, verdict)
            return
        if arrived.refused:
            _put(plan, arrived, verdict)
            _give_up(plan, book, (verdict.seq, verdict.seq), arrived.refused, arrived.received_utc)
            return
        if gap is not None:
            _reopen(plan, book, gap, verdict.seq)
        _put(plan, arrived, verdict)
        _cover(book, verdict.seq, verdict.seq)

    def _take_missing(self, plan: Plan, missing: Missing, arrived: Arrived) -> None:
        book = self._book(plan, (missing.station, missing.epoch), arrived.root)
        holes = book.coverage.missing(missing.first, missing.last)
        for hole in holes:
            _give_up(plan, book, hole, missing.why, arrived.received_utc)

    def _take_status(self, plan: Plan, status: Status, arrived: Arrived) -> None:
        if status.epoch is None:  # the last will: written before the station knew its outbox
            return
        book = self._book(plan, (status.station, status.epoch), arrived.root)
        plan.statuses[arrived.root] = status
        if book.begins is None and status.first_seq is not None:
            book.begins = status.first_seq
            book.coverage.add(1, status.first_seq - 1)

    def _book(self, plan: Plan, key: EpochKey, root: str) -> EpochBook:
        """Return the plan's own copy of the book of an epoch, begun where there was none.

        Raises Elsewhere where the station, or this epoch of it, is known at another root: the broker lets a station
        write below its own root alone, and only so is it known who speaks.
        """
        book = plan.books.get(key) or self.books.get(key)
        if book is not None:
            if book.root != root:
                raise _elsewhere(key[0], {book.root})
            if key not in plan.books:
                plan.books[key] = book.copy()
            return plan.books[key]
        others = {**self.books, **plan.books}.values()
        roots = {other.root for other in others if other.station == key[0]}
        if roots and root not in roots:
            raise _elsewhere(key[0], roots)
        book = plan.books[key] = EpochBook(*key, root)
        if any(other.root == root for other in others if other is not book):
            book.begins = 1  # a station that we know: all of its new epoch is ours
        plan.new_epochs.append(book)
        return book


def _elsewhere(station: str, roots: set[str]) -> Elsewhere:
    known = " and ".join(sorted(roots))
    return Elsewhere(
        f"station {station} is known at {known}: is it another one under this name? Where it moved, end this program, "
        "run `taktsight-subscribe move` and start it again"
    )


def _put(plan: Plan, arrived: Arrived, verdict: Verdict) -> None:
    """Have a verdict stored, or put aside where the database cannot take it."""
    if arrived.refused:
        plan.rejected.append(_rejected(arrived, arrived.refused))
    else:
        plan.verdicts.append(verdict)


def _cover(book: EpochBook, first: int, last: int) -> None:
    book.coverage.add(first, last)
    if first == 1 and book.begins is None:
        book.begins = 1


def _give_up(plan: Plan, book: EpochBook, hole: Range, reason: str, noted_utc: datetime) -> None:
    """Record a gap, which counts as accounted for."""
    gap = Gap(book.station, book.epoch, *hole, reason, noted_utc)
    book.gaps.append(gap)
    plan.new_gaps.append(gap)
    _cover(book, *hole)


def _reopen(plan: Plan, book: EpochBook, gap: Gap, seq: int) -> None:
    """Take one number out of a gap: it came after all."""
    book.gaps.remove(gap)
    left = [replace(gap, first=first, last=last) for first, last in without((gap.first, gap.last), seq)]
    book.gaps += left
    if gap in plan.new_gaps:
        plan.new_gaps.remove(gap)
    else:
        plan.closed_gaps.append(gap)
    plan.new_gaps += left


def _rejected(arrived: Arrived, reason: str) -> Rejected:
    return Rejected(
        topic=storable(f"{arrived.root}/{arrived.kind}")[:MAX_REJECTED_TOPIC_CHARACTERS],
        sha256=hashlib.sha256(arrived.payload).hexdigest(),
        reason=storable(reason),
        size_bytes=len(arrived.payload),
        payload=arrived.payload[:MAX_REJECTED_BYTES],
        received_utc=arrived.received_utc.astimezone(UTC),
    )
