"""The verdicts of an archive as its report needs them: read back, checked once, and said in words."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.publishing.messages import VERDICT_SCHEMA
from agent.publishing.verdict_files import VERDICTS, newest_lines
from agent.verdict import Outcome, Reason
from calibration.errors import InputError

MOST_PARTS = 50_000  # of the newest; a shift at one part a second has 28,800

FATES = {Outcome.PASS: "passed", Outcome.REJECT: "rejected", Outcome.NO_VERDICT: "without verdict"}

CAUSES = {
    Reason.FRAME_LOST: (
        "no frame came",
        "Check the camera's cable and network card, and whether the trigger reaches the camera.",
    ),
    Reason.LATE: (
        "the answer was not ready in time",
        "See the stages below for the slow one; check what else runs on this computer, or allow a longer deadline.",
    ),
    Reason.TOO_DARK: (
        "too dark",
        "Check the lamp, its supply and the exposure time: good parts had far more light.",
    ),
    Reason.SATURATED: (
        "too bright",
        "Check the exposure time, the lamp and stray light: good parts had far less light.",
    ),
    Reason.BLURRED: (
        "blurred",
        "Check focus ring, lens and camera distance, and whether parts move while they are exposed.",
    ),
    Reason.NOT_REGISTERED: (
        "the part was not found",
        "Look at the pictures below: no part, or out of view? Then check feeder and trigger delay.",
    ),
    Reason.OTHER_PRODUCT: (
        "another product",
        "Look at the pictures below: check what is fed and which recipe runs; a covered part reads the same.",
    ),
    Reason.BAD_FRAME: (
        "the frame cannot be used",
        "Check the lamp, the exposure time and the camera's picture format against those of the recipe.",
    ),
    Reason.OVERRUN: (
        "parts came too fast",
        "Slow the line down, or find the slow stage below: frames were waiting when the next one came.",
    ),
    Reason.CAMERA_DOWN: (
        "the camera was not connected",
        "Check the camera's power supply and cable; the station connects again by itself.",
    ),
    Reason.PAUSED: (
        "the station was asked to wait",
        "Nothing to mend: the parts passed while it was paused, and `detail` says why. Inspect them by hand.",
    ),
    Reason.HALTED: (
        "the station halted itself",
        "See `detail` and the alarms in its status; mend the cause, then command `resume` or start the station anew.",
    ),
    Reason.STOPPING: (
        "the station was stopped",
        "Nothing to mend: these parts were under way when the station was asked to stop. Inspect them by hand.",
    ),
    Reason.CRASHED: (
        "the inspection ended of itself",
        "Read the station's log at the time of the part: the inspection was started anew. Inspect these parts by hand.",
    ),
    Reason.FAULT: (
        "something else went wrong",
        "Read the station's log at the time of the part, and pass it on to whoever looks after the software.",
    ),
}
"""What a reason means to a person, and what to check."""

RENAMED = {"queue_full": Reason.OVERRUN}  # as archives of before say it


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the archive."""

    name: str  # the part's id, or its trigger where it has none
    trigger: int
    run: str  # of the agent; triggers count within one
    outcome: Outcome
    reason: Reason
    detail: str
    score: float | None
    threshold: float | None
    accepted: bool  # what the line was told
    region_count: int
    latency_ms: float | None
    stage_ms: Mapping[str, float]
    pictures: Mapping[str, str]  # "frame", "heatmap" -> path below the archive
    created: str  # "2025-03-04T12:00:00.007Z"
    origin: Mapping[str, str]  # "station", "internalRecipeId", "recipeDigest", "engine"
    simulated: bool

    @property
    def trigger_name(self) -> str:
        """The trigger as the name of a part that has no other."""
        return f"trigger {self.trigger}"

    @property
    def ratio(self) -> float | None:
        """Score / threshold; None where there is no score, or no threshold above 0."""
        if self.score is None or self.threshold is None or self.threshold <= 0:
            return None
        return self.score / self.threshold


@dataclass(frozen=True, slots=True)
class Reading:
    """What an archive's verdict files held."""

    messages: tuple[dict[str, Any], ...]  # oldest first, at most MOST_PARTS
    has_older: bool  # there are lines that nobody looked at, because newer ones fill the report
    n_damaged: int  # lines that are no verdict of this version
    cut_off: bool  # the last line has no end: power was cut while it was written


def read_verdicts(archive: Path) -> Reading:
    """Return the newest verdicts of an archive; damaged lines are counted and left out.

    Raises InputError if the folder or its verdict files are missing, unreadable or without one whole verdict.
    """
    path = archive / VERDICTS
    if not archive.is_dir():
        raise InputError(f"{archive}: no such folder: give the folder that station.yaml names under archive")
    messages: deque[dict[str, Any]] = deque()
    n_damaged, has_older, cut_off = 0, False, False
    number = -1
    try:
        for number, line in enumerate(newest_lines(archive)):
            if not line.strip():
                continue
            if has_older := len(messages) >= MOST_PARTS:
                break
            message = _message(line)
            if message is not None:
                messages.appendleft(message)
            elif number == 0:  # no line end comes behind it
                cut_off = True
            else:
                n_damaged += 1
    except OSError as error:
        raise InputError(
            f"{error.filename or path}: {error.strerror}: is {archive} whole and yours to read?"
        ) from error
    if number < 0:
        raise InputError(f"{path}: not found: is {archive} the archive of a station?")
    if not messages:
        raise InputError(
            f"{path}: {n_damaged + cut_off} lines, no verdict among them: nothing was inspected, or another version"
        )
    return Reading(tuple(messages), has_older, n_damaged, cut_off)


def part_of(message: Mapping[str, Any]) -> Part:
    """Return the part of a verdict message. Raises ValueError if it is none of this version."""
    if message.get("schema") != VERDICT_SCHEMA:
        raise ValueError(f"schema {message.get('schema')!r}: want {VERDICT_SCHEMA!r}")
    try:
        stage_ms = {str(name): _number(value) for name, value in message["processingTimes"]["stageMs"].items()}
        return Part(
            name=str(message["partId"] or f"trigger {message['trigger']}"),
            trigger=int(message["trigger"]),
            run=str(message["run"]),
            outcome=Outcome(message["outcome"]),
            reason=RENAMED.get(message["reason"]) or Reason(message["reason"]),
            detail=str(message["detail"]),
            score=_number(message["score"]),
            threshold=_number(message["threshold"]),
            accepted=message["lineAction"] == "accept",
            region_count=int(message["regionCount"]),
            latency_ms=_number(message["latencyMs"]),
            stage_ms={name: value for name, value in stage_ms.items() if value is not None},
            pictures={str(kind): str(name) for kind, name in message.get("pictures", {}).items()},
            created=str(message["creationTime"]),
            origin={key: str(message[key]) for key in ("station", "internalRecipeId", "recipeDigest", "engine")},
            simulated=bool(message["isSimulated"]),
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"verdict message: {type(error).__name__} {error}: want the keys of its schema") from error


def counted(n: int, noun: str = "part") -> str:
    """Return `1 part` or `2 parts`, thousands set apart."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _message(line: bytes) -> dict[str, Any] | None:
    """Return the verdict message of a line, None where it holds none."""
    try:
        message = json.loads(line)
        part_of(message)
    except (ValueError, AttributeError, RecursionError):
        return None
    return dict(message)


def _number(value: object) -> float | None:
    """Return a finite number as it is, anything else that JSON can hold as None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
