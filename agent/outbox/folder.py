"""The outbox's folder as a person sees it: who uses it, what was set aside, and all that waits, for export."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.errors import InUse, OutboxFull, StorageError
from agent.outbox.database import FILE, FILES, Damaged, read_about, reading
from agent.outbox.mark import read_mark
from agent.outbox.rows import intact

log = logging.getLogger(__name__)

LOCK = "outbox.lock"
DAMAGED = "damaged-"
TOLD = "told"  # in a damaged folder: a `missing` row tells of it
CAUSE = "cause"
MOST_PROBES = 100_000  # unreadable rows in a row, after which the rest counts as unreadable
COUNT_S = 1.0  # how long a line may wait while the readable rows of a damaged database are counted


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """Where, and how much."""

    folder: Path
    heatmap_mb: float = 64.0  # of heatmaps that wait; the oldest go first
    max_mb: float = 2048.0  # of verdicts that wait; beyond it nothing is stored
    reserve_mb: float = 8.0  # kept free on the disk for the last verdicts and for acknowledging


@dataclass(frozen=True, slots=True)
class KeptRow:
    """One message that was not delivered to everyone, as a person exports it."""

    state: str  # "waiting" | "quarantined" (refused, or damaged on the disk) | "set aside" (its whole database was)
    epoch: str  # "" where even that is lost
    seq: int
    topic: str
    payload: bytes  # empty where the row itself was lost
    intact: bool  # exactly what was once stored
    why: str


def locked(folder: Path, *, make: bool = False) -> int:
    """Return a descriptor that keeps all other processes out of the folder until it is closed.

    Raises StorageError if the folder cannot be used, or another process uses it.
    """
    try:
        if make:
            _make(folder)
        lock = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o644)
    except OSError as error:
        wanted = "give the outbox a folder it can write" if make else "name the folder of an outbox"
        raise StorageError(f"{folder}: {error.strerror}: {wanted}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise InUse(
            f"{folder}: used by another process, one at a time may: stop the agent of this station first"
        ) from error
    return lock


def outboxes(folder: Path) -> list[Path]:
    """Return the folders of the outboxes that a station keeps here: its own, or one for each of its cameras."""
    places = [folder, *sorted(folder.glob("*/"))]
    return [
        place
        for place in places
        if not place.name.startswith(DAMAGED)
        and ((place / FILE).exists() or (place / LOCK).exists() or any(place.glob(f"{DAMAGED}*")))
    ]


def kept_rows(folder: Path) -> Iterator[KeptRow]:
    """Yield all that waits, is in quarantine or was set aside with a damaged database, as far as it can be read.

    Changes nothing; no agent may run meanwhile. Raises StorageError if there is no outbox, or it is in use.
    """
    lock = locked(folder)
    try:
        for aside in sorted(folder.glob(f"{DAMAGED}*")):
            yield from _rows_of(aside, state="set aside", why=_cause(aside))
        yield from _rows_of(folder, state="waiting", why="")
    finally:
        os.close(lock)


def discard(folder: Path) -> int:
    """Delete what is in quarantine and what was set aside, and return how many databases and rows that were.

    Raises StorageError if there is no outbox, it is in use, or it cannot be written.
    """
    lock = locked(folder)
    try:
        aside = sorted(folder.glob(f"{DAMAGED}*"))
        rows = 0
        if (folder / FILE).exists():
            with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as connection:
                rows = connection.execute("DELETE FROM quarantine").rowcount
        for one in aside:
            shutil.rmtree(one)
    except (OSError, sqlite3.Error) as error:
        raise StorageError(f"{folder}: {error}: nothing more was discarded; check the disk") from error
    finally:
        os.close(lock)
    return rows + len(aside)


def set_aside(folder: Path, cause: str) -> None:
    """Move the database's files into a folder of their own. Raises OutboxFull where the disk refuses."""
    target = folder / f"{DAMAGED}{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    log.error("%s: database damaged: %s: set aside in %s", folder, cause, target.name)
    try:
        target.mkdir()
        for name in FILES:
            if (folder / name).exists():
                (folder / name).rename(target / name)
        with contextlib.suppress(OSError):
            (target / CAUSE).write_text(cause, encoding="utf-8")
    except OSError as error:
        raise OutboxFull(str(error.strerror)) from error


def untold(folder: Path) -> list[Path]:
    """Return the damaged databases of which no `missing` row tells yet, oldest first."""
    return [aside for aside in sorted(folder.glob(f"{DAMAGED}*")) if not (aside / TOLD).exists()]


def describe(aside: Path) -> str:
    """Return for the consumers what was lost with a damaged database, counting for a second at most."""
    deadline_s = time.monotonic() + COUNT_S
    rows = _rows_of(aside, state="set aside", why="")
    counted = list(itertools.takewhile(lambda _: time.monotonic() < deadline_s, (row for row in rows if row.intact)))
    epoch, last = _identity(aside)
    known = f"its epoch {epoch} ended at seq {last} or later" if epoch else "its epoch is not known"
    return (
        f"the station's database was damaged ({_cause(aside)[:150]}): {known}; what was not acknowledged by then will "
        f"not come; {len(counted)} undelivered messages can still be read in {aside.name} on the station: export them"
    )


def _make(folder: Path) -> None:
    """Make the folder and those above it, so that a power cut cannot take them away again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cause(aside: Path) -> str:
    try:
        return (aside / CAUSE).read_text(encoding="utf-8")
    except OSError:
        return "cause not noted"


def _identity(folder: Path) -> tuple[str, int]:
    """Return (epoch, last seq) as far as anything still tells, else ("", 0)."""
    epoch, last = read_mark(folder) or ("", 0)
    with contextlib.suppress(sqlite3.Error, Damaged), reading(folder) as connection:
        if not epoch:
            epoch = str(read_about(connection, "identity")["epoch"])
        last = max(last, int(read_about(connection, "last_seq")))
    return epoch, last


def _rows_of(folder: Path, *, state: str, why: str) -> Iterator[KeptRow]:
    epoch, last = _identity(folder)
    with contextlib.suppress(sqlite3.Error), reading(folder) as connection:
        connection.execute("PRAGMA query_only = ON")
        with contextlib.suppress(sqlite3.Error):
            refused = "SELECT seq, topic, payload, checksum, why FROM quarantine ORDER BY rowid"
            for *row, reason in connection.execute(refused):
                yield _kept("quarantined", epoch, row, str(reason))
        floor = 0
        with contextlib.suppress(sqlite3.Error, Damaged):
            floor = int(read_about(connection, "acknowledged")["floor"])
        for row in _walk(connection, floor + 1, last):
            yield _kept(state, epoch, row, why)


def _kept(state: str, epoch: str, row: list[object], why: str) -> KeptRow:
    seq, topic, payload, stored = row
    data = payload if isinstance(payload, bytes) else str(payload or "").encode()
    number = seq if isinstance(seq, int) else 0
    return KeptRow(state, epoch, number, str(topic or ""), data, intact=intact(seq, topic, payload, stored), why=why)


def _walk(connection: sqlite3.Connection, first: int, last: int) -> Iterator[list[object]]:
    """Yield the rows that can be read; where a page cannot, go on behind it."""
    query = "SELECT seq, topic, payload, checksum FROM waiting WHERE seq BETWEEN ? AND ? ORDER BY seq"
    probes = 0
    while first <= last and probes < MOST_PROBES:
        try:
            for row in connection.execute(query, (first, last)):
                if not first <= row[0] <= last:
                    break  # the tree is knotted here
                first, probes = row[0] + 1, 0
                yield list(row)
            else:
                return
        except sqlite3.Error:
            pass
        first += 1
        probes += 1
