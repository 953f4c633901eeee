"""A camera over the simulated line: the same timing, gaps and faults as a real one, and pixels whose truth is known."""

from __future__ import annotations

import heapq
import queue
import threading
import time
from dataclasses import replace
from itertools import count, islice

from agent.errors import CameraError
from agent.simulation.line import SPECIAL, PartPlan, SimulatedLine
from calibration.frame import Frame, Pixels

BUFFERS = 64  # frames kept for a slow consumer; the next one is lost, as on a real camera
Trigger = tuple[int, int]  # (trigger_id, host clock in ns when it was given)
UNPLUGGED = "the simulated camera does not answer: check its cable and its power supply, then wait for the reconnect"
NOT_STARTED = "the simulated camera is not started: call start() first"


class SimulatedCamera:
    """Camera that draws one part per trigger on its own thread.

    Frame ids start at 1 with every `start` and advance for lost frames too. A frame is handed over no sooner than
    exposure_ms after its trigger was taken up; drawing it counts as exposure and transfer.
    """

    def __init__(self, line: SimulatedLine, *, exposure_ms: float = 2.0, prerendered: int = 0) -> None:
        """prerendered: parts drawn by the first `start`, which come round and round; 0: each is drawn when it comes.

        Drawing a part of 1 megapixel takes longer than inspecting it; a part drawn beforehand costs one copy, as out of
        a driver's buffer. Those of a special kind are drawn when they come, and never kept.
        """
        self._line = line
        self._prerendered = prerendered
        self._drawn: list[tuple[PartPlan, Pixels]] = []
        self._exposure_ns = round(exposure_ms * 1e6)
        self._triggers: queue.SimpleQueue[Trigger | None] = queue.SimpleQueue()
        self._delivered: list[tuple[int, int, Frame]] = []  # heap of (due_ns, frame_id, frame)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._unplugged = False
        self._cut_ns = 0  # when the cable was last pulled: what was triggered before is gone

    def start(self) -> None:
        """Arm and start the drawing thread; a second call changes nothing. Raises CameraError while unplugged."""
        with self._changed:
            if self._unplugged:
                raise CameraError(UNPLUGGED)
            if self._thread is None:
                self._draw_ahead()
                self._triggers = queue.SimpleQueue()
                arguments = (self._triggers,)
                self._thread = threading.Thread(target=self._expose, args=arguments, name="camera", daemon=True)
                self._thread.start()

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:  # noqa: ARG002 - it draws this part
        """Queue the exposure of one part; returns at once. While unplugged the trigger goes unanswered.

        Raises CameraError if not started.
        """
        with self._changed:
            if self._thread is None:
                raise CameraError(NOT_STARTED)
            if not self._unplugged:
                self._triggers.put((trigger_id, time.monotonic_ns()))

    def next_frame(self, timeout_s: float) -> Frame | None:
        """Return the next frame that is due, or None if none came within timeout_s.

        Raises CameraError while unplugged, and if not started or stopped meanwhile.
        """
        deadline_ns = time.monotonic_ns() + round(timeout_s * 1e9)
        with self._changed:
            while True:
                self._require_answering()
                now_ns = time.monotonic_ns()
                wake_ns = deadline_ns
                if self._delivered:
                    due_ns = self._delivered[0][0]
                    if due_ns <= now_ns:
                        return heapq.heappop(self._delivered)[2]
                    wake_ns = min(due_ns, deadline_ns)
                if deadline_ns <= now_ns:
                    return None
                self._changed.wait((wake_ns - now_ns) / 1e9)

    def stop(self) -> None:
        """Disarm and forget what was not fetched; wakes a waiting `next_frame`."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._triggers.put(None)
            self._delivered.clear()
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def unplug(self) -> None:
        """Behave as with the cable out: undelivered frames are gone, `next_frame` and `start` raise CameraError."""
        with self._changed:
            self._unplugged = True
            self._cut_ns = time.monotonic_ns()
            self._delivered.clear()
            self._changed.notify_all()

    def plug(self) -> None:
        """Put the cable back: later triggers are answered again."""
        with self._changed:
            self._unplugged = False

    def _require_answering(self) -> None:
        if self._unplugged:
            raise CameraError(UNPLUGGED)
        if self._thread is None:
            raise CameraError(NOT_STARTED)

    def _expose(self, triggers: queue.SimpleQueue[Trigger | None]) -> None:
        """Body of the drawing thread: answer triggers until the None that `stop` puts."""
        frame_id = 0
        while (trigger := triggers.get()) is not None:
            if self._is_outdated(triggers):
                return  # a backlog is not worked off after stop
            trigger_id, triggered_ns = trigger
            frame_id += 1
            exposed_ns = time.monotonic_ns()
            plan = self._line.plan(trigger_id)
            if plan.kind == "lost":
                continue
            plan, pixels = self._pictured(plan)
            due_ns = max(time.monotonic_ns(), exposed_ns + self._exposure_ns)
            if plan.kind == "late":
                due_ns += round(self._line.settings.late_ms * 1e6)
            frame = _frame(pixels, plan, frame_id=frame_id, exposed_ns=exposed_ns, received_ns=due_ns)
            self._deliver(frame, triggers, triggered_ns)

    def _draw_ahead(self) -> None:
        plans = (plan for plan in map(self._line.plan, count(1)) if plan.kind not in SPECIAL)
        missing = islice(plans, len(self._drawn), self._prerendered)
        self._drawn += [(plan, self._line.render(plan)[0]) for plan in missing]

    def _pictured(self, plan: PartPlan) -> tuple[PartPlan, Pixels]:
        """Return the part's pixels, and the truth about them: that of a part drawn beforehand, where there are any."""
        if not self._drawn or plan.kind in SPECIAL:
            return plan, self._line.render(plan)[0]
        drawn, pixels = self._drawn[(plan.trigger_id - 1) % len(self._drawn)]
        return replace(drawn, trigger_id=plan.trigger_id, part_id=plan.part_id), pixels.copy()

    def _is_outdated(self, triggers: queue.SimpleQueue[Trigger | None]) -> bool:
        """Return True to the thread of an earlier start."""
        return self._thread is None or triggers is not self._triggers

    def _deliver(self, frame: Frame, triggers: queue.SimpleQueue[Trigger | None], triggered_ns: int) -> None:
        with self._changed:
            cut_off = self._is_outdated(triggers) or triggered_ns <= self._cut_ns  # while the part was drawn
            if cut_off or len(self._delivered) >= BUFFERS:
                return
            heapq.heappush(self._delivered, (frame.received_ns, frame.frame_id, frame))
            self._changed.notify()


def _frame(pixels: Pixels, plan: PartPlan, *, frame_id: int, exposed_ns: int, received_ns: int) -> Frame:
    return Frame(
        pixels=pixels,
        frame_id=frame_id,
        trigger_id=plan.trigger_id,
        exposed_ns=exposed_ns,
        received_ns=received_ns,
        facts={"part_id": plan.part_id, "simulated": True, "truth": plan.truth()},
    )
