"""The second opinion on where the outbox's database ends: a few bytes beside the file, written after each commit.

SQLite drops the end of a damaged write-ahead log without a word; by the mark it is noticed.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from agent.errors import OutboxFull
from agent.outbox.rows import checksum

MARK = "last-seq"


def read_mark(folder: Path) -> tuple[str, int] | None:
    """Return (epoch, highest seq) as noted beside the file, or None if there is no whole note."""
    try:
        text = (folder / MARK).read_bytes()
    except OSError:
        return None
    noted = re.fullmatch(rb"([0-9a-f]{12}) ([0-9]{20}) [0-9a-f]{16}\n", text)
    if noted is None or _mark_text(noted[1].decode(), int(noted[2])) != text:
        return None
    return noted[1].decode(), int(noted[2])


class Mark:
    """The mark, open for writing."""

    def __init__(self, folder: Path, epoch: str, seq: int) -> None:
        """Note this seq. Raises OutboxFull where the disk has no room for its few bytes."""
        self._descriptor = -1
        try:
            self._descriptor = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._descriptor, _mark_text(epoch, seq), 0)
        except OSError as error:
            self.close()
            raise OutboxFull(f"{MARK}: {error.strerror}") from error

    def note(self, epoch: str, seq: int) -> None:
        """Note this seq; a disk that refuses is not told of, it is only a second opinion."""
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, _mark_text(epoch, seq), 0)

    def forget(self) -> None:
        """Leave no opinion, until the next `note`: between the two, an epoch may end. Raises OutboxFull."""
        try:
            os.ftruncate(self._descriptor, 0)
            os.fsync(self._descriptor)
        except OSError as error:
            raise OutboxFull(f"{MARK}: {error.strerror}") from error

    def close(self) -> None:
        """Let go of the file. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _mark_text(epoch: str, seq: int) -> bytes:
    return f"{epoch} {seq:020d} {checksum(seq, epoch, b'').hex()}\n".encode()
