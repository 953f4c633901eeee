"""`taktsight-agent outbox` and `commands`: what a person sees of the files that a station keeps."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from agent.commands.log import FILE_NAME, CommandLog, Entry
from agent.config import Station
from agent.errors import InUse
from agent.outbox.database import Damaged, read_about, reading
from agent.outbox.folder import KeptRow, discard, kept_rows
from calibration.console import console, note, say
from calibration.errors import InputError

MAX_VALUE_CHARACTERS = 60  # of what was before and after


@dataclass(slots=True)
class _Group:
    """Kept messages of one state, epoch and cause."""

    count: int = 0
    first: int = 0  # lowest seq
    last: int = 0  # highest seq
    damaged: int = 0

    def add(self, row: KeptRow) -> None:
        """Count one more."""
        self.first = min(self.first, row.seq) if self.count else row.seq
        self.last = max(self.last, row.seq)
        self.count += 1
        self.damaged += not row.intact


def show_outbox(station: Station, export: Path | None, *, discard_rest: bool) -> None:
    """Print what waits, is in quarantine or was set aside; write it to `export`; then delete all but what waits.

    While an agent runs, only what waits for whom is printed.

    Raises StorageError if there is no outbox, or an agent uses it and an export is wanted; InputError if the export
    cannot be written.
    """
    folder = station.outbox.folder
    try:
        groups = _shown(folder, export)
    except InUse:
        if export is not None:
            raise
        say(f"{folder}: in use by the agent that runs; {_waiting(folder)}")
        note("stop the agent to see what is in quarantine, and to export")
        return
    number = sum(group.count for group in groups.values())
    say(
        f"{folder}: {number} messages; {_waiting(folder)}"
        if number
        else f"{folder}: empty, every consumer has everything"
    )
    if number:
        console.print(_kept_table(groups))
    if export is not None:
        say(f"export: {export}")
    if discard_rest:
        say(f"discarded: {discard(folder)} messages in quarantine and databases that were set aside")


def show_commands(station: Station, most: int) -> None:
    """Print the newest commands that the station was given, oldest first; an agent may run meanwhile.

    Raises StorageError if the file is damaged.
    """
    folder = station.outbox.folder
    if not (folder / FILE_NAME).exists():
        say("no command was ever given")
        return
    log = CommandLog(folder, station.name)
    try:
        trail = log.trail(most)[::-1]
    finally:
        log.close()
    for entry in trail:
        say(_told(entry))


def _waiting(folder: Path) -> str:
    """Return how much waits for whom; an agent may run meanwhile."""
    try:
        with reading(folder) as connection:
            last = int(read_about(connection, "last_seq"))
            consumers = dict(read_about(connection, "acknowledged")["consumers"])
    except (sqlite3.Error, Damaged) as error:
        return f"what is waiting cannot be read: {error}"
    waiting = ", ".join(f"{last - int(upto)} for {name or 'the broker'}" for name, upto in consumers.items())
    return f"waiting: {waiting or 'no consumer yet'}"


def _shown(folder: Path, export: Path | None) -> dict[tuple[str, str, str], _Group]:
    """Return the kept messages in groups, having written each to `export`: one at a time, an outbox may be 2 GB."""
    groups: dict[tuple[str, str, str], _Group] = defaultdict(_Group)
    rows = kept_rows(folder)
    first = next(rows, None)  # an outbox that is in use is refused before a file is touched
    every = chain(() if first is None else (first,), rows)
    if export is None:
        for row in every:
            groups[row.state, row.epoch, row.why].add(row)
        return groups
    try:
        with export.open("w", encoding="utf-8") as file:
            for row in every:
                groups[row.state, row.epoch, row.why].add(row)
                file.write(json.dumps(_exported(row), ensure_ascii=False) + "\n")
    except OSError as error:
        wanted = "give a file that can be written; nothing was discarded"
        raise InputError(f"{export}: {error.strerror}: {wanted}") from error
    finally:
        if isinstance(rows, Generator):
            rows.close()  # it holds the outbox
    return groups


def _kept_table(groups: dict[tuple[str, str, str], _Group]) -> Table:
    table = Table(title_justify="left")
    for heading in ("state", "epoch", "messages", "first", "last", "damaged", "why"):
        table.add_column(heading, justify="left" if heading in ("state", "epoch", "why") else "right")
    for (state, epoch, why), group in groups.items():
        table.add_row(state, epoch, str(group.count), str(group.first), str(group.last), str(group.damaged), why)
    return table


def _told(entry: Entry) -> str:
    """Return a command in one line: when, who, what, what came of it."""
    when = entry.began_utc.replace("T", " ")
    arguments = "" if not entry.arguments else f" {json.dumps(entry.arguments, ensure_ascii=False)}"
    changed = "" if entry.before is None else f" ({_short(entry.before)} -> {_short(entry.after)})"
    result = entry.result or "interrupted"
    return f"{when}  {entry.issuer or '?'}  {entry.command}{arguments}  {result}: {entry.detail}{changed}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


def _exported(row: KeptRow) -> dict[str, Any]:
    fields = {"state": row.state, "epoch": row.epoch, "seq": row.seq, "topic": row.topic, "why": row.why}
    try:
        return {**fields, "intact": row.intact, "message": json.loads(row.payload)}
    except ValueError:
        return {**fields, "intact": False, "bytes": row.payload.hex()}
