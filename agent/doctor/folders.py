"""Where a station reads and writes: whether its user may, what kind of disk it is, and how much room is left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Account, Case, Machine
from agent.mqtt.client import credential_files
from agent.publishing.verdict_files import LINE_BYTES, verdict_files

VOLATILE = ("tmpfs", "ramfs")
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")
LEAST_FILES = 1000
LEAST_DAYS = 90  # until verdict lines fill the disk
DAY_MS = 86_400_000
CREDENTIALS = "run/credentials"  # what systemd's LoadCredential= hands over, while the unit runs

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A folder that the agent writes to."""

    name: str  # "outbox"
    path: Path
    most_mb: float  # it may come to hold so much
    reserve_mb: float  # with less than this free it cannot work
    must_last: bool  # it holds what a power cut must not take


def folders(case: Case) -> Iterator[Finding]:
    """Yield for every folder that the agent writes to whether it can, and for how long."""
    account = case.account()
    for folder in wanted_folders(case):
        if case.can_ask_for(account):
            yield may_write(case, folder, account)
        yield from disk(case.machine, folder)
    yield from growth(case)


def readable_files(case: Case) -> Iterator[Finding]:
    """Yield whether the agent's user may read what it needs."""
    station, account, machine = case.station, case.account(), case.machine
    if not case.can_ask_for(account):
        yield warn(
            "files",
            f"not looked at: the agent runs as {account.name}, the doctor was asked as {machine.user.name}",
            f"what {account.name} may read and write",
            f"sudo taktsight-agent doctor {case.file}",
        )
        return
    files = [case.file, station.recipe]
    files += [] if station.mqtt is None else credential_files(station.mqtt)
    hidden = [
        file
        for file in files
        if file.exists() and not file.is_relative_to(machine.at(CREDENTIALS)) and not machine.may(account, file, "r")
    ]
    if hidden:
        listed = ", ".join(str(file) for file in hidden)
        yield fail(
            "files",
            f"{listed}: not readable for {account.name}",
            f"files that {account.name} may read",
            f"chgrp {account.name} FILE && chmod g+r FILE; its folders need g+x",
        )
    else:
        yield ok("files", f"{account.name} may read settings, recipe and certificates")


def wanted_folders(case: Case) -> list[Wanted]:
    """Return the folders that this station writes to, by its settings."""
    station = case.station
    kept, held = station.outbox, station.mqtt is not None
    most_mb = kept.max_mb + kept.heatmap_mb + kept.reserve_mb if held else 0.0
    found = [Wanted("outbox", kept.folder, most_mb, kept.reserve_mb if held else 1.0, True)]
    if station.archive is not None:
        found.append(Wanted("archive", station.archive.folder, station.archive.max_mb, 1.0, False))
    if "recipe" in station.commands.allow:
        found.append(Wanted("recipes", station.recipes.folder, 0.0, 1.0, True))
    if "capture" in station.commands.allow:
        found.append(Wanted("captures", station.commands.captures, 0.0, 1.0, False))
    return found


def may_write(case: Case, folder: Wanted, account: Account) -> Finding:
    """Return whether the agent's user may write there; a folder that is missing is made by it."""
    machine, place = case.machine, _existing(folder.path)
    name = f"{folder.name}.folder"
    if not place.is_dir() or not machine.may(account, place, "w") or not machine.may(account, place, "x"):
        read_only = place.is_dir() and machine.disk_of(place).is_read_only
        why = "the file system is read-only" if read_only else f"{account.name} may not write there"
        action = "remount it; look for disk errors in dmesg" if read_only else f"chown -R {account.name} {folder.path}"
        return fail(name, f"{place}: {why}", f"a folder for {account.name} to write", action)
    outside = _outside_of_unit(case, folder.path)
    if outside:
        return fail(
            name,
            f"{folder.path}: outside of what {case.unit} may write ({outside})",
            "a folder below these",
            "change it in station.yaml, or add ReadWritePaths= in a drop-in",
        )
    there = "" if folder.path.exists() else " (not there yet: the agent makes it)"
    return ok(name, f"{folder.path}: {account.name} may write{there}")


def disk(machine: Machine, folder: Wanted) -> Iterator[Finding]:
    """Yield whether the disk lasts, and has room for all that the folder may come to hold."""
    place = _existing(folder.path)
    name, kind = f"{folder.name}.disk", file_system(machine, place)
    found = machine.disk_of(place)
    free_mb, used_mb = found.free_bytes / 1e6, _used_mb(folder.path)
    told = f"{kind}, {free_mb:.0f} MB free, {used_mb:.0f} MB used"
    room = "make room on the disk"
    if free_mb < folder.reserve_mb:
        yield fail(name, told, f"{folder.reserve_mb:g} MB free: nothing can be stored", room)
    elif free_mb + used_mb < folder.most_mb:
        yield warn(
            name, told, f"room for {folder.most_mb:.0f} MB", f"{room}, or lower {folder.name}.max_mb in station.yaml"
        )
    elif found.free_files is not None and found.free_files < LEAST_FILES:
        yield warn(name, f"{told}, room for {found.free_files} files", f"{LEAST_FILES} files", f"{room}: remove files")
    elif folder.must_last and kind in VOLATILE:
        yield warn(name, told, "a disk: what is in memory does not survive a power cut", _elsewhere(folder))
    elif folder.must_last and kind in REMOTE:
        yield warn(name, told, "a disk of this machine: a network that fails halts the station", _elsewhere(folder))
    else:
        yield ok(name, told)


def growth(case: Case) -> Iterator[Finding]:
    """Yield how long the disk takes verdict lines, with a part every takt, day and night; nothing without an archive.

    Pictures are not counted: they give way.
    """
    archive = case.station.archive
    if archive is None:
        return
    free_mb = case.machine.disk_of(_existing(archive.folder)).free_bytes / 1e6
    daily_mb = DAY_MS / case.station.beat.takt_ms * LINE_BYTES / 1e6
    days, needed = free_mb / daily_mb, float(LEAST_DAYS)
    told = f"verdict lines grow by up to {daily_mb:.0f} MB a day: the disk is full in {days:.0f} days"
    if archive.keep_days and days < needed:  # at most those and the day that goes on
        held_mb = _lines_mb(archive.folder)
        days, needed = (free_mb + held_mb) / daily_mb, archive.keep_days + 1.0
        told = f"verdict lines take up to {needed * daily_mb:.0f} MB, {free_mb:.0f} MB free, {held_mb:.0f} MB used"
    if days < needed:
        wanted = f"room for {archive.keep_days or LEAST_DAYS} days"
        action = "make room on the disk, or set archive.keep_days to fewer days in station.yaml"
        yield warn("archive.growth", told, wanted, action)
    else:
        yield ok("archive.growth", told)


def file_system(machine: Machine, path: Path) -> str:
    """Return the kind of file system that holds a path, "?" where the kernel does not say."""
    path = path.resolve()
    best, kind = Path(), "?"
    for line in (machine.text("proc/self/mountinfo") or "").splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split()
        if len(fields) < 5 or not tail:
            continue
        mounted = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[4]))
        if path.is_relative_to(mounted) and len(mounted.parts) >= len(best.parts):
            best, kind = mounted, tail.split()[0]
    return kind


def _elsewhere(folder: Wanted) -> str:
    key = "recipes.folder" if folder.name == "recipes" else f"{folder.name}.folder"
    return f"set {key} to a folder on a disk"


def _existing(path: Path) -> Path:
    """Return the path, or the first of those above it that is there."""
    return next((place for place in (path, *path.parents) if place.exists()), Path("/"))


def _outside_of_unit(case: Case, path: Path) -> str:
    """Return what the unit may write, if it may write only there and the path is not in it; else ""."""
    facts = case.unit_facts()
    if facts.get("ProtectSystem") != "strict":
        return ""
    roots = {"StateDirectory": "var/lib", "CacheDirectory": "var/cache"}
    allowed = [case.machine.at(f"{root}/{name}") for key, root in roots.items() for name in facts.get(key, "").split()]
    allowed += [Path(place.lstrip("-+")) for place in facts.get("ReadWritePaths", "").split()]
    inside = any(path.resolve().is_relative_to(place.resolve()) for place in allowed)
    return "" if inside else ", ".join(str(place) for place in allowed)


def _lines_mb(archive: Path) -> float:
    """Return what the archive's verdict lines take."""
    try:
        return sum(path.stat().st_size for path in verdict_files(archive)) / 1e6
    except OSError:  # not there yet, or not ours to read
        return 0.0


def _used_mb(folder: Path) -> float:
    """Return what files of the folder, and of those right below it, take."""
    total = 0
    for place in (folder, *(path for path in folder.glob("*") if path.is_dir())):
        try:
            with os.scandir(place) as entries:
                total += sum(entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file())
        except OSError:  # gone meanwhile, or not ours to read: then it is not counted
            continue
    return total / 1e6
