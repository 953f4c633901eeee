"""What remote commands leave behind: which ids are used up, and the audit trail.

One SQLite file, `commands.sqlite`, synchronous FULL: what a call returned from is on the disk. It is bounded: the last
10,000 commands that were tried, the last 1,000 refusals (apart, so that a flood of nonsense pushes no act out of the
trail) and 64 issuers. An issuer's last id is never forgotten: neither age nor the clock makes an old command new again.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import StorageError

FILE_NAME = "commands.sqlite"
FORMAT = 1
MOST_ISSUERS = 64
KEPT_COMMANDS = 10_000  # about 5 MB
KEPT_REFUSALS = 1_000
WAIT_FOR_READERS_S = 5.0

_TABLES = (
    "CREATE TABLE about (format INTEGER NOT NULL, station TEXT NOT NULL)",
    "CREATE TABLE issuers (issuer TEXT PRIMARY KEY, last_id INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    """CREATE TABLE audit (
        number INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, began_utc TEXT NOT NULL, ended_utc TEXT,
        issuer TEXT, id INTEGER, command TEXT NOT NULL, arguments TEXT NOT NULL,
        before TEXT, after TEXT, result TEXT, detail TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX audit_by_id ON audit (issuer, id) WHERE id IS NOT NULL",
    "CREATE INDEX audit_refused ON audit (number) WHERE result = 'refused'",
)
_COLUMNS = "run, began_utc, ended_utc, issuer, id, command, arguments, before, after, result, detail"
_TRIMS = {
    True: "DELETE FROM audit WHERE result = 'refused' AND number <= "
    "(SELECT number FROM audit WHERE result = 'refused' ORDER BY number DESC LIMIT 1 OFFSET ?)",
    False: "DELETE FROM audit WHERE result IS NOT 'refused' AND number <= "
    "(SELECT number FROM audit WHERE result IS NOT 'refused' ORDER BY number DESC LIMIT 1 OFFSET ?)",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit trail. An intent has no result yet; one that keeps none was interrupted."""

    run: str  # of the agent, in which the command was taken up
    began_utc: str  # ISO 8601, the station's clock
    command: str  # as the topic named it
    issuer: str | None = None  # None: could not be read
    command_id: int | None = None  # None: not read, or not used up by this
    arguments: Any = None
    ended_utc: str | None = None
    before: Any = None
    after: Any = None
    result: str | None = None  # "done" | "refused" | "failed"
    detail: str = ""


class CommandLog:
    """The file in a folder of the agent's own. Any thread may call; one agent at a time, as the outbox's lock ensures.

    Every call raises StorageError if the file cannot be read or written, and then nothing of the call holds.
    """

    def __init__(self, folder: Path, station: str) -> None:
        """Open or create the file. Raises StorageError if it is damaged, or of another station or format."""
        self._path = folder / FILE_NAME
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                self._path, timeout=WAIT_FOR_READERS_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise StorageError(f"{self._path}: {error}: want a folder that the agent may write to") from error
        try:
            with self._guarded():
                self._prepare(station)
        except StorageError:
            self._database.close()
            raise

    def last_id(self, issuer: str) -> int | None:
        """Return the highest id of the issuer that is used up; None: the issuer is not known."""
        with self._guarded():
            return self._last_id(issuer)

    def is_full(self) -> bool:
        """Return whether no further issuer can be taken in."""
        with self._guarded():
            return self._issuers() >= MOST_ISSUERS

    def find(self, issuer: str, command_id: int) -> Entry | None:
        """Return what became of the command; None: it never came, or is so old that its line is gone."""
        with self._guarded():
            row = self._database.execute(
                f"SELECT {_COLUMNS} FROM audit WHERE issuer = ? AND id = ?",
                (issuer, command_id),
            ).fetchone()
        return None if row is None else self._entry(row)

    def add(self, entry: Entry) -> None:
        """Write a line, an intent as a rule; with issuer and id, the id is used up from now on.

        Raises StorageError also if the id is not larger than all before, or the issuer one too many.
        """
        with self._transaction():
            if entry.issuer is not None and entry.command_id is not None:
                self._use_up(entry.issuer, entry.command_id)
            marks = ", ".join("?" * len(_COLUMNS.split(",")))
            self._database.execute(f"INSERT INTO audit ({_COLUMNS}) VALUES ({marks})", _row(entry))
            refused = entry.result == "refused"
            self._database.execute(_TRIMS[refused], (KEPT_REFUSALS if refused else KEPT_COMMANDS,))

    def finish(self, entry: Entry) -> None:
        """Write how the command of an intent ended; its issuer and id say which."""
        with self._transaction():
            self._database.execute(
                "UPDATE audit SET ended_utc = ?, before = ?, after = ?, result = ?, detail = ? "
                "WHERE issuer = ? AND id = ?",
                (
                    entry.ended_utc,
                    json.dumps(entry.before),
                    json.dumps(entry.after),
                    entry.result,
                    entry.detail,
                    entry.issuer,
                    entry.command_id,
                ),
            )

    def trail(self, most: int = KEPT_COMMANDS + KEPT_REFUSALS) -> list[Entry]:
        """Return the newest lines of the audit trail, newest first."""
        with self._guarded():
            query = f"SELECT {_COLUMNS} FROM audit ORDER BY number DESC LIMIT ?"
            rows = self._database.execute(query, (most,)).fetchall()
        return [self._entry(row) for row in rows]

    def close(self) -> None:
        """Close the file; no call may follow."""
        with self._lock:
            self._database.close()

    def _prepare(self, station: str) -> None:
        ask = self._database.execute
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "journal_size_limit = 4194304"):
            ask(f"PRAGMA {pragma}")
        verdict = ask("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise self._damaged(str(verdict))
        if ask("SELECT count(*) FROM sqlite_schema WHERE name = 'about'").fetchone()[0] == 0:
            ask("BEGIN IMMEDIATE")
            for table in _TABLES:
                ask(table)
            ask("INSERT INTO about VALUES (?, ?)", (FORMAT, station))
            ask("COMMIT")
        found = ask("SELECT format, station FROM about").fetchone()
        if found != (FORMAT, station):
            raise StorageError(
                f"{self._path}: format and station {found} found, need {(FORMAT, station)}: "
                "give every station a folder of its own"
            )

    def _use_up(self, issuer: str, command_id: int) -> None:
        last_id = self._last_id(issuer)
        if last_id is None and self._issuers() >= MOST_ISSUERS:
            raise StorageError(f"{self._path}: {MOST_ISSUERS} issuers are known: no room for {issuer}")
        if last_id is not None and command_id <= last_id:
            raise StorageError(f"{self._path}: id {command_id} of {issuer} is used up, the last one is {last_id}")
        self._database.execute(
            "INSERT OR REPLACE INTO issuers VALUES (?, ?, ?)", (issuer, command_id, _checksum(issuer, command_id))
        )

    def _last_id(self, issuer: str) -> int | None:
        row = self._database.execute("SELECT last_id, checksum FROM issuers WHERE issuer = ?", (issuer,)).fetchone()
        if row is None:
            return None
        if row[1] != _checksum(issuer, row[0]):
            raise self._damaged(f"the last id of {issuer} does not match its checksum")
        return int(row[0])

    def _issuers(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM issuers").fetchone()[0])

    def _entry(self, row: tuple[Any, ...]) -> Entry:
        run, began, ended, issuer, command_id, command, *values, result, detail = row
        try:
            arguments, before, after = (None if value is None else json.loads(value) for value in values)
        except ValueError as error:
            raise self._damaged(f"the line of {command} {command_id}: {error}") from error
        return Entry(run, began, command, issuer, command_id, arguments, ended, before, after, result, detail)

    def _damaged(self, what: str) -> StorageError:
        return StorageError(
            f"{self._path} is damaged: {what}: stop the agent and move the file away. The station then takes "
            "commands once more that it took within the last hour"
        )

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.OperationalError as error:  # locked, full, read-only, gone
                raise StorageError(f"{self._path}: {error}: see to the disk and who else has the file open") from error
            except sqlite3.Error as error:
                raise self._damaged(str(error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._guarded():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            finally:
                if self._database.in_transaction:  # SQLite itself ends it where the disk is full
                    self._database.execute("ROLLBACK")


def _row(entry: Entry) -> tuple[Any, ...]:
    """Return the values in the order of _COLUMNS."""
    return (
        entry.run,
        entry.began_utc,
        entry.ended_utc,
        entry.issuer,
        entry.command_id,
        entry.command,
        json.dumps(entry.arguments),
        json.dumps(entry.before),
        json.dumps(entry.after),
        entry.result,
        entry.detail,
    )


def _checksum(*values: str | int) -> int:
    """Return a CRC-32: SQLite itself noticed 13 of 30 random corruptions."""
    return zlib.crc32(json.dumps(values).encode())
