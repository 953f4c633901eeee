"""How long the watch for score drift goes without a false alarm, and how soon it finds a change.

    python benchmarks/drift.py [--parts 20000] [--stations 200] [--out FILE]

Good scores are drawn from four distributions. Each station has a calibration of its own: median, deviation and
threshold come from as many good scores as the row says, so their errors are in the figures. `agent.health.drift` sees
what passes. A change moves all scores by so many true deviations; the delay counts rejected parts, too.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from machine import describe
from numpy.typing import NDArray

from agent.health.drift import ALLOWANCE, CLIP, LEAST_ALLOWANCE, LIMIT, WEIGHT, Drift
from calibration.thresholds import reject_threshold, smallest_rate

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
DRAWS: dict[str, Draw] = {
    "normal": lambda generator, n: generator.standard_normal(n),
    "gamma, shape 4": lambda generator, n: generator.gamma(4.0, size=n),
    "lognormal, sigma 0.5": lambda generator, n: generator.lognormal(0.0, 0.5, n),
    "Student t, 3 d.o.f.": lambda generator, n: generator.standard_t(3.0, n),
}
GOOD_PARTS = (20, 50, 200)
CHANGES = (1.0, 1.5, 2.0, 3.0, -1.5, -2.0)  # deviations
FALSE_REJECT_RATE = 0.01  # or the lowest that so few good parts support
MOST_PARTS = 3000  # after a change
TO_DEVIATION = 1.4826  # median absolute deviation of normal values to their standard deviation
SEED = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One distribution, one size of calibration, one change."""

    scores: str
    good_parts: int
    change: float  # deviations; 0: the wait for a false alarm
    stations: int
    alarmed: float  # share of the stations
    parts_p50: float | None  # until the alarm, of those stations that alarmed
    parts_p90: float | None
    rejected: float  # share of all parts


def main() -> int:
    arguments = parsed()
    print(describe())
    print(
        f"allowance {ALLOWANCE:g} ({LEAST_ALLOWANCE:g}), limit {LIMIT:g}, clip {CLIP:g}, weight {WEIGHT:g}, seed {SEED}"
    )
    rows = []
    for name in DRAWS:
        for good_parts in GOOD_PARTS:
            for change in (0.0, *CHANGES):
                parts = MOST_PARTS if change else arguments.parts
                rows.append(measured(name, good_parts, change, parts=parts, stations=arguments.stations))
                print(told(rows[-1], parts), flush=True)
    if arguments.out is not None:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return 0


def measured(name: str, good_parts: int, change: float, *, parts: int, stations: int) -> Row:
    """Return what so many stations did, each with a calibration and a stream of parts of its own."""
    draw, generator = DRAWS[name], np.random.default_rng(SEED)
    shift = change * deviation(draw(generator, 1_000_000))
    delays, rejected = [], 0
    for _ in range(stations):
        calibration = draw(generator, good_parts)
        threshold = reject_threshold(calibration, max(FALSE_REJECT_RATE, smallest_rate(good_parts)))
        drift = Drift(float(np.median(calibration)), deviation(calibration))
        scores = draw(generator, parts) + shift
        rejected += int((scores > threshold).sum())
        delay = parts_until_alarm(drift, scores, threshold)
        if delay is not None:
            delays.append(delay)
    p50, p90 = np.percentile(delays, [50, 90]) if delays else (None, None)
    share = rejected / (parts * stations)
    return Row(name, good_parts, change, stations, len(delays) / stations, p50, p90, share)


def parts_until_alarm(drift: Drift, scores: NDArray[np.float64], threshold: float) -> int | None:
    for number, score in enumerate(scores.tolist(), start=1):
        if score <= threshold:
            drift.note(score, threshold)
            if drift.direction != "none":
                return number
    return None


def deviation(scores: NDArray[np.float64]) -> float:
    return float(TO_DEVIATION * np.median(np.abs(scores - np.median(scores))))


def told(row: Row, parts: int) -> str:
    after = "" if row.parts_p50 is None else f", after {row.parts_p50:.0f} parts p50, {row.parts_p90:.0f} p90"
    return (
        f"{row.scores:22s} {row.good_parts:4d} good parts, change {row.change:+.1f}: {100 * row.alarmed:5.1f} % of "
        f"{row.stations} stations alarmed within {parts} parts{after}; {100 * row.rejected:.0f} % rejected"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=20_000, help="parts without a change, per station")
    parser.add_argument("--stations", type=int, default=200)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
