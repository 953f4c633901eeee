"""A GenICam camera: frames from a process of its own, which may die, hang or lose its camera; no deadline waits for it.

    UP       frames come, triggers are taken
    AWAY     the process looks for the camera, or is about to be started again; every trigger is refused at once

The process is found dead or hanging by whoever waits for a frame, killed, and started again after 1, 2 and then every
5 s. Each start sets the camera up anew and reads everything back: it comes back as it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from agent.between.control import error_named
from agent.cameras.child import PROGRAM, CameraChild
from agent.cameras.genicam_settings import GenicamSettings
from agent.cameras.reckoning import Arrivals
from agent.errors import CameraError
from agent.journal import fields
from calibration.errors import TaktsightError
from calibration.frame import Frame

log = logging.getLogger(__name__)

START_S = 30.0
END_S = 5.0
START_AGAIN_S = (1.0, 2.0, 5.0)
STEADY_S = 5.0  # after so long the waits begin anew
REPORT_EVERY_S = 60.0
LINE_S = 0.2
COUNTED = ("incomplete_frames", "crowded_frames", "withheld_triggers", "unpaired_frames")  # by the camera's process
NOT_STARTED = "the camera is not started: call start() first"


class GenicamCamera:
    """Camera behind a GenTL producer. With a trigger of its own it is a `SelfTriggeredCamera`, too."""

    def __init__(self, settings: GenicamSettings, *, program: Sequence[str] = PROGRAM) -> None:
        self.settings = settings
        self._program = program
        self._child: CameraChild | None = None
        self._is_up = False
        self._fault = NOT_STARTED
        self._up_s = self._start_again_s = 0.0
        self._failures = 0
        self._arrivals = Arrivals()
        self._facts: dict[str, Any] = {}
        self._exposed_ns = 0  # of the frame before
        self._early = 0
        self._counted: Counter[str] = Counter()  # of processes that ended
        self._counted_now: dict[str, int] = {}  # as the one that runs says
        self._reported: dict[str, int] = {}
        self._report_s = 0.0
        self._lines: set[str] = set()  # outputs that are used
        self._line_changed = threading.Condition()
        self._line_asked = self._line_done = 0
        self.values: dict[str, Any] = {}  # nodes as they were read back
        self.differences: tuple[str, ...] = ()  # and what is not as it was wanted
        self.restarts = 0

    @property
    def is_up(self) -> bool:
        """Whether it takes triggers and sends frames."""
        return self._is_up

    @property
    def parts(self) -> int:
        """How many parts the camera's own trigger has announced."""
        return self._arrivals.parts

    @property
    def lag_ns(self) -> int:
        """From the trigger to `received_ns` of its frame."""
        return round(self.settings.trigger.transfer_ms * 1e6)

    @property
    def facts(self) -> dict[str, Any]:
        """Which camera it is, and the digest of its settings; nothing before the first start."""
        return dict(self._facts)

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong so far, by kind."""
        arrivals = self._arrivals
        return {
            **{kind: self._counted[kind] + self._counted_now.get(kind, 0) for kind in COUNTED},
            "ignored_triggers": arrivals.ignored_triggers,
            "early_triggers": self._early,
            "duplicate_frames": arrivals.duplicate_frames,
            "camera_restarts": self.restarts,
        }

    def start(self) -> None:
        """Open the camera, set it up and arm it; a second call changes nothing.

        Raises CameraError with what to check, MissingPackage without harvesters.
        """
        if self._child is not None:
            return
        self._child = CameraChild(self.settings, patient=False, program=self._program)
        give_up_s = time.monotonic() + START_S
        try:
            while not self._is_up:
                if time.monotonic() > give_up_s:
                    raise CameraError(f"the camera was not ready within {START_S:g} s: its producer hangs; see the log")
                if (message := self._child.hear(0.1)) is not None:
                    self._take(message)
        except BaseException:
            self.stop()
            raise

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
        """Ask for the exposure of one part; returns at once. A camera with a trigger of its own ignores it.

        until_ns: time.monotonic_ns() after which the camera's process gives no such trigger: one clock for both.

        Raises CameraError while the camera is away.
        """
        child = self._child
        if child is None or not self._is_up:
            raise CameraError(self._fault)
        if self.settings.trigger.is_ours:
            child.tell(what="trigger", trigger_id=trigger_id, until_ns=until_ns)

    def set_line(self, name: str, *, on: bool) -> None:
        """Set one of the camera's outputs, such as UserOutput0; it is off whenever the camera comes up.

        For one thread, beside the one that waits for frames. Raises CameraError if the camera is away, or does not
        confirm it within LINE_S.
        """
        child = self._child
        with self._line_changed:
            self._lines.add(name)
            if child is None or not self._is_up:
                raise CameraError(self._fault)
            number = self._line_asked = self._line_asked + 1
            child.tell(what="line", name=name, on=on, number=number)
            if not self._line_changed.wait_for(lambda: self._line_done >= number, LINE_S):
                raise CameraError(f"{name} was not set within {LINE_S:g} s")

    def next_frame(self, timeout_s: float) -> Frame | None:
        """Return the next frame, or None if none came in time, or a part was announced that has none.

        Raises CameraError while the camera is away, after having done what there is to do about it.
        """
        give_up_s = time.monotonic() + timeout_s
        while True:
            self._report()
            child = self._child or self._started_again()
            try:
                message = child.hear(give_up_s - time.monotonic())
                frame, goes_on = (None, False) if message is None else self._take(message)
            except TaktsightError as error:
                self._lose(str(error))
                raise CameraError(str(error)) from error
            if frame is not None:
                return frame
            if not self._is_up and not goes_on:
                raise CameraError(self._fault)
            if not goes_on or time.monotonic() >= give_up_s:
                return None

    def stop(self) -> None:
        """Let the camera go; never raises, may be called twice."""
        child, self._child = self._child, None
        self._is_up, self._fault = False, NOT_STARTED
        if child is not None:
            child.end(END_S)

    def _take(self, message: dict[str, Any]) -> tuple[Frame | None, bool]:
        """Return the message's frame, if it has one, and else whether the next message may be waited for."""
        what = message["what"]
        if what == "frame":
            return self._frame(message), True
        if what == "ready":
            self._come_up(message)
            return None, True
        if what == "line":
            with self._line_changed:
                self._line_done = message["number"]
                self._line_changed.notify_all()
            return None, True
        if what == "lost":
            self._arrivals.lost()
            return None, False
        raise error_named(message["error"], message["text"])

    def _come_up(self, message: dict[str, Any]) -> None:
        self._facts, self.values = message["facts"], message["values"]
        self.differences = tuple(message["differences"])
        self._is_up, self._up_s = True, time.monotonic()
        missed = self._arrivals.connected(message["first_frame_id"], message["counter_before"], message["counter_now"])
        self._rest_lines()
        log.info("camera %s, settings %s", self._facts["camera"], self._facts["settings"], extra=fields(camera="up"))
        for difference in self.differences:
            log.warning("camera: %s", difference)
        if self.restarts and not self.settings.trigger.is_ours:
            told = "nothing tells how many parts went by" if missed is None else f"{missed} parts went by"
            log.warning("while the camera was away, %s", told)

    def _rest_lines(self) -> None:
        """Switch off what was ever switched: a camera that was away may have it on."""
        assert self._child is not None
        with self._line_changed:
            for name in self._lines:
                self._child.tell(what="line", name=name, on=False, number=self._line_done)

    def _frame(self, message: dict[str, Any]) -> Frame | None:
        """Return the frame, None if it shows no new part."""
        child = self._child
        assert child is not None
        assert child.slots is not None
        own, slot = message["facts"], message["slot"]
        self._counted_now = message["counted"]
        number: int | None = message["trigger_id"]
        if not self.settings.trigger.is_ours:
            number = self._arrivals.number(message["frame_id"], own.get("counter"))
        if number is None:
            child.slots.free(slot)
            return None
        dtype = np.uint8 if message["bit_depth"] == 8 else np.uint16
        return Frame(
            pixels=child.slots.lend(slot, tuple(message["shape"]), dtype),
            frame_id=message["frame_id"],
            trigger_id=number,
            exposed_ns=message["exposed_ns"],
            received_ns=message["received_ns"],
            bit_depth=message["bit_depth"],
            facts={**self._facts, **own, **self._early_fact(message["exposed_ns"])},
        )

    def _early_fact(self, exposed_ns: int) -> dict[str, bool]:
        """Notice a trigger that came sooner than a part can: bouncing, or two parts that touch."""
        before_ns, self._exposed_ns = self._exposed_ns, exposed_ns
        if not before_ns or not 0 < exposed_ns - before_ns < self.settings.trigger.least_gap_ms * 1e6:
            return {}
        self._early += 1
        return {"early_trigger": True}

    def _started_again(self) -> CameraChild:
        """Return a new process if it is time for one. Raises CameraError if it is not."""
        if self._fault == NOT_STARTED or time.monotonic() < self._start_again_s:
            raise CameraError(self._fault)
        self.restarts += 1
        self._child = CameraChild(self.settings, patient=True, program=self._program)
        return self._child

    def _lose(self, fault: str) -> None:
        """End the process, and plan the next one."""
        child, self._child = self._child, None
        if self._is_up and time.monotonic() - self._up_s > STEADY_S:
            self._failures = 0
        wait_s = START_AGAIN_S[min(self._failures, len(START_AGAIN_S) - 1)]
        self._failures += 1
        self._is_up, self._fault, self._exposed_ns = False, fault, 0
        self._start_again_s = time.monotonic() + wait_s
        self._counted += Counter(self._counted_now)
        self._counted_now = {}
        if child is not None:
            with suppress(OSError):
                child.kill()

    def _report(self) -> None:
        """Log once a minute what went wrong since."""
        if time.monotonic() < self._report_s:
            return
        self._report_s = time.monotonic() + REPORT_EVERY_S
        counters = self.counters
        new = {kind: count - self._reported.get(kind, 0) for kind, count in counters.items()}
        self._reported = counters
        if any(new.values()):
            told = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in new.items() if count)
            log.warning("camera, in the last minute: %s", told)
