"""Verdict messages as they leave the outbox, for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from agent.clock import Stamp
from agent.publishing.messages import HeatmapPayload, Origin, numbered, verdict_message
from agent.verdict import Verdict

EPOCH = "00112233aabb"
NOON = datetime(2025, 3, 4, 12, tzinfo=UTC)


def sent(
    verdict: Verdict, origin: Origin, seq: int, *, created_utc: datetime = NOON, heatmap: HeatmapPayload | None = None
) -> dict[str, Any]:
    """Return the numbered message of a verdict."""
    return numbered(verdict_message(verdict, origin, Stamp(created_utc, 0.0), heatmap), epoch=EPOCH, seq=seq)
