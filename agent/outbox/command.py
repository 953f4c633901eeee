"""`taktsight-agent outbox` and `commands`: what a person sees of the files that a station keeps."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
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


def show_outbox(station: Station, export: Path | None, *, discard_rest: bool) -> None:
    """Print what waits, is in quarantine or was set aside; write it to `export`; then delete all but what waits.

    While an agent runs, only what waits for whom is printed.

    Raises StorageError if there is no outbox, or an agent uses it and an export is wanted; InputError if the export
    cannot be written.
    """
    folder = station.outbox.folder
    try:
        rows = list(kept_rows(folder))
    except InUse:
        if export is not None:
            raise
        say(f"{folder}: in use by the agent that runs; {_waiting(folder)}")
        note("stop the agent to see what is in quarantine, and to export")
        return
    say(
        f"{folder}: {len(rows)} messages; {_waiting(folder)}"
        if rows
        else f"{folder}: empty, every consumer has everything"
    )
    if rows:
        console.print(_kept_table(rows))
    if export is not None:
        _write(export, rows)
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


def _kept_table(rows: list[KeptRow]) -> Table:
    table = Table(title_justify="left")
    for heading in ("state", "epoch", "messages", "first", "last", "damaged", "why"):
        table.add_column(heading, justify="left" if heading in ("state", "epoch", "why") else "right")
    groups: dict[tuple[str, str, str], list[KeptRow]] = defaultdict(list)
    for row in rows:
        groups[row.state, row.epoch, row.why].append(row)
    for (state, epoch, why), group in groups.items():
        seqs = [row.seq for row in group]
        damaged = Counter(row.intact for row in group)[False]
        table.add_row(state, epoch, str(len(group)), str(min(seqs)), str(max(seqs)), str(damaged), why)
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


def _write(path: Path, rows: list[KeptRow]) -> None:
    lines = [json.dumps(_exported(row), ensure_ascii=False) for row in rows]
    try:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a file that can be written; nothing was discarded") from error


def _exported(row: KeptRow) -> dict[str, Any]:
    fields = {"state": row.state, "epoch": row.epoch, "seq": row.seq, "topic": row.topic, "why": row.why}
    try:
        return {**fields, "intact": row.intact, "message": json.loads(row.payload)}
    except ValueError:
        return {**fields, "intact": False, "bytes": row.payload.hex()}
