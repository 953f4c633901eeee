"""The line: triggers out, frames in, one verdict per trigger at its deadline at the latest.

The clock opens parts, on the beat or when the plant announces them (`agent.line.pace`), or the camera's own trigger
does: a number that it skips is a part without a frame.

Four threads, each with one job:

    clock (the caller's)   gives triggers; settles what is overdue as no_verdict
    acquisition            takes frames from the camera into a bounded queue; opens what the camera announces
    inspection             runs the pipeline, one frame at a time, and between two parts what others ask of it
    delivery               hands settled verdicts to the outlets (`agent.line.delivery`)

Whoever settles a trigger in the ledger first speaks for it; a result that comes later is counted, never sent. A line
that is held goes on taking triggers: each part is `no_verdict` with the reason of the hold, at once.

The output (the gate) is told by whoever settles, before anything is stored or sent. A part that comes while as many are
open as may wait is `overrun` at once: a burst takes bounded memory.

Each thread comes round within POLL_S, with or without parts, and notes when. `heartbeat_ns` is the slowest one's
moment: it stands still once one of them hangs or has died, in the engine, the camera or an outlet.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import cast

from agent.cameras.camera import NO_FRAME, Camera, SelfTriggeredCamera
from agent.cameras.trigger import Announced
from agent.errors import CameraError, EndOfFrames, FrameError, OutputError
from agent.journal import fields
from agent.line.beat import Beat, Deliver, Hold, Inspector, Observer, OnRound, Settled
from agent.line.delivery import Delivery
from agent.line.errands import Answer, Errands
from agent.line.ledger import Ledger, OpenTrigger
from agent.line.pace import MISSED, pace_of, running
from agent.line.states import Event, State, StateMachine
from agent.line.tally import Tally
from agent.outputs.output import NoOutput, Output
from agent.publishing.messages import line_action
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame

log = logging.getLogger(__name__)

POLL_S = 0.05  # how soon a thread notices that it should stop


class Line:
    """One camera, one inspector, one beat. `hold`, `release`, `between_parts` and `stop` are for any thread."""

    def __init__(
        self,
        camera: Camera,
        inspector: Inspector,
        beat: Beat,
        deliver: Deliver,
        on_round: OnRound = lambda _: None,
        *,
        output: Output | None = None,
        observer: Observer | None = None,
        states: StateMachine | None = None,
    ) -> None:
        """states: those of the station, Ready by now; None: its own."""
        self._camera = camera
        self.inspector = inspector
        self._beat = beat
        self._on_round = on_round
        self._output = output or NoOutput()
        self._observer = observer or Observer()
        self.states = states or StateMachine(State.READY)
        self._came_round_ns = dict.fromkeys(("clock", "acquisition", "inspection", "delivery"), 0)
        self._ledger = Ledger(beat.deadline_ms)
        self._frames: queue.Queue[Frame] = queue.Queue(maxsize=beat.queue_length)
        self._stopping = threading.Event()  # no more triggers
        self._ended = threading.Event()  # all threads go home
        self._wake = threading.Event()  # something changed for the clock
        self._errands = Errands(self._ended.is_set)
        self._pace = pace_of(beat)
        self._self_triggered = cast(SelfTriggeredCamera, camera) if beat.by_camera else None
        self._most_parts: int | None = None
        self._camera_fault: str | None = None
        self._holding = threading.Lock()
        self.held: Hold | None = None
        self.tally = Tally()
        self._delivery = Delivery(deliver, self._come_round_to_deliver, self.tally)

    @property
    def heartbeat_ns(self) -> int:
        """When the slowest of the four threads last came round, time.monotonic_ns(); 0 until each has for once."""
        return min(self._came_round_ns.values())

    def run(self, count: int | None = None) -> Tally:
        """Give `count` triggers (None: until `stop`), and return when each has its verdict and all were delivered.

        Raises CameraError if the camera or the beat's source cannot be started; after that it never raises for either.
        """
        self._most_parts = count
        with ExitStack() as ends:  # of each, from the last to the first
            ends.callback(self.states.fire, Event.STOP)
            ends.callback(self._camera.stop)
            self._camera.start()  # before parts come: one that waited for the camera has gone by
            ends.enter_context(running(self._pace, self._wake.set))
            ends.callback(self._output.close)  # rests before the camera goes: it may be an output of the camera
            self._run()
        return self.tally

    def _run(self) -> None:
        if self.held is None:
            self.states.fire(Event.START)
        workers = [
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            for work in (self._acquire, self._inspect)
        ]
        delivery = threading.Thread(target=self._delivery.run, name="delivery", daemon=True)
        for thread in (*workers, delivery):
            thread.start()
        try:
            self._keep_the_beat()
        finally:
            self._settle_all(Reason.STOPPING, "the agent was stopped with this part under way")
            self._ended.set()
            for thread in workers:
                thread.join()
            self._settle_all(Reason.STOPPING, "the agent was stopped when this part came")
            self._delivery.end()
            delivery.join()

    def stop(self) -> None:
        """Give no more triggers; `run` returns once the open ones have their verdicts. Safe in a signal handler."""
        self._stopping.set()
        self._wake.set()

    def hold(self, reason: Reason, detail: str) -> None:
        """Give every part from now on no verdict, for this reason; a halt is not softened to a pause."""
        with self._holding:
            if self.held is None or self.held.reason is not Reason.HALTED:
                self.states.fire(Event.FAIL if reason is Reason.HALTED else Event.PAUSE)
                self.held = Hold(reason, detail)
                log.warning("%s: %s", reason, detail, extra=fields(state=reason))

    def release(self) -> None:
        """Inspect again."""
        with self._holding:
            if self.held is not None:
                log.warning("%s no longer: inspecting again", self.held.reason, extra=fields(state="running"))
                self.states.fire(Event.CONFIRM if self.states.state is State.ERROR else Event.START)
            self.held = None

    def between_parts(self, errand: Callable[[], Answer], timeout_s: float) -> Answer:
        """Run the errand while no frame is being inspected and return what it returns, or raise what it raises.

        Raises TimeoutError if its turn did not come in time; it then never runs.
        """
        return self._errands.ask(errand, timeout_s)

    def put_in_charge(self, inspector: Inspector) -> None:
        """Let another inspector judge the next frame. To be called from an errand."""
        self.inspector = inspector

    def _has_all_parts(self) -> bool:
        return self._stopping.is_set() or (self._most_parts is not None and self.tally.triggers >= self._most_parts)

    def _keep_the_beat(self) -> None:
        """Trigger when parts come, and settle what is overdue, until nothing is left to do."""
        while self._comes_round("clock"):
            done = self._has_all_parts()
            if done and len(self._ledger) == 0:
                return
            now_ns = time.monotonic_ns()
            self._settle_overdue(now_ns)
            if done:
                self._wait(None)
            elif (announced := self._pace.take(now_ns)) is None:
                self._wait(self._pace.next_ns)
            else:
                self._open_all(announced)

    def _open_all(self, announced: Announced) -> None:
        """Open the parts that were announced; those that are lost get their verdict at once."""
        self.tally.parts_unseen += announced.unseen
        for _ in range(announced.lost):
            if self._has_all_parts():
                return
            trigger_id = self.tally.triggers + 1
            if self._open(trigger_id, announced.at_ns):
                self._speak_for(trigger_id, Reason.FRAME_LOST, self._pace.why_lost)
        if announced.opens and not self._has_all_parts():
            self._trigger(announced)

    def _wait(self, next_trigger_ns: int | None) -> None:
        """Sleep until the next trigger or deadline, or until something changes."""
        moments = [moment for moment in (next_trigger_ns, self._ledger.next_deadline_ns()) if moment is not None]
        wait_s = min([POLL_S, *((moment - time.monotonic_ns()) / 1e9 for moment in moments)])
        if wait_s > 0:
            self._wake.wait(wait_s)
        self._wake.clear()

    def _trigger(self, announced: Announced) -> None:
        """Open the part that stands before the camera, and have its picture taken while it does."""
        trigger_id = self.tally.triggers + 1
        if not self._open(trigger_id, announced.at_ns):
            return
        until_ns = self._pace.until_ns(announced)
        if until_ns is not None and time.monotonic_ns() > until_ns:
            self._speak_for(trigger_id, Reason.FRAME_LOST, MISSED)
            return
        try:
            self._camera.trigger(trigger_id, until_ns)
        except EndOfFrames:
            self._ledger.settle(trigger_id)
            self._observer.withdrawn(trigger_id)
            self.tally.triggers = trigger_id - 1
            self.stop()
        except CameraError as error:
            self._speak_for(trigger_id, Reason.CAMERA_DOWN, str(error))

    def _open(self, trigger_id: int, opened_ns: int) -> bool:
        """Open a part; False where it is answered at once: the line is held, or too many wait."""
        waiting = len(self._ledger)
        self._observer.opened(trigger_id)
        self._ledger.open(trigger_id, opened_ns)
        self.tally.triggers = trigger_id
        if (held := self.held) is not None:
            self._speak_for(trigger_id, held.reason, held.detail)
        elif waiting > self._beat.queue_length:  # one of them is being inspected
            self._speak_for(trigger_id, Reason.OVERRUN, f"{waiting} parts wait already: slow the line")
        else:
            return True
        return False

    def _open_announced(self, camera: SelfTriggeredCamera, frame: Frame | None) -> bool:
        """Open the parts that the camera announced; True if the frame's part, the last one, waits for its verdict."""
        opened_ns = (time.monotonic_ns() if frame is None else frame.received_ns) - camera.lag_ns
        is_open = False
        while camera.parts > self.tally.triggers and not self._has_all_parts():
            trigger_id = self.tally.triggers + 1
            is_open = self._open(trigger_id, opened_ns)
            if frame is None or frame.trigger_id != trigger_id:
                self._speak_for(trigger_id, Reason.FRAME_LOST, NO_FRAME)
                is_open = False
            self._wake.set()
        return is_open

    def _comes_round(self, thread: str) -> bool:
        """Note that this thread is done with its last piece of work; return False when all are to go home."""
        self._came_round_ns[thread] = time.monotonic_ns()
        return not self._ended.is_set()

    def _acquire(self) -> None:
        while self._comes_round("acquisition"):
            try:
                frame = self._camera.next_frame(POLL_S)
            except FrameError as error:
                frame = None
                self._speak_for(error.trigger_id, Reason.BAD_FRAME, str(error))
            except CameraError as error:
                self._note_camera(str(error))
                self._ended.wait(POLL_S)
                continue
            self._note_camera(None)
            if self._self_triggered is not None and not self._open_announced(self._self_triggered, frame):
                continue
            if frame is not None:
                self._take_in(frame)

    def _take_in(self, frame: Frame) -> None:
        """Queue a frame for the inspection."""
        if not self._ledger.arrived(frame):
            self.tally.stale_frames += 1
            return
        if self._frames.full():
            self._drop_settled_frames()
        try:
            self._frames.put_nowait(frame)
        except queue.Full:
            waiting = self._frames.maxsize
            self._speak_for(frame.trigger_id, Reason.OVERRUN, f"{waiting} frames wait already: slow the line")

    def _drop_settled_frames(self) -> None:
        """Make room: after a stall the queue is full of frames whose deadline has passed."""
        with suppress(queue.Empty, queue.Full):
            for _ in range(self._frames.maxsize):
                waiting = self._frames.get_nowait()
                if self._ledger.deadline_ns(waiting.trigger_id) is not None:
                    self._frames.put_nowait(waiting)

    def _inspect(self) -> None:
        while self._comes_round("inspection"):
            self._errands.run()
            try:
                frame = self._frames.get(timeout=POLL_S)
            except queue.Empty:
                continue
            deadline_ns = self._ledger.deadline_ns(frame.trigger_id)
            if deadline_ns is not None:
                self._conclude(self._inspected(frame, deadline_ns))
                self._observer.rested()

    def _inspected(self, frame: Frame, deadline_ns: int) -> Verdict:
        try:
            return self.inspector.inspect(frame, deadline_ns)
        except Exception as error:
            log.exception("part %d could not be inspected", frame.trigger_id)
            return _without(frame.trigger_id, Reason.FAULT, f"{type(error).__name__}: {error}", frame)

    def _conclude(self, verdict: Verdict) -> None:
        """Settle a trigger with what the pipeline said, unless its time is over."""
        entry = self._ledger.settle(verdict.trigger_id)
        if entry is None:
            self.tally.late_results += 1
            return
        now_ns = time.monotonic_ns()
        if now_ns > entry.deadline_ns:
            self.tally.late_results += 1
            verdict = self._late(entry)
        self._send(verdict, entry, now_ns)

    def _speak_for(self, trigger_id: int, reason: Reason, detail: str) -> None:
        if (entry := self._ledger.settle(trigger_id)) is not None:
            self._send(_without(trigger_id, reason, detail, entry.frame), entry, time.monotonic_ns())

    def _settle_overdue(self, now_ns: int) -> None:
        for entry in self._ledger.overdue(now_ns):
            self._send(self._late(entry), entry, now_ns)

    def _settle_all(self, reason: Reason, detail: str) -> None:
        for entry in self._ledger.overdue(2**63):
            self._send(_without(entry.trigger_id, reason, detail, entry.frame), entry, time.monotonic_ns())

    def _late(self, entry: OpenTrigger) -> Verdict:
        """Return the verdict at the deadline: lost where no frame came, late where the answer was not ready."""
        limit = f"{self._beat.deadline_ms:g} ms"
        if entry.frame is not None:
            return _without(entry.trigger_id, Reason.LATE, f"no answer within {limit}", entry.frame)
        if self._camera_fault is not None:
            return _without(entry.trigger_id, Reason.CAMERA_DOWN, self._camera_fault, None)
        return _without(entry.trigger_id, Reason.FRAME_LOST, f"no frame within {limit} of the trigger", None)

    def _send(self, verdict: Verdict, entry: OpenTrigger, now_ns: int) -> None:
        self._act(verdict, entry)
        verdict = replace(verdict, latency_ms=(now_ns - entry.opened_ns) / 1e6, decided_ns=now_ns)
        self._delivery.put(Settled(verdict, entry.frame, self.inspector))
        self._wake.set()
        wanted_stop = verdict.outcome is Outcome.NO_VERDICT and verdict.reason not in (Reason.PAUSED, Reason.HALTED)
        if self._beat.on_no_verdict == "stop" and wanted_stop and not self._stopping.is_set():
            log.warning("part %d: %s: stopping, as station.yaml says", verdict.trigger_id, verdict.reason)
            self.stop()

    def _act(self, verdict: Verdict, entry: OpenTrigger) -> None:
        """Tell the gate; one that cannot be told rests at divert, and the station fails safe."""
        try:
            action = line_action(verdict, self._beat.on_no_verdict)
            self._output.act(verdict.trigger_id, action, entry.opened_ns)
        except OutputError as error:
            self.hold(Reason.HALTED, f"the output cannot be driven: {error}")

    def _come_round_to_deliver(self) -> None:
        """Note that the delivery thread came round, and tell those who watch over the line."""
        self._comes_round("delivery")
        self._on_round(self.heartbeat_ns)

    def _note_camera(self, fault: str | None) -> None:
        """Log the camera's state when it changes."""
        if fault is not None and self._camera_fault is None:
            log.warning("camera down: %s", fault, extra=fields(camera="down"))
        if fault is None and self._camera_fault is not None:
            log.warning("camera back", extra=fields(camera="up"))
        self._camera_fault = fault


def _without(trigger_id: int, reason: Reason, detail: str, frame: Frame | None) -> Verdict:
    part_id = None if frame is None else frame.facts.get("part_id")
    return Verdict(trigger_id, Outcome.NO_VERDICT, reason, detail, part_id=part_id)
