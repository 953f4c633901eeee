"""What a line is told and what it tells: its beat, who judges, parts that were settled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.cameras.trigger import TriggerSource
from agent.verdict import Reason, Verdict
from calibration.frame import Frame


class Inspector(Protocol):
    """What judges one frame; `agent.line.pipeline.Pipeline` is the real one."""

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        """Return the verdict on one frame; called by one thread, one frame at a time.

        deadline_ns: time.monotonic_ns() by which it must be there; what can be cut to keep it, is.
        """


@dataclass(frozen=True, slots=True)
class Settled:
    """One trigger's verdict, the frame it rests on, and who was in charge when it was settled."""

    verdict: Verdict
    frame: Frame | None
    inspector: Inspector


@dataclass(frozen=True, slots=True)
class Hold:
    """Why parts get no verdict for now."""

    reason: Reason  # PAUSED or HALTED
    detail: str


Deliver = Callable[[Sequence[Settled]], None]
OnRound = Callable[[int], None]  # gets heartbeat_ns; called by the delivery thread after each round that did not fail


@dataclass(frozen=True, slots=True)
class Beat:
    """What the line asks of us."""

    takt_ms: float  # from trigger to trigger
    deadline_ms: float  # from trigger to verdict
    queue_length: int = 4  # parts that may wait for the inspection
    on_no_verdict: str = "reject"  # what the gate does with such a part: reject | pass | stop (reject, then stop)
    by_camera: bool = False  # the camera's own trigger opens the parts: it is a SelfTriggeredCamera
    source: TriggerSource | None = None  # announces the parts, in the place of the beat


class Observer:
    """Is told of triggers before anything else happens to them, and when the inspection has time. Ignores both."""

    def opened(self, trigger_id: int) -> None:
        """A part has come."""

    def withdrawn(self, trigger_id: int) -> None:
        """It has not: there are no more parts."""

    def rested(self) -> None:
        """The inspection thread is done with a part."""
