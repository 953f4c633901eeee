"""What a station remembers: verdicts that wait for somebody, what was set aside, and the account of who changed what.

Everything is read beside an agent that runs, and nothing is locked: an agent that starts at this moment does start.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from agent.audit import AuditLog
from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case, Machine
from agent.errors import StorageError
from agent.mqtt.delivery import BROKER
from agent.outbox.database import FILE, Damaged, read_about, reading
from agent.outbox.folder import DAMAGED, LOCK

WAITING_S = 60.0  # so many seconds' parts may wait before it is told
LEAST_WAITING = 10

_FLOCK = re.compile(r"FLOCK\s+\S+\s+WRITE\s+(\d+)\s+([0-9a-f]+):([0-9a-f]+):(\d+)\s")


def outbox(case: Case) -> Iterator[Finding]:
    """Yield who uses the outbox, and what waits, is in quarantine or was set aside."""
    if case.station.mqtt is None:
        return  # verdicts wait in memory
    folder = case.station.outbox.folder
    process = used_by(case.machine, folder)
    yield ok("outbox.agent", "no agent runs" if process is None else f"an agent runs: process {process}")
    if not (folder / FILE).exists():
        yield ok("outbox", f"{folder}: nothing was ever stored")
    else:
        yield from _waiting(case)
    aside = sorted(path.name for path in folder.glob(f"{DAMAGED}*"))
    if aside:
        yield warn(
            "outbox.damaged",
            f"{len(aside)} databases set aside, the newest {aside[-1]}",
            "a disk that keeps what was written",
            f"check the disk; {_export(case)}",
        )


def audit_trail(case: Case) -> Iterator[Finding]:
    """Yield whether the account of changes is whole."""
    try:
        chain = AuditLog(case.station.outbox.folder).verify()
    except StorageError as error:
        yield fail("audit", str(error), "an unbroken chain", "keep a copy; find out who had access to the folder")
        return
    if chain.torn_bytes:
        yield warn(
            "audit",
            f"{chain.lines} lines, then {chain.torn_bytes} bytes that a power cut tore",
            "whole lines",
            "nothing: the next start of the agent cuts them off and says so",
        )
    elif not chain.lines:
        yield ok("audit", "no line yet")
    else:
        yield ok("audit", f"{chain.lines} lines, an unbroken chain; digest of the last: {chain.last[:16]}")


def used_by(machine: Machine, folder: Path) -> int | None:
    """Return the process that holds the outbox's lock, as the kernel lists it; None: nobody."""
    try:
        lock = (folder / LOCK).stat()
    except OSError:
        return None
    for process, major, minor, inode in _FLOCK.findall(machine.text("proc/locks") or ""):
        if int(inode) == lock.st_ino and os.makedev(int(major, 16), int(minor, 16)) == lock.st_dev:
            return int(process)
    return None


def _waiting(case: Case) -> Iterator[Finding]:
    """Yield what waits for each consumer, and what is in quarantine."""
    folder = case.station.outbox.folder
    try:
        with reading(folder) as connection:
            last = int(read_about(connection, "last_seq"))
            consumers = dict(read_about(connection, "acknowledged")["consumers"])
            quarantined = int(connection.execute("SELECT count(*) FROM quarantine").fetchone()[0])
    except (sqlite3.Error, Damaged) as error:
        yield fail(
            "outbox",
            f"{folder / FILE}: {error}",
            "a database that can be read",
            "run as root or as the agent's user; if it is damaged, the agent sets it aside when it starts",
        )
        return
    waiting = {name or "the broker": last - int(upto) for name, upto in consumers.items()}
    told = ", ".join(f"{number} for {name}" for name, number in waiting.items()) or "no consumer yet"
    most = max(LEAST_WAITING, round(1000 * WAITING_S / case.station.beat.takt_ms))
    if max(waiting.values(), default=0) > most:
        who = "the broker" if BROKER in consumers else "the consumers"
        yield warn("outbox", f"waiting: {told}", f"{most} at most, a minute's parts", f"bring {who} back; see broker")
    else:
        yield ok("outbox", f"waiting: {told}; {last} stored in this epoch")
    if quarantined:
        yield warn(
            "outbox.quarantine",
            f"{quarantined} messages that could not be delivered",
            "none",
            _export(case),
        )


def _export(case: Case) -> str:
    return f"stop the agent, then taktsight-agent outbox {case.file} --export kept.jsonl --discard"
