"""Durations counted in buckets of one thousandth: percentiles of millions of parts in a few kilobytes.

The buckets are those of HdrHistogram (Tene, 2012): three significant digits, microseconds, no upper limit; a test
compares the two. Its Python package is not used: for Linux on ARM there is none that needs no compiler, and it brings
setuptools along. Only buckets that hold something are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

DIGIT_BITS = 11  # a bucket is at most 1/1024 of its value wide
PERCENTILES = (50.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of many durations, milliseconds; a percentile is its bucket's upper edge, never above the maximum.

    Of fewer than 1000 values p99.9 is the greatest, of fewer than 100 p99 is.
    """

    n: int
    mean: float
    p50: float
    p99: float
    p999: float
    max: float


class Histogram:
    """How often each duration came. Not locked: one thread at a time."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # lowest microsecond of the bucket -> how often
        self._sum_us = 0
        self._max_us = 0

    def record(self, duration_ms: float) -> None:
        """Count one duration; a negative one counts as 0, one that is no finite number not at all."""
        if not math.isfinite(duration_ms):
            return
        us = max(0, round(duration_ms * 1e3))
        low = _lowest(us)
        self._counts[low] = self._counts.get(low, 0) + 1
        self._sum_us += us
        self._max_us = max(self._max_us, us)

    def summary(self) -> Summary | None:
        """Return n, mean, percentiles and maximum; None where nothing was counted."""
        n = sum(self._counts.values())
        if n == 0:
            return None
        lows = sorted(self._counts)
        ranks = [max(1, math.ceil(n * percentile / 100 - 1e-9)) for percentile in PERCENTILES]
        found: list[float] = []
        seen = 0
        for low in lows:
            seen += self._counts[low]
            while len(found) < len(ranks) and seen >= ranks[len(found)]:
                found.append(min(_highest(low), self._max_us) / 1e3)
        p50, p99, p999 = found
        return Summary(n, self._sum_us / n / 1e3, p50, p99, p999, self._max_us / 1e3)

    def cumulative(self, bounds_ms: Sequence[float]) -> tuple[list[int], int, float]:
        """Return how many durations were at most each bound (ascending), how many there were, and their sum in ms.

        A duration within one thousandth above a bound may count as at most the bound.
        """
        below = [sum(n for low, n in self._counts.items() if low <= bound * 1e3) for bound in bounds_ms]
        return below, sum(self._counts.values()), self._sum_us / 1e3


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """Return all durations of these in one histogram of its own."""
    whole = Histogram()
    counts = whole._counts
    for one in histograms:
        for low, n in one._counts.items():
            counts[low] = counts.get(low, 0) + n
        whole._sum_us += one._sum_us
        whole._max_us = max(whole._max_us, one._max_us)
    return whole


def merged_by_name(groups: Iterable[Mapping[str, Histogram]]) -> dict[str, Histogram]:
    """Return one histogram per name over all groups, in the order in which the names came first."""
    by_name: dict[str, list[Histogram]] = {}
    for group in groups:
        for name, one in group.items():
            by_name.setdefault(name, []).append(one)
    return {name: merged(ones) for name, ones in by_name.items()}


def _lowest(us: int) -> int:
    """Return the lowest value of the bucket that holds it."""
    shift = max(0, us.bit_length() - DIGIT_BITS)
    return us >> shift << shift


def _highest(low: int) -> int:
    """Return the highest value of the bucket that begins here."""
    return low + (1 << max(0, low.bit_length() - DIGIT_BITS)) - 1
