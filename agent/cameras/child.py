"""The process of a camera as the agent sees it: started, told, listened to, ended. It is never waited for."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from agent.between.control import MOST_BYTES, pair
from agent.cameras.genicam_settings import GenicamSettings
from agent.cameras.slots import FrameSlots
from agent.errors import CameraError

PROGRAM = (sys.executable, "-m", "agent.cameras.process")
SLOTS = 16  # frames on their way, or in use
HUNG_S = 10.0  # without a sign of life; a node of a dead camera blocks for 5 s
OPEN_S = 60.0  # until the first one: it waits for a camera that is away


class CameraChild:
    """One camera's process. `tell` is for any thread, the rest for one."""

    def __init__(self, settings: GenicamSettings, *, patient: bool, program: Sequence[str] = PROGRAM) -> None:
        """Start it; returns at once. patient: it waits for a camera that is not there."""
        self._end, theirs = pair()
        self._end.setblocking(False)
        self._started_ns = time.monotonic_ns()
        self.slots: FrameSlots | None = None  # once it is ready
        try:
            self._process = subprocess.Popen(
                [*program, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)
            )
        except OSError as error:
            self._end.close()
            raise CameraError(f"the camera's process cannot be started: {error.strerror}: free memory") from error
        finally:
            theirs.close()
        self.tell(settings=settings.as_dict(), slots=SLOTS, patient=patient)

    def tell(self, **message: Any) -> None:
        """Say something. Raises CameraError if it is gone or takes nothing more."""
        try:
            self._end.send(json.dumps(message).encode())
        except OSError as error:
            raise CameraError("the camera's process does not take what it is told: see the log") from error

    def hear(self, timeout_s: float) -> dict[str, Any] | None:
        """Return its next message, None if none came in time. Raises CameraError at its end, or if it hangs."""
        if not select.select([self._end], [], [], max(timeout_s, 0.0))[0]:
            self._check_life()
            return None
        data, descriptors = b"", list[int]()
        with suppress(OSError):
            data, descriptors, _, _ = socket.recv_fds(self._end, MOST_BYTES, 1)
        if not data:
            raise CameraError(f"the camera's process ended with code {self._process.poll()}: see the log")
        message: dict[str, Any] = json.loads(data)
        for descriptor in descriptors:
            try:
                self.slots = FrameSlots(descriptor)
            finally:
                os.close(descriptor)
        return message

    def end(self, wait_s: float) -> None:
        """Let it let the camera go, for so long; then kill it. Never raises."""
        with suppress(CameraError):
            self.tell(what="stop")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        self.kill()

    def kill(self) -> None:
        """End it as it stands."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # what the kernel does not let go yet is waited for by nobody
        self._end.close()

    def _check_life(self) -> None:
        now_ns = time.monotonic_ns()
        beat_ns = self.slots.beat_ns if self.slots is not None else 0
        silent_ns = now_ns - beat_ns if beat_ns else now_ns - self._started_ns - round((OPEN_S - HUNG_S) * 1e9)
        if silent_ns > HUNG_S * 1e9:
            raise CameraError(f"the camera's process gave no sign of life for {HUNG_S:g} s: its producer hangs")
