"""The durable outbox: verdicts stay here until every consumer has them, over restarts, power cuts and full disks.

`Outbox` keeps them in a folder:

    outbox.db, -wal, -shm   the verdicts that wait, and those in quarantine: `agent.outbox.database`
    last-seq                second opinion on where the database ends
    outbox.lock             held by the process that uses the folder
    heatmaps/               the bounded spool: `agent.outbox.spool`
    reserve-*               space for the last verdicts, and for acknowledging on a full disk
    damaged-{utc}/          a database that could not be trusted, kept for export: `agent.outbox.folder`

Every seq of an epoch is accounted for: it is read as what was stored, or as `missing`, or all consumers have it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from agent.errors import OutboxFull, StorageError
from agent.outbox.contact import Contact, old_copy
from agent.outbox.database import Damaged, Database, Row, Taken
from agent.outbox.folder import TOLD, OutboxSettings, describe, locked, set_aside, untold
from agent.outbox.memory import Batch, MemoryOutbox
from agent.outbox.space import Space
from agent.outbox.spool import SpooledHeatmap
from agent.publishing.messages import Alarm, encode, missing_message

__all__ = ["MemoryOutbox", "Outbox", "OutboxSettings", "Row", "Taken"]

log = logging.getLogger(__name__)

SAVE_ROWS = 256  # acknowledged rows, or
SAVE_S = 1.0  # age, after which an acknowledgement is written down; until then a crash costs duplicates


class Outbox:
    """One station's verdicts on their way. `store` is for one thread, all else for any others, all at the same time.

    When the database cannot be trusted any more, in either thread, it is set aside and another one with a new `epoch`
    takes its place, with a `missing` in its first row that tells what happened. Whoever reads compares `epoch` before
    he goes on with a seq that he remembers; a seq of the old epoch is refused by `acknowledge` and `quarantine`.
    """

    def __init__(self, settings: OutboxSettings, station: str) -> None:
        """Raises StorageError: folder not usable, in use by another process, of another station, or disk full."""
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
        self._lock = locked(self._folder, make=True)
        self._space = Space(settings)
        self._spool = self._space.spool
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock)
            self._space.reserve.refill(margin=0)
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
            self._space.refusal = str(error)
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
                self._space.complain(f"cannot be read: {refusal}")
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

    @property
    def contact(self) -> Contact:
        """What consumers can have of this epoch."""
        return Contact(0, in_touch=True) if self._database is None else self._database.contact

    @property
    def is_new_epoch(self) -> bool:
        """True where the epoch began in this run."""
        return self._database is None or self._database.is_new

    def witness(self, seq: int) -> Row | None:
        """Return a row that all consumers have, if it is the last such one: sent again, it makes them answer."""
        with self._reading:
            try:
                return None if self._database is None else self._database.rows(seq, seq).get(seq)
            except StorageError:  # whoever reads what waits will see to it
                return None

    def note_contact(self, *, heard: str = "") -> None:
        """Note that rows stored in this run may be handed out; heard: a consumer that said what can be true."""
        with self._delivering, self._writing:
            database = self._database
            if database is None:
                return
            doubted = "" if heard == database.contact.doubted else database.contact.doubted
            contact = replace(database.contact, in_touch=True, doubted=doubted)
            try:
                self._space.insist(lambda: database.note_contact(contact), storing=False)
            except Damaged as damage:
                self._set_aside(database, damage)
            except OutboxFull as refusal:  # the next batch writes it down; a crash until then may cost duplicates
                database.contact = contact
                self._space.complain(f"contact not written: {refusal}")

    def renew(self, consumer: str, upto: int) -> bool:
        """Begin a new epoch, because a consumer has more of this one than this file can have handed out.

        False, for the moment: other consumers do not have what was certainly handed out, or the disk refuses.
        """
        with self._delivering, self._writing, self._reading:
            database = self._database
            if database is None or consumer not in database.acknowledged:
                return False
            certain = database.contact.certain
            lacking = [name for name, acked in database.acknowledged.items() if name != consumer and acked < certain]
            self._space.tell_of_copy(old_copy(database.epoch, certain, (consumer, upto), lacking))
            if lacking:
                return False
            try:
                self._space.insist(lambda: database.renew(consumer), storing=False)
                self._space.begin(database.epoch, 0)
            except StorageError as refusal:
                self._space.complain(f"no new epoch: {refusal}")
            self.epoch = database.epoch
            return database.is_new

    def set_consumers(self, names: Collection[str]) -> None:
        """Wait for these consumers from now on: new ones from the first seq that is kept, others are forgotten."""
        with self._delivering, self._writing:
            self._consumers = frozenset(names)
            database = self._database
            if database is None or set(database.acknowledged) == self._consumers:
                return
            database.wait_for(self._consumers)
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
        return self._space.alarms(self.waiting, 0 if self._database is None else self._database.quarantined)

    def close(self) -> None:
        """Save the acknowledgements and let go of the folder. Never raises, may be called twice."""
        with self._writing, self._reading:
            database, self._database = self._database, None
            if database is not None:
                try:
                    database.save_acknowledged(everything=True)
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
        self._space.refusal = ""
        return stored

    def _store(self, database: Database, batch: Batch, taken: Taken | None) -> list[dict[str, Any]]:
        if not batch:
            return []
        self._space.reserve.refill(margin=2)
        first, stored = database.last_seq + 1, False
        try:
            numbers = enumerate(batch, start=first)
            messages = [self._space.spooled(*item, epoch=database.epoch, seq=seq) for seq, item in numbers]
            rows = [Row(message["seq"], "verdict", encode(message)) for message in messages]
            size = sum(len(row.payload) for row in rows)
            self._space.check(database, size, lambda: self._save_acknowledged(database, now=True))
            self._space.insist(lambda: database.append(rows, taken), storing=True)
            stored = True
        finally:
            if not stored:
                for seq in range(first, first + len(batch)):
                    self._spool.remove(seq)
        return messages

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
            for row in self._as_missing(database, spoilt, "lost or damaged in the station's database"):
                found[row.seq] = row
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
                    self._space.insist(lambda: database.replace(rows, why), storing=False)
                except OutboxFull as refusal:
                    self._space.complain(f"quarantine not written: {refusal}")
        return rows

    def _missing(self, database: Database, seq: int, why: str) -> Row:
        message = missing_message(self._station, epoch=database.epoch, first=seq, last=seq, why=why)
        return Row(seq, "missing", encode(message))

    def _save_acknowledged(self, database: Database, *, now: bool = False) -> None:
        """Write down what is due; where the disk takes nothing at all it stays in memory for the next time."""
        behind = database.floor - database.removed
        unsaved = behind or database.acknowledged != database.saved[0]
        many = behind >= SAVE_ROWS and not self._storing and not self._space.complaint
        if not now and not many and not (unsaved and time.monotonic() - self._saved_s >= SAVE_S):
            return
        self._saved_s = time.monotonic()
        with self._writing:
            if database is not self._database:
                return
            try:
                everything = now or bool(self._space.reserve.missing)
                self._space.insist(lambda: database.save_acknowledged(everything=everything), storing=False)
                self._space.complain("")
            except OutboxFull as refusal:
                self._space.complain(f"acknowledgements not written: {refusal}")
            if self._space.reserve.missing:
                database.checkpoint()
                self._space.reserve.refill(margin=2)

    def _usable(self) -> Database:
        """Return the database, opened or begun anew if there is none. Raises StorageError."""
        if self._database is None:
            try:
                self._space.insist(self._open, storing=False)
            except Damaged as damage:
                self._set_aside(None, damage)
        if self._database is None:
            self._space.insist(self._open, storing=False)
        assert self._database is not None
        return self._database

    def _open(self) -> None:
        database = Database(self._folder, self._station, autocheckpoint_pages=self._space.log_pages)
        with contextlib.ExitStack() as undo:
            undo.callback(database.close)
            if self._consumers is not None:
                database.wait_for(self._consumers)
            for aside in untold(self._folder):
                database.append([self._missing(database, database.last_seq + 1, describe(aside))])
                self._space.note(aside / TOLD)
            self._space.begin(database.epoch, database.last_seq)
            undo.pop_all()
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
                self._space.insist(lambda: set_aside(self._folder, str(cause)), storing=False)
                self._space.insist(self._open, storing=False)
            except StorageError as error:
                log.error("%s: no new database: %s", self._folder, error)
