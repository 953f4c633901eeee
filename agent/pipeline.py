"""The decision about one frame: pure, the same beside the line and in replay."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.engine import Engine
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.errors import BadFrame, NotRegistered
from calibration.frame import Frame
from calibration.photometric import Photometric
from calibration.preprocess import View, check_frame, picture_of, to_batch
from calibration.recipe import Recipe
from calibration.registration import Registration

MOST_REGIONS = 16
STAGES = ("photometric", "registration", "preprocess", "engine", "decision")


class Pipeline:
    """One recipe on one engine. `inspect` keeps no state between frames; one thread at a time."""

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
        self.photometric = photometric or Photometric()
        self.score_threshold = recipe.thresholds.score if score_threshold is None else score_threshold

    def inspect(self, frame: Frame) -> Verdict:
        """Return the verdict on one frame: pass or reject, or no_verdict where nothing can honestly be said."""
        watch = _Stopwatch()
        part_id = frame.facts.get("part_id")
        try:
            return self._scored(frame, watch, part_id)
        except NotRegistered as error:
            return _no_verdict(frame, Reason.NOT_REGISTERED, str(error), watch, part_id)
        except BadFrame as error:
            return _no_verdict(frame, Reason.BAD_FRAME, str(error), watch, part_id)

    def _scored(self, frame: Frame, watch: _Stopwatch, part_id: str | None) -> Verdict:
        recipe = self.recipe
        with watch.stage("photometric"):
            pixels = self.photometric.correct(frame.pixels, frame.bit_depth)
            check_frame(pixels, frame.bit_depth, recipe.view)
        registration = None
        with watch.stage("registration"):
            if recipe.reference is not None:
                registration = recipe.reference.register(pixels, frame.bit_depth)
        with watch.stage("preprocess"):
            batch = to_batch(pixels, frame.bit_depth, recipe.view, registration)
        with watch.stage("engine"):
            anomaly_map, score = self.engine.infer(batch)
        if not (math.isfinite(score) and bool(np.isfinite(anomaly_map).all())):
            return _no_verdict(frame, Reason.FAULT, f"the engine answered {score}: not a number", watch, part_id)
        with watch.stage("decision"):
            found = regions(anomaly_map, recipe.thresholds.map, recipe.view)
        return self._verdict(frame, watch, score, batch, anomaly_map, found, registration, part_id)

    def _verdict(  # noqa: PLR0917 private: gathers what the stages made
        self,
        frame: Frame,
        watch: _Stopwatch,
        score: float,
        batch: NDArray[np.float32],
        anomaly_map: NDArray[np.float32],
        found: tuple[Region, ...],
        registration: Registration | None,
        part_id: str | None,
    ) -> Verdict:
        threshold = self.score_threshold
        return Verdict(
            trigger_id=frame.trigger_id,
            outcome=Outcome.REJECT if score > threshold else Outcome.PASS,
            reason=Reason.SCORE,
            detail=_explanation(score, threshold, found),
            part_id=part_id,
            score=score,
            threshold=threshold,
            regions=found,
            registration=registration,
            anomaly_map=anomaly_map,
            picture=picture_of(batch),
            stage_ms=watch.stage_ms,
        )


def regions(anomaly_map: NDArray[np.float32], map_threshold: float, view: View) -> tuple[Region, ...]:
    """Return the connected places (8 neighbours) above the threshold, highest peak first, in reference pixels.

    anomaly_map: (h', w'), covering the detector's view. At most 16 are returned.
    """
    above = (anomaly_map > map_threshold).astype(np.uint8)
    if not above.any():
        return ()
    box = view.rectangle
    cell_x, cell_y = box.width_px / anomaly_map.shape[1], box.height_px / anomaly_map.shape[0]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    found = [
        Region(
            x_px=box.x_px + float(stats[label, cv2.CC_STAT_LEFT]) * cell_x,
            y_px=box.y_px + float(stats[label, cv2.CC_STAT_TOP]) * cell_y,
            width_px=float(stats[label, cv2.CC_STAT_WIDTH]) * cell_x,
            height_px=float(stats[label, cv2.CC_STAT_HEIGHT]) * cell_y,
            area_px=float(stats[label, cv2.CC_STAT_AREA]) * cell_x * cell_y,
            peak=float(anomaly_map[labels == label].max()),
        )
        for label in range(1, count)
    ]
    return tuple(sorted(found, key=lambda region: -region.peak)[:MOST_REGIONS])


class _Stopwatch:
    """Milliseconds per stage, on the monotonic clock."""

    def __init__(self) -> None:
        self.stage_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.stage_ms[name] = (time.monotonic_ns() - started_ns) / 1e6


def _no_verdict(frame: Frame, reason: Reason, detail: str, watch: _Stopwatch, part_id: str | None) -> Verdict:
    return Verdict(frame.trigger_id, Outcome.NO_VERDICT, reason, detail, part_id=part_id, stage_ms=watch.stage_ms)


def _explanation(score: float, threshold: float, found: tuple[Region, ...]) -> str:
    """Return one sentence for the operator."""
    if score <= threshold:
        return ""
    if not found:
        return f"score {score:.3g} is above {threshold:.3g}, spread over the part"
    worst = found[0]
    x, y = worst.x_px + worst.width_px / 2, worst.y_px + worst.height_px / 2
    return f"unlike good parts at x {x:.0f}, y {y:.0f} px, {worst.width_px:.0f} x {worst.height_px:.0f} px"
