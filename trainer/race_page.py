"""What a person sees of a race: a table in the terminal, a CSV, and a page that sets accuracy against time."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2
from rich import box
from rich.table import Table

from calibration.chart import number, round_numbers
from calibration.errors import InputError
from trainer.race import Entry, ranked_by_labels
from trainer.timing import DEADLINE

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 36, 48
LEAST_ERROR, MOST_ERROR = 1e-3, 0.7  # 1 - AUROC; what is better or worse stands at the edge


def table_of(entries: Sequence[Entry], order: Sequence[Entry], takt_ms: float) -> Table:
    """Return the candidates, best first, then the too slow and the failed ones."""
    table = Table(title="race", title_justify="left", box=box.SIMPLE)
    for heading in ("", "detector", "AUROC", "escape", "synthetic", "p50 / p99 ms", ""):
        table.add_column(heading, justify="left" if heading in {"detector", ""} else "right", no_wrap=True)
    for entry in [*order, *(entry for entry in entries if entry not in order)]:
        auroc, escape, synthetic, p50, p99, *_ = _figures(entry)
        place = str(order.index(entry) + 1) if entry in order else ""
        out = "failed" if entry.result.failed else "too slow" if entry.too_slow(takt_ms) else ""
        table.add_row(place, entry.name, auroc, escape, synthetic, f"{p50} / {p99}", out)
    return table


def why_out(entry: Entry, takt_ms: float) -> str:
    """Return why a candidate has no place; empty where it has one."""
    if entry.result.failed:
        return f"failed: {entry.result.failed}"
    return f"too slow for {DEADLINE * takt_ms:g} ms" if entry.too_slow(takt_ms) else ""


def _figures(entry: Entry) -> list[str]:
    result = entry.result
    shares = [result.auroc, result.escape, result.synthetic_auroc]
    texts = ["-" if value is None else f"{value:.3f}" for value in shares]
    texts += ["-" if value is None else f"{value:.1f}" for value in (result.p50_ms, result.p99_ms)]
    return [*texts, *("-" if value is None else f"{value:.0f}" for value in (result.fit_s, result.recipe_mb))]


def write_table(path: Path, entries: Sequence[Entry], order: Sequence[Entry], takt_ms: float) -> None:
    """Write every figure as CSV. Raises InputError if the file cannot be written."""
    heading = ["place", "detector", "height", "width", *asdict(entries[0].result), "out"] if entries else []
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(heading)
            for entry in [*order, *(entry for entry in entries if entry not in order)]:
                place = order.index(entry) + 1 if entry in order else ""
                heat = entry.heat
                writer.writerow([
                    place, heat.detector, heat.height, heat.width, *asdict(entry.result).values(),
                    why_out(entry, takt_ms),
                ])  # fmt: skip
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a folder that can be written") from error


def page(product: str, entries: Sequence[Entry], order: Sequence[Entry], takt_ms: float) -> str:
    """Return one HTML page without scripts or outside references."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    labelled = ranked_by_labels(order)
    rows = [(str(place), entry.name, _figures(entry), "") for place, entry in enumerate(order, 1)]
    rows += [("", entry.name, _figures(entry), why_out(entry, takt_ms)) for entry in entries if entry not in order]
    return environment.get_template("race.html").render(
        product=product,
        takt_ms=f"{takt_ms:g}",
        deadline_ms=f"{DEADLINE * takt_ms:g}",
        overkill=f"{100 * entries[0].heat.overkill:g} %" if entries else "",
        engines=sorted({entry.result.engine for entry in entries if entry.result.engine}),
        labelled=labelled,
        rows=rows,
        **_picture(entries, order, takt_ms, labelled=labelled),
    )


def _picture(entries: Sequence[Entry], order: Sequence[Entry], takt_ms: float, *, labelled: bool) -> dict[str, object]:
    """Return places of points and ticks: p99 to the right, AUROC upwards, time and error (1 - AUROC) logarithmic."""
    shown = [entry for entry in entries if not entry.result.failed and _error(entry, labelled=labelled) is not None]
    times_ms = [time for entry in shown if math.isfinite(time := entry.result.p99_ms or math.inf)]
    low_ms, high_ms = min([*times_ms, DEADLINE * takt_ms]) / 1.3, max([*times_ms, DEADLINE * takt_ms]) * 1.6

    def x(time_ms: float) -> float:
        share = math.log(min(time_ms, high_ms) / low_ms) / math.log(high_ms / low_ms)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(error: float) -> float:
        share = math.log(max(error, LEAST_ERROR) / LEAST_ERROR) / math.log(MOST_ERROR / LEAST_ERROR)
        return round(TOP + min(1.0, share) * (HEIGHT - TOP - BOTTOM), 1)

    points = [
        {
            "x": x(entry.result.p99_ms or math.inf),
            "y": y(_error(entry, labelled=labelled) or 0.0),
            "place": order.index(entry) + 1 if entry in order else None,
            "name": entry.name,
        }
        for entry in shown
    ]
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM,
        "points": points[::-1],
        "deadline_x": x(DEADLINE * takt_ms),
        "time_ticks": [(x(value), number(value)) for value in _time_ticks(low_ms, high_ms)],
        "error_ticks": [(y(1 - value), f"{value:g}") for value in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)],
    }  # fmt: skip


def _time_ticks(low_ms: float, high_ms: float) -> list[float]:
    ticks = [factor * 10.0**e for e in range(-2, 6) for factor in (1, 2, 5) if low_ms <= factor * 10.0**e <= high_ms]
    return ticks if len(ticks) >= 3 else list(round_numbers(low_ms, high_ms))


def _error(entry: Entry, *, labelled: bool) -> float | None:
    value = entry.result.auroc if labelled else entry.result.synthetic_auroc
    return None if value is None else 1.0 - value
