"""The decision about one frame: pure, the same beside the line and in replay."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.engines.engine import Engine, of_crops
from agent.line.budget import Budget, Costs
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition, glimpse, measured
from calibration.errors import BadFrame, NotRegistered
from calibration.frame import Frame, Pixels, reflectance
from calibration.photometric import Photometric
from calibration.preprocess import View, batch_of, check_frame, picture_of, to_crop
from calibration.recipe import Recipe
from calibration.registration import Registration
from calibration.zones import Zones

MOST_REGIONS = 16
STAGES = ("photometric", "condition", "registration", "preprocess", "engine", "regions")
TOO_LITTLE_TIME = "even at its quickest the answer would not have been there at the deadline"
REASON_FOR_CAUSE = {"wrong_part": Reason.OTHER_PRODUCT}  # of NotRegistered; every other cause is NOT_REGISTERED


class Pipeline:
    """One recipe on one engine. `inspect` keeps no state between frames but what stages cost; one thread at a time."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        photometric: Photometric | None = None,
        *,
        score_threshold: float | None = None,  # None: the recipe's own
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self._infer_crop = of_crops(engine)
        self.photometric = photometric or Photometric()
        self._costs = Costs()
        self.score_threshold = recipe.thresholds.score if score_threshold is None else score_threshold

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        """Return the verdict on one frame: pass or reject, or no_verdict where nothing can honestly be said.

        Light and focus are looked at before the part is: a blurred part that would not register either is `blurred`.
        deadline_ns: time.monotonic_ns(); a part that cannot be judged until then is `late` at once (see `budget`).
        """
        watch, budget = _Stopwatch(self._costs), Budget(deadline_ns, self._costs)
        try:
            with watch.stage("photometric"):
                pixels = self.photometric.correct(frame.pixels, frame.bit_depth)
                check_frame(pixels, frame.bit_depth, self.recipe.view)
            with watch.stage("condition"):
                condition = self._condition(frame, pixels)
                limits = self.recipe.condition
                complaint = None if limits is None else limits.complaint(condition)
        except BadFrame as error:
            return _no_verdict(frame, Reason.BAD_FRAME, str(error), watch)
        if complaint is not None:
            return _no_verdict(frame, Reason(complaint.cause), complaint.detail, watch, condition)
        try:
            return self._scored(frame, pixels, condition, watch, budget)
        except NotRegistered as error:
            reason = REASON_FOR_CAUSE.get(error.cause, Reason.NOT_REGISTERED)
            return _no_verdict(frame, reason, str(error), watch, condition)
        except BadFrame as error:
            return _no_verdict(frame, Reason.BAD_FRAME, str(error), watch, condition)

    def _condition(self, frame: Frame, pixels: Pixels) -> Condition:
        """Return light and focus of a frame; pixels: the same after photometric correction."""
        sensor_pixels = None if self.photometric.is_identity else frame.pixels
        registered = self.recipe.reference is not None
        view = self.recipe.view
        return measured(glimpse(pixels, frame.bit_depth, view, registered=registered, sensor_pixels=sensor_pixels))

    def _scored(self, frame: Frame, pixels: Pixels, condition: Condition, watch: _Stopwatch, budget: Budget) -> Verdict:
        recipe = self.recipe
        if budget.is_hopeless("registration", "preprocess", "engine"):
            return _no_verdict(frame, Reason.LATE, TOO_LITTLE_TIME, watch, condition)
        registration = None
        with watch.stage("registration"):
            if recipe.reference is not None:
                registration = recipe.reference.register(pixels, frame.bit_depth)
        with watch.stage("preprocess"):
            crop = to_crop(pixels, recipe.view, registration)
            batch = None  # 8-bit pixels may go to a GPU as they are
            if self._infer_crop is None or crop.dtype != np.uint8:
                batch = batch_of(crop, frame.bit_depth, recipe.view)
        if budget.is_hopeless("engine"):
            return _no_verdict(frame, Reason.LATE, TOO_LITTLE_TIME, watch, condition)
        with watch.stage("engine"):
            anomaly_map, score = self._infer(crop, batch)
        if not (math.isfinite(score) and bool(np.isfinite(anomaly_map).all())):
            return _no_verdict(frame, Reason.FAULT, f"the engine answered {score}: not a number", watch, condition)
        found = None
        if budget.allows("regions"):
            with watch.stage("regions"):
                found = regions(anomaly_map, recipe.thresholds.map, recipe.view, recipe.zones)
        picture = reflectance(crop, frame.bit_depth) if batch is None else picture_of(batch)
        verdict = self._verdict(frame, watch, score, picture, anomaly_map, found, registration, condition)
        return replace(verdict, cut=tuple(budget.cut)) if budget.cut else verdict

    def _infer(self, crop: Pixels, batch: NDArray[np.float32] | None) -> tuple[NDArray[np.float32], float]:
        if batch is not None:
            return self.engine.infer(batch)
        assert self._infer_crop is not None
        return self._infer_crop(np.asarray(crop, np.uint8))

    def _verdict(  # noqa: PLR0917 private: gathers what the stages made
        self,
        frame: Frame,
        watch: _Stopwatch,
        score: float,
        picture: NDArray[np.float32],
        anomaly_map: NDArray[np.float32],
        found: tuple[Region, ...] | None,
        registration: Registration | None,
        condition: Condition,
    ) -> Verdict:
        threshold = self.score_threshold
        zones = {} if self.recipe.zones is None else self.recipe.zones.scores(anomaly_map)
        verdict = Verdict(
            trigger_id=frame.trigger_id,
            outcome=Outcome.REJECT if score > threshold else Outcome.PASS,
            reason=Reason.SCORE,
            part_id=frame.facts.get("part_id"),
            score=score,
            threshold=threshold,
            regions=found or (),
            zones=zones,
            mm_per_px=self.recipe.mm_per_px,
            registration=registration,
            condition=condition,
            anomaly_map=anomaly_map,
            picture=picture,
            stage_ms=watch.stage_ms,
        )
        return replace(verdict, detail=_explanation(verdict, score, threshold, looked=found is not None))


def regions(
    anomaly_map: NDArray[np.float32], map_threshold: float, view: View, zones: Zones | None = None
) -> tuple[Region, ...]:
    """Return the connected places (8 neighbours) above the threshold, highest peak first, in reference pixels.

    anomaly_map: (h', w'), covering the detector's view. zones: of that map; each place is in that of its peak. At most
    16 are returned.
    """
    above = (anomaly_map > map_threshold).astype(np.uint8)
    if not above.any():
        return ()
    box = view.rectangle
    cell_x, cell_y = box.width_px / anomaly_map.shape[1], box.height_px / anomaly_map.shape[0]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    found = []
    for label in range(1, count):
        inside = np.where(labels == label, anomaly_map, -np.inf)
        peak = int(inside.argmax())
        found.append(
            Region(
                x_px=box.x_px + float(stats[label, cv2.CC_STAT_LEFT]) * cell_x,
                y_px=box.y_px + float(stats[label, cv2.CC_STAT_TOP]) * cell_y,
                width_px=float(stats[label, cv2.CC_STAT_WIDTH]) * cell_x,
                height_px=float(stats[label, cv2.CC_STAT_HEIGHT]) * cell_y,
                area_px=float(stats[label, cv2.CC_STAT_AREA]) * cell_x * cell_y,
                peak=float(anomaly_map.flat[peak]),
                zone=None if zones is None else zones.names[int(zones.cells.flat[peak])],
            )
        )
    return tuple(sorted(found, key=lambda region: -region.peak)[:MOST_REGIONS])


class _Stopwatch:
    """Milliseconds per stage, on the monotonic clock."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self.stage_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_ns = time.monotonic_ns()
        try:
            yield
        finally:
            duration_ns = time.monotonic_ns() - started_ns
            self._costs.note(name, duration_ns)
            self.stage_ms[name] = duration_ns / 1e6


def _no_verdict(
    frame: Frame, reason: Reason, detail: str, watch: _Stopwatch, condition: Condition | None = None
) -> Verdict:
    return Verdict(
        trigger_id=frame.trigger_id,
        outcome=Outcome.NO_VERDICT,
        reason=reason,
        detail=detail,
        part_id=frame.facts.get("part_id"),
        condition=condition,
        stage_ms=watch.stage_ms,
    )


def _explanation(verdict: Verdict, score: float, threshold: float, *, looked: bool) -> str:
    """Return one sentence for the operator. looked: False where there was no time to look for places."""
    if verdict.outcome is not Outcome.REJECT:
        return ""
    by = f"{', '.join(verdict.rejected_by)}: " if verdict.rejected_by else ""
    if not looked:
        return f"{by}score {score:.3g} is above {threshold:.3g}; there was no time to say where"
    if not verdict.regions:
        return f"{by}score {score:.3g} is above {threshold:.3g}, spread over the part"
    worst = verdict.regions[0]
    x, y = worst.x_px + worst.width_px / 2, worst.y_px + worst.height_px / 2
    text = f"{by}unlike good parts at x {x:.0f}, y {y:.0f} px, {worst.width_px:.0f} x {worst.height_px:.0f} px"
    if verdict.mm_per_px is not None:
        text += f" ({worst.width_px * verdict.mm_per_px:.3g} x {worst.height_px * verdict.mm_per_px:.3g} mm)"
    return text
