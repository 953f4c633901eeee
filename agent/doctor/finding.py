"""What the doctor says: one finding per thing that was looked at, and all of them as one object for machines."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

SCHEMA = "taktsight.doctor/1"


class Grade(StrEnum):
    """How bad it is; the worst one decides."""

    OK = "ok"
    WARN = "warn"  # the station runs, not as well or not as long as it should
    FAIL = "fail"  # the station does not start, does not judge, or is not heard


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. Raises ValueError if it is not fine and does not say what to do."""

    name: str  # stable, for machines: "broker.tls"
    grade: Grade
    found: str
    wanted: str = ""  # empty where all is well
    action: str = ""

    def __post_init__(self) -> None:
        """Check that nobody is left alone with a finding."""
        if not self.found or (self.grade is not Grade.OK and not (self.wanted and self.action)):
            raise ValueError(f"{self.name}: need what was found and, unless it is ok, what was wanted and what to do")


def ok(name: str, found: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(name, Grade.OK, found)


def warn(name: str, found: str, wanted: str, action: str) -> Finding:
    """Return a finding that somebody should see to by daylight."""
    return Finding(name, Grade.WARN, found, wanted, action)


def fail(name: str, found: str, wanted: str, action: str) -> Finding:
    """Return a finding that somebody must see to now."""
    return Finding(name, Grade.FAIL, found, wanted, action)


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Return how many there are of each grade."""
    counted = Counter(finding.grade for finding in findings)
    return {str(grade): counted[grade] for grade in Grade}


def has_failed(findings: Sequence[Finding]) -> bool:
    """Return whether anything must be seen to now; warnings do not count."""
    return any(finding.grade is Grade.FAIL for finding in findings)


def report(findings: Sequence[Finding], *, version: str, station_file: str | None, now_utc: datetime) -> dict[str, Any]:
    """Return the object of `doctor --json`: see interface/doctor.json."""
    return {
        "schema": SCHEMA,
        "creationTime": now_utc.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "version": version,
        "host": platform.node(),
        "stationFile": station_file,
        "isFine": not has_failed(findings),
        "counts": counts(findings),
        "findings": [{**asdict(finding), "grade": str(finding.grade)} for finding in findings],
    }
