"""A station's figures for tests: verdicts as they come from a line, and a clock that a test moves."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from agent.health.health import Health
from agent.verdict import Outcome, Reason, Verdict
from calibration.condition import Condition
from calibration.registration import Registration
from tests.schemas import INTERFACE

MEDIAN, DEVIATION, THRESHOLD = 0.30, 0.05, 0.45
TAKT_MS, DEADLINE_MS = 50.0, 45.0
SCHEMA = json.loads((INTERFACE / "health.json").read_text(encoding="utf-8"))
MORNING = datetime(2026, 11, 22, 6, tzinfo=UTC)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def utc(self) -> datetime:
        return MORNING + timedelta(seconds=self.now_s - 1000.0)


def new_health(clock: Clock) -> Health:
    """Return the figures of a station that runs the recipe flange."""
    health = Health("cell7", takt_ms=TAKT_MS, deadline_ms=DEADLINE_MS, monotonic=clock, now=clock.utc)
    health.reset("flange", "ab" * 32, MEDIAN, DEVIATION)
    health.tell("running")
    return health


def scored(score: float = MEDIAN, latency_ms: float = 20.0, **more: Any) -> Verdict:
    """Return a pass or a reject."""
    outcome = Outcome.REJECT if score > THRESHOLD else Outcome.PASS
    given = {"score": score, "threshold": THRESHOLD, "latency_ms": latency_ms, **more}
    return Verdict(1, outcome, Reason.SCORE, **given)


def silent(reason: Reason, latency_ms: float = 0.1) -> Verdict:
    """Return a part without verdict."""
    return Verdict(1, Outcome.NO_VERDICT, reason, "for a test", latency_ms=latency_ms)


def placed(dx_px: float = 0.0, angle_deg: float = 0.0, *, residual_px: float = 0.1) -> Registration:
    """Return a part that lies so far to the right of the reference, turned by so much."""
    turn = np.radians(angle_deg)
    image_from_reference = np.array(
        [[np.cos(turn), -np.sin(turn), dx_px], [np.sin(turn), np.cos(turn), 0.0], [0.0, 0.0, 1.0]]
    )
    return Registration(np.linalg.inv(image_from_reference), residual_px=residual_px, similarity=0.9)


def lit(brightness: float, sharpness: float | None = 1.5) -> Condition:
    """Return what was measured on a frame."""
    return Condition(brightness, 0.1, 0.7, 0.0, sharpness)


def run(health: Health, clock: Clock, parts: int, *, seed: int = 0, rejects: int = 0) -> None:
    """Let so many parts pass on the takt, with stages, places and light; then so many rejects."""
    generator = np.random.default_rng(seed)
    for number in range(parts + rejects):
        clock.now_s += TAKT_MS / 1e3
        stage_ms = {"registration": 8.0 + generator.gamma(2.0, 0.5), "engine": 7.0 + generator.gamma(2.0, 0.5)}
        score = MEDIAN + DEVIATION * min(2.9, generator.standard_normal()) if number < parts else 2 * THRESHOLD
        health.note(
            scored(
                score,
                3.0 + sum(stage_ms.values()),
                stage_ms=stage_ms,
                registration=placed(generator.normal(0.0, 3.0), generator.uniform(-5.0, 5.0)),
                condition=lit(generator.normal(0.4, 0.01)),
            )
        )
