"""The figures of a station at one moment, and the JSON object that tells them: `interface/health.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from agent.health.drift import DriftState
from agent.health.histogram import Histogram
from agent.publishing.messages import Alarm, alarm_fields
from agent.verdict import Outcome, Reason

HEALTH_SCHEMA = "taktsight.health/1"

GAUGES = {
    "ring_records": "Verdicts on their way from the inspect to the publish process.",
    "unstored": "Verdicts in memory that the disk refused.",
    "outbox_waiting": "Verdicts on the disk that not every consumer has confirmed.",
    "inspect_memory_bytes": "Resident memory of the inspect process.",
    "publish_memory_bytes": "Resident memory of the publish process.",
    "parts_unseen_total": "Parts of the beat that went by without a verdict while the agent was put aside.",
    "stale_frames_total": "Frames that came after their trigger was settled.",
    "late_results_total": "Inspections that ended after their deadline.",
    "shed_pictures_total": "Verdicts handed on without pictures.",
    "shed_heatmaps_total": "Heatmaps given up to keep room for verdicts.",
    "delivery_faults_total": "Verdicts that an outlet could not take.",
    "archive_failures_total": "Parts that could not be archived.",
    "restarts_total": "Restarts of a process by the other.",
}
"""What a station measures of itself, and what it means. A name that ends in _total is only ever counted up."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How one measure lay, in its own unit."""

    mean: float
    sd: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Count:
    """What came in a span of time."""

    seconds: float
    verdicts: Counter[tuple[Outcome, Reason]]
    latency: Histogram  # trigger to verdict, of parts that were looked at or waited for
    stages: Mapping[str, Histogram]  # in the order of the pipeline


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything that is known of a running station at one moment."""

    station: str
    created_utc: datetime
    started_utc: datetime
    last_verdict_utc: datetime | None
    state: str  # as in the status
    alarms: tuple[Alarm, ...]
    recipe: str  # product; "" before there is one
    recipe_digest: str
    takt_ms: float
    deadline_ms: float
    since_start: Count
    recent: Count  # the last ten minutes, or since the recipe changed
    strip_every_s: float
    strip: tuple[tuple[float | None, int], ...]  # (slowest part in ms, late parts) of each span, oldest first
    n_places: int
    places: Mapping[str, Spread]  # of the newest registered parts: dx_px, dy_px, angle_deg, residual_px, similarity
    n_conditions: int
    conditions: Mapping[str, Spread]  # of the newest frames: the measures of `calibration.condition.Condition`
    drift: DriftState
    gauges: Mapping[str, float]


def health_message(figures: Figures) -> dict[str, object]:
    """Return the figures as JSON; what is no finite number is null."""
    return {
        "schema": HEALTH_SCHEMA,
        "station": figures.station,
        "creationTime": _timestamp(figures.created_utc),
        "startTime": _timestamp(figures.started_utc),
        "lastVerdictTime": None if figures.last_verdict_utc is None else _timestamp(figures.last_verdict_utc),
        "state": figures.state,
        "alarms": alarm_fields(figures.alarms),
        "internalRecipeId": figures.recipe,
        "recipeDigest": figures.recipe_digest,
        "taktMs": figures.takt_ms,
        "deadlineMs": figures.deadline_ms,
        "sinceStart": _count_fields(figures.since_start),
        "recent": _count_fields(figures.recent),
        "strip": {
            "everyS": figures.strip_every_s,
            "slowestMs": [_number(slowest_ms) for slowest_ms, _ in figures.strip],
            "late": [late for _, late in figures.strip],
        },
        "registration": _measures(figures.n_places, figures.places),
        "condition": _measures(figures.n_conditions, figures.conditions),
        "drift": {
            "watched": figures.drift.watched,
            "parts": figures.drift.parts,
            "deviations": _number(figures.drift.level),
            "direction": figures.drift.direction,
            "rising": figures.drift.rising,
            "falling": figures.drift.falling,
            "limit": figures.drift.limit,
        },
        "gauges": _numbers(figures.gauges),
    }


def _count_fields(count: Count) -> dict[str, object]:
    return {
        "seconds": round(count.seconds, 3),
        "verdicts": [
            {"outcome": str(outcome), "reason": str(reason), "count": n}
            for (outcome, reason), n in sorted(count.verdicts.items())
        ],
        "triggerToVerdictMs": _summary(count.latency),
        "stageMs": {stage: _summary(histogram) for stage, histogram in count.stages.items()},
    }


def _measures(parts: int, spreads: Mapping[str, Spread]) -> dict[str, object]:
    return {"parts": parts, "measures": {name: _numbers(asdict(spread)) for name, spread in spreads.items()}}


def _summary(histogram: Histogram) -> dict[str, float | int] | None:
    summary = histogram.summary()
    return None if summary is None else asdict(summary)


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _timestamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
