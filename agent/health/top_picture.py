"""One picture of a running station for `top`: does it keep its takt, first of all; then what, where and why."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from calibration.errors import TaktsightError

TIGHT = 0.8  # share of the deadline that p99.9 may take
NOT_JUDGED = 0.1  # share of parts without verdict that is the news, however quick they were
SILENT_TAKTS, SILENT_S = 5, 2.0  # a running station without verdicts for so long stands still
LEFT_COLUMNS = 60  # what stages and measures need
SIDE_BY_SIDE = 118  # columns from which the tables stand beside each other
STATISTICS = (("p50", "p50"), ("p99", "p99"), ("p99.9", "p999"), ("max", "max"))
COLOURS = {"pass": "green", "reject": "red", "no_verdict": "yellow"}
UNITS = {"dx_px": "dx, px", "dy_px": "dy, px", "angle_deg": "angle, deg", "residual_px": "residual, px"}
HALF_TURN_DEG = 180.0
MIB = 1024**2

FULL, BLOCKS = "█▓░", "▁▂▃▄▅▆▇█"
ASCII_FULL, ASCII_BLOCKS = "#=-", "12345678"  # eighths of the deadline


def drawn(message: Mapping[str, Any], terminal: Console, trouble: str = "") -> RenderableType:
    """Return the picture of one `taktsight.health/1` for this terminal.

    trouble: what to say of a station that does not answer any more; "" for one that does.

    Raises TaktsightError on a message that cannot be read.
    """
    try:
        return _Picture(message, terminal.width, terminal.options.ascii_only).whole(trouble)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TaktsightError(
            f"the station's figures cannot be read ({type(error).__name__}: {error}): use the taktsight-agent that runs"
        ) from error


class _Picture:
    """What one message looks like."""

    def __init__(self, message: Mapping[str, Any], width: int, ascii_only: bool) -> None:
        self._told = message
        self._recent = message["recent"]
        self._latency = self._recent["triggerToVerdictMs"]
        self._deadline_ms = float(message["deadlineMs"])
        self._width = width
        self._full, self._blocks = (ASCII_FULL, ASCII_BLOCKS) if ascii_only else (FULL, BLOCKS)

    def whole(self, trouble: str) -> RenderableType:
        """Return everything, the most important first: a low window shows the top."""
        head: list[RenderableType] = [self._title(), self._headline(trouble), *self._alarms(), Text()]
        if self._latency is not None:
            head += [*self._bar(), *self._strip(), Text()]
        left: list[RenderableType] = [self._stages(), Text(), self._measures()]
        right: list[RenderableType] = [self._verdicts(), Text(), *self._lines()]
        if self._width < SIDE_BY_SIDE:
            return Group(*head, *right, Text(), *left)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(min_width=LEFT_COLUMNS)
        grid.add_row(Group(*left), Group(*right))
        return Group(*head, grid)

    def _title(self) -> Text:
        told = self._told
        up_s = _seconds(told["startTime"], told["creationTime"])
        line = Text(_printable(told["station"]), style="bold")
        line.append(f"   {_printable(told['internalRecipeId'] or 'no recipe yet')}   {_printable(told['state'])}")
        line.append(f"   takt {told['taktMs']:g} ms, deadline {self._deadline_ms:g} ms, up {_lasting(up_s)}", "dim")
        return line

    def _headline(self, trouble: str) -> Text:
        """Return what an engineer must see in two seconds."""
        word, style, why = ("NO ANSWER", "reverse red", trouble) if trouble else self._judged()
        return Text.assemble((f" {word} ", f"bold {style}"), " ", why)

    def _judged(self) -> tuple[str, str, str]:
        told, deadline = self._told, f"{self._deadline_ms:g} ms"
        if told["state"] != "running":
            return _printable(told["state"]).upper(), "reverse yellow", "no part is judged"
        silent_s = _seconds(told["lastVerdictTime"] or told["startTime"], told["creationTime"])
        if silent_s > max(SILENT_S, SILENT_TAKTS * told["taktMs"] / 1e3):
            return "NO PARTS", "reverse yellow", f"no verdict for {_lasting(silent_s)}"
        n_late, parts = _counted(self._recent, "late"), _counted(self._recent)
        if n_late:
            return (
                "LATE",
                "reverse red",
                f"{n_late:,} of {parts:,} parts had no answer at {deadline} {self._span()}",
            )
        return self._in_time(parts, deadline)

    def _in_time(self, parts: int, deadline: str) -> tuple[str, str, str]:
        """Return what to say where no part was late."""
        latency, without = self._latency, self._without_verdict()
        if latency is None:
            return "NO PARTS", "reverse yellow", f"none was looked at {self._span()}"
        if sum(without.values()) > NOT_JUDGED * parts:
            causes = ", ".join(f"{_printable(reason)} {count:,}" for reason, count in without.items())
            of_all = f"{sum(without.values()):,} of {parts:,} parts"
            return "NOT JUDGED", "reverse yellow", f"{of_all} had no verdict {self._span()}: {causes}"
        used = latency["p999"] / self._deadline_ms
        if used > TIGHT and "frame_lost" in without:  # such a part takes the whole deadline, whatever the engine does
            of_all = f"{without['frame_lost']:,} of {parts:,} parts"
            return (
                "FRAMES LOST",
                "reverse yellow",
                f"{of_all} had no frame at {deadline} {self._span()}: camera, trigger",
            )
        why = f"p99.9 {latency['p999']:.1f} of {deadline}, 0 of {parts:,} parts late {self._span()}"
        return ("TIGHT", "reverse yellow", why) if used > TIGHT else ("KEEPS ITS TAKT", "reverse green", why)

    def _without_verdict(self) -> dict[str, int]:
        """Return how many recent parts had no verdict, by reason, the most frequent first."""
        counts = {
            row["reason"]: int(row["count"]) for row in self._recent["verdicts"] if row["outcome"] == "no_verdict"
        }
        return dict(sorted(((reason, count) for reason, count in counts.items() if count), key=lambda item: -item[1]))

    def _span(self) -> str:
        return f"in {_lasting(self._recent['seconds'])}"

    def _alarms(self) -> list[Text]:
        return [
            Text.assemble((f"alarm {_printable(alarm['code'])}: ", "bold red"), _printable(alarm["detail"]))
            for alarm in self._told["alarms"]
        ]

    def _bar(self) -> list[Text]:
        """Return trigger to verdict on a scale that ends behind the deadline, and what the shades mean."""
        width = min(self._width, 101) - 1
        limit = round(width * 0.9)
        ends = [min(width, round(limit * self._latency[key] / self._deadline_ms)) for key in ("p50", "p99", "max")]
        bar = Text()
        begin = 0
        for shade, end, style in zip(self._full, ends, ("green", "yellow", "yellow"), strict=True):
            bar.append(shade * max(0, end - begin), style)
            begin = max(begin, end)
        bar.append(" " * (width - begin))
        bar.stylize("red", limit)
        bar = Text.assemble(bar[:limit], ("|", "bold red"), bar[limit:])
        scale = Text("trigger to verdict, ms".ljust(limit - len("deadline ")) + "deadline ", "dim")
        legend = [f"{name} {self._latency[key]:.1f}" for name, key in STATISTICS]
        figures = Text("   ".join(legend))
        shades = Text(f"{self._full[0]} to p50   {self._full[1]} to p99   {self._full[2]} to max", "dim")
        if len(figures) + 6 + len(shades) > self._width:
            return [scale, bar, figures, shades]
        return [scale, bar, Text.assemble(figures, "      ", shades)]

    def _strip(self) -> list[Text]:
        """Return the slowest part of each ten seconds, as eighths of the deadline."""
        strip = self._told["strip"]
        line = Text()
        for slowest_ms, late in zip(strip["slowestMs"], strip["late"], strict=True):
            if late:
                line.append("!", "bold red")
            elif slowest_ms is None:
                line.append(" ")
            else:
                eighth = min(7, max(0, int(8 * slowest_ms / self._deadline_ms)))
                line.append(self._blocks[eighth], "yellow" if slowest_ms > TIGHT * self._deadline_ms else "green")
        note = f" slowest of each {strip['everyS']:g} s, ! late" if len(line) + 32 <= self._width else ""
        return [Text.assemble(line, (note, "dim"))]

    def _stages(self) -> Table:
        table = _table("stage", "n", *(name for name, _ in STATISTICS), title=f"ms {self._span()}")
        named = {**self._recent["stageMs"], "trigger to verdict": self._latency}
        for stage, summary in named.items():
            if summary is not None:
                row = (_short(summary[key]) for _, key in STATISTICS)
                style = "bold" if summary is self._latency else ""
                table.add_row(_printable(stage), f"{summary['n']:,}", *row, style=style)
        return table

    def _verdicts(self) -> Table:
        whole = {(row["outcome"], row["reason"]): row["count"] for row in self._told["sinceStart"]["verdicts"]}
        recent = {(row["outcome"], row["reason"]): row["count"] for row in self._recent["verdicts"]}
        table = _table("verdicts", _lasting(self._recent["seconds"]), "share", "since start")
        total = sum(recent.values())
        for kind in sorted(whole, key=lambda kind: (list(COLOURS).index(kind[0]), -whole[kind])):
            outcome, reason = kind
            told = outcome if reason == "score" else _printable(reason)
            share = f"{100 * recent.get(kind, 0) / total:.1f} %" if total else ""
            table.add_row(Text(told, COLOURS[outcome]), f"{recent.get(kind, 0):,}", share, f"{whole[kind]:,}")
        return table

    def _measures(self) -> RenderableType:
        registration, condition = self._told["registration"], self._told["condition"]
        measures = {**registration["measures"], **condition["measures"]}
        if not measures:
            return Text("no part was registered or measured yet", "dim")
        parts = max(registration["parts"], condition["parts"])
        table = _table("measure", "mean", "sd", "min", "max", title=f"newest {parts:,} parts")
        for name, spread in measures.items():
            digits = 2 if name in UNITS else 3
            shown = within_a_turn(spread) if name == "angle_deg" else spread
            row = (f"{shown[key]:.{digits}f}" for key in ("mean", "sd", "min", "max"))
            table.add_row(UNITS.get(name, _printable(name).replace("_", " ")), *row)
        return table

    def _lines(self) -> list[Text]:
        """Return drift, queues, memory and what was counted beside the verdicts."""
        gauges = {_printable(name): value for name, value in self._told["gauges"].items() if value is not None}
        memory = [
            f"{_words(name, '_bytes', '_memory_bytes')} {value / MIB:,.0f} MiB"
            for name, value in gauges.items()
            if name.endswith("_bytes")
        ]
        totals = [
            f"{_words(name, '_total')} {value:,.0f}"
            for name, value in gauges.items()
            if name.endswith("_total") and value
        ]
        queues = [
            f"{_words(name)} {value:,g}" for name, value in gauges.items() if not name.endswith(("_bytes", "_total"))
        ]
        lines = {"drift": [self._drift()], "waiting": queues, "memory": memory, "counted": totals}
        return [Text.assemble((f"{name:<8}", "dim"), ", ".join(told)) for name, told in lines.items() if told]

    def _drift(self) -> str:
        drift = self._told["drift"]
        if not drift["watched"]:
            return "not watched: the recipe does not say how good parts scored"
        if drift["deviations"] is None:
            return "no part passed yet"
        where = f"passed parts at {round(drift['deviations'], 1) + 0.0:+.1f} deviations"
        if drift["direction"] != "none":
            return f"{drift['direction'].upper()}, {where} from the calibration's median"
        share = max(drift["rising"], drift["falling"]) / drift["limit"]
        return f"none, {where}, {100 * share:.0f} % of an alarm"


def _table(first: str, *others: str, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", title=None)
    table.add_column(first if title is None else f"{first}, {title}", no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _counted(count: Mapping[str, Any], reason: str | None = None) -> int:
    return sum(int(row["count"]) for row in count["verdicts"] if reason in (None, row["reason"]))


def _short(duration_ms: float) -> str:
    return f"{duration_ms:.2f}" if duration_ms < 1 else f"{duration_ms:.1f}"


def within_a_turn(spread: Mapping[str, float]) -> dict[str, float]:
    """Return a spread of angles as people read it: -180..180 degrees; parts that lie any way round have that range."""
    if spread["max"] - spread["min"] > HALF_TURN_DEG and max(spread["max"], -spread["min"]) > HALF_TURN_DEG:
        return {**spread, "min": -HALF_TURN_DEG, "max": HALF_TURN_DEG}
    turned = {
        key: (spread[key] + HALF_TURN_DEG) % (2 * HALF_TURN_DEG) - HALF_TURN_DEG for key in ("mean", "min", "max")
    }
    return {**spread, **turned}


def _words(name: str, *endings: str) -> str:
    for ending in sorted(endings, key=len, reverse=True):
        name = name.removesuffix(ending)
    return name.replace("_", " ")


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _lasting(seconds: float) -> str:
    """Return a span of time in its two greatest units."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days == 0 else f"{days} d {hours % 24} h"


def _printable(text: object) -> str:
    """Return text without control characters: a station's words must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(text))
