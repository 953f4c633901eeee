"""Watch a station's verdicts arrive: drawn in place in a terminal, one aligned line per part everywhere else.

Where none arrives it says why: no broker, no station, a state in which no part is judged, consumers that are away.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from textwrap import wrap
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from agent.errors import BrokerError
from agent.mqtt.client import MqttSettings
from agent.publishing.messages import STATES, STATUS_SCHEMA, VERDICT_SCHEMA
from agent.watch_subscription import Backlog, Subscription

MAX_KEPT = 10_000  # verdicts remembered, for the result and against duplicates
MOST_CAUSE_CHARACTERS = 300
MOST_ROWS = 200  # of the largest terminal
PATIENCE_S = 3.0  # before silence is explained; a station says how it does every 5 s, and at once what is retained
POLL_S = 0.1

LABELS = {"pass": ("PASS", "bold green"), "reject": ("REJECT", "bold red"), "no_verdict": ("NO VERDICT", "bold yellow")}
COLUMNS = (("part", 14), ("trigger", 7), ("outcome", 10), ("score", 9), ("threshold", 9), ("ms", 7))
HEADINGS = "  ".join(f"{name:<{width}}" for name, width in COLUMNS) + "  cause"


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown of one verdict."""

    key: tuple[str, str, int]  # (station, epoch, seq)
    part: str
    trigger: str
    outcome: str  # pass, reject or no_verdict
    score: str
    threshold: str
    latency_ms: str
    cause: str


@dataclass(frozen=True, slots=True)
class Status:
    """What is shown of how a station says it does."""

    lines: tuple[str, ...]  # its state, then its alarms
    away: tuple[str, ...]  # all its consumers, where verdicts wait for every one of them
    backlog: Backlog | None  # of a station without consumers that is there
    is_offline: bool


def watch(
    settings: MqttSettings,
    *,
    count: int | None,
    timeout_s: float | None,
    console: Console,
    on_subscribed: Callable[[], None] | None = None,
    give_up: Callable[[], bool] = lambda: False,
    take_waiting: bool = False,
) -> list[dict[str, Any]]:
    """Print verdicts until `count` different ones came or timeout_s passed; returns them in order of arrival.

    None means no limit; the last MAX_KEPT verdicts are returned. Duplicates are not shown again; what cannot be read
    is shown as a warning.

    on_subscribed: called once, as soon as no verdict can be missed any more. give_up: asked ten times a second; True
    ends the watch. take_waiting: show also what waits at a station without consumers for the first who subscribes;
    it is shown here and nowhere else then.

    Raises BrokerError if the broker refuses us, or was never reached within timeout_s; SettingsError as MqttSettings.
    """
    deadline_s = inf if timeout_s is None else time.monotonic() + timeout_s
    wanted = inf if count is None else count
    verdicts: OrderedDict[tuple[str, str, int], dict[str, Any]] = OrderedDict()
    shown = 0
    with ExitStack() as stack:
        subscription = Subscription(settings, take_waiting=take_waiting)
        stack.callback(subscription.close)
        show = stack.enter_context(LiveLines(console)) if console.is_terminal else _PlainLines(console)
        silence = _Silence(settings)
        while shown < wanted and time.monotonic() < deadline_s:
            arrived = subscription.next_message(POLL_S)
            if on_subscribed is not None and subscription.is_ready:
                on_subscribed()
                on_subscribed = None
            show.standing(silence.explained(subscription))
            if arrived is None:
                if give_up():
                    break
                continue
            try:
                if arrived.is_status:
                    status = read_status(_parsed(arrived.payload, STATUS_SCHEMA))
                    silence.note_status(status)
                    subscription.gate.note(status.backlog, is_offline=status.is_offline)
                    continue
                message = _parsed(arrived.payload, VERDICT_SCHEMA)
                row = read_row(message)
            except ValueError as error:
                show.warn(f"unreadable message of {len(arrived.payload)} bytes: {error}")
                continue
            if row.key not in verdicts:
                silence.end()
                verdicts[row.key] = message
                shown += 1
                show.add(row)
            if len(verdicts) > MAX_KEPT:
                verdicts.popitem(last=False)
        if not subscription.was_connected:
            raise BrokerError(f"no broker at {settings.host}:{settings.port}: start it, or check mqtt.host and port")
    return list(verdicts.values())


def _parsed(payload: bytes, schema: str) -> dict[str, Any]:
    """Return the JSON object. Raises ValueError if it is none of this schema."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(message, dict) or message.get("schema") != schema:
        raise ValueError(f"not a {schema}")
    return message


def read_row(message: dict[str, Any]) -> Row:
    """Return the row for one verdict message. Raises ValueError if a field is missing or of another type."""
    try:
        station, epoch, seq = message["station"], message["epoch"], message["seq"]
        if not (isinstance(station, str) and isinstance(epoch, str) and isinstance(seq, int)):
            raise ValueError("station, epoch and seq do not make a key")
        if message["outcome"] not in LABELS:
            raise ValueError(f"outcome {str(message['outcome'])[:20]!r} is unknown")
        return Row(
            key=(station, epoch, seq),
            part=_printable(message["partId"] or f"#{seq}"),
            trigger=_printable(message["trigger"]),
            outcome=message["outcome"],
            score=_figure(message["score"], ".3f"),
            threshold=_figure(message["threshold"], ".3f"),
            latency_ms=_figure(message["latencyMs"], ".1f"),
            cause=_cause(message),
        )
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a field has another type: {error}") from error


def read_status(message: dict[str, Any]) -> Status:
    """Return what is shown of one status message. Raises ValueError if a field is missing or of another type."""
    try:
        station, state, recipe = (str(message[key]) for key in ("station", "state", "internalRecipeId"))
        if state not in STATES:
            raise ValueError(f"state {state[:20]!r} is unknown")
        more = {"ready": f": {recipe}", "running": f": {recipe}", "offline": ": killed, or cut off from the broker"}
        lines = [_printable(f"{station} is {state}{more.get(state, '')}")]
        lines += [_printable(f"alarm {alarm['code']}: {alarm['detail']}") for alarm in message["alarms"]]
        waiting = {str(name): int(one["waiting"]) for name, one in message.get("consumers", {}).items()}
        backlog = _backlog(message["delivery"]) if message.get("deliveryMode") == "broker" else None
    except KeyError as error:
        raise ValueError(f"field {error} is missing") from error
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a field has another type: {error}") from error
    away = tuple(sorted(waiting)) if waiting and all(waiting.values()) else ()
    return Status(tuple(lines), away, backlog, state == "offline")


def _backlog(delivery: dict[str, Any]) -> Backlog:
    unheard = int(delivery["noSubscribers"])
    return Backlog(int(delivery["waiting"]), int(delivery["confirmed"]) - unheard, unheard)


def _cause(message: dict[str, Any]) -> str:
    """Return why, in a few words: nothing for a pass."""
    if message["outcome"] == "pass":
        return ""
    reason, detail = "" if message["reason"] == "score" else message["reason"], message["detail"]
    cause = ": ".join(_printable(part) for part in (reason, detail) if part)
    return cause if len(cause) <= MOST_CAUSE_CHARACTERS else cause[: MOST_CAUSE_CHARACTERS - 1] + "…"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(float(value), form)


def _printable(value: object) -> str:
    """Return text without control characters: a message must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


class _Silence:
    """Why nothing comes, in lines for a person."""

    def __init__(self, settings: MqttSettings) -> None:
        self._settings = settings
        self._since_s = time.monotonic()
        self._status: Status | None = None
        self._away: tuple[str, ...] = ()

    def note_status(self, status: Status) -> None:
        """The station said how it does; one that says twice that its consumers are behind is not just under way."""
        self._away = status.away if self._status is not None and self._status.away else ()
        self._status = status

    def end(self) -> None:
        """A verdict came."""
        self._since_s = time.monotonic()

    def explained(self, subscription: Subscription) -> tuple[str, ...]:
        """Return what to say of broker and station now."""
        broker = f"{self._settings.host}:{self._settings.port}"
        is_long = time.monotonic() > self._since_s + PATIENCE_S
        if not subscription.is_connected:
            if subscription.was_connected:
                return (f"the connection to {broker} is lost: trying again",)
            return (f"no broker answers at {broker} yet: trying again",) if is_long else ()
        if self._status is None:
            return (
                (
                    f"no station speaks at {self._settings.topic}: compare mqtt.topic in its station.yaml, and whether "
                    "the broker lets you read status",
                )
                if is_long
                else ()
            )
        if is_long and subscription.gate.waiting:
            wait = f"{subscription.gate.waiting} verdicts wait at the station for the first who subscribes"
            return (*self._status.lines, f"{wait}: start the MES; --take-waiting shows them here, and then nobody else")
        if not (is_long and self._away):
            return self._status.lines
        names = ", ".join(self._away)
        return (*self._status.lines, f"verdicts wait at the station, not acknowledged by {names}: check that it runs")


class LiveLines:
    """How the station does and its latest verdicts, drawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: deque[Row] = deque(maxlen=MOST_ROWS)
        self._standing: tuple[str, ...] = ()
        self._live = Live(self.picture(), console=console, refresh_per_second=10)

    def __enter__(self) -> LiveLines:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def add(self, row: Row) -> None:
        """Show one more verdict."""
        self._rows.append(row)
        self._live.update(self.picture())

    def standing(self, lines: tuple[str, ...]) -> None:
        """Show how the station does."""
        if lines != self._standing:
            self._standing = lines
            self._live.update(self.picture())

    def warn(self, text: str) -> None:
        """Print a warning above the verdicts."""
        self._live.console.print(Text(f"warning: {_printable(text)}", style="yellow"))

    def picture(self) -> Group:
        """Return as many of the newest verdicts as the terminal has room for; a cause that is long on a line below."""
        width, room = self._console.width, self._console.height - 2
        head = [Text(line, "bold red" if line.startswith("alarm ") else "yellow") for line in self._standing]
        room -= sum(-(-len(line.plain) // width) for line in head)
        drawn: deque[Text] = deque()
        for row in reversed(self._rows):
            lines = _drawn(row, width)
            if len(drawn) + len(lines) > room:
                break
            drawn.extendleft(reversed(lines))
        return Group(*head, Text(HEADINGS, "dim", no_wrap=True), *drawn)


def _drawn(row: Row, width: int) -> list[Text]:
    label, style = LABELS[row.outcome]
    cells = _cells(row)
    line = Text("  ".join(cells), no_wrap=True, overflow="ellipsis")
    begin = len(cells[0]) + len(cells[1]) + 4
    line.stylize(style, begin, begin + len(label))
    if not row.cause:
        return [line]
    if len(line) + 2 + len(row.cause) <= width:
        return [line.append(f"  {row.cause}")]
    return [line, *(Text(f"    {words}") for words in wrap(row.cause, max(20, width - 4)))]


class _PlainLines:
    """One aligned line per verdict: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._standing: tuple[str, ...] = ()
        self._print(HEADINGS)

    def add(self, row: Row) -> None:
        """Print one verdict."""
        self._print("  ".join([*_cells(row), row.cause]).rstrip())

    def standing(self, lines: tuple[str, ...]) -> None:
        """Print what changed of how the station does."""
        for line in lines:
            if line not in self._standing:
                self._print(f"note: {line}")
        self._standing = lines

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(f"warning: {_printable(text)}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(row: Row) -> list[str]:
    fields = (row.part, row.trigger, LABELS[row.outcome][0], row.score, row.threshold, row.latency_ms)
    return [f"{field:<{width}}" for field, (_, width) in zip(fields, COLUMNS, strict=True)]
