"""What the line is told about one part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from calibration.condition import Condition
from calibration.registration import Registration


class Outcome(StrEnum):
    """The three things that can be said of a part."""

    PASS = "pass"
    REJECT = "reject"
    NO_VERDICT = "no_verdict"


class Reason(StrEnum):
    """Why: `SCORE` for every pass and reject, one of the others for every no_verdict."""

    SCORE = "score"  # the score was compared with the threshold
    FRAME_LOST = "frame_lost"  # the trigger was given, no frame came before the deadline
    LATE = "late"  # the frame came, the answer was not ready at the deadline
    TOO_DARK = "too_dark"  # the lamp is off or weak: far less light than good parts had
    SATURATED = "saturated"  # far more light than good parts had, or too much of the frame at full scale
    BLURRED = "blurred"  # the fine detail of good parts is gone: focus, or motion
    NOT_REGISTERED = "not_registered"  # the part was not found where it can be judged: blank, out of view, poor fit
    OTHER_PRODUCT = "other_product"  # something is there, but not with the contour of the reference
    BAD_FRAME = "bad_frame"  # wrong size, wrong channels, reference patch out of range; a file that is no picture
    OVERRUN = "overrun"  # triggers came faster than parts can be inspected
    CAMERA_DOWN = "camera_down"  # the camera is not connected
    PAUSED = "paused"  # somebody asked the station to wait: detail says why
    HALTED = "halted"  # the station can no longer keep its promises: detail says why, a person must look
    STOPPING = "stopping"  # the agent was asked to stop with this part under way
    CRASHED = "crashed"  # the inspection ended of itself with this part under way, or was killed
    FAULT = "fault"  # anything else went wrong: detail and the log say what


@dataclass(frozen=True, slots=True)
class Region:
    """One connected place where the anomaly map is above the map threshold, in reference pixels."""

    x_px: float  # left edge
    y_px: float  # top edge
    width_px: float
    height_px: float
    area_px: float
    peak: float  # highest map value inside, in the recipe's units
    zone: str | None = None  # where the peak lies; None where no zones are drawn


@dataclass(frozen=True, slots=True)
class Verdict:
    """One trigger's one answer. score and threshold are None where nothing was scored."""

    trigger_id: int
    outcome: Outcome
    reason: Reason
    detail: str = ""  # one sentence for a person
    part_id: str | None = None
    score: float | None = None
    threshold: float | None = None
    regions: tuple[Region, ...] = ()
    zones: Mapping[str, float] = field(default_factory=dict)  # each zone's score, against the same threshold
    mm_per_px: float | None = None  # of the reference view, as the recipe has it
    registration: Registration | None = None
    condition: Condition | None = None  # light and focus of the frame; None where none could be looked at
    anomaly_map: NDArray[np.float32] | None = None  # (h', w'), the recipe's units
    picture: NDArray[np.float32] | None = None  # (h, w) or (h, w, 3) reflectance: what the detector saw
    cut: tuple[str, ...] = ()  # stages that were left out to be in time: `agent.line.budget`
    stage_ms: Mapping[str, float] = field(default_factory=dict)  # what each stage took, in order
    latency_ms: float | None = None  # trigger to decision, filled in by the loop
    decided_ns: int | None = None  # time.monotonic_ns() of the decision, filled in by the loop

    @property
    def rejected_by(self) -> tuple[str, ...]:
        """The zones above the threshold, strangest first; empty where the part is rejected as a whole."""
        limit = self.threshold
        if self.outcome is not Outcome.REJECT or limit is None:
            return ()
        return tuple(
            sorted((name for name in self.zones if self.zones[name] > limit), key=lambda name: -self.zones[name])
        )

    def __post_init__(self) -> None:
        """Raises ValueError where outcome and reason contradict each other."""
        if (self.outcome is Outcome.NO_VERDICT) == (self.reason is Reason.SCORE):
            raise ValueError(f"a {self.outcome} verdict cannot have the reason {self.reason}")
        if self.outcome is not Outcome.NO_VERDICT and (self.score is None or self.threshold is None):
            raise ValueError(f"a {self.outcome} verdict needs a score and a threshold")
