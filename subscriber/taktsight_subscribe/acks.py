"""When to acknowledge to stations: soon, rarely under load, always in the end; and when to ask them to send again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from taktsight_subscribe.coverage import Range
from taktsight_subscribe.ledger import EpochKey, Ledger

ACK_EVERY_S = 0.02  # per station, under load
ACK_EVERY_PARTS = 16  # or as soon as there are so many: a station sends no more than 64 ahead of it
HOLE_PATIENCE_S = 0.5  # what comes out of order is given this long
TAIL_PATIENCE_S = 5.0  # and the station this long to send what its status says it has
RESEND_MIN_S, RESEND_MAX_S = 1.0, 60.0
LOST_AFTER_S = 5.0  # a hole that the station cannot fill is given up after this


@dataclass(frozen=True, slots=True)
class Ack:
    """One acknowledgement to send."""

    topic: str  # root of the station
    epoch: str
    upto: int
    resend: bool


@dataclass(slots=True)
class _Watch:
    """What is known of the acknowledgements and the lowest hole of one epoch."""

    is_due: bool = False
    resend: bool = False
    sent_upto: int = 0
    not_before_s: float = 0.0
    hole: Range | None = None
    hole_since_s: float = 0.0
    next_resend_s: float = 0.0
    resend_delay_s: float = RESEND_MIN_S


class Acks:
    """Decides over acknowledgements. All times are of time.monotonic()."""

    def __init__(self) -> None:
        self._watches: dict[EpochKey, _Watch] = {}

    def note(self, key: EpochKey, *, resend: bool = False) -> None:
        """Have the prefix of an epoch acknowledged soon."""
        watch = self._watches.setdefault(key, _Watch())
        watch.is_due = True
        watch.resend = watch.resend or resend

    @property
    def are_waiting(self) -> bool:
        """Whether one has been put off."""
        return any(watch.is_due for watch in self._watches.values())

    def due(self, ledger: Ledger, now_s: float, *, at_once: bool = False) -> Iterator[Ack]:
        """Yield what is to be sent now; `at_once` leaves nothing for later."""
        for key, watch in self._watches.items():
            book = ledger.books[key]
            is_many = book.coverage.upto >= watch.sent_upto + ACK_EVERY_PARTS
            if watch.is_due and (at_once or watch.resend or is_many or now_s >= watch.not_before_s):
                yield Ack(book.root, book.epoch, book.coverage.upto, watch.resend)
                if watch.resend:
                    watch.next_resend_s = now_s + watch.resend_delay_s
                watch.is_due = watch.resend = False
                watch.sent_upto = book.coverage.upto
                watch.not_before_s = now_s + ACK_EVERY_S

    def watch_holes(self, ledger: Ledger, now_s: float) -> dict[EpochKey, list[Range]]:
        """Ask again for what is missing for long, and return by epoch what no asking will bring back."""
        lost: dict[EpochKey, list[Range]] = {}
        for book in ledger.books.values():
            holes = ledger.holes(book.key)
            watch = self._watches.setdefault(book.key, _Watch())
            if not holes:
                watch.hole = None
                continue
            if watch.hole is None or watch.hole[0] != holes[0][0]:
                is_tail = holes[0][0] > book.coverage.highest
                watch.hole, watch.hole_since_s = holes[0], now_s
                watch.next_resend_s = max(
                    watch.next_resend_s, now_s + (TAIL_PATIENCE_S if is_tail else HOLE_PATIENCE_S)
                )
                watch.resend_delay_s = RESEND_MIN_S
            gone = ledger.no_longer_kept(book.key)
            if gone and now_s - watch.hole_since_s >= LOST_AFTER_S:
                lost[book.key] = gone
            elif now_s >= watch.next_resend_s and not gone:
                self.note(book.key, resend=True)
                watch.next_resend_s = now_s + watch.resend_delay_s
                watch.resend_delay_s = min(2 * watch.resend_delay_s, RESEND_MAX_S)
        return lost
