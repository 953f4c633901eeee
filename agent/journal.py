"""Log records as journal entries with fields of their own, by journald's native protocol.

    log.warning("part %d: %s", 7, "late", extra=fields(verdict="no_verdict", reason="late"))
    journalctl TAKTSIGHT_REASON=late

Used only where JOURNAL_STREAM says that stderr is the journal; elsewhere the same records are plain lines, and the
fields are not shown. A journal that does not keep up is not waited for: what it missed is counted and said.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "taktsight-agent"
LONGEST_VALUE = 16_384  # bytes; an entry above the socket's buffer (208 KiB) would need a file descriptor
LONGEST_STACK = LONGEST_VALUE // 2  # characters; its end says most
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # syslog(3)
_KEY = "taktsight_fields"  # of a record's extra


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return `extra` for a log call: each value becomes the journal field TAKTSIGHT_{NAME}; None is left out."""
    return {_KEY: {f"TAKTSIGHT_{name.upper()}": value for name, value in values.items() if value is not None}}


class JournalHandler(logging.Handler):
    """Sends records to journald; never blocks and never raises."""

    def __init__(self, path: Path = JOURNAL_SOCKET, /, **always: object) -> None:
        """always: fields of every entry, named as in `fields`."""
        super().__init__()
        self._path = str(path)
        self._always = fields(**always)[_KEY]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self.missed = 0  # entries that the journal did not take since the last that it took

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; where the journal does not take it, count it."""
        try:
            entry = self._entry(record)
        except (TypeError, ValueError):  # arguments that do not fit the message
            self.handleError(record)
            return
        if self.missed:
            entry |= {"TAKTSIGHT_MISSED": self.missed}
        try:
            self._socket.sendto(encoded(entry), self._path)
        except OSError:
            self.missed += 1
            return
        self.missed = 0

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()

    def _entry(self, record: logging.LogRecord) -> dict[str, object]:
        message = record.getMessage()
        if record.exc_info:
            stack = (self.formatter or logging.Formatter()).formatException(record.exc_info)
            message = f"{message}\n{stack[-LONGEST_STACK:]}"
        return {
            "MESSAGE": message,
            "PRIORITY": next((number for level, number in _PRIORITIES if record.levelno >= level), 7),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "LOGGER": record.name,
            "THREAD_NAME": record.threadName,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            **self._always,
            **getattr(record, _KEY, {}),
        }


def encoded(entry: Mapping[str, object]) -> bytes:
    """Return one entry as a datagram: NAME=value lines, or name, length and bytes where a value has several lines.

    Source: systemd, docs/JOURNAL_NATIVE_PROTOCOL.md.
    """
    parts = []
    for name, value in entry.items():
        content = str(value).encode(errors="backslashreplace")[:LONGEST_VALUE]
        content = content.decode(errors="ignore").encode()  # no half character at the cut: the field would be binary
        if b"\n" in content:
            parts.append(name.encode() + b"\n" + len(content).to_bytes(8, "little") + content + b"\n")
        else:
            parts.append(name.encode() + b"=" + content + b"\n")
    return b"".join(parts)


def stderr_is_journal(stream: Any = None, said: str | None = None) -> bool:
    """Return whether stderr leads to the journal. said: device:inode as systemd says it, None: JOURNAL_STREAM."""
    said = os.environ.get("JOURNAL_STREAM", "") if said is None else said
    try:
        found = os.fstat((sys.stderr if stream is None else stream).fileno())
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return said == f"{found.st_dev}:{found.st_ino}"


def log_to_journal(**always: object) -> bool:
    """Send all log records to the journal instead of stderr, where stderr is the journal; return whether it is."""
    if not stderr_is_journal() or not JOURNAL_SOCKET.exists():
        return False
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(JournalHandler(**always))
    return True
