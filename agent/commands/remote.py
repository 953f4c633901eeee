"""What a command does, seen from the publish process: disks and recordings here, the line at the other end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from agent.between import control
from agent.between.control import Asking
from agent.commands.commands import Change
from agent.errors import CommandError
from agent.line.capture import FrameCapture
from calibration.errors import TaktsightError


class RemoteOperations:
    """The real `agent.commands.commands.Operations`: asks the inspect process. One thread at a time."""

    def __init__(self, inspection: Asking, capture: FrameCapture, unstored: Callable[[], int]) -> None:
        """unstored: returns how many verdicts could not be stored so far; a halted line goes on trying."""
        self._inspection = inspection
        self._capture = capture
        self._unstored = unstored

    def change_recipe(self, name: str) -> Change:
        """Judge the next part by another recipe, proven on this device first; the old one judges until then."""
        return self._ask("change_recipe", name=name)

    def pause(self, reason: str) -> Change:
        """Give every part no verdict until `resume`."""
        return self._ask("pause", reason=reason)

    def resume(self) -> Change:
        """Inspect again, if what halted the station is over."""
        waiting = self._unstored()
        if waiting:
            raise CommandError(f"{waiting} verdicts still cannot be stored: free space for the outbox first")
        return self._ask("resume")

    def capture(self, count: int) -> Change:
        """Record the next frames; they are taken while the line runs."""
        folder = self._capture.begin(count)
        try:
            self._ask("send_frames", count=count)
        except TaktsightError:
            self._capture.left = 0  # no frame comes: the next capture may begin
            raise
        return Change(None, {"folder": folder.name, "count": count}, f"the next {count} frames go to {folder.name}")

    def set_threshold(self, score: float | None) -> Change:
        """Judge the next part by another score threshold; the recipe's file stays as it is."""
        return self._ask("set_threshold", score=score)

    def self_test(self) -> Change:
        """Prove the engine on the recipe's self-test between two parts; one that fails halts the station."""
        return self._ask("self_test")

    def _ask(self, what: str, **arguments: Any) -> Change:
        give_up_ns = time.monotonic_ns() + round(control.CARRY_OUT_S * 1e9)
        return Change(**self._inspection.ask(what, give_up_ns=give_up_ns, **arguments))
