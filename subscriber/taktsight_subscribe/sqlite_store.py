"""A store in one SQLite file: nothing to install, any program on the machine may read it meanwhile."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from taktsight_subscribe.errors import RowRefused, StoreError
from taktsight_subscribe.messages import Key, Verdict, timestamp
from taktsight_subscribe.store import (
    MAX_REJECTED,
    SCHEMA_VERSION,
    Batch,
    Gap,
    Placed,
    Progress,
    StoredEpoch,
    ranges,
)

LOCK_TIMEOUT_S = 5.0  # a reader never blocks us; another writer does

TABLES = """
CREATE TABLE verdict (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    station TEXT NOT NULL, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
    run TEXT, trigger INTEGER, outcome TEXT NOT NULL, reason TEXT, score REAL, threshold REAL,
    part_id TEXT, product TEXT, created_utc TEXT, received_utc TEXT NOT NULL, message TEXT NOT NULL,
    UNIQUE (station, epoch, seq));
CREATE TABLE gap (
    station TEXT NOT NULL, epoch TEXT NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    reason TEXT NOT NULL, noted_utc TEXT NOT NULL, PRIMARY KEY (station, epoch, first));
CREATE TABLE progress (
    station TEXT NOT NULL, epoch TEXT NOT NULL, root TEXT NOT NULL, begins INTEGER, upto INTEGER NOT NULL,
    PRIMARY KEY (station, epoch));
CREATE TABLE rejected (
    topic TEXT NOT NULL, sha256 TEXT NOT NULL, reason TEXT NOT NULL, size_bytes INTEGER NOT NULL,
    payload BLOB NOT NULL, times INTEGER NOT NULL, first_utc TEXT NOT NULL, last_utc TEXT NOT NULL,
    PRIMARY KEY (topic, sha256));
CREATE TABLE handed_over (consumer TEXT PRIMARY KEY, position INTEGER NOT NULL);
"""
COLUMNS = (
    "station, epoch, seq, run, trigger, outcome, reason, score, threshold, part_id, product, "
    "created_utc, received_utc, message"
)
INSERT_VERDICT = f"INSERT INTO verdict ({COLUMNS}) VALUES ({', '.join('?' * 14)}) ON CONFLICT DO NOTHING"
INSERT_GAP = "INSERT INTO gap VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
UPSERT_PROGRESS = """INSERT INTO progress VALUES (?, ?, ?, ?, ?) ON CONFLICT (station, epoch)
    DO UPDATE SET root = excluded.root, begins = excluded.begins, upto = max(upto, excluded.upto)"""
UPSERT_REJECTED = """INSERT INTO rejected VALUES (?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (topic, sha256)
    DO UPDATE SET times = times + 1, last_utc = excluded.last_utc"""
TRIM_REJECTED = f"""DELETE FROM rejected WHERE rowid IN
    (SELECT rowid FROM rejected ORDER BY last_utc DESC LIMIT -1 OFFSET {MAX_REJECTED})"""


class SqliteStore:
    """A Store in the file `path`, made where there is none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"SqliteStore({str(self.path)!r})"

    def open(self) -> None:
        """Open the file. Raises StoreError if it is no database of ours."""
        self.close()
        try:
            connection = sqlite3.connect(
                self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}: check that the folder exists and may be written") from error
        try:
            _prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            raise StoreError(f"{self.path}: {error}") from error
        except StoreError as error:
            connection.close()
            raise StoreError(f"{self.path}: {error}") from error
        self._connection = connection

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def commit(self, batch: Batch) -> None:
        """Store the batch in one transaction that is on the disk when this returns."""
        with self._transaction() as connection:
            connection.executemany(INSERT_VERDICT, [_verdict_row(verdict) for verdict in batch.verdicts])
            connection.executemany(
                "DELETE FROM gap WHERE station = ? AND epoch = ? AND first = ?",
                [(gap.station, gap.epoch, gap.first) for gap in batch.closed_gaps],
            )
            connection.executemany(INSERT_GAP, [_gap_row(gap) for gap in batch.new_gaps])
            for row in batch.rejected:
                moment = timestamp(row.received_utc)
                fields = (row.topic, row.sha256, row.reason, row.size_bytes, row.payload, moment, moment)
                connection.execute(UPSERT_REJECTED, fields)
            if batch.rejected:
                connection.execute(TRIM_REJECTED)
            connection.executemany(
                UPSERT_PROGRESS,
                [(made.station, made.epoch, made.root, made.begins, made.upto) for made in batch.progress],
            )

    def epochs(self) -> list[StoredEpoch]:
        """Return every epoch, in the order in which they were first seen."""
        with self._reading() as connection:
            rows = connection.execute("SELECT station, epoch, root, begins, upto FROM progress ORDER BY rowid")
            return [_stored_epoch(connection, Progress(*row)) for row in rows.fetchall()]

    def find(self, key: Key) -> Verdict | None:
        """Return one verdict."""
        with self._reading() as connection:
            query = f"SELECT {COLUMNS} FROM verdict WHERE station = ? AND epoch = ? AND seq = ?"
            row = connection.execute(query, key).fetchone()
        return None if row is None else _verdict(row)

    def after(self, position: int, limit: int) -> list[Placed]:
        """Return the next verdicts in the order of arrival."""
        with self._reading() as connection:
            query = f"SELECT position, {COLUMNS} FROM verdict WHERE position > ? ORDER BY position LIMIT ?"
            rows = connection.execute(query, (position, limit)).fetchall()
        return [Placed(row[0], _verdict(row[1:])) for row in rows]

    def handed_over(self, consumer: str) -> int:
        """Return the position up to which the consumer's loop has had everything."""
        with self._reading() as connection:
            row = connection.execute("SELECT position FROM handed_over WHERE consumer = ?", (consumer,)).fetchone()
        return 0 if row is None else int(row[0])

    def set_handed_over(self, consumer: str, position: int) -> None:
        """Remember that."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO handed_over VALUES (?, ?)", (consumer, position))

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection to one caller; what SQLite says comes as StoreError."""
        with self._lock:
            if self._connection is None:
                raise StoreError(f"{self.path} is not open")
            try:
                yield self._connection
            except (sqlite3.DataError, sqlite3.IntegrityError, OverflowError, UnicodeEncodeError) as error:
                raise RowRefused(f"{self.path} refuses a row: {error}") from error
            except sqlite3.Error as error:
                raise StoreError(f"{self.path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Lend the connection for a transaction: committed at the end, undone on any error."""
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the database durable, and its tables where there are none."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        if connection.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is not None:
            raise StoreError("holds tables of something else: name another file")
        for statement in TABLES.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    elif version != SCHEMA_VERSION:
        raise StoreError(f"was written by version {version} of the tables, this is {SCHEMA_VERSION}: update")
    connection.execute("COMMIT")


def _stored_epoch(connection: sqlite3.Connection, progress: Progress) -> StoredEpoch:
    key = (progress.station, progress.epoch)
    above = connection.execute(
        "SELECT seq FROM verdict WHERE station = ? AND epoch = ? AND seq > ? ORDER BY seq", (*key, progress.upto)
    )
    gaps = connection.execute("SELECT * FROM gap WHERE station = ? AND epoch = ? ORDER BY first", key)
    return StoredEpoch(
        progress,
        ranges([row[0] for row in above]),
        [_gap(row) for row in gaps],
    )


def _verdict_row(verdict: Verdict) -> tuple[Any, ...]:
    return (
        *verdict.key,
        verdict.run,
        verdict.trigger,
        verdict.outcome,
        verdict.reason,
        verdict.score,
        verdict.threshold,
        verdict.part_id,
        verdict.product,
        None if verdict.created_utc is None else timestamp(verdict.created_utc),
        timestamp(verdict.received_utc),
        verdict.text,
    )


def _gap_row(gap: Gap) -> tuple[Any, ...]:
    return gap.station, gap.epoch, gap.first, gap.last, gap.reason, timestamp(gap.noted_utc)


def _gap(row: Sequence[Any]) -> Gap:
    station, epoch, first, last, reason, noted = row
    return Gap(station, epoch, first, last, reason, datetime.fromisoformat(noted))


def _verdict(row: Sequence[Any]) -> Verdict:
    fields = dict(zip(COLUMNS.split(", "), row, strict=True))
    created = fields.pop("created_utc")
    received_utc, text = datetime.fromisoformat(fields.pop("received_utc")), fields.pop("message")
    created_utc = None if created is None else datetime.fromisoformat(created)
    return Verdict(**fields, created_utc=created_utc, received_utc=received_utc, text=text)
