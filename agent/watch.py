"""Watch a station's verdicts arrive: a live table in a terminal, one aligned line per part everywhere else."""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.reasoncodes import ReasonCode
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent.errors import BrokerError
from agent.mqtt.client import MqttSettings, begin_connecting, build_client
from agent.publishing.messages import VERDICT_SCHEMA

MAX_KEPT = 10_000  # verdicts remembered, for the result and against duplicates
MAX_CAUSE_CHARACTERS = 60
MIN_ROWS = 5
POLL_S = 0.1

LABELS = {"pass": ("PASS", "bold green"), "reject": ("REJECT", "bold red"), "no_verdict": ("NO VERDICT", "bold yellow")}
COLUMNS = (("part", 14), ("trigger", 7), ("outcome", 10), ("score", 9), ("threshold", 9), ("ms", 7))


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


def watch(
    settings: MqttSettings,
    *,
    count: int | None,
    timeout_s: float | None,
    console: Console,
    on_subscribed: Callable[[], None] | None = None,
    give_up: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Print verdicts until `count` different ones came or timeout_s passed; returns them in order of arrival.

    None means no limit; the last MAX_KEPT verdicts are returned. Duplicates are not shown again; what cannot be read
    is shown as a warning.

    on_subscribed: called once, as soon as no verdict can be missed any more. give_up: asked ten times a second; True
    ends the watch.

    Raises BrokerError if the broker refuses us, or was never reached within timeout_s; SettingsError as MqttSettings.
    """
    deadline_s = inf if timeout_s is None else time.monotonic() + timeout_s
    wanted = inf if count is None else count
    verdicts: OrderedDict[tuple[str, str, int], dict[str, Any]] = OrderedDict()
    shown = 0
    with ExitStack() as stack:
        subscription = _Subscription(settings)
        stack.callback(subscription.close)
        show = stack.enter_context(_LiveTable(console)) if console.is_terminal else _PlainLines(console)
        while shown < wanted and time.monotonic() < deadline_s:
            payload = subscription.next_payload(POLL_S)
            if on_subscribed is not None and subscription.is_ready:
                on_subscribed()
                on_subscribed = None
            if payload is None:
                if give_up():
                    break
                continue
            try:
                message = _parsed(payload)
                row = read_row(message)
            except ValueError as error:
                show.warn(f"unreadable message of {len(payload)} bytes: {error}")
                continue
            if row.key not in verdicts:
                verdicts[row.key] = message
                shown += 1
                show.add(row)
            if len(verdicts) > MAX_KEPT:
                verdicts.popitem(last=False)
        if not subscription.was_connected:
            raise BrokerError(f"no broker at {settings.host}:{settings.port}: start it, or check mqtt.host and port")
    return list(verdicts.values())


def _parsed(payload: bytes) -> dict[str, Any]:
    """Return the JSON object. Raises ValueError if it is none of ours."""
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(message, dict) or message.get("schema") != VERDICT_SCHEMA:
        raise ValueError(f"not a {VERDICT_SCHEMA}")
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


def _cause(message: dict[str, Any]) -> str:
    """Return why, in a few words: nothing for a pass."""
    if message["outcome"] == "pass":
        return ""
    reason, detail = "" if message["reason"] == "score" else message["reason"], message["detail"]
    if detail.startswith(f"{reason}: "):  # it begins with the reason in words
        reason = ""
    cause = ": ".join(_printable(part) for part in (reason, detail) if part)
    return cause if len(cause) <= MAX_CAUSE_CHARACTERS else cause[: MAX_CAUSE_CHARACTERS - 1] + "…"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(float(value), form)


def _printable(value: object) -> str:
    """Return text without control characters: a message must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


class _LiveTable:
    """The latest verdicts as a table that is drawn in place."""

    def __init__(self, console: Console) -> None:
        self._rows: deque[Row] = deque(maxlen=max(MIN_ROWS, console.height - 6))
        self._live = Live(self._table(), console=console, refresh_per_second=10)

    def __enter__(self) -> _LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def add(self, row: Row) -> None:
        """Show one more verdict."""
        self._rows.append(row)
        self._live.update(self._table())

    def warn(self, text: str) -> None:
        """Print a warning above the table."""
        self._live.console.print(Text(f"warning: {_printable(text)}", style="yellow"))

    def _table(self) -> Table:
        table = Table()
        for name, _ in COLUMNS:
            table.add_column(name, justify="left" if name in {"part", "outcome"} else "right", no_wrap=True)
        table.add_column("cause", no_wrap=True)
        for row in self._rows:
            label, style = LABELS[row.outcome]
            figures = (row.score, row.threshold, row.latency_ms, row.cause)
            table.add_row(Text(row.part), row.trigger, Text(label, style=style), *(Text(figure) for figure in figures))
        return table


class _PlainLines:
    """One aligned line per verdict: for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._print("  ".join(f"{name:<{width}}" for name, width in COLUMNS) + "  cause")

    def add(self, row: Row) -> None:
        """Print one verdict."""
        fields = (row.part, row.trigger, LABELS[row.outcome][0], row.score, row.threshold, row.latency_ms)
        cells = [f"{field:<{width}}" for field, (_, width) in zip(fields, COLUMNS, strict=True)]
        self._print("  ".join([*cells, row.cause]).rstrip())

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(f"warning: {_printable(text)}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Subscription:
    """The verdict topic of one station, subscribed again after every reconnection."""

    def __init__(self, settings: MqttSettings) -> None:
        self.was_connected = False
        self.is_ready = False  # subscribed: every verdict from now on reaches us
        self._topic = f"{settings.topic}/verdict"
        self._arrived: SimpleQueue[bytes | BrokerError] = SimpleQueue()
        self._client = build_client(settings, f"taktsight-watch-{secrets.token_hex(4)}")
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        begin_connecting(self._client, settings)

    def next_payload(self, timeout_s: float) -> bytes | None:
        """Return the next payload, or None if none came in time. Raises BrokerError if the broker refuses us."""
        try:
            arrived = self._arrived.get(timeout=timeout_s)
        except Empty:
            return None
        if isinstance(arrived, BrokerError):
            raise arrived
        return arrived

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    # paho's thread runs these: post and return.

    def _on_connect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._arrived.put(BrokerError(f"the broker refuses us: {reason}: check mqtt.username and password_file"))
            return
        self.was_connected = True
        client.subscribe(self._topic, qos=1)

    def _on_subscribe(self, _client: Any, _userdata: Any, _mid: Any, reasons: list[ReasonCode], _props: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._arrived.put(BrokerError(f"the broker does not let us read {self._topic}: check its access list"))
            return
        self.is_ready = True

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        self._arrived.put(bytes(message.payload))
