"""One self-contained HTML page after a shift: what the station decided, where it could not, which parts to see."""

from __future__ import annotations

import errno
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from agent.publishing.verdict_files import VERDICTS
from agent.shift.chart import strip_chart
from agent.shift.gallery import Choice, choices, galleries, scale_bar_uri
from agent.shift.parts import CAUSES, FATES, Part, Reading, counted, part_of, read_verdicts
from agent.verdict import Outcome, Reason
from calibration.errors import InputError

TEMPLATE = Path(__file__).with_suffix(".html")
CHART_KEY = (("pass", "passed"), ("reject", "rejected"), ("silent", "no verdict"))
MOST_NAMED = 3  # recipes, engines, ... listed by name

LEGEND = """<section><h2>How to read the pictures</h2>
<p>Left, or above: the part as the camera saw it. Beside it, in gray and as the detector sees it: where it looks
unlike good parts. The colour scale is the same in every picture, so a calm part stays gray.</p>
<div class="card key"><figure><img src="$scale_bar" alt="Colour scale of the anomaly maps: clear up to half the
threshold, yellow up to it, then orange, and dark red from twice the threshold"><div class="places"><span>0</span>
<span>threshold</span><span>2 &times; threshold</span></div></figure></div></section>"""


@dataclass(frozen=True, slots=True)
class ShiftSummary:
    """What the page says, for the terminal."""

    parts: int
    outcomes: Mapping[str, int]  # "pass", "reject", "no_verdict", those that occurred
    reasons: Mapping[str, int]  # why there was no verdict, the most frequent first


def write_shift_report(
    archive: Path, out: Path, *, title: str | None = None, deadline_ms: float | None = None
) -> ShiftSummary:
    """Write the report on an archive to `out`, and return its numbers; arguments as in `render_shift_report`.

    Raises InputError if the archive is missing or without a verdict, or the file cannot be written.
    """
    reading = read_verdicts(archive)
    page = render_shift_report(
        reading.messages, archive, title=title, deadline_ms=deadline_ms, notes=_reading_notes(reading)
    )
    try:
        out.write_bytes(page.encode("utf-8", errors="replace"))
    except OSError as error:
        action = ": make its folder, or name another" if error.errno == errno.ENOENT else ""
        raise InputError(f"{out}: report not written ({error.strerror}){action}") from error
    return _summary([part_of(message) for message in reading.messages])


def render_shift_report(
    messages: Sequence[Mapping[str, Any]],
    archive: Path,
    *,
    title: str | None = None,
    deadline_ms: float | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the report as one HTML page without scripts or outside references; the same inputs give the same text.

    messages: verdict messages with `pictures`, as the archive holds them, oldest first. archive: where their pictures
    lie; those that are gone or damaged are left out. deadline_ms: of station.yaml, which messages do not carry.
    notes: what the reader must know beforehand.

    Raises InputError if there is no message, or one that is no verdict of this version.
    """
    if not messages:
        raise InputError("no verdict to report on: give at least one")
    try:
        parts = [part_of(message) for message in messages]
    except ValueError as error:
        raise InputError(f"the report cannot be made: {error}") from error
    heading = title or f"{_names(parts, 'station')}: {_names(parts, 'internalRecipeId')}"
    shown = choices(parts, archive)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(heading),
        headline=escape(headline(_summary(parts))),
        span=escape(_span(parts)),
        tiles="".join(_tiles(parts, deadline_ms)),
        notes=_notes([*notes, *_archive_notes(parts)]),
        facts=_facts(parts),
        chart=_chart_section(parts),
        causes=_causes_section(parts),
        latency=_latency_section(parts),
        galleries=_gallery_sections(shown, archive),
    )


def headline(summary: ShiftSummary) -> str:
    """Return the shift in one sentence, as in `100 parts: 84 passed, 11 rejected, 5 without verdict`."""
    counts = [f"{summary.outcomes.get(outcome, 0):,} {fate}" for outcome, fate in FATES.items()]
    return f"{counted(summary.parts)}: {', '.join(counts)}."


def _summary(parts: Sequence[Part]) -> ShiftSummary:
    reasons = Counter(part.reason for part in parts if part.outcome is Outcome.NO_VERDICT)
    order = list(Reason)
    ranked = sorted(reasons, key=lambda reason: (-reasons[reason], order.index(reason)))
    return ShiftSummary(
        parts=len(parts),
        outcomes=dict(Counter(str(part.outcome) for part in parts)),
        reasons={str(reason): reasons[reason] for reason in ranked},
    )


# ---- header ----------------------------------------------------------------------------------------------------------


def _span(parts: Sequence[Part]) -> str:
    """Return when the first and the last verdict were made."""
    first, last = min(part.created for part in parts), max(part.created for part in parts)
    ending = last[11:19] if last[:10] == first[:10] else _moment(last)
    return f"{_moment(first)} to {ending} UTC"


def _moment(created: str) -> str:
    return created[:19].replace("T", " ")


def _tiles(parts: Sequence[Part], deadline_ms: float | None) -> list[str]:
    tiles = []
    for outcome, kind in ((Outcome.PASS, "pass"), (Outcome.REJECT, "reject"), (Outcome.NO_VERDICT, "silent")):
        members = [part for part in parts if part.outcome is outcome]
        accepted = sum(part.accepted for part in members)
        basis = percent(len(members), len(parts))
        if outcome is Outcome.NO_VERDICT and members:
            basis += f" · {_fate_of_silent(len(members), accepted)}"
        label = {Outcome.NO_VERDICT: "No verdict"}.get(outcome, FATES[outcome].capitalize())
        tiles.append(_tile(kind, label, f'<div class="value">{len(members):,}</div><div>{basis}</div>'))
    return [*tiles, _latency_tile(parts, deadline_ms)]


def _fate_of_silent(n: int, accepted: int) -> str:
    if accepted == 0:
        return "diverted" if n == 1 else "all diverted"
    return f"{accepted:,} accepted without inspection"


def _latency_tile(parts: Sequence[Part], deadline_ms: float | None) -> str:
    """Return the latency of parts with a score; one without verdict is settled at the deadline and would hide it."""
    scored, silent = _latencies(parts)
    content = '<div><div class="value">—</div></div>'
    if scored:
        figures = zip(("half within", "99 % within", "longest"), _percentiles(scored), strict=True)
        content = "".join(
            f'<div><div class="value">{_milliseconds(value)}</div><div>{name}</div></div>' for name, value in figures
        )
    settled = (
        f"<small>parts without verdict: given up after {_milliseconds(max(silent))} at most</small>" if silent else ""
    )
    deadline = "" if deadline_ms is None else f", deadline {deadline_ms:g} ms"
    label = f"Trigger to pass or reject, ms{deadline}"
    return _tile("latency", label, f'<div class="three">{content}</div>{settled}')


def _latencies(parts: Sequence[Part]) -> tuple[list[float], list[float]]:
    """Return trigger to verdict in ms, of the parts with a score and of those without verdict."""
    scored = [p.latency_ms for p in parts if p.latency_ms is not None and p.outcome is not Outcome.NO_VERDICT]
    silent = [p.latency_ms for p in parts if p.latency_ms is not None and p.outcome is Outcome.NO_VERDICT]
    return scored, silent


def _tile(kind: str, label: str, content: str) -> str:
    return f'<div class="card tile {kind}"><div class="label">{escape(label)}</div>{content}</div>'


def _reading_notes(reading: Reading) -> list[str]:
    notes = []
    if reading.has_older:
        notes.append(f"Only the newest {counted(len(reading.messages))} are shown; older verdicts stay in the archive.")
    if reading.cut_off:
        notes.append(
            f"The last line of {VERDICTS} is cut off, as after a power cut: that part is missing on this page."
        )
    if reading.n_damaged:
        lines = counted(reading.n_damaged, "line")
        notes.append(f"{lines} of the archive cannot be read and {'is' if reading.n_damaged == 1 else 'are'} left out.")
    return notes


def _archive_notes(parts: Sequence[Part]) -> list[str]:
    """Return what the reader must know before trusting the numbers."""
    notes = []
    if any(part.simulated for part in parts):
        notes.append("These parts came from a simulation or a recording, not from a running line.")
    missing = _missing_verdicts(parts)
    if missing:
        notes.append(
            f"{counted(missing, 'verdict')} {'is' if missing == 1 else 'are'} missing in the archive (gaps in the "
            "count): was the disk full, or not writable?"
        )
    if len({part.origin["recipeDigest"] for part in parts}) > 1:
        notes.append("The recipe was changed during this time: scores before and after it are not comparable.")
    return notes


def _missing_verdicts(parts: Sequence[Part]) -> int:
    """Return how many triggers are missing between the first and the last verdict of each run."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for part in parts:
        numbers[part.run].add(part.trigger)
    return sum(max(seen) - min(seen) + 1 - len(seen) for seen in numbers.values())


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _facts(parts: Sequence[Part]) -> str:
    facts = {
        "Station": _names(parts, "station"),
        "Product": _names(parts, "internalRecipeId"),
        "Recipe": _names(parts, "recipeDigest", characters=12),
        "Engine": _names(parts, "engine"),
        "Runs of the station": f"{len({part.run for part in parts}):,}",
    }
    return "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in facts.items())


def _names(parts: Sequence[Part], key: str, characters: int | None = None) -> str:
    """Return the different values of a key in the order in which they came, the first few by name."""
    values = list(dict.fromkeys(part.origin[key][:characters] for part in parts))
    more = len(values) - MOST_NAMED
    return ", ".join(values[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


# ---- sections --------------------------------------------------------------------------------------------------------


def _section(title: str, explanation: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{explanation}</p>{body}</section>"


def _chart_section(parts: Sequence[Part]) -> str:
    explanation = (
        "One mark per part, in the order of the verdicts: its score, as a multiple of the threshold. Above the line it "
        "is rejected. A slow drift upwards is worth a look at lamp, lens and tool."
    )
    undrawn = sum(part.outcome is not Outcome.NO_VERDICT and part.ratio is None for part in parts)
    if undrawn:
        explanation += f" {counted(undrawn)} cannot be drawn: their threshold is not above 0."
    key = "".join(f'<span class="{kind}">{name}</span>' for kind, name in CHART_KEY)
    body = f'<div class="card"><div class="legend">{key}</div>{strip_chart(parts)}</div>'
    return _section("Part by part", explanation, body)


def _causes_section(parts: Sequence[Part]) -> str:
    """Return why there was no verdict and what to check, the most frequent cause first; empty where none is missing."""
    reasons = _summary(parts).reasons
    newest = {part.reason: part.detail for part in parts}
    rows = []
    for name, count in reasons.items():
        reason = Reason(name)
        meaning, check = CAUSES[reason]
        example = f'<span class="soft example">{escape(newest[reason])}</span>' if newest[reason] else ""
        rows.append(
            f'<tr><th scope="row">{meaning}<span class="soft word">{reason}</span></th><td>{count:,}</td>'
            f'<td class="text">{check}{example}</td></tr>'
        )
    if not rows:
        return ""
    body = _table(("cause", "parts", "what to check, and what was said last"), (True, False, True), rows)
    accepted = sum(part.accepted for part in parts if part.outcome is Outcome.NO_VERDICT)
    told = "The line was told to divert these parts; nothing is known of their surface."
    if accepted:
        told = f"The line was told to accept {accepted:,} of these parts uninspected, as station.yaml says."
    return _section("Why there was no verdict", told, body)


def _latency_section(parts: Sequence[Part]) -> str:
    durations: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for stage, duration_ms in part.stage_ms.items():
            durations[stage].append(duration_ms)
    rows = [_latency_row(stage, values) for stage, values in durations.items()]
    totals = zip(("trigger to pass or reject", "trigger to no verdict"), _latencies(parts), strict=True)
    rows += [_latency_row(label, values, "total") for label, values in totals if values]
    if not rows:
        return ""
    explanation = (
        "Milliseconds per stage. Trigger to pass or reject also holds exposure, transfer and waiting. A part is given "
        "up without verdict at its deadline at the latest."
    )
    headings = ("stage", "parts", "p50", "p99", "longest")
    return _section("Where the time goes", explanation, _table(headings, (True, *[False] * 4), rows))


def _latency_row(stage: str, values_ms: Sequence[float], kind: str = "") -> str:
    cells = "".join(f"<td>{_milliseconds(value)}</td>" for value in _percentiles(values_ms))
    return f'<tr class="{kind}"><th scope="row">{escape(stage)}</th><td>{len(values_ms):,}</td>{cells}</tr>'


def _table(headings: Sequence[str], textual: Sequence[bool], rows: Sequence[str]) -> str:
    head = "".join(
        f'<th scope="col"{" class=text" if is_text else ""}>{heading}</th>'
        for heading, is_text in zip(headings, textual, strict=True)
    )
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _gallery_sections(shown: Sequence[Choice], archive: Path) -> str:
    if not shown:
        return ""
    legend = Template(LEGEND).substitute(scale_bar=scale_bar_uri())
    sections = [legend]
    for choice, cards in zip(shown, galleries(shown, archive), strict=True):
        of = f" of {choice.n:,}" if choice.n > len(choice.parts) else ""
        title = f'{choice.title} <span class="soft">({len(choice.parts)}{of})</span>'
        sections.append(_section(title, choice.explanation, f'<div class="gallery">{cards}</div>'))
    return "".join(sections)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def percent(count: int, n: int) -> str:
    """Return the share as per cent with one decimal, never rounded to 0 % or 100 %."""
    if count in (0, n):
        return f"{100 * count // n} %"
    return f"{min(max(100 * count / n, 0.1), 99.9):.1f} %"


def _percentiles(values_ms: Sequence[float]) -> tuple[float, float, float]:
    """Return p50, p99 and maximum."""
    p50, p99 = np.percentile(np.asarray(values_ms), [50, 99])
    return float(p50), float(p99), max(values_ms)


def _milliseconds(value_ms: float) -> str:
    return f"{value_ms:.2f}" if value_ms < 1 else f"{value_ms:.1f}" if value_ms < 100 else f"{value_ms:,.0f}"
