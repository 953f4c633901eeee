"""What gives way when the disk fills: a bounded spool of heatmaps, and a reserve kept for the last verdicts.

A heatmap is a file `{epoch}-{seq}-{sha256}.jpg`, written under a temporary name and renamed. It is not synced to the
disk: that would cost each part the 4 ms of a second fsync for a picture that nobody's count depends on. The digest in
its name tells a torn or damaged file when it is read, and such a file is removed, never sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import OutboxFull
from agent.publishing.messages import HeatmapPayload

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096  # what the smallest file takes on a disk
SHED_BYTES = 2**20  # of heatmaps at a time where the disk is full
RESERVES = ("acknowledging", "storing")  # the first is made first, and only acknowledging may use it up
_OURS = re.compile(r"([0-9a-f]{12})-([0-9]{12})-([0-9a-f]{64})\.jpg(\.partial)?")


@dataclass(frozen=True, slots=True)
class SpooledHeatmap:
    """One whole heatmap as it was put in."""

    seq: int
    sha256: str
    data: bytes
    content_type: str = "image/jpeg"


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    sha256: str
    size: int  # bytes on the disk


class Spool:
    """Heatmaps of one epoch that wait, in the order of their verdicts. One thread puts, another takes."""

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._epoch = ""
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # held for the list alone, never while a file is read or written
        self._refusing = False
        self.shed_count = 0  # heatmaps dropped to make room, refused by the disk, or found damaged

    def begin(self, epoch: str, last_seq: int) -> None:
        """Keep the whole heatmaps of this epoch up to last_seq; remove all others and what a crash left half written.

        A heatmap beyond last_seq was written for a verdict that was never stored. Raises OSError.
        """
        self._folder.mkdir(exist_ok=True)
        with self._lock:
            self.shed_count += len(self._entries)
            self._epoch, self._bytes = epoch, 0
            self._entries.clear()
            for path in sorted(self._folder.iterdir()):
                named = _OURS.fullmatch(path.name)
                if named is None:
                    continue  # not ours: somebody keeps notes here
                if named[1] == epoch and int(named[2]) <= last_seq and named[4] is None:
                    self._remember(int(named[2]), _Entry(path, named[3], _on_disk(path.stat().st_size)))
                else:
                    _unlink(path)
        self._shed_to(self._max_bytes)

    def put(self, seq: int, heatmap: HeatmapPayload, *, refuse: bool = False) -> bool:
        """Keep one heatmap, making room by dropping the oldest; False, and nothing kept, where the disk refuses.

        refuse: keep nothing, because the disk's last space is for verdicts; counted as shed.
        """
        path = self._folder / f"{self._epoch}-{seq:012d}-{heatmap.sha256}.jpg"
        size = _on_disk(len(heatmap.data))
        written = not refuse and size <= self._max_bytes and self._write(path, heatmap.data)
        if not written:
            self.shed_count += 1
            return False
        with self._lock:
            self._remember(seq, _Entry(path, heatmap.sha256, size))
        self._shed_to(self._max_bytes)
        return True

    def oldest(self, upto: int, after: int = 0) -> SpooledHeatmap | None:
        """Return the first whole heatmap with after < seq <= upto; damaged ones on the way are removed."""
        while True:
            with self._lock:
                found = next(((seq, entry) for seq, entry in self._entries.items() if seq > after), None)
            if found is None or found[0] > upto:
                return None
            seq, entry = found
            try:
                data = entry.path.read_bytes()
            except OSError:  # shed by the other thread, or taken away by a person
                data = b""
            if hashlib.sha256(data).hexdigest() == entry.sha256:
                return SpooledHeatmap(seq, entry.sha256, data)
            if self.remove(seq):
                self.shed_count += 1
                log.warning("heatmap of verdict %d is damaged on the disk: removed, not sent", seq)

    def remove(self, seq: int) -> bool:
        """Drop one heatmap; False if it is not there."""
        with self._lock:
            entry = self._entries.pop(seq, None)
            if entry is None:
                return False
            self._bytes -= entry.size
        _unlink(entry.path)
        return True

    def shed(self, size: int) -> bool:
        """Drop the oldest heatmaps, `size` bytes of them at least or all; False if there was none."""
        before = self._bytes
        return before > 0 and self._shed_to(max(0, before - size))

    def __len__(self) -> int:
        return len(self._entries)

    def _write(self, path: Path, data: bytes) -> bool:
        partial = path.with_name(path.name + ".partial")
        try:
            self._folder.mkdir(exist_ok=True)  # somebody may have deleted all heatmaps to make room
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            _unlink(partial)
            if not self._refusing:
                log.warning("%s: %s: verdicts go without heatmaps", self._folder, error.strerror)
            self._refusing = True
            return False
        self._refusing = False
        return True

    def _shed_to(self, most_bytes: float) -> bool:
        shed = []
        with self._lock:
            while self._entries and self._bytes > most_bytes:
                _, entry = self._entries.popitem(last=False)
                self._bytes -= entry.size
                shed.append(entry.path)
            self.shed_count += len(shed)
        for path in shed:
            _unlink(path)
        return bool(shed)

    def _remember(self, seq: int, entry: _Entry) -> None:
        self._entries[seq] = entry
        self._bytes += entry.size


class Reserve:
    """Space that is taken from the disk in good times, in two files, and given back when nothing else is left."""

    def __init__(self, folder: Path, size: float) -> None:
        """size: bytes of all files together; 0 for no reserve."""
        self._size = int(size) // len(RESERVES)
        self._paths = {name: folder / f"reserve-{name}" for name in RESERVES}
        self.missing = frozenset(RESERVES) if self._size else frozenset[str]()

    def refill(self, *, margin: int) -> None:
        """Take what is missing of the reserve as far as there is room; else leave it missing.

        margin: how many times as much must stay free behind it, for storing; acknowledging takes what it gets.
        """
        for name in RESERVES:
            wanted = 0 if name == RESERVES[0] else margin
            if name in self.missing and self._take(self._paths[name], wanted):
                self.missing -= {name}

    def release(self, name: str) -> bool:
        """Give one file's space back to the disk; False if it was not there."""
        there = self._paths[name].exists()
        _unlink(self._paths[name])
        if self._size:
            self.missing |= {name}
        return there

    def _take(self, path: Path, margin: int) -> bool:
        try:
            if path.exists() and path.stat().st_size == self._size:
                return True
            disk = os.statvfs(path.parent)
            if disk.f_bavail * disk.f_frsize < (1 + margin) * self._size:
                return False
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError:
            _unlink(path)
            return False
        return True


class Room:
    """Lets work on the disk go on where the disk is full, as long as there is something that can give way."""

    def __init__(self, folder: Path, spool: Spool, reserve: Reserve) -> None:
        self._folder = folder
        self._spool = spool
        self._reserve = reserve

    def insist(self, work: Callable[[], object], *, storing: bool) -> None:
        """Do the work; where the disk is full, drop heatmaps and then the reserve until it works or nothing is left.

        work: all or nothing, raises OutboxFull where the disk refuses. storing: leave what acknowledging needs.

        Raises OutboxFull.
        """
        reliefs = self._reliefs(RESERVES[1:] if storing else RESERVES[::-1])
        while True:
            try:
                work()
                return
            except OutboxFull as refusal:
                if next(reliefs, None) is None:
                    raise OutboxFull(
                        f"{self._folder}: {refusal}: let the disk have room and be writable, then resume"
                    ) from refusal

    def _reliefs(self, reserves: Sequence[str]) -> Iterator[str]:
        while self._spool.shed(SHED_BYTES):
            yield "heatmaps"
        for name in reserves:
            if self._reserve.release(name):
                log.error("%s: disk full: the reserve for %s is used up", self._folder, name)
                yield name


def _on_disk(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _unlink(path: Path) -> None:
    """Remove a file if the disk lets us; a heatmap left behind is removed at the next start."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
