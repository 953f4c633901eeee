"""In which state a station is, as OPC 40100-1 (machine vision) names them, and every way from one to another.

| state | the line | left by |
|---|---|---|
| Preoperational | gets no triggers: settings, recipe and engine are read | prepare |
| Initialized | gets no triggers: a recipe is loaded, its engine not proven yet | prove |
| Ready | parts get no verdict (`paused`), or there are none yet | start |
| ContinuousExecution | every part is judged | pause, fail, stop |
| Error | fail-safe: parts get no verdict (`halted`) | a person or an explicit command: confirm; or stop |
| Halted | the end of a run: no triggers | - (the process ends) |

The words in brackets and those of the status on MQTT are older than this table: see `WIRE_STATE`.
"""

from __future__ import annotations

import threading
from enum import StrEnum

from agent.errors import CommandError


class State(StrEnum):
    """OPC 40100-1, VisionStateMachineType and VisionAutomaticModeStateMachineType."""

    PREOPERATIONAL = "Preoperational"
    INITIALIZED = "Initialized"
    READY = "Ready"
    EXECUTING = "ContinuousExecution"
    ERROR = "Error"
    HALTED = "Halted"


class Event(StrEnum):
    """What moves a station from one state to another."""

    PREPARE = "prepare"  # settings and recipe are there
    PROVE = "prove"  # the engine reproduces the recipe's self-test
    START = "start"  # also what a person calls resume
    PAUSE = "pause"
    FAIL = "fail"  # the station cannot keep its promises
    CONFIRM = "confirm"  # a person or a command: the fault is seen to, and the engine proven anew
    STOP = "stop"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.PREOPERATIONAL, Event.PREPARE): State.INITIALIZED,
    (State.INITIALIZED, Event.PROVE): State.READY,
    (State.READY, Event.START): State.EXECUTING,
    (State.READY, Event.PAUSE): State.READY,
    (State.EXECUTING, Event.START): State.EXECUTING,
    (State.EXECUTING, Event.PAUSE): State.READY,
    (State.INITIALIZED, Event.FAIL): State.ERROR,
    (State.READY, Event.FAIL): State.ERROR,
    (State.EXECUTING, Event.FAIL): State.ERROR,
    (State.ERROR, Event.FAIL): State.ERROR,
    (State.ERROR, Event.CONFIRM): State.EXECUTING,
    **{(state, Event.STOP): State.HALTED for state in State},
    (State.HALTED, Event.PAUSE): State.HALTED,  # what comes after the end changes nothing
    (State.HALTED, Event.FAIL): State.HALTED,
}
"""Every way there is: what is not here is refused."""

WIRE_STATE = {
    State.PREOPERATIONAL: "starting",
    State.INITIALIZED: "starting",
    State.READY: "ready",  # or "paused", where somebody paused it
    State.EXECUTING: "running",
    State.ERROR: "halted",
    State.HALTED: "stopped",
}
"""`state` of the status on MQTT."""


class StateMachine:
    """One station's state. Any thread may ask and fire."""

    def __init__(self, state: State = State.PREOPERATIONAL) -> None:
        """state: where it begins."""
        self._state = state
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        """The present one."""
        return self._state

    def fire(self, event: Event) -> State:
        """Move on, and return the new state. Raises CommandError where this state knows no such way."""
        with self._lock:
            target = TRANSITIONS.get((self._state, event))
            if target is None:
                ways = ", ".join(sorted(way for state, way in TRANSITIONS if state is self._state))
                raise CommandError(f"{event} is not possible in state {self._state}: {ways} is")
            self._state = target
            return target
