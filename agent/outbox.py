"""The durable outbox: verdicts stay here until every consumer has them, over restarts, power cuts and full disks.

`Outbox` keeps them in a folder:

    outbox.db, -wal, -shm   the verdicts that wait, and those in quarantine: `agent.outbox_database`
    last-seq                second opinion on where the database ends
    outbox.lock             held by the process that uses the folder
    heatmaps/               the bounded spool: `agent.spool`
    reserve-*               space for the last verdicts, and for acknowledging on a full disk
    damaged-{utc}/          a database that could not be trusted, kept for export: `agent.outbox_folder`

Every seq of an epoch is accounted for: it is read as what was stored, or as `missing`, or all consumers have it.
`MemoryOutbox` numbers verdicts and keeps them nowhere but in memory: for a station without a broker, and for tests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from typing import Any

from agent.errors import OutboxFull, StorageError
from agent.messages import Alarm, HeatmapPayload, encode, missing_message, numbered
from agent.outbox_database import PAGE_BYTES, Damaged, Database, Row, Taken
from agent.outbox_folder import DAMAGED, TOLD, OutboxSettings, describe, locked, set_aside, untold
from agent.outbox_memory import Batch, MemoryOutbox
from agent.spool import RESERVES, Reserve, Room, Spool, SpooledHeatmap

__all__ = ["MemoryOutbox", "Outbox", "OutboxSettings", "Row", "Taken"]

log = logging.getLogger(__name__)

HEATMAPS = "heatmaps"
SAVE_ROWS = 256  # acknowledged rows, or
SAVE_S = 1.0  # age, after which an acknowledgement is written down; until then a crash costs duplicates
ALARM_SHARE = 0.5  # of max_mb in use: a person should know long before the station halts


class Outbox:
    """One station's verdicts on their way. `store` is for one thread, all else for any others, all at the same time.

    When the database cannot be trusted any more, in either thread, it is set aside and another one with a new `epoch`
    takes its place, with a `missing` in its first row that tells what happened. Whoever reads compares `epoch` before
    he goes on with a seq that he remembers; a seq of the old epoch is refused by `acknowledge` and `quarantine`.
    """

    def __init__(self, settings: OutboxSettings, station: str) -> None:
        """Raises StorageError: folder not usable, in use by another process, of another station, or disk full."""
        self._settings = settings
        self._station = station
        self._folder = settings.folder
        self._delivering = threading.RLock()  # first of the three; never taken to store
        self._writing = threading.RLock()  # taken before _reading where both are needed
        self._reading = threading.Lock()
        self._database: Database | None = None
        self.epoch = ""  # 12 hex digits, those of the database in use
        self._consumers: frozenset[str] | None = None  # None: as the database says
        self._saved_s = time.monotonic()
        self._storing = False  # a verdict waits for the disk: what is not urgent stands back
        self._refusal = ""  # why the last batch was not stored
        self._share_per_row = 0.0  # of max_mb, when a batch was last stored
        self._complaint = ""  # what the disk refuses the deliverer
        self._lock = locked(self._folder, make=True)
        reserve = int(settings.reserve_mb * 1e6)
        self._pages = min(256, max(16, reserve // len(RESERVES) // 4 // PAGE_BYTES))  # of the log, before a checkpoint
        self._spool = Spool(self._folder / HEATMAPS, settings.heatmap_mb * 1e6)
        self._reserve = Reserve(self._folder, reserve)
        self._room = Room(self._folder, self._spool, self._reserve)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock)
            self._reserve.refill(margin=0)
            self._usable()
            undo.pop_all()

    @property
    def first_seq(self) -> int:
        """Lowest seq that some consumer has not; last_seq + 1 where nothing waits."""
        return 1 if self._database is None else self._database.floor + 1

    @property
    def last_seq(self) -> int:
        """Highest seq stored; 0 in the beginning."""
        return 0 if self._database is None else self._database.last_seq

    @property
    def waiting(self) -> int:
        """How many seqs some consumer has not."""
        return self.last_seq - self.first_seq + 1

    @property
    def heatmaps_shed(self) -> int:
        """Heatmaps that were dropped to make room, refused by the disk, or found damaged, since the start."""
        return self._spool.shed_count

    @property
    def heatmaps_waiting(self) -> int:
        """Heatmaps in the spool."""
        return len(self._spool)

    @property
    def taken(self) -> Taken | None:
        """What `store` was last told about where its rows came from; None: nothing."""
        return None if self._database is None else self._database.taken

    def store(self, batch: Batch, taken: Taken | None = None) -> list[dict[str, Any]]:
        """Number the messages and put them on the disk, all or none; return them as they will be published.

        A heatmap that could not be kept is no longer linked. On a full disk heatmaps go first, then the reserve.
        taken: how far their source is used up, written down in the same transaction.

        Raises OutboxFull or StorageError, with nothing stored and no seq used up; ValueError on a message with NaN.
        """
        self._storing = True
        try:
            with self._writing:
                return self._store_or_begin_anew(batch, taken)
        except StorageError as error:
            self._refusal = str(error)
            raise
        finally:
            self._storing = False

    def read(self, after: int, limit: int) -> list[Row]:
        """Return up to `limit` rows with seq > after that some consumer has not, in order and without gaps.

        A row that was lost or is not what was written comes as `missing`. Nothing comes of a seq beyond last_seq.
        """
        with self._delivering:
            database = self._database
            if database is None:
                return []
            try:
                self._save_acknowledged(database)
                return self._read(database, max(after, database.floor) + 1, limit)
            except Damaged as damage:
                self._set_aside(database, damage)
            except OutboxFull as refusal:
                self._complain(f"cannot be read: {refusal}")
            return []

    def acknowledge(self, consumer: str, upto: int) -> bool:
        """Note that a consumer safely has every seq up to `upto`; rows that all have are deleted.

        Written to the disk after 256 rows, after a second, and in `close`; until then a crash brings rows back that
        the consumer has already, never less. False, and nothing noted: the consumer is not known, or `upto` is beyond
        what was handed out (of another epoch, say).
        """
        with self._delivering:
            database = self._database
            if database is None or consumer not in database.acknowledged or not 0 <= upto <= database.offered:
                return False
            if upto > database.acknowledged[consumer]:
                database.acknowledged[consumer] = upto
                database.floor = max(database.floor, min(database.acknowledged.values()))
            try:
                self._save_acknowledged(database)
            except Damaged as damage:
                self._set_aside(database, damage)
                return False
            return True

    def acknowledged(self) -> dict[str, int]:
        """Return up to which seq each consumer has everything."""
        return {} if self._database is None else dict(self._database.acknowledged)

    def set_consumers(self, names: Collection[str]) -> None:
        """Wait for these consumers from now on: new ones from the first seq that is kept, others are forgotten."""
        with self._delivering, self._writing:
            self._consumers = frozenset(names)
            database = self._database
            if database is None or set(database.acknowledged) == self._consumers:
                return
            known = database.acknowledged
            database.acknowledged = {name: known.get(name, database.floor) for name in sorted(self._consumers)}
            database.floor = max(database.floor, min(database.acknowledged.values(), default=0))
            try:
                self._save_acknowledged(database, now=True)
            except Damaged as damage:
                self._set_aside(database, damage)

    def quarantine(self, seq: int, why: str) -> Row:
        """Put a row aside that can never be delivered, for export; return the `missing` that has its place.

        Raises StorageError if the row was never handed out or all consumers have it.
        """
        with self._delivering:
            database = self._database
            if database is None or not database.floor < seq <= database.offered:
                raise StorageError(f"seq {seq} cannot be put into quarantine: it does not wait in epoch {self.epoch}")
            try:
                with self._reading:
                    row = database.rows(seq, seq).get(seq) if database is self._database else None
                if row is None or row.topic != "missing":
                    row = self._as_missing(database, [seq], why)[0]
                    self._spool.remove(seq)
            except Damaged as damage:
                self._set_aside(database, damage)
                raise StorageError(f"seq {seq}: its database was damaged and set aside") from damage
            return row

    def next_heatmap(self, upto: int, after: int = 0) -> SpooledHeatmap | None:
        """Return the oldest whole heatmap with after < seq <= upto; it stays until `remove_heatmap`."""
        return self._spool.oldest(upto, after)

    def remove_heatmap(self, seq: int) -> None:
        """Drop a heatmap, if it is there."""
        self._spool.remove(seq)

    def alarms(self) -> list[Alarm]:
        """Return what a person should see to, as of now."""
        quarantined = 0 if self._database is None else self._database.quarantined
        damaged = len(list(self._folder.glob(f"{DAMAGED}*")))
        low = "the disk has no room for the reserve: make room" if self._reserve.missing else ""
        if (filled := self._share_per_row * self.waiting) > ALARM_SHARE:
            low = f"{self.waiting} verdicts wait and fill {filled:.0%} of outbox.max_mb: bring the consumers back"
        found = {
            "storage_full": self._refusal,
            "storage_low": low,
            "verdicts_quarantined": f"{quarantined} messages in quarantine: export them" if quarantined else "",
            "database_damaged": f"{damaged} databases set aside: check the disk, export them" if damaged else "",
        }
        return [Alarm(code, detail) for code, detail in found.items() if detail]

    def close(self) -> None:
        """Save the acknowledgements and let go of the folder. Never raises, may be called twice."""
        with self._writing, self._reading:
            database, self._database = self._database, None
            if database is not None:
                try:
                    database.save_acknowledged()
                    while database.floor > database.removed:
                        database.save_acknowledged()
                except StorageError as error:
                    log.warning("%s: acknowledgements not saved: %s: consumers get some again", self._folder, error)
                database.close()
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _store_or_begin_anew(self, batch: Batch, taken: Taken | None) -> list[dict[str, Any]]:
        if self._lock < 0:
            raise StorageError(f"{self._folder}: the outbox is closed")
        try:
            stored = self._store(self._usable(), batch, taken)
        except Damaged as damage:
            self._set_aside(self._database, damage)
            stored = self._store(self._usable(), batch, taken)
        self._refusal = ""
        return stored

    def _store(self, database: Database, batch: Batch, taken: Taken | None) -> list[dict[str, Any]]:
        if not batch:
            return []
        self._reserve.refill(margin=2)
        first, stored = database.last_seq + 1, False
        try:
            messages = [self._spooled(database, seq, *item) for seq, item in enumerate(batch, start=first)]
            rows = [Row(message["seq"], "verdict", encode(message)) for message in messages]
            self._check_room(database, sum(len(row.payload) for row in rows))
            self._room.insist(lambda: database.append(rows, taken), storing=True)
            stored = True
        finally:
            if not stored:
                for seq in range(first, first + len(batch)):
                    self._spool.remove(seq)
        return messages

    def _spooled(
        self, database: Database, seq: int, message: dict[str, Any], heatmap: HeatmapPayload | None
    ) -> dict[str, Any]:
        kept = heatmap is not None and self._spool.put(seq, heatmap, refuse=bool(self._reserve.missing))
        if not kept:
            message = {**message, "heatmap": None}
        return numbered(message, epoch=database.epoch, seq=seq)

    def _check_room(self, database: Database, size: int) -> None:
        """Refuse what max_mb, or the space that acknowledging needs, does not leave room for."""
        most = self._settings.max_mb * 1e6
        used = database.used_bytes() + size
        self._share_per_row = used / most / (database.last_seq - database.removed + 1)
        if used > most:
            self._save_acknowledged(database, now=True)
            if database.used_bytes() + size > most:
                raise OutboxFull(
                    f"{self._folder}: {database.last_seq - database.floor} verdicts wait and fill "
                    f"{self._settings.max_mb:g} MB, all it may hold: bring the consumers back, then resume"
                )
        if RESERVES[0] in self._reserve.missing and database.free_bytes() < 2 * size + 16 * PAGE_BYTES:
            raise OutboxFull(f"{self._folder}: disk full, the reserve is used up: make room, then resume")

    def _read(self, database: Database, first: int, limit: int) -> list[Row]:
        last = min(database.last_seq, first + limit - 1)  # before the query: what is stored meanwhile is no gap
        if first > last:
            return []
        with self._reading:
            if database is not self._database:
                return []
            found = database.rows(first, last)
        spoilt = [seq for seq in range(first, last + 1) if found.get(seq) is None]
        if spoilt:
            log.error("%s: %d verdicts from seq %d on are lost or damaged", self._folder, len(spoilt), spoilt[0])
            why = "lost or damaged in the station's database"
            found |= {row.seq: row for row in self._as_missing(database, spoilt, why)}
        if database is not self._database:
            return []
        database.offered = max(database.offered, last)
        return [row for _, row in sorted(found.items()) if row is not None]

    def _as_missing(self, database: Database, seqs: Sequence[int], why: str) -> list[Row]:
        """Return a `missing` for each seq, put in its place; where the disk takes nothing at all, only returned."""
        rows = [self._missing(database, seq, why) for seq in seqs]
        with self._writing:
            if database is self._database:
                try:
                    self._room.insist(lambda: database.replace(rows, why), storing=False)
                except OutboxFull as refusal:
                    self._complain(f"quarantine not written: {refusal}")
        return rows

    def _missing(self, database: Database, seq: int, why: str) -> Row:
        message = missing_message(self._station, epoch=database.epoch, first=seq, last=seq, why=why)
        return Row(seq, "missing", encode(message))

    def _save_acknowledged(self, database: Database, *, now: bool = False) -> None:
        """Write down what is due; where the disk takes nothing at all it stays in memory for the next time."""
        behind = database.floor - database.removed
        unsaved = behind or database.acknowledged != database.saved[0]
        many = behind >= SAVE_ROWS and not self._storing and not self._complaint
        if not now and not many and not (unsaved and time.monotonic() - self._saved_s >= SAVE_S):
            return
        self._saved_s = time.monotonic()
        with self._writing:
            if database is not self._database:
                return
            try:
                self._room.insist(database.save_acknowledged, storing=False)
                while (now or self._reserve.missing) and database.floor > database.removed:
                    database.checkpoint()
                    database.save_acknowledged()
                self._complain("")
            except OutboxFull as refusal:
                self._complain(f"acknowledgements not written: {refusal}")
            if self._reserve.missing:
                database.checkpoint()
                self._reserve.refill(margin=2)

    def _complain(self, complaint: str) -> None:
        """Log what the disk refuses the deliverer, once as long as it lasts."""
        if complaint and not self._complaint:
            log.error("%s: %s", self._folder, complaint)
        self._complaint = complaint

    def _usable(self) -> Database:
        """Return the database, opened or begun anew if there is none. Raises StorageError."""
        if self._database is None:
            try:
                self._room.insist(self._open, storing=False)
            except Damaged as damage:
                self._set_aside(None, damage)
        if self._database is None:
            self._room.insist(self._open, storing=False)
        assert self._database is not None
        return self._database

    def _open(self) -> None:
        database = Database(self._folder, self._station, autocheckpoint_pages=self._pages)
        try:
            if self._consumers is not None:
                known = database.acknowledged
                database.acknowledged = {name: known.get(name, database.floor) for name in sorted(self._consumers)}
            for aside in untold(self._folder):
                database.append([self._missing(database, database.last_seq + 1, describe(aside))])
                (aside / TOLD).touch()
            self._spool.begin(database.epoch, database.last_seq)
        except OSError as error:
            database.close()
            raise OutboxFull(str(error.strerror)) from error
        except StorageError:
            database.close()
            raise
        self._database, self.epoch = database, database.epoch

    def _set_aside(self, damaged: Database | None, cause: Damaged) -> None:
        """Move the damaged files away and begin anew; nothing is done where the other thread was faster."""
        with self._writing, self._reading:
            if self._database is not damaged or self._lock < 0:
                return
            if damaged is not None:
                damaged.close()
            self._database = None
            try:
                self._room.insist(lambda: set_aside(self._folder, str(cause)), storing=False)
                self._room.insist(self._open, storing=False)
            except StorageError as error:
                log.error("%s: no new database: %s", self._folder, error)
