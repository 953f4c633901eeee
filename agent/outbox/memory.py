"""The outbox that ships as a fake: it numbers verdicts and keeps them nowhere but in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from agent.outbox.database import Taken
from agent.publishing.messages import Alarm, HeatmapPayload, new_id, numbered

KEPT_MESSAGES = 1000  # that are remembered

Batch = Sequence[tuple[dict[str, Any], HeatmapPayload | None]]


class MemoryOutbox:
    """Numbers verdicts and remembers the last 1000: for a station without a broker, and for tests."""

    def __init__(self) -> None:
        self.epoch = new_id()
        self.last_seq = 0
        self.taken: Taken | None = None
        self.messages: deque[dict[str, Any]] = deque(maxlen=KEPT_MESSAGES)

    def store(self, batch: Batch, taken: Taken | None = None) -> list[dict[str, Any]]:
        """Number the messages, remember them, and return them."""
        self.taken = taken
        first = self.last_seq + 1
        messages = [numbered(item[0], epoch=self.epoch, seq=seq) for seq, item in enumerate(batch, start=first)]
        self.last_seq += len(messages)
        self.messages.extend(messages)
        return messages

    def alarms(self) -> list[Alarm]:
        """Return none."""
        return []

    def close(self) -> None:
        """Keep what is remembered; nothing has to be let go."""
