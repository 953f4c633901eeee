"""The strip chart of a shift: one mark per part in the order of the verdicts, drawn as SVG by hand.

Places are per cent of the plot, so that the page can stretch it; strokes keep their width, so a dot stays round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from agent.shift.parts import CAUSES, FATES, Part, counted
from agent.verdict import Outcome
from calibration.chart import number, round_numbers

MOST_COLUMNS = 600  # more parts than this share columns: a shift of 28,800 must stay a page
TIMES = "\N{MULTIPLICATION SIGN}"
TOPS = (1.5, 2.0, 3.0)  # score / threshold at the upper edge; what lies above the last is drawn on it
STROKES_PX = ((120, 9), (300, 6), (MOST_COLUMNS, 4))  # up to so many parts, so wide a dot
SHARED_STROKE_PX = 3  # where parts share columns
DOT = 0.01  # per cent of the width: a stroke of no length at all is lost on the way to some printers
LEAST_BAR, HIGHEST_BAR = 14.0, 56.0  # per cent of the row of parts without verdict
CLASSES = {Outcome.PASS: "pass", Outcome.REJECT: "reject", Outcome.NO_VERDICT: "silent"}


@dataclass(frozen=True, slots=True)
class _Column:
    """Neighbouring parts that share a place on the axis: one each, while they are few."""

    place: float
    first: int  # number of its first part, counted from 1
    parts: tuple[Part, ...]

    def of(self, outcome: Outcome) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.outcome is outcome)


def strip_chart(parts: Sequence[Part]) -> str:
    """Return the chart as HTML: ratio of score to threshold per part, and parts without verdict on a row below."""
    columns = _columns(parts)
    top = _top(parts)
    stroke_px = next((width for most, width in STROKES_PX if len(parts) <= most), SHARED_STROKE_PX)
    ratios = "".join(_ratio_marks(column, top) for column in columns)
    silent = "".join(_silent_mark(column) for column in columns)
    n_silent = sum(part.outcome is Outcome.NO_VERDICT for part in parts)
    label = f"Score over threshold of {counted(len(parts))}; the values stand in the tooltips"
    limit = _height(1.0, top)
    return (
        f'<div class="strip-chart" style="--dot:{stroke_px}px">'
        f'<div class="scale">{_scale(top, parts)}</div>'
        f'<div class="plot"><span class="zone" style="height:{limit}%"></span>'
        f'<span class="limit" style="top:{limit}%"></span>'
        f"{_svg(label, _run_lines(parts) + ratios)}</div>"
        '<div class="scale lane">no verdict</div>'
        f'<div class="plot lane">{_svg(f"{counted(n_silent)} without verdict", silent)}</div>'
        f'<div class="scale foot">part</div><div class="across">{_part_numbers(len(parts))}</div></div>'
    )


def told(part: Part) -> str:
    """Return what was decided on the part and why, as a person would say it."""
    if part.outcome is Outcome.NO_VERDICT:
        return f"no verdict, {CAUSES[part.reason][0]}"
    return f"{FATES[part.outcome]}, " + (scores(part) if part.ratio is None else f"{part.ratio:.2f} {TIMES} threshold")


def scores(part: Part) -> str:
    """Return score and threshold with as many digits as tell them apart; empty where nothing was scored."""
    if part.score is None or part.threshold is None:
        return ""
    score, threshold = number(part.score, part.threshold), number(part.threshold, part.score)
    return f"score {score}, threshold {threshold}"


def _columns(parts: Sequence[Part]) -> list[_Column]:
    width = max(1, math.ceil(len(parts) / MOST_COLUMNS))
    return [
        _Column(_place(first + (min(width, len(parts) - first) - 1) / 2, len(parts)), first + 1, tuple(members))
        for first in range(0, len(parts), width)
        if (members := parts[first : first + width])
    ]


def _top(parts: Sequence[Part]) -> float:
    highest = max((part.ratio for part in parts if part.ratio is not None), default=0.0)
    return next((top for top in TOPS if highest <= top), TOPS[-1])


def _place(index: float, n: int) -> float:
    return round(100 * (index + 0.5) / n, 3)


def _height(ratio: float, top: float) -> float:
    return round(100 - 100 * min(max(ratio, 0.0), top) / top, 2)


def _ratio_marks(column: _Column, top: float) -> str:
    """Return a band from the lowest to the highest passed part (a dot where there is one), and a dot per reject."""
    marks = []
    for outcome in (Outcome.PASS, Outcome.REJECT):
        members = [part for part in column.of(outcome) if part.ratio is not None]
        ratios = [part.ratio for part in members if part.ratio is not None]
        if ratios:
            heights = sorted({_height(ratio, top) for ratio in ratios})
            band = f"M{column.place} {heights[0]}h{DOT}V{heights[-1]}"
            dots = "".join(f"M{column.place} {height}h{DOT}" for height in heights)
            span = f"{FATES[outcome]}, {min(ratios):.2f} to {max(ratios):.2f} {TIMES} threshold"
            path = band if outcome is Outcome.PASS else dots
            marks.append(_mark(path, CLASSES[outcome], _tooltip(column, members, span)))
    return "".join(marks)


def _silent_mark(column: _Column) -> str:
    """Return a bar as high as the share of the column's parts that got no verdict."""
    members = column.of(Outcome.NO_VERDICT)
    if not members:
        return ""
    height = max(LEAST_BAR, HIGHEST_BAR * len(members) / len(column.parts))
    path = f"M{column.place} 78V{78 - height:.1f}"
    return _mark(path, CLASSES[Outcome.NO_VERDICT], _tooltip(column, members, "without verdict"))


def _tooltip(column: _Column, members: Sequence[Part], span: str) -> str:
    if len(column.parts) == 1:
        part = members[0]
        return f"{part.name}{f', {part.trigger_name}' if part.name != part.trigger_name else ''}: {told(part)}"
    last = column.first + len(column.parts) - 1
    return f"parts {column.first:,} to {last:,}: {len(members)} {span}"


def _mark(path: str, kind: str, tooltip: str) -> str:
    return f'<path class="{kind}" d="{path}"><title>{escape(tooltip)}</title></path>'


def _run_lines(parts: Sequence[Part]) -> str:
    """Return a line before the first part of every run but the first."""
    starts = [index for index in range(1, len(parts)) if parts[index].run != parts[index - 1].run]
    return "".join(
        _mark(
            f"M{_place(index - 0.5, len(parts))} 0V100",
            "run",
            f"the station was started anew before part {index + 1:,}",
        )
        for index in starts[:MOST_COLUMNS]
    )


def _scale(top: float, parts: Sequence[Part]) -> str:
    above = any(part.ratio is not None and part.ratio > top for part in parts)
    ticks = {step / 2: f"{step / 2:g} {TIMES}" for step in range(int(top * 2) + 1)}
    ticks[1.0] = "<b>threshold</b>"
    ticks[top] = f"{'≥ ' if above else ''}{ticks[top]}"
    return "".join(f'<span style="top:{_height(tick, top)}%">{text}</span>' for tick, text in ticks.items())


def _part_numbers(n: int) -> str:
    places = [round(value) for value in round_numbers(0.0, max(4.0, n)) if value == round(value) and 1 <= value <= n]
    return "".join(f'<span style="left:{_place(place - 1, n)}%">{place:,}</span>' for place in places or [1])


def _svg(label: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">{content}</svg>'
    )
