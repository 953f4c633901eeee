"""Who changed what at this station: one JSON object per line, each with the SHA-256 of the line before.

Whoever changes, removes or inserts a line breaks the chain there. Cutting off the newest lines leaves a shorter chain
that is whole: to notice that, note down the last digest, which `taktsight-agent audit --verify` prints, elsewhere.
A returned `append` is on the disk; what a power cut tore is cut off by the next one, which says so in the chain.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from agent.commands.log import Entry
from agent.errors import StorageError
from agent.ownership import ANEW, make_folder, open_in, opened_folder
from calibration.recipe import Recipe
from calibration.recipe_file import sha256, strict_json, sync_folder

log = logging.getLogger(__name__)

FILE_NAME, OLDER_NAME = "audit.jsonl", "audit.1.jsonl"
MOST_BYTES = 32 * 1024**2  # of one file, 80,000 lines; then it becomes the older one, in whose place it steps
MOST_LINE_BYTES = 16 * 1024
NOTHING = "0" * 64  # stands before the first line
TORN = "torn line cut off"
_KEYS = {"utc", "who", "what", "old", "new", "before"}


@dataclass(frozen=True, slots=True)
class Chain:
    """A trail that was found whole."""

    lines: int
    first: str  # digest before the first line that is kept; NOTHING where nothing was ever dropped
    last: str  # digest of the last line
    torn_bytes: int  # after the last line, of one that a power cut tore


class AuditLog:
    """The trail in a folder. Processes and threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME

    def append(self, what: str, *, old: Any = None, new: Any = None, who: str | None = None) -> None:
        """Add a line and return when it is on the disk. who: None takes the user of this process.

        Raises StorageError if it cannot be written.
        """
        try:
            with self._locked() as file:
                before = self._repaired(file)
                line = _line(what, old, new, who or user(), before)
                if file.tell() < MOST_BYTES:
                    _write(file, line)
                else:
                    self._write_anew(line)
        except OSError as error:
            raise StorageError(
                f"{self.path}: {error.strerror}: the agent's user must be able to write there"
            ) from error

    def tell(self, what: str, *, old: Any = None, new: Any = None, who: str | None = None) -> None:
        """Add a line about what has happened already; where the disk refuses, the log has it instead."""
        try:
            self.append(what, old=old, new=new, who=who)
        except StorageError as error:
            log.error("not in the audit trail: %s by %s, %s -> %s: %s", what, who or user(), old, new, error)

    def command(self, entry: Entry) -> None:
        """Add the outcome of a command that was carried out."""
        new = {"id": entry.command_id, "result": entry.result, "detail": entry.detail, "after": entry.after}
        self.tell(f"command {entry.command}", old=entry.before, new=new, who=f"issuer {entry.issuer}")

    def verify(self, noted: str | None = None) -> Chain:
        """Return what was proven about the whole trail.

        noted: digest of a line that somebody wrote down earlier, which must still be there.

        Raises StorageError naming the first line that does not fit.
        """
        first, last, number, torn, seen = NOTHING, NOTHING, 0, b"", noted in (None, NOTHING)
        for path, position, line in self._lines():
            if torn:
                raise _broken(path, position - 1, "it is damaged")
            if _is_torn(line):
                torn = line
                continue
            number += 1
            fields = _fields(line)
            if fields is None:
                raise _broken(path, position, "it is none of ours")
            if number == 1:
                first = last = str(fields["before"])
            if fields["before"] != last:
                raise _broken(path, position, "it does not follow the line before")
            last = sha256(line)
            seen |= last == noted
        if first != NOTHING and not self._older.exists():
            raise _broken(self.path, 1, "lines before it were removed")
        if not seen:
            raise StorageError(f"{self.path}: no line has the digest {noted}: the newest lines were removed")
        return Chain(number, first, last, len(torn))

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines, oldest first; what cannot be read is left out, `verify` tells of it."""
        for _, _, line in self._lines():
            fields = _fields(line)
            if fields is not None:
                yield fields

    @property
    def _older(self) -> Path:
        return self.path.with_name(OLDER_NAME)

    def _lines(self) -> Iterator[tuple[Path, int, bytes]]:
        """Yield (file, line number in it, line) over both files. Raises StorageError if they cannot be read."""
        for path in (self._older, self.path):
            try:
                with path.open("rb") as file:
                    for number, line in enumerate(file, start=1):
                        yield path, number, line
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}: let this user read it") from error

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Open the file for ourselves alone; it may have been replaced while we waited."""
        folder = self.path.parent
        make_folder(folder)
        while True:
            with opened_folder(folder) as opened:
                handle = open_in(opened, FILE_NAME, os.O_RDWR | os.O_CREAT)
            with os.fdopen(handle, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                ours = os.fstat(file.fileno())
                if not self.path.exists() or self.path.stat().st_ino != ours.st_ino:
                    continue
                if ours.st_size == 0:
                    sync_folder(folder)
                yield file
                return

    def _repaired(self, file: BinaryIO) -> str:
        """Return the digest of the last whole line, with the file at its end; a torn one is cut off and told of."""
        end = file.seek(0, os.SEEK_END)
        tail_at = max(0, end - 2 * MOST_LINE_BYTES)
        file.seek(tail_at)
        tail = file.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        last = whole[:-1].rpartition(b"\n")[2] + b"\n" if whole else b""
        if _is_torn(last) and last:
            whole = whole[: -len(last)]
            last = whole[:-1].rpartition(b"\n")[2] + b"\n" if whole else b""
        torn = tail[len(whole) :]
        file.seek(tail_at + len(whole))
        before = sha256(last) if last else self._end_of_older()
        if torn:
            file.truncate()
            line = _line(TORN, {"bytes": len(torn), "sha256": sha256(torn)}, None, user(), before)
            _write(file, line)
            return sha256(line)
        return before

    def _end_of_older(self) -> str:
        last = NOTHING
        for path, _, line in self._lines():
            if path == self._older:
                last = sha256(line)
        return last

    def _write_anew(self, line: bytes) -> None:
        """Begin a new file; that of before becomes the older one."""
        with opened_folder(self.path.parent) as folder:
            os.replace(FILE_NAME, OLDER_NAME, src_dir_fd=folder, dst_dir_fd=folder)
            with os.fdopen(open_in(folder, FILE_NAME, ANEW), "wb") as file:
                _write(file, line)
            os.fsync(folder)


def _write(file: BinaryIO, line: bytes) -> None:
    file.write(line)
    file.flush()
    os.fsync(file.fileno())


def run_facts(run: str, recipe: Recipe, station_yaml: str) -> dict[str, Any]:
    """Return what a run begins with. station_yaml: SHA-256 of the settings file."""
    signature = recipe.signature
    return {
        "run": run,
        "version": importlib.metadata.version("taktsight"),
        "recipe": recipe.product,
        "digest": recipe.digest,
        "signer": None if signature is None else signature.key,
        "revision": None if signature is None else signature.revision,
        "station_yaml": station_yaml,
    }


def _broken(path: Path, number: int, why: str) -> StorageError:
    return StorageError(
        f"{path}, line {number}: the audit trail is broken here: {why}: keep a copy of the file and find out who had "
        "access to it; then move it away, and the agent begins a new one"
    )


def _is_torn(line: bytes) -> bool:
    """Return whether a power cut did this: the end is missing, or the beginning is zeros where the end is there."""
    return not line.endswith(b"\n") or b"\0" in line


def user() -> str:
    """Return who runs this process, and who became root for it."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = f"uid {os.getuid()}"
    behind = os.environ.get("SUDO_USER", "")
    return f"user {behind} as {name}" if behind.isidentifier() else f"user {name}"


def _line(what: str, old: Any, new: Any, who: str, before: str) -> bytes:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = {"utc": now, "who": who, "what": what, "old": old, "new": new, "before": before}
    line = json.dumps(fields, default=str).encode() + b"\n"
    if len(line) <= MOST_LINE_BYTES:
        return line
    return _line(what, _cut(old), _cut(new), who[:200], before)


def _cut(value: Any) -> str:
    return json.dumps(value, default=str)[:2000]


def _fields(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line, None if it is none of ours."""
    try:
        fields = strict_json(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and set(fields) == _KEYS else None
