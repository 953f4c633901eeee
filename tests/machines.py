"""Machines and stations for the doctor, made of files in a folder: nothing of the machine that runs the test shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.config import read_station
from agent.doctor.finding import Finding
from agent.doctor.machine import Account, Case, Disk, Machine

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
AGENT = Account("taktsight", 990, 990, (990,))
ROOT = Account("root", 0, 0)
DISK = Disk(free_bytes=100 * 10**9, free_files=10**6, is_read_only=False)


def machine_at(root: Path, files: Mapping[str, object] | None = None, **answers: Any) -> Machine:
    """Return a machine with these files below root; answers: fields of Machine in place of healthy ones."""
    for name, content in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    healthy = Machine(
        root=root,
        environment={},
        processor="x86_64",
        user=AGENT,
        account_named={"taktsight": AGENT}.get,
        may=lambda account, path, mode: True,
        disk_of=lambda path: DISK,
        run=lambda command: None,
        limit=lambda number: (0, 0),
        is_synchronized=lambda: True,
        cuda_driver=lambda: None,
        now_utc=lambda: NOON,
    )
    return dataclasses.replace(healthy, **answers)


def case_at(folder: Path, machine: Machine, settings: str = "", *, file: Path | None = None) -> Case:
    """Return a station of this machine. settings: lines of station.yaml beside the needed ones."""
    file = file or folder / "station.yaml"
    lines = ["station: cell7", "recipe: tiny.recipe", "takt_ms: 100", "camera: {kind: simulated}", settings]
    if "recipes:" not in settings:
        lines.append("recipes: {unsigned: allow}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Case(machine, read_station(file), file)


def grades(findings: Iterable[Finding]) -> dict[str, str]:
    """Return grade by name."""
    return {finding.name: str(finding.grade) for finding in findings}


def only(findings: Iterable[Finding], name: str) -> Finding:
    """Return the one finding of this name."""
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def looking(folder: Path, probe: Callable[[Case], Iterable[Finding]], key: str) -> Callable[[str], list[Finding]]:
    """Return a function that has a probe look at a station with this block under `key`; none where it is empty."""

    def look(block: str) -> list[Finding]:
        settings = f"{key}: {{{block}}}" if block else ""
        return list(probe(case_at(folder, machine_at(folder / "root"), settings)))

    return look
