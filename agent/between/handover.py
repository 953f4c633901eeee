"""From the line into shared memory: every verdict, and as many of its pictures as there is room for.

Where the publish process falls behind, heatmaps are shed first, then pictures and frames, a verdict never: what finds
no room in the ring waits here. With the ring full the station fails safe, because nothing is stored any more.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.between.record import Charge, Part, encoded
from agent.between.ring import BOARD_BYTES, Ring
from agent.line.beat import Inspector, Observer, Settled
from agent.line.realtime import StillHeap
from agent.verdict import Outcome

log = logging.getLogger(__name__)

HEATMAPS_UP_TO, PICTURES_UP_TO = 0.5, 0.75  # share of the pictures' room that may be in use
MOST_BOARD_BYTES = BOARD_BYTES - 64
MOST_WAITING = 10_000  # verdicts beyond the ring, about 15 MB; the newest go, which a halted line made without looking


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which pictures the publish process can use."""

    heatmaps: bool  # for MQTT
    pictures: str  # of the archive: none | rejects | all

    def heatmap(self, outcome: Outcome) -> bool:
        """Return whether the anomaly map is wanted."""
        return self.heatmaps or self.picture(outcome)

    def picture(self, outcome: Outcome) -> bool:
        """Return whether the picture that the detector saw and the frame are wanted."""
        return self.pictures == "all" or (self.pictures == "rejects" and outcome is not Outcome.PASS)


class Handover(Observer):
    """The inspect process's side of the ring. `deliver` and `came_round` are for the line's delivery thread."""

    def __init__(
        self,
        ring: Ring,
        wake: int,
        wanted: Wanted,
        charge_of: Callable[[Inspector], Charge],
        on_full: Callable[[str], None],
    ) -> None:
        """wake: eventfd that the publish process waits on. on_full: is called while the ring is full."""
        self._ring = ring
        self._wake = wake
        self._wanted = wanted
        self._charge_of = charge_of
        self._on_full = on_full
        self._heap = StillHeap()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._captures_left = 0  # frames that somebody asked for
        self.shed_heatmaps = self.shed_pictures = 0
        self.given_up = 0  # verdicts that found no room anywhere

    @property
    def unwritten(self) -> int:
        """Verdicts that found no room in the ring so far."""
        return len(self._waiting)

    def opened(self, trigger_id: int) -> None:
        """Note in shared memory that the part has come: whoever survives us speaks for it."""
        self._ring.note_open(trigger_id)

    def withdrawn(self, trigger_id: int) -> None:
        """Forget it again."""
        self._ring.note_closed(trigger_id)

    def rested(self) -> None:
        """Tidy the heap between two parts."""
        self._heap.rested()

    def freeze(self) -> None:
        """Everything is loaded: from here on the heap stays as it is."""
        self._heap.freeze()

    def send_frames(self, count: int) -> None:
        """Hand over the next so many frames for somebody who asked for them. Any thread."""
        self._captures_left = count

    def deliver(self, batch: Sequence[Settled]) -> None:
        """Hand over settled parts, in their order."""
        for settled in batch:
            try:
                self._hand_over(settled)
            except ValueError:
                log.exception("part %d: its verdict cannot be handed over", settled.verdict.trigger_id)
                self.given_up += 1
                self._ring.note_closed(settled.verdict.trigger_id)
        os.eventfd_write(self._wake, 1)

    def came_round(self, about_us: dict[str, Any]) -> None:
        """Hand over what waits, and post a word about the inspect process."""
        if self._waiting:
            self._flush()
            os.eventfd_write(self._wake, 1)
        data = json.dumps(about_us).encode()
        if len(data) > MOST_BOARD_BYTES:
            data = json.dumps({**about_us, "alarms": []}).encode()
        if len(data) <= MOST_BOARD_BYTES:
            self._ring.post(data)

    def counters(self) -> dict[str, int]:
        """Return what was counted here."""
        return {"shed_heatmaps": self.shed_heatmaps, "shed_images": self.shed_pictures, "given_up": self.given_up}

    def _hand_over(self, settled: Settled) -> None:
        part, trigger_id = self._as_part(settled), settled.verdict.trigger_id
        data, pictures = encoded(part, self._ring.most_bytes)
        if self._waiting or not self._ring.write(data, pictures, trigger_id):
            self._flush()
            data, _ = encoded(self._without_pictures(part), self._ring.most_bytes)
            if self._waiting or not self._ring.write(data, trigger_id=trigger_id):
                self._keep(trigger_id, data)
                return
        self._ring.note_closed(trigger_id)

    def _as_part(self, settled: Settled) -> Part:
        """Return the part with those pictures that are wanted and have room."""
        verdict, share = settled.verdict, self._ring.picture_share
        is_captured = self._captures_left > 0 and settled.frame is not None
        self._captures_left -= is_captured
        has_map = self._wanted.heatmap(verdict.outcome) and verdict.anomaly_map is not None
        has_picture = self._wanted.picture(verdict.outcome) and settled.frame is not None
        if has_map and share > HEATMAPS_UP_TO:
            self.shed_heatmaps += 1
            has_map = False
        if has_picture and share > PICTURES_UP_TO:
            self.shed_pictures += 1
            has_picture = False
        return Part(
            verdict=replace(
                verdict,
                anomaly_map=verdict.anomaly_map if has_map else None,
                picture=verdict.picture if has_picture and has_map else None,
            ),
            frame=settled.frame if has_picture or is_captured else None,
            charge=self._charge_of(settled.inspector),
            is_captured=is_captured,
        )

    def _without_pictures(self, part: Part) -> Part:
        """Shed what there is no room for; somebody who asked for a frame gets a later one."""
        self.shed_heatmaps += part.verdict.anomaly_map is not None
        self.shed_pictures += part.frame is not None
        self._captures_left += part.is_captured
        verdict = replace(part.verdict, anomaly_map=None, picture=None)
        return replace(part, frame=None, verdict=verdict, is_captured=False)

    def _keep(self, trigger_id: int, data: bytes) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self.given_up += 1
            self._ring.note_closed(trigger_id)
        else:
            self._waiting.append((trigger_id, data))
        self._on_full(
            f"{self._ring.slots} verdicts wait in memory, the publish process does not store them: see the log"
        )

    def _flush(self) -> None:
        while self._waiting and self._ring.write(self._waiting[0][1], trigger_id=self._waiting[0][0]):
            self._ring.note_closed(self._waiting.popleft()[0])
