"""What is missing, for people: what is given up, and what may still come."""

from __future__ import annotations

from dataclasses import dataclass

from taktsight_subscribe.ledger import Ledger
from taktsight_subscribe.store import Store

STILL_OPEN = "not here yet: later ones are, and the station is asked to send again"


@dataclass(frozen=True, slots=True)
class Missing:
    """Parts that are not in the store."""

    station: str
    epoch: str
    first: int
    last: int
    reason: str
    is_final: bool  # False: they may still come

    @property
    def count(self) -> int:
        """How many."""
        return self.last - self.first + 1


def missing_parts(store: Store) -> list[Missing]:
    """Return everything that is missing below what has come, by station. The store is open."""
    ledger = Ledger(store.epochs())
    found: list[Missing] = []
    for book in ledger.books.values():
        final = [(gap.first, gap.last, gap.reason, True) for gap in book.gaps]
        still_open = [(first, last, STILL_OPEN, False) for first, last in ledger.holes(book.key)]
        found += [Missing(book.station, book.epoch, *part) for part in sorted(final + still_open)]
    return found
