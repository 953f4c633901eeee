"""The process of one GenICam camera: started by `agent.cameras.genicam`, never by hand.

    python -m agent.cameras.process CONTROL                    an inherited descriptor, a socket of messages in JSON

    parent -> child    first {settings, slots, patient}, then {"what": "trigger" | "line" | "stop"}
    child -> parent    {"what": "ready" | "frame" | "lost" | "line" | "failed"}, see the functions that tell them

It may block in a producer, hang or crash: the parent never waits for it. It ends when the socket does. One thread: a
producer that waits for a frame holds Python's lock, and what else happens in this process waits with it.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

import cv2

from agent.between.control import MOST_BYTES
from agent.cameras.genicam_formats import Layout, PixelFormat, decode, pixel_format
from agent.cameras.genicam_nodes import Applied, apply
from agent.cameras.genicam_settings import GenicamSettings
from agent.cameras.reckoning import KEPT_TRIGGERS, Pairing
from agent.cameras.slots import FrameSlots
from agent.errors import CameraError
from calibration.console import log_to_stderr
from calibration.errors import MissingPackage, TaktsightError

log = logging.getLogger(__name__)

WAIT_MS = 50  # for a frame, where nothing else is to be done
AWAIT_MS = 2  # where a trigger may come meanwhile
IDLE_S = 0.02  # for a trigger, where no frame is awaited
PROBE_S = 1.5  # of silence, then the camera is asked whether it is still there
MOST_UNANSWERED = 3  # triggers in a row, over at least this time
UNANSWERED_S = 0.8
PATIENCE_S, TRY_AGAIN_S = 30.0, 1.0  # for a camera that was lost
FOREVER_NS = 2**63
NOT_INSTALLED = "harvesters or genicam is not installed: pip install 'taktsight[genicam]'"


def open_device(settings: GenicamSettings) -> Any:
    """Return an `agent.cameras.genicam_device.Device`. Raises CameraError, MissingPackage."""
    try:
        from agent.cameras.genicam_device import Device  # noqa: PLC0415 an optional package
    except ImportError as error:
        raise MissingPackage(NOT_INSTALLED) from error
    return Device(settings)


class CameraSession:
    """One camera from its opening until it is lost. Construct, then `run`."""

    def __init__(self, end: socket.socket, hello: dict[str, Any]) -> None:
        """Open the camera, set it up, start it and tell the parent. Raises TaktsightError."""
        self._end = end
        self.settings = GenicamSettings.from_dict(hello["settings"])
        self._device = self._opened(patient=hello["patient"])
        self._nodes = self._device.nodes
        counter_before = self._counter()
        applied = apply(self._nodes, self.settings)
        self._checked = _to_check(applied)
        self._agreed = int(self._nodes.get("Width")), int(self._nodes.get("Height")), self._device.pixel_format
        self._slots, descriptor = self._memory(hello["slots"])
        self._trigger = self._nodes.software_trigger() if self.settings.trigger.is_ours else None
        self._chunks = self._chunk_nodes()
        self._device.start(self.settings.buffers)
        self._pairing = Pairing(self._device.first_frame_id)
        self._too_late: deque[int] = deque(maxlen=KEPT_TRIGGERS)  # triggers whose frame may show another part
        self._heard_ns = time.monotonic_ns()  # when the camera last gave a sign of life
        self._unanswered = self._unanswered_since_ns = 0
        self._incomplete = self._crowded = self._withheld = 0
        self._wait_ms = WAIT_MS
        self._is_ended = False
        self._tell_ready(applied, counter_before, descriptor)

    def run(self) -> None:
        """Hand over frames until the parent ends it. Raises CameraError once the camera is lost."""
        while not self._is_ended:
            self._slots.beat()
            idle = self._trigger is not None and not self._pairing.is_waiting(time.monotonic_ns())
            self._hear(IDLE_S if idle else 0.0)
            frame = self._device.fetch(self._wait_ms if self._trigger is None else 1 if idle else AWAIT_MS)
            if frame is not None:
                self._hand_over(frame)
            self._count_incomplete()
            self._look_after()

    def close(self) -> None:
        """Let the camera go."""
        self._device.close()

    def _opened(self, *, patient: bool) -> Any:
        """Return the camera; where patient, one that is away or in use may come for a while."""
        give_up_s = time.monotonic() + (PATIENCE_S if patient else 0.0)
        while True:
            try:
                return open_device(self.settings)
            except CameraError:
                if time.monotonic() >= give_up_s or _has_hung_up(self._end):
                    raise
            time.sleep(TRY_AGAIN_S)

    def _memory(self, count: int) -> tuple[FrameSlots, int]:
        """Return slots for frames of the size that the camera is set to now."""
        width, height, code = self._agreed
        return FrameSlots.make(count, pixel_format(code).frame_bytes(width, height))

    def _chunk_nodes(self) -> dict[str, str]:
        """Return the nodes that tell about a frame, by what they are called in its facts."""
        wanted = {"exposure_us": "ChunkExposureTime", "gain_db": "ChunkGain", "counter": "ChunkCounterValue",
                  "line_status": "ChunkLineStatusAll", "frame_counter": "ChunkFrameID"}  # fmt: skip
        given = {f"Chunk{chunk}" for chunk in self.settings.chunks}
        if self.settings.trigger.counter is not None:
            given.add("ChunkCounterValue")
        return {fact: name for fact, name in wanted.items() if name in given}

    def _counter(self) -> int | None:
        """Return the camera's count of triggers, None where it has none."""
        name = self.settings.trigger.counter
        if name is None or not self._nodes.has("CounterValue"):
            return None
        self._nodes.set("CounterSelector", name)
        return int(self._nodes.get("CounterValue"))

    def _tell_ready(self, applied: Applied, counter_before: int | None, descriptor: int) -> None:
        found = self._device.found
        message = {
            "what": "ready",
            "facts": {
                "camera": found.serial or found.id,
                "model": f"{found.vendor} {found.model}".strip(),
                "firmware": found.firmware,
                "producer": f"{found.producer} {found.producer_version}".strip(),
                "settings": applied.digest[:16],
            },
            "first_frame_id": self._device.first_frame_id,
            "counter_before": counter_before,
            "counter_now": self._counter(),
            "differences": list(applied.differences),
            "values": applied.values,
        }
        try:
            socket.send_fds(self._end, [json.dumps(message).encode()], [descriptor])
        finally:
            os.close(descriptor)

    def _hear(self, wait_s: float) -> None:
        """Do what the parent says."""
        while select.select([self._end], [], [], wait_s)[0]:
            data = self._end.recv(MOST_BYTES)
            message: dict[str, Any] = json.loads(data) if data else {"what": "stop"}
            if message["what"] == "stop":
                self._is_ended = True
                return
            if message["what"] == "line":
                self._set_line(message)
            elif message["what"] == "trigger":
                self._give_trigger(message["trigger_id"], message.get("until_ns"))
            wait_s = 0.0

    def _set_line(self, message: dict[str, Any]) -> None:
        """Set an output of the camera, and confirm it; from now on the next such message is not kept waiting."""
        self._nodes.set("UserOutputSelector", message["name"])
        self._nodes.set("UserOutputValue", message["on"])
        self._wait_ms = AWAIT_MS
        self._tell("line", number=message["number"])

    def _give_trigger(self, trigger_id: int, until_ns: int | None) -> None:
        """Trigger the camera, unless the answer could not be told from that to the trigger before.

        until_ns: after which another part may stand there; a trigger that waited until then is not given, one that took
        until then to be given brings no frame.
        """
        assert self._trigger is not None
        until_ns = FOREVER_NS if until_ns is None else until_ns
        before_ns = time.monotonic_ns()
        if before_ns > until_ns or not self._pairing.may_trigger(before_ns):
            self._withheld += 1
            return
        self._trigger()
        after_ns = time.monotonic_ns()
        self._pairing.given(trigger_id, before_ns, after_ns)
        if after_ns > until_ns:
            self._withheld += 1
            self._too_late.append(trigger_id)
        if self._unanswered == 0:
            self._unanswered_since_ns = before_ns
        self._unanswered += 1

    def _hand_over(self, frame: Any) -> None:
        """Copy a frame into shared memory, unpacked, and tell the parent."""
        received_ns = self._heard_ns = time.monotonic_ns()
        self._unanswered = 0
        trigger_id = (
            None if self._trigger is None else self._pairing.answered(frame.frame_id, frame.exposed_ns, received_ns)
        )
        if trigger_id in self._too_late:
            trigger_id = None
        slot = self._slots.take()
        if slot is None or (self._trigger is not None and trigger_id is None):
            self._device.give_back(frame)
            self._crowded += slot is None
            if self._trigger is None:
                self._tell("lost")
            return
        form = self._format(frame.layout)
        shape = form.shape(frame.layout.width, frame.layout.height)
        decode(frame.data, frame.layout, self._slots.room(slot, shape, form.dtype))
        own = {fact: self._nodes.get(name) for fact, name in self._chunks.items() if self._nodes.has(name)}
        self._device.give_back(frame)
        self._slots.fill(slot)
        counted = {
            "incomplete_frames": self._incomplete,
            "crowded_frames": self._crowded,
            "withheld_triggers": self._withheld,
            "unpaired_frames": self._pairing.unpaired,
        }
        self._tell(
            "frame",
            slot=slot,
            shape=shape,
            bit_depth=form.bit_depth,
            frame_id=frame.frame_id,
            trigger_id=trigger_id,
            exposed_ns=frame.exposed_ns,
            received_ns=received_ns,
            facts={"format": form.name, **own},
            counted=counted,
        )

    def _format(self, layout: Layout) -> PixelFormat:
        """Return a frame's format. Raises CameraError if it is not as the camera was set up."""
        form, found = pixel_format(layout.code), (layout.width, layout.height, layout.code)
        if found != self._agreed:
            width, height, code = self._agreed
            raise CameraError(
                f"{layout.width} x {layout.height} px of {form.name} came, {width} x {height} px of "
                f"{pixel_format(code).name} were set: somebody else changes the camera"
            )
        return form

    def _count_incomplete(self) -> None:
        """Tell of each frame that came with holes: the camera lives, the part has no picture."""
        for _ in range(self._device.incomplete - self._incomplete):
            self._incomplete += 1
            self._heard_ns = time.monotonic_ns()
            self._unanswered = 0
            if self._trigger is None:
                self._tell("lost")

    def _look_after(self) -> None:
        """Raise CameraError if the camera is gone: it does not answer, or has forgotten how it was set up."""
        now_ns = time.monotonic_ns()
        if self._unanswered >= MOST_UNANSWERED and now_ns - self._unanswered_since_ns > UNANSWERED_S * 1e9:
            raise CameraError(
                f"{self._unanswered} triggers in a row brought no frame: the camera was restarted, or busy"
            )
        if now_ns - self._heard_ns < PROBE_S * 1e9:
            return
        self._device.check()
        for name, wanted in self._checked.items():
            if (found := self._nodes.get(name)) != wanted:
                raise CameraError(f"the camera has forgotten its settings ({name} is {found}): it was restarted")
        self._heard_ns = now_ns

    def _tell(self, what: str, **arguments: Any) -> None:
        self._end.sendall(json.dumps({"what": what, **arguments}).encode())


def _to_check(applied: Applied) -> dict[str, Any]:
    """Return a node that a camera which was restarted has forgotten, and its value."""
    mode = applied.values.get("TriggerMode[FrameStart]", applied.values.get("TriggerMode"))
    return {} if mode is None else {"TriggerMode": mode}


def _has_hung_up(end: socket.socket) -> bool:
    """Return whether the parent is gone, or wants us to end."""
    return bool(select.select([end], [], [], 0)[0])


def main(arguments: list[str]) -> int:
    """Serve one camera until the parent ends; 0, or 1 after an error that the parent was told."""
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT):  # the parent ends us
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr()
    cv2.setNumThreads(1)  # as the inspection does: a pool of threads waits for its slowest
    end = socket.socket(fileno=int(arguments[0]))
    session = None
    try:
        session = CameraSession(end, json.loads(end.recv(MOST_BYTES)))
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # harvesters took it
        session.run()
    except OSError:
        pass  # the parent is gone
    except TaktsightError as error:
        _tell_failure(end, type(error).__name__, str(error))
        os._exit(1)  # a dead camera takes 15 s to be let go, one that lives notices within seconds
    except Exception as error:
        log.exception("the camera's process fails")
        _tell_failure(
            end, CameraError.__name__, f"the camera's process fails: {type(error).__name__}: {error}: see the log"
        )
        os._exit(1)
    if session is not None:
        session.close()
    end.close()
    return 0


def _tell_failure(end: socket.socket, error: str, text: str) -> None:
    with suppress(OSError):
        end.sendall(json.dumps({"what": "failed", "error": error, "text": text}).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
