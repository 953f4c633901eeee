"""A station without a line: an outbox that tests fill, and the publisher that empties it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from agent.clock import Stamp
from agent.mqtt.publisher import MqttPublisher, MqttSettings, outbox_consumers
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import HeatmapPayload, Origin, heatmap_payload, new_id, verdict_message
from agent.publishing.publisher import OnCommand, Undelivered
from agent.verdict import Outcome, Reason, Verdict

ROOT = "acme/plant1/hall2/line3/cell7"
ORIGIN = Origin("cell7", new_id(), "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
HEATMAP = heatmap_payload(np.linspace(0, 2, 64 * 64, dtype=np.float32).reshape(64, 64), 1.0)


class TestStation:
    """One outbox and one publisher, both started."""

    __test__ = False  # for pytest: this is no test

    def __init__(self, folder: Path, port: int, *, on_command: OnCommand | None = None, **settings: Any) -> None:
        self._folder, self._on_command = folder, on_command
        self.settings = MqttSettings(topic=ROOT, port=port, **settings)
        self.start()

    def start(self) -> None:
        """Begin a run."""
        self.outbox = Outbox(OutboxSettings(self._folder, reserve_mb=0.0), "cell7")
        self.outbox.set_consumers(outbox_consumers(self.settings))
        self.publisher = MqttPublisher(self.settings, ORIGIN, self.outbox, self._on_command)
        self.publisher.start()

    def inspect(self, count: int, *, heatmap: HeatmapPayload | None = None, detail: str = "") -> list[int]:
        """Store this many verdicts and return their seqs."""
        verdict = Verdict(1, Outcome.PASS, Reason.SCORE, score=0.25, threshold=0.5, latency_ms=31.5, detail=detail)
        message = verdict_message(verdict, ORIGIN, Stamp(datetime.now(UTC), 0.0), heatmap)
        stored = self.outbox.store([(message, heatmap)] * count)
        self.publisher.wake()
        return [item["seq"] for item in stored]

    def stop(self, timeout_s: float = 5.0) -> Undelivered:
        """Stop publisher and outbox."""
        undelivered = self.publisher.stop(timeout_s)
        self.outbox.close()
        return undelivered

    def restart(self) -> None:
        """Stop soon and begin a new run on the same outbox."""
        self.stop(0.4)
        self.start()


def contents(items: list[Any]) -> list[dict[str, Any]]:
    """Return the JSON of received messages."""
    return [json.loads(item.payload) for item in items]
