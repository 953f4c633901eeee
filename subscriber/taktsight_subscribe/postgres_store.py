"""A store in PostgreSQL, for plants that have one: the tables sit beside those of the MES. Needs psycopg 3."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from taktsight_subscribe.errors import MissingPackage, RowRefused, SettingsError, StoreError
from taktsight_subscribe.messages import Key, Verdict, storable
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

if TYPE_CHECKING:
    import psycopg

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 30_000
TCP_USER_TIMEOUT_MS = 25_000  # a server that went without a word, with a statement of ours on its way
WRITERS_LOCK = 0x7461_6B74  # one writer at a time, so that positions become visible in order
OURS = f"taktsight-subscribe {SCHEMA_VERSION}"  # comment on the table verdict

TABLES = f"""
CREATE TABLE verdict (
    position BIGINT GENERATED ALWAYS AS IDENTITY UNIQUE,
    station TEXT NOT NULL, epoch TEXT NOT NULL, seq BIGINT NOT NULL,
    run TEXT, trigger BIGINT, outcome TEXT NOT NULL, reason TEXT, score DOUBLE PRECISION, threshold DOUBLE PRECISION,
    part_id TEXT, product TEXT, created_utc TIMESTAMPTZ, received_utc TIMESTAMPTZ NOT NULL, message JSONB NOT NULL,
    PRIMARY KEY (station, epoch, seq));
CREATE TABLE gap (
    station TEXT NOT NULL, epoch TEXT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL,
    reason TEXT NOT NULL, noted_utc TIMESTAMPTZ NOT NULL, PRIMARY KEY (station, epoch, first));
CREATE TABLE progress (
    id BIGINT GENERATED ALWAYS AS IDENTITY,
    station TEXT NOT NULL, epoch TEXT NOT NULL, root TEXT NOT NULL, begins BIGINT, upto BIGINT NOT NULL,
    PRIMARY KEY (station, epoch));
CREATE TABLE rejected (
    topic TEXT NOT NULL, sha256 TEXT NOT NULL, reason TEXT NOT NULL, size_bytes BIGINT NOT NULL,
    payload BYTEA NOT NULL, times BIGINT NOT NULL, first_utc TIMESTAMPTZ NOT NULL, last_utc TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (topic, sha256));
CREATE TABLE handed_over (consumer TEXT PRIMARY KEY, position BIGINT NOT NULL);
COMMENT ON TABLE verdict IS '{OURS}';
"""
COLUMNS = (
    "station, epoch, seq, run, trigger, outcome, reason, score, threshold, part_id, product, "
    "created_utc, received_utc, message"
)
INSERT_VERDICT = f"INSERT INTO verdict ({COLUMNS}) VALUES ({', '.join(['%s'] * 14)}) ON CONFLICT DO NOTHING"
INSERT_GAP = "INSERT INTO gap VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
UPSERT_PROGRESS = """INSERT INTO progress (station, epoch, root, begins, upto) VALUES (%s, %s, %s, %s, %s)
    ON CONFLICT (station, epoch) DO UPDATE
    SET root = excluded.root, begins = excluded.begins, upto = greatest(progress.upto, excluded.upto)"""
UPSERT_REJECTED = """INSERT INTO rejected VALUES (%s, %s, %s, %s, %s, 1, %s, %s) ON CONFLICT (topic, sha256)
    DO UPDATE SET times = rejected.times + 1, last_utc = excluded.last_utc"""
TRIM_REJECTED = f"""DELETE FROM rejected WHERE ctid IN
    (SELECT ctid FROM rejected ORDER BY last_utc DESC OFFSET {MAX_REJECTED})"""
FIND_TABLES = "SELECT obj_description(to_regclass('verdict'), 'pg_class'), to_regclass('verdict')"


class PostgresStore:
    """A Store in the database of a connection string such as "postgresql://mes@db/plant".

    The tables are made in the first schema of the search path where there are none; with tables made beforehand, the
    right to read, insert, update and delete is enough.

    Raises MissingPackage if psycopg is not installed, SettingsError if the connection string cannot be read.
    """

    def __init__(self, conninfo: str) -> None:
        try:
            import psycopg  # noqa: PLC0415  the package is optional
        except ImportError as error:
            wanted = "pip install 'taktsight-subscribe[postgresql]'"
            raise MissingPackage(f"PostgreSQL needs psycopg 3: {wanted}") from error
        _check_conninfo(psycopg, conninfo)
        self._psycopg = psycopg
        self._conninfo = conninfo
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return "PostgresStore(...)"  # the connection string may hold a password

    def open(self) -> None:
        """Connect. Raises StoreError if there is no database, or tables of others have our names."""
        self.close()
        try:
            connection = self._psycopg.connect(
                self._conninfo,
                autocommit=True,
                connect_timeout=CONNECT_TIMEOUT_S,
                application_name="taktsight-subscribe",
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=TCP_USER_TIMEOUT_MS,
            )
        except self._psycopg.Error as error:
            raise StoreError(f"PostgreSQL: {_first_line(error)}") from error
        try:
            connection.execute(f"SET statement_timeout = {STATEMENT_TIMEOUT_MS}")
            connection.execute("SET timezone = 'UTC'")
            connection.execute("SET synchronous_commit = on")
            _prepare(connection)
        except self._psycopg.Error as error:
            connection.close()
            raise StoreError(f"PostgreSQL: {_first_line(error)}") from error
        except StoreError:
            connection.close()
            raise
        self._connection = connection

    def close(self) -> None:
        """Disconnect."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def commit(self, batch: Batch) -> None:
        """Store the batch in one transaction that the server has on its disk when this returns."""
        with self._using() as connection, connection.transaction(), connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (WRITERS_LOCK,))
            cursor.executemany(INSERT_VERDICT, [_verdict_row(verdict) for verdict in batch.verdicts])
            cursor.executemany(
                "DELETE FROM gap WHERE station = %s AND epoch = %s AND first = %s",
                [(gap.station, gap.epoch, gap.first) for gap in batch.closed_gaps],
            )
            cursor.executemany(INSERT_GAP, [_gap_row(gap) for gap in batch.new_gaps])
            for row in batch.rejected:
                fields = (row.topic, row.sha256, row.reason, row.size_bytes, row.payload)
                cursor.execute(UPSERT_REJECTED, (*fields, row.received_utc, row.received_utc))
            if batch.rejected:
                cursor.execute(TRIM_REJECTED)
            cursor.executemany(
                UPSERT_PROGRESS,
                [(made.station, made.epoch, made.root, made.begins, made.upto) for made in batch.progress],
            )

    def epochs(self) -> list[StoredEpoch]:
        """Return every epoch, in the order in which they were first seen."""
        with self._using() as connection:
            rows = connection.execute("SELECT station, epoch, root, begins, upto FROM progress ORDER BY id")
            return [_stored_epoch(connection, Progress(*row)) for row in rows.fetchall()]

    def find(self, key: Key) -> Verdict | None:
        """Return one verdict."""
        with self._using() as connection:
            query = f"SELECT {COLUMNS}::text FROM verdict WHERE station = %s AND epoch = %s AND seq = %s"
            row = connection.execute(query, key).fetchone()
        return None if row is None else Verdict(*row)

    def after(self, position: int, limit: int) -> list[Placed]:
        """Return the next verdicts in the order of arrival."""
        with self._using() as connection:
            query = f"SELECT position, {COLUMNS}::text FROM verdict WHERE position > %s ORDER BY position LIMIT %s"
            rows = connection.execute(query, (position, limit)).fetchall()
        return [Placed(row[0], Verdict(*row[1:])) for row in rows]

    def handed_over(self, consumer: str) -> int:
        """Return the position up to which the consumer's loop has had everything."""
        with self._using() as connection:
            row = connection.execute("SELECT position FROM handed_over WHERE consumer = %s", (consumer,)).fetchone()
        return 0 if row is None else int(row[0])

    def set_handed_over(self, consumer: str, position: int) -> None:
        """Remember that."""
        statement = """INSERT INTO handed_over VALUES (%s, %s)
            ON CONFLICT (consumer) DO UPDATE SET position = excluded.position"""
        with self._using() as connection:
            connection.execute(statement, (consumer, position))

    @contextmanager
    def _using(self) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        """Lend the connection to one caller; what PostgreSQL says comes as StoreError."""
        with self._lock:
            if self._connection is None:
                raise StoreError("PostgreSQL is not connected")
            try:
                yield self._connection
            except (
                self._psycopg.DataError,
                self._psycopg.IntegrityError,
                self._psycopg.errors.ProgramLimitExceeded,  # an OperationalError, and yet for good
                UnicodeEncodeError,
            ) as error:
                raise RowRefused(f"PostgreSQL refuses a row: {_first_line(error)}") from error
            except self._psycopg.Error as error:
                raise StoreError(f"PostgreSQL: {_first_line(error)}") from error


def _check_conninfo(psycopg: Any, conninfo: str) -> None:
    """Raise SettingsError, which quotes nothing, where a password would be taken for something else.

    libpq's own messages quote what they trip over: here a piece of the password.
    """
    wanted = "PostgreSQL: the connection string cannot be read: percent-encode % / @ # in the password"
    try:
        parts = psycopg.conninfo.conninfo_to_dict(conninfo)
    except psycopg.Error:
        raise SettingsError(wanted) from None
    hosts, ports = (str(parts.get(name, "")).split(",") for name in ("host", "port"))
    has_at = any("@" in name[1:] for name in (*hosts, str(parts.get("dbname", ""))))  # at first: an abstract socket
    if has_at or not all(port.isdecimal() for port in ports if port):
        raise SettingsError(wanted)


def _prepare(connection: psycopg.Connection[tuple[Any, ...]]) -> None:
    """Make the tables where there are none."""
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (WRITERS_LOCK,))
        found = connection.execute(FIND_TABLES).fetchone()
        comment, table = found if found is not None else (None, None)
        if table is None:
            for statement in TABLES.split(";\n"):
                if statement.strip():
                    connection.execute(statement.encode())
        elif comment != OURS:
            raise StoreError(
                f"PostgreSQL has a table `verdict` that is not of {OURS!r}: use another schema, as with "
                "postgresql://.../plant?options=-csearch_path%3Dtaktsight"
            )


def _stored_epoch(connection: psycopg.Connection[tuple[Any, ...]], progress: Progress) -> StoredEpoch:
    key = (progress.station, progress.epoch)
    above = connection.execute(
        "SELECT seq FROM verdict WHERE station = %s AND epoch = %s AND seq > %s ORDER BY seq", (*key, progress.upto)
    )
    gaps = connection.execute("SELECT * FROM gap WHERE station = %s AND epoch = %s ORDER BY first", key)
    return StoredEpoch(progress, ranges([row[0] for row in above]), [Gap(*row) for row in gaps])


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
        verdict.created_utc,
        verdict.received_utc,
        _jsonb(verdict.text),
    )


def _gap_row(gap: Gap) -> tuple[Any, ...]:
    return gap.station, gap.epoch, gap.first, gap.last, gap.reason, gap.noted_utc


def _jsonb(text: str) -> str:
    """Return JSON that JSONB takes: no escaped NUL, no half of a surrogate pair."""
    return json.dumps(_cleaned(json.loads(text)), ensure_ascii=False) if "\\u" in text else text


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, dict):
        return {storable(name): _cleaned(item) for name, item in value.items()}
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
