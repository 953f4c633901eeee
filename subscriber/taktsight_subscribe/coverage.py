"""Which sequence numbers of one epoch are accounted for: a prefix 1..upto and islands above it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

Range = tuple[int, int]  # first and last, both included


class Coverage:
    """A set of whole numbers from 1, kept as few ranges, so that a hole of a billion costs no more than one of one."""

    def __init__(self, upto: int = 0, above: Iterable[Range] = ()) -> None:
        self.upto = upto  # every number 1..upto is in
        self._islands: list[Range] = []  # sorted, disjoint, none touches another or the prefix
        for first, last in above:
            self.add(first, last)

    def __contains__(self, seq: int) -> bool:
        return seq <= self.upto or any(first <= seq <= last for first, last in self._touching(seq, seq))

    @property
    def highest(self) -> int:
        """The highest number that is in; 0 where none is."""
        return self._islands[-1][1] if self._islands else self.upto

    def copy(self) -> Coverage:
        """Return another one with the same numbers."""
        twin = Coverage(self.upto)
        twin._islands = list(self._islands)
        return twin

    def add(self, first: int, last: int) -> None:
        """Put first..last in."""
        if last <= self.upto:
            return
        begin, end = self._neighbours(first, last)
        joined = self._islands[begin:end]
        first = min([first, *(island[0] for island in joined)])
        last = max([last, *(island[1] for island in joined)])
        if first <= self.upto + 1:
            self.upto = last
            self._islands[begin:end] = []
            self._islands = [island for island in self._islands if island[0] > self.upto]
        else:
            self._islands[begin:end] = [(first, last)]

    def missing(self, first: int, last: int) -> list[Range]:
        """Return the ranges of first..last that are not in."""
        return list(self._missing(max(first, self.upto + 1), last))

    def _missing(self, first: int, last: int) -> Iterator[Range]:
        for island in self._touching(first, last):
            if first < island[0]:
                yield first, island[0] - 1
            first = max(first, island[1] + 1)
        if first <= last:
            yield first, last

    def _touching(self, first: int, last: int) -> list[Range]:
        begin, end = self._neighbours(first, last)
        return [island for island in self._islands[begin:end] if island[1] >= first and island[0] <= last]

    def _neighbours(self, first: int, last: int) -> Range:
        """Return the slice of islands that overlap first..last or lie right beside it."""
        begin = bisect_left(self._islands, first - 1, key=lambda island: island[1])
        end = bisect_left(self._islands, last + 2, key=lambda island: island[0])
        return begin, max(begin, end)


def without(whole: Range, seq: int) -> list[Range]:
    """Return what is left of a range when one number is taken out."""
    first, last = whole
    return [part for part in ((first, seq - 1), (seq + 1, last)) if part[0] <= part[1]]
