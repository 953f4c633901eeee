"""What a command does to the running line. Each takes effect between two parts, or not at all.

The inspect process's half of `agent.commands.remote`: that one knows of disks and recordings, this one of the line.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from agent.commands.commands import Change
from agent.engines.engine import prove
from agent.errors import CommandError, EngineError, StorageError
from agent.line.loop import Line
from agent.line.pipeline import Pipeline
from agent.recipes.changeover import Changeover
from agent.recipes.store import TakeBack
from agent.verdict import Reason

BETWEEN_PARTS_S = 10.0  # a line that does not come between two parts within this time hangs
NEVER_NS = 2**63

Answer = TypeVar("Answer")


class LineOperations:
    """What is asked of the line, by any thread: one after the other.

    give_up_ns: time.monotonic_ns(); what was not done by then raises CommandError, and is not done later.
    """

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
        self._turn = threading.Lock()  # a publish process that died may have left a command under way
        self._give_up_ns = NEVER_NS

    def change_recipe(self, name: str, give_up_ns: int = NEVER_NS) -> Change:
        """Judge the next part by another recipe, proven on this device first; the old one judges until then."""
        with self._in_turn(give_up_ns):
            before, after = self._pipeline, self._changeover.to(name)
            self._put_in_charge(after, lambda: self._changeover.remember_recipe(name, after))
            return Change(_recipe(before), _recipe(after), f"{after.recipe.product} on {after.engine.label}")

    def pause(self, reason: str, give_up_ns: int = NEVER_NS) -> Change:
        """Give every part no verdict until `resume`."""
        with self._in_turn(give_up_ns):
            before = self._state()
            if before == "halted":
                raise CommandError("the station is halted, which is more than paused: see its alarms, then resume")
            self._line.hold(Reason.PAUSED, reason)
            return Change(before, self._state(), reason)

    def resume(self, give_up_ns: int = NEVER_NS) -> Change:
        """Inspect again, if what halted the station is over."""
        with self._in_turn(give_up_ns):
            before = self._state()
            if before == "halted":
                self._prove()
                self._check_time()
            self._line.release()
            return Change(before, self._state(), "inspecting")

    def send_frames(self, count: int, give_up_ns: int = NEVER_NS) -> Change:
        """Hand the next frames over with their verdicts."""
        with self._in_turn(give_up_ns):
            self._send_frames(count)
            return Change(None, count)

    def set_threshold(self, score: float | None, give_up_ns: int = NEVER_NS) -> Change:
        """Judge the next part by another score threshold; the recipe's file stays as it is."""
        with self._in_turn(give_up_ns):
            before = self._pipeline.score_threshold
            after = self._changeover.with_threshold(self._pipeline, score)
            self._put_in_charge(after, lambda: self._changeover.remember_threshold(after, score))
            return Change(before, after.score_threshold, f"a part is rejected above {after.score_threshold:g}")

    def self_test(self, give_up_ns: int = NEVER_NS) -> Change:
        """Prove the engine on the recipe's self-test between two parts; one that fails halts the station."""
        with self._in_turn(give_up_ns):
            try:
                difference = self._prove()
            except EngineError as error:
                self._line.hold(Reason.HALTED, f"self-test failed: {error}")
                raise
            after = {"difference": difference, "tolerance": self._tolerance}
            return Change(None, after, f"the engine reproduces the trainer's answers within {difference:.1e}")

    @contextmanager
    def _in_turn(self, give_up_ns: int) -> Iterator[None]:
        with self._turn:
            self._give_up_ns = give_up_ns
            self._check_time()
            yield

    def _check_time(self) -> None:
        if time.monotonic_ns() >= self._give_up_ns:
            raise CommandError("it could not be done in time: nothing was changed: send it again with a new id")

    def _prove(self) -> float:
        pipeline = self._pipeline
        return self._between_parts(lambda: prove(pipeline.engine, pipeline.recipe, self._tolerance))

    def _put_in_charge(self, pipeline: Pipeline, remember: Callable[[], TakeBack]) -> None:
        """Let the pipeline judge the next part; what cannot be remembered for the next start does not happen.

        It is remembered first, in this thread: between two parts nothing waits for a disk, or for who else uses it.
        """
        self._check_time()
        take_back = remember()
        try:
            self._between_parts(lambda: self._line.put_in_charge(pipeline))
        except CommandError as error:
            try:
                take_back()
            except StorageError as fault:
                raise CommandError(
                    "it was not done in time, and will hold from the next start on, which could not be taken back "
                    f"({fault}): command it again, or what held before"
                ) from error
            raise
        self._pipeline = pipeline

    def _between_parts(self, errand: Callable[[], Answer]) -> Answer:
        def in_time() -> Answer:
            self._check_time()
            return errand()

        try:
            return self._line.between_parts(in_time, BETWEEN_PARTS_S)
        except TimeoutError as error:
            raise CommandError(
                f"the line did not come between two parts within {BETWEEN_PARTS_S:g} s: nothing was changed"
            ) from error

    def _state(self) -> str:
        held = self._line.held
        return "running" if held is None else str(held.reason)


def _recipe(pipeline: Pipeline) -> dict[str, object]:
    return {"product": pipeline.recipe.product, "digest": pipeline.recipe.digest}
