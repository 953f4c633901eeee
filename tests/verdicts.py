"""Verdict messages as they leave the outbox, and as the archive has them, for tests."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.clock import Stamp
from agent.publishing.messages import HeatmapPayload, Origin, numbered, verdict_message
from agent.publishing.verdict_files import newest_lines
from agent.verdict import Verdict

EPOCH = "00112233aabb"
NOON = datetime(2025, 3, 4, 12, tzinfo=UTC)


def sent(
    verdict: Verdict, origin: Origin, seq: int, *, created_utc: datetime = NOON, heatmap: HeatmapPayload | None = None
) -> dict[str, Any]:
    """Return the numbered message of a verdict."""
    return numbered(verdict_message(verdict, origin, Stamp(created_utc, 0.0), heatmap), epoch=EPOCH, seq=seq)


def archived(archive: Path) -> list[dict[str, Any]]:
    """Return the verdicts of an archive, the oldest first; none without one, or of a line that is not all there."""
    lines = list(newest_lines(archive)) if archive.exists() else []
    return [json.loads(line) for line in reversed(lines) if line.endswith(b"}")]
