"""What the plant is told: one JSON object per verdict, one per change of the station's status.

Field names are those of OPC 40100-1 (machine vision, ResultDataType) where it has them, in camelCase throughout.
The contracts are in `agent/interface/`; (station, epoch, seq) identifies a verdict for ever.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil, isnan
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.clock import Stamp
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition
from calibration.heatmap import FULL_SCALE, levels
from calibration.registration import Registration

VERDICT_SCHEMA = "taktsight.verdict/1"
MISSING_SCHEMA = "taktsight.missing/1"
STATUS_SCHEMA = "taktsight.status/1"
STATES = ("starting", "ready", "running", "paused", "halted", "stopped", "offline")
JPEG_QUALITY = 90  # 256 x 256: 3.7 KB, 0.2 ms, error up to 3 of 255 levels
MAX_REGIONS = 32
MAX_DETAIL_CHARACTERS = 500

LINE_ACTION_FOR_POLICY = {"reject": "divert", "pass": "accept", "stop": "divert"}
"""What the line is told about a part without verdict, by `Origin.on_no_verdict`; `stop` also ends the run."""

_ABORTED = frozenset({Reason.LATE, Reason.STOPPING, Reason.OVERRUN, Reason.PAUSED, Reason.HALTED, Reason.CRASHED})


@dataclass(frozen=True, slots=True)
class Origin:
    """Who speaks: the same for all messages of one run. Raises ValueError on a malformed field."""

    station: str
    run: str  # 12 hex digits, new for every run of the agent: see new_id()
    recipe: str  # product name
    recipe_digest: str  # sha256, 64 hex digits
    engine: str  # "openvino f32, 2 threads"
    simulated: bool
    on_no_verdict: str  # "reject" | "pass" | "stop": what the station does with a part without verdict

    def __post_init__(self) -> None:
        """Refuse what would make messages that consumers cannot trust."""
        if not self.station or not self.station.isprintable():
            raise ValueError(f"station {self.station!r}: want a name of printable characters")
        if not re.fullmatch(r"[0-9a-f]{12}", self.run):
            raise ValueError(f"run {self.run!r}: want 12 hex digits, as new_id() makes them")
        if not re.fullmatch(r"[0-9a-f]{64}", self.recipe_digest):
            raise ValueError(f"recipe_digest {self.recipe_digest!r}: want 64 hex digits")
        if self.on_no_verdict not in LINE_ACTION_FOR_POLICY:
            raise ValueError(f"on_no_verdict {self.on_no_verdict!r}: want one of {', '.join(LINE_ACTION_FOR_POLICY)}")


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that a person should see to, while it lasts."""

    code: str  # stable word for machines
    detail: str  # one sentence: what was found, what to do


@dataclass(frozen=True, slots=True)
class HeatmapPayload:
    """One anomaly map as a small gray picture, ready to send."""

    data: bytes
    sha256: str
    width: int
    height: int
    full_scale: float  # map value at gray level 255, in the recipe's units
    content_type: str = "image/jpeg"


def new_id() -> str:
    """Return 12 random hex digits: 48 bits, so that two runs or two outboxes of a station never share them."""
    return secrets.token_hex(6)


def heatmap_payload(anomaly_map: NDArray[np.float32], map_threshold: float, size: int = 256) -> HeatmapPayload:
    """Return the map as a gray JPEG with its longer side at most `size` px; never enlarged, and no peak averaged away.

    anomaly_map: (h, w), the recipe's units. map_threshold: same units, above 0; it lies at gray level 127.
    """
    height, width = anomaly_map.shape
    shrink = min(1.0, size / max(height, width))
    target = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = np.nan_to_num(anomaly_map, nan=np.inf)
    if shrink < 1.0:
        reach = 2 * ceil(1 / shrink) - 1  # px: every pixel of the map lies in the reach of one that is kept
        peaks = cv2.dilate(small, np.ones((reach, reach), dtype=np.uint8))
        small = np.asarray(cv2.resize(peaks, target, interpolation=cv2.INTER_NEAREST), dtype=np.float32)
    ok, encoded = cv2.imencode(".jpg", levels(small, map_threshold), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise ValueError(f"OpenCV cannot encode a map of {height} x {width} as JPEG")
    data = encoded.tobytes()
    return HeatmapPayload(
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        width=target[0],
        height=target[1],
        full_scale=FULL_SCALE * map_threshold,
    )


def verdict_message(
    verdict: Verdict, origin: Origin, stamp: Stamp, heatmap: HeatmapPayload | None = None
) -> dict[str, Any]:
    """Return the verdict as the JSON object of `verdict.schema.json`, but for its key: the outbox numbers it.

    stamp: when it was decided.

    Raises ValueError if a pass or reject carries a NaN score, or the stamp has no time zone.
    """
    score, threshold = _number(verdict.score), _number(verdict.threshold)
    if verdict.outcome is not Outcome.NO_VERDICT and (score is None or threshold is None):
        raise ValueError(
            f"part {verdict.trigger_id} is a {verdict.outcome} with score {verdict.score}: NaN decides nothing"
        )
    return {
        "schema": VERDICT_SCHEMA,
        "station": origin.station,
        "epoch": None,
        "seq": None,
        **_opc_fields(verdict, origin, stamp),
        "run": origin.run,
        "trigger": verdict.trigger_id,
        "monotonicMs": round(stamp.monotonic_ms, 3),
        "clockStepMs": round(stamp.clock_step_ms, 3),
        "clockSynchronized": stamp.synchronized,
        "outcome": str(verdict.outcome),
        "reason": str(verdict.reason),
        "detail": verdict.detail[:MAX_DETAIL_CHARACTERS],
        "score": score,
        "threshold": threshold,
        "lineAction": line_action(verdict, origin.on_no_verdict),
        "regions": _region_fields(verdict.regions, verdict.mm_per_px),
        "regionCount": len(verdict.regions),
        "zones": {name: _number(score) for name, score in verdict.zones.items()},
        "rejectedBy": list(verdict.rejected_by),
        "registration": None if verdict.registration is None else _registration_fields(verdict.registration),
        "condition": None if verdict.condition is None else _condition_fields(verdict.condition),
        "latencyMs": _number(verdict.latency_ms),
        "cut": list(verdict.cut),
        "recipeDigest": origin.recipe_digest,
        "engine": origin.engine,
        "heatmap": None if heatmap is None else _heatmap_link(heatmap),
    }


def numbered(message: dict[str, Any], *, epoch: str, seq: int) -> dict[str, Any]:
    """Return a verdict message with its key: seq counts the verdicts of one epoch from 1, without gaps."""
    link = message["heatmap"]
    return {
        **message,
        "epoch": epoch,
        "seq": seq,
        "resultId": f"{message['station']}/{epoch}/{seq}",
        "heatmap": None if link is None else {**link, "topic": heatmap_topic(seq)},
    }


def missing_message(
    station: str, *, epoch: str, first: int, last: int, why: str, created_utc: datetime | None = None
) -> dict[str, Any]:
    """Return the notice that stands in for verdicts first..last of an epoch, which never come; it has seq first."""
    return {
        "schema": MISSING_SCHEMA,
        "station": station,
        "epoch": epoch,
        "seq": first,
        "first": first,
        "last": last,
        "why": why[:MAX_DETAIL_CHARACTERS],
        "creationTime": _timestamp(created_utc or datetime.now(UTC)),
    }


def status_message(
    origin: Origin,
    state: str,
    *,
    created_utc: datetime | None = None,
    counters: Mapping[str, int] | None = None,
    alarms: Sequence[Alarm] = (),
    machine_state: str | None = None,
    health: str | None = None,
) -> dict[str, Any]:
    """Return what the station says of itself; the publisher adds what it knows of outbox and delivery when it sends it.

    state: one of STATES; `offline` is the last will, written in advance and therefore without a time.
    counters: whatever the agent counts, by name. machine_state: `agent.line.states.State`. health: one line for people.

    Raises ValueError on another state.
    """
    if state not in STATES:
        raise ValueError(f"status {state!r}: want one of {', '.join(STATES)}")
    created = None if state == "offline" else _timestamp(created_utc or datetime.now(UTC))
    return {
        "schema": STATUS_SCHEMA,
        "station": origin.station,
        "run": origin.run,
        "state": state,
        "creationTime": created,
        "internalRecipeId": origin.recipe,
        "recipeDigest": origin.recipe_digest,
        "engine": origin.engine,
        "isSimulated": origin.simulated,
        "onNoVerdict": origin.on_no_verdict,
        "counters": dict(counters or {}),
        "alarms": alarm_fields(alarms),
        "machineState": machine_state,
        "health": health,
    }


def alarm_fields(alarms: Iterable[Alarm]) -> list[dict[str, str]]:
    """Return alarms as they stand in a status."""
    return [{"code": alarm.code, "detail": alarm.detail[:MAX_DETAIL_CHARACTERS]} for alarm in alarms]


def encode(message: Mapping[str, Any]) -> bytes:
    """Return the message as it travels: compact JSON, UTF-8; half a surrogate becomes "?". Raises ValueError on NaN."""
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def heatmap_topic(seq: int) -> str:
    """Return the heatmap's topic below the station's root."""
    return f"heatmap/{seq}"


def line_action(verdict: Verdict, on_no_verdict: str) -> str:
    """Return what the line is told about the part: `accept` or `divert`.

    A halted station passes nothing, whatever the policy: it cannot keep its promises, for as long as nobody comes.
    """
    if verdict.outcome is Outcome.NO_VERDICT and verdict.reason is not Reason.HALTED:
        return LINE_ACTION_FOR_POLICY[on_no_verdict]
    return "accept" if verdict.outcome is Outcome.PASS else "divert"


def _opc_fields(verdict: Verdict, origin: Origin, stamp: Stamp) -> dict[str, Any]:
    """Return the fields of OPC 40100-1 ResultDataType; those that this version has no source for are None."""
    stage_ms = {name: _number(duration) for name, duration in verdict.stage_ms.items()}
    total_ms = _number(sum(verdict.stage_ms.values())) if stage_ms else None
    return {
        "resultId": None,
        "isPartial": False,
        "isSimulated": origin.simulated,
        "resultState": _result_state(verdict.reason),
        "internalRecipeId": origin.recipe,
        "internalConfigurationId": None,
        "jobId": None,
        "partId": verdict.part_id,
        "measId": None,
        "productId": origin.recipe,
        "creationTime": _timestamp(stamp.created_utc),
        "processingTimes": {"processingDuration": total_ms, "stageMs": stage_ms},
    }


def _result_state(reason: Reason) -> int:
    """Return OPC 40100-1 ResultState: 1 completed, 3 aborted, 4 failed."""
    if reason is Reason.SCORE:
        return 1
    return 3 if reason in _ABORTED else 4


def _region_fields(regions: tuple[Region, ...], mm_per_px: float | None) -> list[dict[str, Any]]:
    """Return the strongest regions, highest peak first: a bad light must not make a message of a megabyte."""
    strongest = sorted(regions, key=lambda region: region.peak, reverse=True)[:MAX_REGIONS]
    return [_place_fields(region, mm_per_px) for region in strongest]


def _place_fields(region: Region, mm_per_px: float | None) -> dict[str, Any]:
    """Return one region; its zone only where zones are drawn, millimetres only where the recipe knows the scale."""
    sides = {"x": region.x_px, "y": region.y_px, "width": region.width_px, "height": region.height_px}
    told: dict[str, Any] = {f"{name}Px": _number(side) for name, side in sides.items()}
    told |= {"areaPx": _number(region.area_px), "peak": _number(region.peak)}
    if region.zone is not None:
        told["zone"] = region.zone
    if mm_per_px is not None:
        told |= {f"{name}Mm": _number(round(side * mm_per_px, 4)) for name, side in sides.items()}
        told["areaMm2"] = _number(round(region.area_px * mm_per_px**2, 4))
    return told


def _registration_fields(registration: Registration) -> dict[str, Any]:
    """Return how the part lay: pixels of the reference, degrees, similarity 0..1."""
    return {
        "dxPx": _number(registration.dx_px),
        "dyPx": _number(registration.dy_px),
        "angleDeg": _number(registration.angle_deg),
        "residualPx": _number(registration.residual_px),
        "similarity": _number(registration.similarity),
    }


def _condition_fields(condition: Condition) -> dict[str, Any]:
    """Return light and focus of the frame: shares 0..1, sharpness as a ratio of at least about 1."""
    return {
        "brightness": _number(condition.brightness),
        "darkLevel": _number(condition.dark_level),
        "brightLevel": _number(condition.bright_level),
        "saturatedShare": _number(condition.saturated_share),
        "sharpness": _number(condition.sharpness),
    }


def _heatmap_link(heatmap: HeatmapPayload) -> dict[str, Any]:
    """Return how to find the heatmap, below the station's root once it is numbered, and how to check it."""
    return {
        "topic": None,
        "sha256": heatmap.sha256,
        "contentType": heatmap.content_type,
        "width": heatmap.width,
        "height": heatmap.height,
        "fullScale": heatmap.full_scale,
    }


def _number(value: float | None) -> float | None:
    """Return a number that JSON can carry: NaN becomes None, an infinity the largest float."""
    if value is None or isnan(value):
        return None
    return min(max(float(value), -sys.float_info.max), sys.float_info.max)


def _timestamp(moment: datetime) -> str:
    """Return UTC as ISO 8601 with milliseconds and Z. Raises ValueError on a time without zone."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone: pass datetime.now(UTC)")
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
