"""A line whose parts a PLC or a pin announces, in the place of the beat."""

from __future__ import annotations

import time
from typing import Any

from agent.cameras.trigger import Announced, TriggerSource
from agent.line.loop import Line
from agent.line.tally import Tally
from agent.verdict import Reason

TOO_LATE = "the trigger's source told of this part too late for a picture, or of several at once: see docs/camera.md"


class PacedLine(Line):
    """A `Line` that triggers the camera when its source says so, and counts deadlines from that moment."""

    def __init__(self, source: TriggerSource, *arguments: Any, **options: Any) -> None:
        """arguments, options: as of `Line`."""
        super().__init__(*arguments, **options)
        self._source = source

    def run(self, count: int | None = None) -> Tally:
        """Trigger for `count` announced parts (None: until `stop`); else as `Line.run`.

        Raises CameraError as well if the source cannot be had.
        """
        self._source.start(self._wake.set)
        try:
            return super().run(count)
        finally:
            self._source.stop()

    def _keep_the_beat(self, count: int | None) -> None:
        """Trigger when parts are announced, and settle what is overdue, until nothing is left to do."""
        while self._comes_round("clock"):
            done = self._has_all_parts(count)
            if done and len(self._ledger) == 0:
                return
            self._settle_overdue(time.monotonic_ns())
            announced = None if done else self._source.announcements.take()
            if announced is None:
                self._wait(None)
            else:
                self._take(announced, count)

    def _take(self, announced: Announced, count: int | None) -> None:
        """Open the parts that were announced; those that are lost get their verdict at once."""
        for _ in range(announced.lost):
            if self._has_all_parts(count):
                return
            trigger_id = self.tally.triggers + 1
            if self._open(trigger_id, announced.at_ns):
                self._speak_for(trigger_id, Reason.FRAME_LOST, TOO_LATE)
        if announced.opens and not self._has_all_parts(count):
            self._trigger(announced.at_ns)
