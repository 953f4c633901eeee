"""The verdict lines of an archive: one JSON line per verdict, a file a day.

    verdicts.jsonl               the day that goes on
    verdicts-2026-11-23.jsonl    a day that is over, UTC; -2 and so on where the clock was set and a day came again

What is told of the time comes from the verdicts themselves: no clock is asked here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

VERDICTS = "verdicts.jsonl"
LINE_BYTES = 1550  # of a usual verdict: 91,271 for 59 parts of the tutorial
READ_BYTES = 2**18  # at a time, from the end
LAST_LINES = 8  # looked at for a day; a power cut damages one or two

_OVER = re.compile(r"verdicts-(\d{4}-\d{2}-\d{2})(?:-(\d{1,9}))?\.jsonl")


def verdict_files(folder: Path) -> list[Path]:
    """Return the files with verdict lines that are there, the newest first. Raises OSError."""
    found = []
    for path in folder.iterdir():
        if named := _OVER.fullmatch(path.name):
            found.append((named[1], int(named[2] or 1), path))
    current = folder / VERDICTS
    return [*([current] if current.exists() else []), *(path for _, _, path in sorted(found, reverse=True))]


def newest_lines(folder: Path) -> Iterator[bytes]:
    """Yield what lies between the line ends of all files, the newest first: b"" for one that ends whole.

    Raises OSError.
    """
    for path in verdict_files(folder):
        yield from _lines_from_the_end(path)


class VerdictFile:
    """The file of the day that goes on. One thread."""

    def __init__(self, folder: Path, keep_days: int = 0) -> None:
        """keep_days: files of days that were over longer ago are deleted; 0: none."""
        self._folder = folder
        self._path = folder / VERDICTS
        self._keep_days = keep_days
        self._day = ""  # of what the file holds; "": not looked at yet

    def append(self, message: dict[str, Any]) -> None:
        """Append a verdict message, whole or not at all; the first of another day begins another file.

        Raises OSError where the disk refuses it.
        """
        self._turn_over(str(message["creationTime"])[:10])
        with self._path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            start = b"" if _ends_whole(file, size) else b"\n"  # half a line spoils one verdict, not the next one too
            rest = memoryview(start + json.dumps(message).encode() + b"\n")
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):  # then half a line stays
                    file.truncate(size)
                raise

    def triggers(self, run: str, most: int) -> set[int]:
        """Return which triggers of a run are among the last `most` lines; none where they cannot be read."""
        found = set()
        try:
            for line in islice(newest_lines(self._folder), most):
                message = _read(line)
                if message.get("run") == run:
                    found.add(int(message["trigger"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s: %s: what is archived is not known", self._path, error)
        return found

    def _turn_over(self, today: str) -> None:
        """Set the file of a day that is over aside; a folder that refuses is told and asked again the next day."""
        day = self._day or self._day_of_file() or today
        if not _is_over(day, today):
            self._day = day
            return
        self._day = today
        try:
            if self._path.exists():
                self._path.rename(self._name_of(day))
            self._forget(min(day, today))
        except OSError as error:
            log.warning("%s: not set aside as the file of %s: %s", self._path, day, error)

    def _day_of_file(self) -> str:
        """Return the day of the newest verdict in the file, of its last change where it has none; "" if it is empty."""
        try:
            about = self._path.stat()
            if not about.st_size:
                return ""
            for line in islice(_lines_from_the_end(self._path), LAST_LINES):
                with contextlib.suppress(ValueError):
                    return date.fromisoformat(str(_read(line).get("creationTime"))[:10]).isoformat()
            return datetime.fromtimestamp(about.st_mtime, UTC).date().isoformat()
        except OSError:
            return ""

    def _name_of(self, day: str) -> Path:
        """Return the name for a day that is over, behind those that this day has already."""
        named = (_OVER.fullmatch(path.name) for path in self._folder.iterdir())
        number = max((int(one[2] or 1) for one in named if one is not None and one[1] == day), default=0) + 1
        return self._folder / (f"verdicts-{day}.jsonl" if number == 1 else f"verdicts-{day}-{number}.jsonl")

    def _forget(self, day: str) -> None:
        """Delete what is older than `keep_days` before a day.

        That day is the one that is over, or today where the clock went back: a clock that is wrong for a moment, and
        years ahead, takes no file with it.
        """
        if not self._keep_days:
            return
        oldest = (date.fromisoformat(day) - timedelta(days=self._keep_days)).isoformat()
        for path in verdict_files(self._folder):
            named = _OVER.fullmatch(path.name)
            if named is not None and named[1] < oldest:
                path.unlink(missing_ok=True)
                log.info("%s: deleted, older than %d days", path, self._keep_days)


def _is_over(day: str, today: str) -> bool:
    """Return whether a day is over: verdicts round midnight may be told in another order, a clock may go back."""
    return today > day or (date.fromisoformat(day) - date.fromisoformat(today)).days > 1


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield what lies between the line ends of a file, the last first."""
    with path.open("rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at > 0:
            size = min(READ_BYTES, at)
            at -= size
            file.seek(at)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest


def _read(line: bytes) -> dict[str, Any]:
    """Return the object of a line; an empty one where it holds none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _ends_whole(file: BinaryIO, size: int) -> bool:
    """Return whether the last line has its end; a power cut or a full disk leaves half a line."""
    if size == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
