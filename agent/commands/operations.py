"""What a command does to the running line. Each takes effect between two parts, or not at all.

The inspect process's half of `agent.commands.remote`: that one knows of disks and recordings, this one of the line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from agent.commands.commands import Change
from agent.engines.engine import prove
from agent.errors import CommandError, EngineError
from agent.line.loop import Line
from agent.line.pipeline import Pipeline
from agent.recipes.changeover import Changeover
from agent.verdict import Reason

BETWEEN_PARTS_S = 10.0  # a line that does not come between two parts within this time hangs

Answer = TypeVar("Answer")


class LineOperations:
    """What is asked of the line. One thread at a time."""

    def __init__(
        self,
        line: Line,
        pipeline: Pipeline,
        *,
        changeover: Changeover,
        tolerance: float,
        send_frames: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Begin with the pipeline that is in charge of the line.

        tolerance: largest difference from the trainer's answers, as `agent.engines.engine.prove` measures it.
        send_frames: hands the next so many frames over, for somebody who asked for them.
        """
        self._line = line
        self._pipeline = pipeline
        self._changeover = changeover
        self._tolerance = tolerance
        self._send_frames = send_frames

    def change_recipe(self, name: str) -> Change:
        """Judge the next part by another recipe, proven on this device first; the old one judges until then."""
        before, after = self._pipeline, self._changeover.to(name)
        self._put_in_charge(after, lambda: self._changeover.remember_recipe(name, after))
        return Change(_recipe(before), _recipe(after), f"{after.recipe.product} on {after.engine.label}")

    def pause(self, reason: str) -> Change:
        """Give every part no verdict until `resume`."""
        before = self._state()
        if before == "halted":
            raise CommandError("the station is halted, which is more than paused: see its alarms, then resume")
        self._line.hold(Reason.PAUSED, reason)
        return Change(before, self._state(), reason)

    def resume(self) -> Change:
        """Inspect again, if what halted the station is over."""
        before = self._state()
        if before == "halted":
            self._prove()
        self._line.release()
        return Change(before, self._state(), "inspecting")

    def send_frames(self, count: int) -> Change:
        """Hand the next frames over with their verdicts."""
        self._send_frames(count)
        return Change(None, count)

    def set_threshold(self, score: float | None) -> Change:
        """Judge the next part by another score threshold; the recipe's file stays as it is."""
        before = self._pipeline.score_threshold
        after = self._changeover.with_threshold(self._pipeline, score)
        self._put_in_charge(after, lambda: self._changeover.remember_threshold(after, score))
        return Change(before, after.score_threshold, f"a part is rejected above {after.score_threshold:g}")

    def self_test(self) -> Change:
        """Prove the engine on the recipe's self-test between two parts; one that fails halts the station."""
        try:
            difference = self._prove()
        except EngineError as error:
            self._line.hold(Reason.HALTED, f"self-test failed: {error}")
            raise
        after = {"difference": difference, "tolerance": self._tolerance}
        return Change(None, after, f"the engine reproduces the trainer's answers within {difference:.1e}")

    def _prove(self) -> float:
        pipeline = self._pipeline
        return self._between_parts(lambda: prove(pipeline.engine, pipeline.recipe, self._tolerance))

    def _put_in_charge(self, pipeline: Pipeline, remember: Callable[[], None]) -> None:
        """Let the pipeline judge the next part; what cannot be remembered for the next start does not happen."""

        def take_over() -> None:
            remember()
            self._line.put_in_charge(pipeline)

        self._between_parts(take_over)
        self._pipeline = pipeline

    def _between_parts(self, errand: Callable[[], Answer]) -> Answer:
        try:
            return self._line.between_parts(errand, BETWEEN_PARTS_S)
        except TimeoutError as error:
            raise CommandError(
                f"the line did not come between two parts within {BETWEEN_PARTS_S:g} s: nothing was changed"
            ) from error

    def _state(self) -> str:
        held = self._line.held
        return "running" if held is None else str(held.reason)


def _recipe(pipeline: Pipeline) -> dict[str, object]:
    return {"product": pipeline.recipe.product, "digest": pipeline.recipe.digest}
