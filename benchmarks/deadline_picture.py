"""How long parts took, drawn: a row of bars per case on a logarithmic scale, so that one part of thousands shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from deadline_figures import PATH, Case, Run, durations, is_late, percentiles, reasons
from numpy.typing import NDArray

from calibration.chart import round_numbers

WIDTH, ROW, TOP, BOTTOM = 1720, 190, 110, 90  # px
LEFT, RIGHT = 330, 60  # px
BIN_MS = 0.5
INK, SOFT, LINE = (0x1C, 0x23, 0x29), (0x5B, 0x66, 0x70), (0xDD, 0xE2, 0xE6)  # RGB, those of the shift report
PASS, REJECT = (0x3F, 0x6F, 0x8F), (0xB3, 0x39, 0x0B)
GAP = 18  # px between labels
FONT = cv2.FONT_HERSHEY_SIMPLEX
LARGE, NORMAL, SMALL = 0.9, 0.72, 0.6


class _Sheet:
    """White paper with an axis of milliseconds across."""

    def __init__(self, rows: int, most_ms: float) -> None:
        self.pixels: NDArray[np.uint8] = np.full((TOP + rows * ROW + BOTTOM, WIDTH, 3), 255, np.uint8)
        self.most_ms = most_ms
        widest = cv2.getTextSize("p99.9 000.0", FONT, SMALL, 1)[0][0] + GAP
        self.edges = {name: WIDTH - (4 - place) * widest for place, name in enumerate(("p50", "p99", "p99.9", "max"))}

    def x(self, value_ms: float) -> int:
        return round(LEFT + min(value_ms, self.most_ms) / self.most_ms * (WIDTH - LEFT - RIGHT))

    def line(self, start: tuple[int, int], end: tuple[int, int], colour: tuple[int, int, int], thick: int = 1) -> None:
        cv2.line(self.pixels, start, end, colour, thick, cv2.LINE_AA)

    def text(self, text: str, place: tuple[int, int], size: float, colour: tuple[int, int, int], side: str) -> None:
        """Write at (x, y of the baseline); side: left | middle | right, of the text that the place is."""
        (width, _), _ = cv2.getTextSize(text, FONT, size, 1)
        shift = {"left": 0, "middle": width // 2, "right": width}[side]
        cv2.putText(self.pixels, text, (place[0] - shift, place[1]), FONT, size, colour, 1, cv2.LINE_AA)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG with a row per run; all have the same deadline."""
    taken_ms = [durations(run)[PATH] for run in runs]
    deadline_ms = runs[0].deadline_ms
    most_ms = 1.06 * max(deadline_ms, *(float(values.max()) for values in taken_ms))
    most_parts = max(len(values) for values in taken_ms)
    sheet = _Sheet(len(runs), most_ms)
    bottom = TOP + len(runs) * ROW
    sheet.text("From trigger to verdict", (24, 48), LARGE, INK, "left")
    legend = f"a part every {runs[0].takt_ms:g} ms; bars: parts in each half millisecond, logarithmic"
    sheet.text(legend, (LEFT, 48), SMALL, SOFT, "left")
    for value in round_numbers(0.0, most_ms):
        sheet.line((sheet.x(value), TOP), (sheet.x(value), bottom), LINE)
        sheet.text(f"{value:g}", (sheet.x(value), bottom + 34), SMALL, SOFT, "middle")
    sheet.text("ms", (WIDTH - 16, bottom + 34), SMALL, SOFT, "right")
    for number, (run, values) in enumerate(zip(runs, taken_ms, strict=True)):
        _draw_row(sheet, run, values, TOP + (number + 1) * ROW, most_parts)
    sheet.line((sheet.x(deadline_ms), TOP - 12), (sheet.x(deadline_ms), bottom), REJECT, 2)
    sheet.text(f"deadline {deadline_ms:g} ms", (sheet.x(deadline_ms), TOP - 22), SMALL, REJECT, "middle")
    _, data = cv2.imencode(".png", sheet.pixels[:, :, ::-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def _draw_row(sheet: _Sheet, run: Run, values_ms: NDArray[np.float64], foot: int, most_parts: int) -> None:
    """Draw the bars of one case above y = foot, with a mark at each percentile."""
    highest = ROW - 74
    late = reasons(run)["late"]
    _draw_bars(sheet, values_ms, PASS, foot, highest / (1 + math.log10(most_parts)))
    _draw_bars(sheet, values_ms[is_late(run)], REJECT, foot, highest / (1 + math.log10(most_parts)))
    sheet.line((LEFT, foot), (WIDTH - RIGHT, foot), SOFT)
    _mark(sheet, percentiles(values_ms), foot, highest)
    sheet.text(run.case.name, (24, foot - 84), NORMAL, INK, "left")
    sheet.text(_load(run.case), (24, foot - 52), SMALL, SOFT, "left")
    told = f"{late} late of {len(values_ms)}"
    sheet.text(told, (24, foot - 20), SMALL, REJECT if late else SOFT, "left")


def _draw_bars(
    sheet: _Sheet, values_ms: NDArray[np.float64], colour: tuple[int, int, int], foot: int, decade_px: float
) -> None:
    """Draw how many parts took how long; one part is a bar of the height of a decade."""
    bins, counts = np.unique(np.floor(values_ms / BIN_MS).astype(int), return_counts=True)
    for place, parts in zip(bins, counts, strict=True):
        left, right = sheet.x(place * BIN_MS), sheet.x((place + 1) * BIN_MS)
        top = foot - round((1 + math.log10(parts)) * decade_px)
        cv2.rectangle(sheet.pixels, (left, top), (max(left, right - 2), foot - 1), colour, -1)


def _mark(sheet: _Sheet, values_ms: Sequence[float], foot: int, highest: int) -> None:
    """Mark p50, p99, p99.9 and the maximum; a label gives way to the one on its left, the last stays on the paper."""
    top, reached = foot - highest - 10, 0
    for name, value in zip(("p50", "p99", "p99.9", "max"), values_ms, strict=True):
        label, x = f"{name} {value:.1f}", sheet.x(value)
        (width, _), _ = cv2.getTextSize(label, FONT, SMALL, 1)
        at = max(min(x - width // 2, sheet.edges[name]), reached + GAP)
        sheet.line((x, top), (x, foot), INK)
        sheet.text(label, (at, top - 12), SMALL, INK, "left")
        reached = at + width


def _load(case: Case) -> str:
    """Return what is done to the agent, in few words."""
    words = [*(["cores full"] if case.hog else []), *(["1.2 M objects"] if case.heap else [])]
    return ", ".join(words) or "nothing else runs"
