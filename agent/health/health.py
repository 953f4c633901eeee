"""How a station does: latencies, counts, places of the parts, drift of their scores, since the start and of late.

`Health` lives in the publish process and hears of every verdict once. Others read it meanwhile: the status on MQTT and
the service manager (`line`, `alarms`), Prometheus (`agent.health.metrics`), `taktsight-agent top` (`snapshot`).
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.health.drift import Drift, DriftState
from agent.health.histogram import Histogram, merged, merged_by_name
from agent.health.message import Count, Figures, Spread, health_message
from agent.publishing.messages import Alarm
from agent.verdict import Outcome, Reason, Verdict
from calibration.condition import Condition
from calibration.registration import Registration
from calibration.settings import Section

DEFAULT_PORT = 9464  # where Prometheus looks for programs that tell of themselves
SLICE_S, SLICES = 60.0, 10  # "of late" is the last ten of these, the present one not full
STRIP_S, STRIP_PLACES = 10.0, 60  # the slowest part of each ten seconds
KEPT_PARTS = 1000  # whose places, and whose light and focus, are told
PLACE_MEASURES = ("dx_px", "dy_px", "angle_deg", "residual_px", "similarity")
CONDITION_MEASURES = ("brightness", "dark_level", "bright_level", "saturated_share", "sharpness")
GAUGE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

UNTIMED = frozenset({Reason.PAUSED, Reason.HALTED, Reason.STOPPING, Reason.CAMERA_DOWN, Reason.OVERRUN, Reason.CRASHED})
"""Parts that are answered without being looked at: counted, but their latency says nothing of the inspection."""


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Where the station's figures are served."""

    port: int  # on 127.0.0.1; 0: nowhere


def read_health_settings(section: Section) -> HealthSettings:
    """Return the settings under `health`. Raises SettingsError naming the key that is out of range."""
    return HealthSettings(port=section.whole("port", DEFAULT_PORT, minimum=0, maximum=65535))


@dataclass(slots=True)
class _Slice:
    """What came in one span of time."""

    number: int = 0
    verdicts: Counter[tuple[Outcome, Reason]] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)
    stages: dict[str, Histogram] = field(default_factory=dict)

    def note(self, verdict: Verdict) -> None:
        """Count one verdict."""
        self.verdicts[verdict.outcome, verdict.reason] += 1
        for stage, duration_ms in verdict.stage_ms.items():
            self.stages.setdefault(stage, Histogram()).record(duration_ms)
        if verdict.latency_ms is not None and verdict.reason not in UNTIMED:
            self.latency.record(verdict.latency_ms)


@dataclass(slots=True)
class _Place:
    """One place of the strip: ten seconds."""

    number: int
    slowest_ms: float | None = None
    late: int = 0


class Health:
    """The figures of one run of one station. `note` and `reset` are for one thread; the rest is for any."""

    def __init__(
        self,
        station: str,
        *,
        takt_ms: float,
        deadline_ms: float,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._station = station
        self._takt_ms, self._deadline_ms = takt_ms, deadline_ms
        self._monotonic, self._now = monotonic, now
        self._lock = threading.Lock()
        self._started_utc = now()
        self._started_s = self._recent_from_s = monotonic()
        self._last_verdict_utc: datetime | None = None
        self._whole = _Slice()
        self._slices: deque[_Slice] = deque(maxlen=SLICES)
        self._strip: deque[_Place] = deque(maxlen=STRIP_PLACES)
        self._places: deque[tuple[float, ...]] = deque(maxlen=KEPT_PARTS)
        self._conditions: deque[tuple[float, ...]] = deque(maxlen=KEPT_PARTS)
        self._drift = Drift(None, None)
        self._recipe = self._digest = ""
        self._state, self._alarms = "starting", tuple[Alarm, ...]()
        self._gauges: dict[str, float] = {}

    @property
    def gauges(self) -> Mapping[str, float]:
        """What the owner measures: `agent.health.message.GAUGES` names those that are known."""
        return self._gauges

    @gauges.setter
    def gauges(self, gauges: Mapping[str, float]) -> None:
        """Raises ValueError on a name that Prometheus would refuse."""
        for name in gauges:
            if not GAUGE_NAME.fullmatch(name):
                raise ValueError(f"gauge {name!r}: want lower case letters, digits and _, such as outbox_waiting")
        self._gauges = {name: float(value) for name, value in gauges.items()}

    def tell(self, state: str, alarms: Iterable[Alarm] = ()) -> None:
        """Take the state and the alarms that the station's status has."""
        with self._lock:
            self._state, self._alarms = state, tuple(alarms)

    def reset(
        self, recipe: str, digest: str, good_median: float | None = None, good_deviation: float | None = None
    ) -> None:
        """Begin with another recipe: all but what was counted since the start is forgotten.

        good_median, good_deviation: `Thresholds` of the recipe; None: drift is not watched.
        """
        with self._lock:
            self._recipe, self._digest = recipe, digest
            self._drift = Drift(good_median, good_deviation)
            self._slices.clear()
            self._strip.clear()
            self._places.clear()
            self._conditions.clear()
            self._recent_from_s = self._monotonic()

    def note(self, verdict: Verdict) -> None:
        """Take one verdict."""
        place = None if verdict.registration is None else _place(verdict.registration)
        condition = None if verdict.condition is None else _condition(verdict.condition)
        now_s = self._monotonic() - self._started_s
        with self._lock:
            self._last_verdict_utc = self._now()
            self._whole.note(verdict)
            self._current_slice(now_s).note(verdict)
            self._note_on_strip(verdict, now_s)
            if place is not None:
                self._places.append(place)
            if condition is not None:
                self._conditions.append(condition)
            if verdict.outcome is Outcome.PASS and verdict.score is not None and verdict.threshold is not None:
                self._drift.note(verdict.score, verdict.threshold)

    def alarms(self) -> list[Alarm]:
        """Return what a person should see to, as far as it is found out here: `score_drift`."""
        with self._lock:
            drift = self._drift.state()
        return _drift_alarms(drift)

    def line(self) -> str:
        """Return one line for the status: parts and late ones since the start, latencies of the last ten minutes."""
        figures = self.figures()
        verdicts, summary = figures.since_start.verdicts, figures.recent.latency.summary()
        late = sum(n for (_, reason), n in verdicts.items() if reason is Reason.LATE)
        silent = sum(n for (outcome, _), n in verdicts.items() if outcome is Outcome.NO_VERDICT)
        told = [f"{verdicts.total()} parts"]
        if summary is not None:
            told.append(f"p50 {summary.p50:.3g} p99 {summary.p99:.3g} p99.9 {summary.p999:.3g} ms")
        told.append(f"{late} late")
        if silent > late:
            told.append(f"{silent - late} more without verdict")
        told.append(_drift_words(figures.drift))
        return f"{figures.recipe or figures.state}: {', '.join(told)}"

    def snapshot(self) -> dict[str, object]:
        """Return all figures as the JSON object of `interface/health.json`."""
        return health_message(self.figures())

    def figures(self) -> Figures:
        """Return all figures of this moment, copied."""
        now_s = self._monotonic()
        up_s = now_s - self._started_s
        with self._lock:
            number = int(up_s // SLICE_S)
            slices = [one for one in self._slices if one.number > number - SLICES]
            since_s = max(self._recent_from_s, self._started_s + (number - SLICES + 1) * SLICE_S)
            whole, recent = _count([self._whole], up_s), _count(slices, now_s - since_s)
            strip = [_Place(one.number, one.slowest_ms, one.late) for one in self._strip]
            places, conditions = list(self._places), list(self._conditions)
            drift, state, told = self._drift.state(), self._state, self._alarms
            recipe, digest, last_utc = self._recipe, self._digest, self._last_verdict_utc
        codes = {alarm.code for alarm in told}
        return Figures(
            station=self._station,
            created_utc=self._now(),
            started_utc=self._started_utc,
            last_verdict_utc=last_utc,
            state=state,
            alarms=(*told, *(alarm for alarm in _drift_alarms(drift) if alarm.code not in codes)),
            recipe=recipe,
            recipe_digest=digest,
            takt_ms=self._takt_ms,
            deadline_ms=self._deadline_ms,
            since_start=whole,
            recent=recent,
            strip_every_s=STRIP_S,
            strip=_filled(strip, int(up_s // STRIP_S)),
            n_places=len(places),
            places=_spreads(places, PLACE_MEASURES),
            n_conditions=len(conditions),
            conditions=_spreads(conditions, CONDITION_MEASURES),
            drift=drift,
            gauges=self._gauges,
        )

    def _current_slice(self, now_s: float) -> _Slice:
        number = int(now_s // SLICE_S)
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        return self._slices[-1]

    def _note_on_strip(self, verdict: Verdict, now_s: float) -> None:
        number = int(now_s // STRIP_S)
        if not self._strip or self._strip[-1].number != number:
            self._strip.append(_Place(number))
        place = self._strip[-1]
        place.late += verdict.reason is Reason.LATE
        latency_ms = verdict.latency_ms
        if latency_ms is not None and verdict.reason not in UNTIMED:
            place.slowest_ms = latency_ms if place.slowest_ms is None else max(place.slowest_ms, latency_ms)


def memory_bytes(pid: int) -> float:
    """Return how much memory a process has in use (its resident set); NaN where there is no such process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return math.nan
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _count(slices: Sequence[_Slice], seconds: float) -> Count:
    verdicts: Counter[tuple[Outcome, Reason]] = Counter()
    for one in slices:
        verdicts.update(one.verdicts)
    return Count(
        seconds=seconds,
        verdicts=verdicts,
        latency=merged(one.latency for one in slices),
        stages=merged_by_name(one.stages for one in slices),
    )


def _filled(strip: Sequence[_Place], newest: int) -> tuple[tuple[float | None, int], ...]:
    """Return (slowest ms, late parts) of each ten seconds up to now, oldest first; None where no part came."""
    found = {place.number: place for place in strip}
    numbers = range(max(0, newest - STRIP_PLACES + 1), newest + 1)
    return tuple((found[number].slowest_ms, found[number].late) if number in found else (None, 0) for number in numbers)


def _place(registration: Registration) -> tuple[float, ...]:
    """Return PLACE_MEASURES of one part."""
    return (
        registration.dx_px,
        registration.dy_px,
        registration.angle_deg,
        registration.residual_px,
        registration.similarity,
    )


def _condition(condition: Condition) -> tuple[float, ...]:
    """Return CONDITION_MEASURES of one frame; NaN where there was nothing to measure."""
    return (
        condition.brightness,
        condition.dark_level,
        condition.bright_level,
        condition.saturated_share,
        math.nan if condition.sharpness is None else condition.sharpness,
    )


def _spreads(rows: Sequence[tuple[float, ...]], names: Sequence[str]) -> dict[str, Spread]:
    """Return one spread per measure that is known of any part. rows: one per part, in the order of names."""
    columns = zip(names, np.array(rows, dtype=np.float64).T, strict=False)  # none where there are no rows
    finite = {name: column[np.isfinite(column)] for name, column in columns}
    return {
        name: _angles(column) if name == "angle_deg" else Spread(*_moments(column))
        for name, column in finite.items()
        if len(column)
    }


def _moments(values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    return float(values.mean()), float(values.std()), float(values.min()), float(values.max())


def _angles(degrees: NDArray[np.float64]) -> Spread:
    """Return the spread about the mean direction: 179 and -179 degrees lie 2 apart, so the maximum may exceed 180."""
    radians = np.radians(degrees)
    middle = float(np.degrees(np.arctan2(np.sin(radians).mean(), np.cos(radians).mean())))
    mean, sd, least, most = _moments((degrees - middle + 180.0) % 360.0 - 180.0)
    return Spread(middle + mean, sd, middle + least, middle + most)


def _drift_words(drift: DriftState) -> str:
    if not drift.watched:
        return "drift not watched"
    if drift.direction == "none" or drift.level is None:
        return "drift none"
    return f"drift {drift.direction} {abs(drift.level):.1f}"


def _drift_alarms(drift: DriftState) -> list[Alarm]:
    if drift.direction == "none" or drift.level is None:
        return []
    where, risk = ("above", "soon they are rejected") if drift.direction == "up" else ("below", "defects may escape")
    return [
        Alarm(
            "score_drift",
            f"parts that pass score {abs(drift.level):.1f} deviations {where} those of the calibration: {risk}. Look "
            "at light, focus, window, the part's place and the lot; if the parts are meant to look like this, fit the "
            "threshold anew with taktsight-calibration threshold, or train anew",
        )
    ]
