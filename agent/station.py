"""One station put together: camera, pipeline, line, and the outlets of its verdicts."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

from agent.archive import Archive
from agent.config import Station
from agent.engine import Engine, open_engine
from agent.loop import Line, Tally
from agent.messages import Origin, heatmap_payload, new_epoch, status_message, verdict_message
from agent.mqtt import MqttPublisher
from agent.pipeline import Pipeline
from agent.publisher import MemoryPublisher, Publisher, Undelivered
from agent.verdict import Verdict
from calibration.frame import Frame
from calibration.recipe import Recipe, read_recipe

log = logging.getLogger(__name__)

STATUS_EVERY_S = 5.0
DELIVER_AT_END_S = 5.0


class RunningStation:
    """Everything that one run needs. Verdicts go out in this order: publisher, then archive."""

    def __init__(self, station: Station) -> None:
        """Raises what the recipe, the engine and the archive raise: a station that cannot judge does not start."""
        self.recipe: Recipe = read_recipe(station.recipe)
        self.engine: Engine = open_engine(self.recipe, station.engine)
        self._warn_of_foreign_thresholds()
        self.origin = Origin(
            station=station.name,
            epoch=new_epoch(),
            recipe=self.recipe.product,
            recipe_digest=self.recipe.digest,
            engine=self.engine.label,
            simulated=station.camera.simulated,
            on_no_verdict=station.on_no_verdict,
        )
        self._publisher: Publisher = _publisher(station, self.origin)
        self._archive = None if station.archive is None else Archive(station.archive)
        self._heatmaps = station.mqtt is not None and station.mqtt.heatmaps
        pipeline = Pipeline(self.recipe, self.engine, station.photometric)
        self.line = Line(station.camera.open(), pipeline, station.beat, self._deliver)
        self._seq = 0
        self._status_due_s = 0.0

    def run(self, count: int | None) -> tuple[Tally, Undelivered]:
        """Inspect `count` parts (None: until `line.stop`) and return what happened and what no broker confirmed."""
        self._publisher.start()
        self._publish_status("ready")
        try:
            tally = self.line.run(count)
        finally:
            self._publish_status("stopped")
            undelivered = self._publisher.stop(DELIVER_AT_END_S)
        return tally, undelivered

    def _deliver(self, verdict: Verdict, frame: Frame | None) -> None:
        """Hand one verdict to the outlets. Runs in the line's delivery thread."""
        self._seq += 1
        limit = self.recipe.thresholds.map
        heatmap = None
        if self._heatmaps and verdict.anomaly_map is not None:
            heatmap = heatmap_payload(verdict.anomaly_map, limit)
        message = verdict_message(verdict, self.origin, seq=self._seq, created_utc=datetime.now(UTC), heatmap=heatmap)
        self._publisher.publish_verdict(message, heatmap)
        if self._archive is not None:
            self._archive.store(message, verdict, frame, limit)
        if time.monotonic() >= self._status_due_s:
            self._status_due_s = time.monotonic() + STATUS_EVERY_S
            self._publish_status("running")

    def _publish_status(self, state: str) -> None:
        tally = self.line.tally
        counters = {
            "triggers": tally.triggers,
            **tally.outcomes,
            "stale_frames": tally.stale_frames,
            "late_results": tally.late_results,
            "shed_pictures": tally.shed_pictures,
            "delivery_faults": tally.delivery_faults,
            "archive_failures": 0 if self._archive is None else self._archive.failures,
        }
        self._publisher.publish_status(status_message(self.origin, state, counters=counters))

    def _warn_of_foreign_thresholds(self) -> None:
        """A threshold belongs to the precision that it was fitted on."""
        fitted_on = self.recipe.thresholds.fitted_on
        precision = self.engine.label.split(",")[0].split()[-1]
        if precision not in fitted_on:
            log.warning(
                "thresholds were fitted on %s, this engine is %s: run taktsight-agent replay --scores with this "
                "engine, then taktsight-calibration threshold", fitted_on, self.engine.label
            )  # fmt: skip


def _publisher(station: Station, origin: Origin) -> Publisher:
    return MemoryPublisher() if station.mqtt is None else MqttPublisher(station.mqtt, origin)
