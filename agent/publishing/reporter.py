"""What a station tells of itself: status on MQTT, figures on loopback, from what both processes count."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.between.record import Charge, Part
from agent.between.ring import Ring
from agent.config import Station
from agent.health.health import Health, memory_bytes
from agent.health.metrics import HealthServer
from agent.publishing.messages import Alarm, status_message
from agent.publishing.publisher import Publisher
from agent.sparkplug.publisher import SparkplugPublisher

STATUS_EVERY_S = 5.0
COUNTED_THERE = {  # gauge: counters of the inspect process that add up to it
    "parts_unseen_total": ("parts_unseen",),
    "stale_frames_total": ("stale_frames",),
    "late_results_total": ("late_results",),
    "shed_pictures_total": ("shed_pictures", "shed_images"),  # by the line, by the handover
    "shed_heatmaps_total": ("shed_heatmaps",),
    "delivery_faults_total": ("delivery_faults",),
    "restarts_total": ("publisher_restarts",),
}


class Reporter:
    """Lives in the publish process. One thread."""

    def __init__(self, station: Station, ring: Ring, charge: Charge, publishers: Sequence[Publisher]) -> None:
        self._ring = ring
        self._charge = charge
        self._publishers = publishers
        self._health = Health(station.name, takt_ms=station.beat.takt_ms, deadline_ms=station.beat.deadline_ms)
        port = station.health.port
        self._server = HealthServer(self._health, port) if port else None
        self._judged_by: tuple[Any, ...] = ()
        self._said: tuple[Any, ...] = ()
        self._due_s = 0.0
        self._about_line: Mapping[str, Any] = {}
        self.counters: Callable[[], dict[str, int]] = dict  # of the publish process
        self.gauges: Callable[[], dict[str, float]] = dict
        self.alarms: Callable[[], list[Alarm]] = list
        self.outbox_alarms: Callable[[], list[Alarm]] = list  # the status has them already, from its publisher

    def start(self) -> None:
        """Serve figures; a port in use is told and nothing more."""
        self._judge_by(self._charge)
        if self._server is not None:
            self._server.start()

    def stop(self) -> None:
        """Serve no more, and say that the station has stopped."""
        self._publish("stopped")
        if self._server is not None:
            self._server.stop()

    def note(self, part: Part) -> None:
        """Take a stored part into the figures."""
        self._judge_by(part.charge)
        self._health.note(part.verdict)

    def come_round(self, about_line: Mapping[str, Any]) -> None:
        """Tell what is due: at once where the state changed, else every 5 s. about_line: the ring's board."""
        self._about_line = about_line
        state = str(about_line.get("state", "starting"))
        said = (state, self._charge.origin)
        if said != self._said or time.monotonic() >= self._due_s:
            self._said, self._due_s = said, time.monotonic() + STATUS_EVERY_S
            self._publish(state)

    def _judge_by(self, charge: Charge) -> None:
        judged_by = (charge.origin.recipe_digest, charge.good_median, charge.good_deviation)
        self._charge = charge
        if judged_by != self._judged_by:
            self._judged_by = judged_by
            self._health.reset(charge.origin.recipe, *judged_by)

    def _publish(self, state: str) -> None:
        counted = {str(name): int(number) for name, number in self._about_line.get("counters", {}).items()}
        alarms = [
            *(Alarm(str(one["code"]), str(one["detail"])) for one in self._about_line.get("alarms", ())),
            *self.alarms(),
            *self._health.alarms(),
        ]
        self._health.gauges = {
            **{gauge: float(sum(counted.get(name, 0) for name in names)) for gauge, names in COUNTED_THERE.items()},
            "ring_records": float(self._ring.pending),
            "inspect_memory_bytes": memory_bytes(os.getppid()),
            "publish_memory_bytes": memory_bytes(os.getpid()),
            **self.gauges(),
        }
        self._health.tell(state, [*alarms, *self.outbox_alarms()])
        message = status_message(
            self._charge.origin,
            state,
            counters={**counted, **self.counters(), **_sparkplug_counters(self._publishers)},
            alarms=alarms,
            machine_state="Halted" if state == "stopped" else self._about_line.get("machine_state"),
            health=self._health.line(),
        )
        for publisher in self._publishers:
            publisher.publish_status(message)


def _sparkplug_counters(publishers: Sequence[Publisher]) -> dict[str, int]:
    found = [publisher.counters() for publisher in publishers if isinstance(publisher, SparkplugPublisher)]
    return {f"sparkplug_{name}": number for counters in found for name, number in counters.items()}
