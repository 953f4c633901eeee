"""The outbox's file: SQLite that syncs every commit, with a checksum in every row.

SQLite alone notices fewer than half of all damaged pages, hence the checksums; and it drops the end of a damaged
write-ahead log without a word, hence `last-seq`: a few bytes beside the file, written after each commit, that tell when
the file ends before what was stored.

What SQLite can say is told apart by what its owner does: `OutboxFull` where the disk does not take it (retry with more
room), `Damaged` where the file cannot be trusted (set it aside, start another).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import OutboxFull, StorageError
from agent.outbox.contact import Contact, renumber
from agent.outbox.mark import MARK, Mark, read_mark
from agent.outbox.rows import checksum, intact
from agent.publishing.messages import new_id

FORMAT = 1
FILE = "outbox.db"
FILES = (FILE, f"{FILE}-wal", f"{FILE}-shm", MARK)
PAGE_BYTES = 4096
QUICK_CHECK_BYTES = 256 * 2**20  # 0.5 ms per MB from memory, 10 ms from a slow disk: larger files open unchecked
MOST_REMOVED = 1000  # rows of one delete: 20 ms at most in which a verdict waits for its turn

_SCHEMA = (
    "CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE waiting"
    " (seq INTEGER PRIMARY KEY, topic TEXT NOT NULL, payload BLOB NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE quarantine"
    " (seq INTEGER NOT NULL, topic TEXT, payload BLOB, checksum BLOB, why TEXT NOT NULL, moved_utc TEXT NOT NULL)",
)
_REFUSED = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
    }
)
_UNREADABLE = frozenset(
    {
        sqlite3.SQLITE_IOERR_READ,
        sqlite3.SQLITE_IOERR_SHORT_READ,
        sqlite3.SQLITE_IOERR_DATA,
        sqlite3.SQLITE_IOERR_CORRUPTFS,
    }
)


class Damaged(StorageError):
    """The file is not what was written: set it aside. Never leaves the outbox."""


@dataclass(frozen=True, slots=True)
class Row:
    """One message as it is published, byte for byte the same each time."""

    seq: int
    topic: str  # "verdict" | "missing"
    payload: bytes  # JSON


@dataclass(frozen=True, slots=True)
class Taken:
    """How much of a run's records the outbox holds: written down with the rows themselves."""

    run: str
    records: int  # those with lower numbers are stored


class Database:
    """One file, one epoch. One caller at a time may write, and one other read; the outbox sees to that.

    `floor` is the seq up to which every consumer has everything; it runs ahead of what is removed from the file. The
    row at the floor stays until there is a higher one: sent again, it makes a consumer say where it stands.
    """

    def __init__(self, folder: Path, station: str, *, autocheckpoint_pages: int) -> None:
        """Open the file, or make it with a new epoch.

        Raises Damaged, OutboxFull where the disk refuses, StorageError if it is another station's or too new.
        """
        self._folder = folder
        self._mark: Mark | None = None
        self.acknowledged: dict[str, int] = {}
        self.saved: tuple[dict[str, int], int] = ({}, 0)
        self.removed = 0
        self.taken: Taken | None = None
        self.is_new = False  # made in this run: nobody can have anything of its epoch
        self.contact = self._noted = Contact(0, in_touch=True)
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        mark = read_mark(folder)
        with _translated(), contextlib.ExitStack() as undo:
            undo.callback(self.close)
            if mark is not None and not (folder / FILE).exists():
                raise Damaged(f"{FILE} is gone")
            self._writer = _connect(folder / FILE)
            if (folder / FILE).stat().st_size <= QUICK_CHECK_BYTES:
                self._quick_check()
            self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            self._writer.execute(f"PRAGMA wal_autocheckpoint = {autocheckpoint_pages}")
            if not self._writer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._create(station, trusted=mark is None)
            self._load(station, mark)
            self._reader = _connect(folder / FILE)
            self._reader.execute("PRAGMA query_only = ON")
            self._mark = Mark(folder, self.epoch, self.last_seq)
            undo.pop_all()
        self.offered = self.last_seq  # highest seq that was ever handed to the deliverer

    def append(self, rows: Sequence[Row], taken: Taken | None = None) -> None:
        """Store rows that continue the seq and where they came from, all or none; on the disk when this returns."""
        values = [(row.seq, row.topic, row.payload, checksum(row.seq, row.topic, row.payload)) for row in rows]
        with self._transaction() as writer:
            writer.executemany("INSERT INTO waiting VALUES (?, ?, ?, ?)", values)
            self._write_about("last_seq", rows[-1].seq)
            if self.contact != self._noted:
                self._write_about("contact", astuple(self.contact))
            if taken is not None:
                self._write_about("taken", [taken.run, taken.records])
        self.last_seq = rows[-1].seq
        self.taken = taken or self.taken
        self._noted = self.contact
        if self._mark is not None:
            self._mark.note(self.epoch, self.last_seq)

    def rows(self, first: int, last: int) -> dict[int, Row | None]:
        """Return what the file has of seq first..last: None for a row that is not what was written."""
        assert self._reader is not None
        found: dict[int, Row | None] = {}
        highest = first - 1
        query = "SELECT seq, topic, payload, checksum FROM waiting WHERE seq BETWEEN ? AND ? ORDER BY seq"
        with _translated():
            for seq, topic, payload, stored in self._reader.execute(query, (first, last)):
                if seq <= highest or seq > last:
                    raise Damaged(f"row {seq} follows row {highest}")
                highest = seq
                found[seq] = Row(seq, topic, payload) if intact(seq, topic, payload, stored) else None
        return found

    def replace(self, rows: Sequence[Row], why: str) -> None:
        """Put rows in the place of those with the same seq, which go into quarantine as they are."""
        moved_utc = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._transaction() as writer:
            for row in rows:
                moved = writer.execute(
                    "INSERT INTO quarantine SELECT seq, topic, payload, checksum, ?, ? FROM waiting WHERE seq = ?",
                    (why, moved_utc, row.seq),
                )
                if not moved.rowcount:  # there is nothing to keep of a lost row, but a person should know
                    nothing = (row.seq, None, None, None, why, moved_utc)
                    writer.execute("INSERT INTO quarantine VALUES (?, ?, ?, ?, ?, ?)", nothing)
                values = (row.seq, row.topic, row.payload, checksum(row.seq, row.topic, row.payload))
                writer.execute("INSERT OR REPLACE INTO waiting VALUES (?, ?, ?, ?)", values)
        self.quarantined += len(rows)

    def note_contact(self, contact: Contact) -> None:
        """Write down what consumers can have."""
        if contact != self._noted:
            with self._transaction():
                self._write_about("contact", astuple(contact))
        self.contact = self._noted = contact

    def renew(self, doubted: str) -> None:
        """Begin another epoch with the rows that cannot have been handed out before this run."""
        epoch, certain, last_seq = new_id(), self.contact.certain, self.last_seq - self.contact.certain
        acknowledged = {name: max(0, upto - certain) for name, upto in self.acknowledged.items()}
        acknowledged[doubted] = 0
        contact = Contact(0, in_touch=True, doubted=doubted)
        identity = {**self._read_about("identity"), "epoch": epoch}
        assert self._mark is not None
        self._mark.forget()
        with self._transaction() as writer:
            renumber(writer, epoch, certain, self.last_seq)
            self._write_about("identity", identity)
            self._write_about("last_seq", last_seq)
            self._write_about("acknowledged", {"floor": 0, "consumers": acknowledged})
            self._write_about("contact", astuple(contact))
        self.epoch, self.last_seq, self.is_new = epoch, last_seq, True
        self.acknowledged, self.floor, self.removed, self.offered = acknowledged, 0, 0, 0
        self.saved = (dict(acknowledged), 0)
        self.contact = self._noted = contact
        self._mark.note(epoch, last_seq)

    def save_acknowledged(self, *, everything: bool = False) -> None:
        """Write down what the consumers have and remove rows that all have, a thousand at most: see `removed`.

        Fewer are removed where the disk is full, because the log has to hold every page that changes.
        everything: go on until all such rows are removed.
        """
        self._save_some_acknowledged()
        while everything and self.floor > self.removed:
            self.checkpoint()
            self._save_some_acknowledged()

    def wait_for(self, consumers: Collection[str]) -> None:
        """Keep rows for these: new ones from the first that is kept, others are forgotten. Not written down yet."""
        known = self.acknowledged
        self.acknowledged = {name: known.get(name, self.floor) for name in sorted(consumers)}
        self.floor = max(self.floor, min(self.acknowledged.values(), default=0))

    def checkpoint(self) -> None:
        """Move the log into the file, as far as the disk lets us; the log keeps its space and begins at its start."""
        assert self._writer is not None
        with contextlib.suppress(OutboxFull), _translated():
            self._writer.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def used_bytes(self) -> int:
        """Return the size of all rows in the file, waiting and in quarantine."""
        return PAGE_BYTES * (self._count("page_count") - self._count("freelist_count"))

    def free_bytes(self) -> int:
        """Return the space inside the file that new rows can take without the disk's help."""
        return PAGE_BYTES * self._count("freelist_count")

    def close(self) -> None:
        """Close the file; the acknowledgements are the caller's to save before. May be called twice."""
        for connection in (self._reader, self._writer):
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):  # a damaged file may not even close
                    connection.close()
        self._reader = self._writer = None
        if self._mark is not None:
            self._mark.close()

    def _save_some_acknowledged(self) -> None:
        for most in (MOST_REMOVED, MOST_REMOVED // 10, MOST_REMOVED // 100):
            try:
                self._save_acknowledged(most)
                return
            except OutboxFull as refusal:
                refused = refusal
                self.checkpoint()
        raise refused

    def _save_acknowledged(self, most: int) -> None:
        acknowledged, floor = dict(self.acknowledged), self.floor
        with self._transaction() as writer:
            if (acknowledged, floor) != self.saved:
                self._write_about("acknowledged", {"floor": floor, "consumers": acknowledged})
            upto = min(floor, self.removed + most)
            writer.execute("DELETE FROM waiting WHERE seq < ?", (upto,))
        self.saved = (acknowledged, floor)
        self.removed = upto

    def _create(self, station: str, *, trusted: bool) -> None:
        if not trusted or self._count("page_count") > 1:
            raise Damaged("its tables are gone")
        with self._transaction() as writer:
            for statement in _SCHEMA:
                writer.execute(statement)
            self._write_about("identity", {"format": FORMAT, "station": station, "epoch": new_id()})
            self._write_about("last_seq", 0)
            self._write_about("acknowledged", {"floor": 0, "consumers": {}})
            self._write_about("contact", astuple(self.contact))
        self.is_new = True

    def _load(self, station: str, mark: tuple[str, int] | None) -> None:
        identity = self._read_about("identity")
        if identity["format"] != FORMAT:
            raise StorageError(
                f"{self._folder}: outbox of format {identity['format']}, this version reads {FORMAT}: "
                "let the version that wrote it deliver its verdicts, or give this one another folder"
            )
        if identity["station"] != station:
            raise StorageError(
                f"{self._folder}: outbox of station {identity['station']}, wanted {station}: "
                "give each station its own folder"
            )
        self.epoch = str(identity["epoch"])
        self.last_seq = int(self._read_about("last_seq"))
        if self._number("SELECT count(*) FROM about WHERE name = 'taken'"):
            self.taken = Taken(*self._read_about("taken"))
        book = self._read_about("acknowledged")
        self.floor = int(book["floor"])
        self.acknowledged = {str(name): int(upto) for name, upto in book["consumers"].items()}
        self.saved = (dict(self.acknowledged), self.floor)
        self.removed = self._number(f"SELECT min(coalesce(min(seq), {self.floor}), {self.floor}) FROM waiting")
        self.quarantined = self._number("SELECT count(*) FROM quarantine")
        stored = Contact(self.last_seq, in_touch=True)  # of a file from before this was written down
        if self._number("SELECT count(*) FROM about WHERE name = 'contact'"):
            stored = Contact(*self._read_about("contact"))
        self._noted = stored
        self.contact = stored if self.is_new else stored.reopened(self.last_seq)
        highest = self._number("SELECT coalesce(max(seq), 0) FROM waiting")
        if highest > self.last_seq or self.floor > self.last_seq:
            raise Damaged(f"it holds row {max(highest, self.floor)}, but says that it ends at row {self.last_seq}")
        if mark is not None and (mark[0] != self.epoch or mark[1] > self.last_seq):
            raise Damaged(
                f"it ends at row {self.last_seq} of epoch {self.epoch}, but row {mark[1]} of {mark[0]} was stored"
            )

    def _quick_check(self) -> None:
        assert self._writer is not None
        said = str(self._writer.execute("PRAGMA quick_check(1)").fetchone()[0])
        if said != "ok":
            raise Damaged(said.removeprefix("*** in database main ***").strip())

    def _write_about(self, name: str, value: Any) -> None:
        assert self._writer is not None
        text = json.dumps(value)
        values = (name, text, checksum(0, name, text.encode()))
        self._writer.execute("INSERT OR REPLACE INTO about VALUES (?, ?, ?)", values)

    def _read_about(self, name: str) -> Any:
        assert self._writer is not None
        return read_about(self._writer, name)

    def _number(self, query: str) -> int:
        assert self._writer is not None
        return int(self._writer.execute(query).fetchone()[0])

    def _count(self, pragma: str) -> int:
        with _translated():
            return self._number(f"PRAGMA {pragma}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        writer = self._writer
        assert writer is not None
        with _translated():
            writer.execute("BEGIN IMMEDIATE")
            try:
                yield writer
                writer.execute("COMMIT")
            finally:
                if writer.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        writer.execute("ROLLBACK")


def read_about(connection: sqlite3.Connection, name: str) -> Any:
    """Return a value that the outbox keeps of itself. Raises Damaged if it is not what was written."""
    found = connection.execute("SELECT value, checksum FROM about WHERE name = ?", (name,)).fetchone()
    if found is None or not isinstance(found[0], str) or found[1] != checksum(0, name, found[0].encode()):
        raise Damaged(f"its {name} is not what was written")
    return json.loads(found[0])


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """Give a connection that cannot change the file; it is closed in the end. Raises sqlite3.Error."""
    with contextlib.closing(_connect(folder / FILE, mode="ro")) as connection:
        yield connection


def _connect(path: Path, *, mode: str = "rwc") -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=5.0)
    connection.text_factory = lambda text: text.decode(errors="replace")  # damaged text is judged by its checksum
    for pragma in ("cell_size_check = ON", "trusted_schema = OFF"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what SQLite and the disk say into what the owner can do about it; our own mistakes pass as they are."""
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        if code & 0xFF in _REFUSED and code not in _UNREADABLE:
            raise OutboxFull(str(error)) from error
        raise Damaged(str(error)) from error
    except OSError as error:
        raise OutboxFull(str(error.strerror)) from error
