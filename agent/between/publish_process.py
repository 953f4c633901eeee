"""The publish process as the inspect process sees it: started, listened to, started again, ended."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from agent.between.control import Answerer, Answering, error_named, pair
from agent.between.ring import Ring
from agent.errors import CommandError
from agent.publishing.publisher import Undelivered

log = logging.getLogger(__name__)

START_S = 90.0  # until it says ready: a large outbox is checked first
POLL_S = 0.2
HUNG_S = 30.0  # without a sign of life; a disk may take its time
START_AGAIN_S = (0.0, 1.0, 2.0, 5.0, 10.0)  # waits before the first, second ... start after it ended of itself
STEADY_S = 60.0  # after so long the waits begin anew
END_S = 20.0  # for what it does after the line has ended
END_STARTS = 3  # of a process that dies at the end: what waits in memory is not given up for one kill


@dataclass(frozen=True, slots=True)
class Ended:
    """What the publish process said last."""

    undelivered: Undelivered
    lost: int  # verdicts that could not be stored


class PublishProcess:
    """Keeps one publish process alive. `look_after` is for one thread, which it never holds up for long."""

    def __init__(
        self,
        station_file: Path,
        settings: bytes,
        ring: Ring,
        wake: int,
        *,
        hello: Callable[[bool], dict[str, Any]],
        asked: Mapping[str, Answerer],
        told: Mapping[str, Answerer],
    ) -> None:
        """settings: what the station's file held when the run began; wake: eventfd.

        hello: see `agent.publishing.publication`.
        """
        self._station_file = station_file
        self._settings = settings
        self._ring = ring
        self._hello = hello
        self._asked = asked
        self._told: dict[str, Answerer] = {
            **told,
            "ready": self._on_ready,
            "failed": self._on_failed,
            "ended": self._on_ended,
        }
        self._wake = wake
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Answering | None = None
        self._answered = Event()
        self._failure: tuple[str, str] | None = None
        self._ended: Ended | None = None
        self._started_s = 0.0
        self._failures = 0
        self._start_again_s = 0.0
        self.restarts = 0

    def start(self) -> None:
        """Start it and wait until it is ready. Raises what kept it from starting."""
        self._spawn(is_first=True)
        give_up_s = time.monotonic() + START_S
        while not self._answered.wait(POLL_S):
            died = self._process is None or self._process.poll() is not None
            if not died and time.monotonic() < give_up_s:
                continue
            if not self._answered.wait(POLL_S):  # its last word may be under way
                code = None if self._process is None else self._process.poll()
                self.kill()
                raise CommandError(_not_started(code))
        if self._failure is not None:
            self.kill()
            raise error_named(*self._failure)

    def look_after(self) -> None:
        """Start it again if it ended of itself; end it if it hangs."""
        process, now_s = self._process, time.monotonic()
        if process is None:
            if now_s >= self._start_again_s:
                self.restarts += 1
                self._spawn(is_first=False)
            return
        code = process.poll()
        if code is None:
            beat_ns = self._ring.reader_beat_ns
            silent_s = now_s - max(beat_ns / 1e9, self._started_s + START_S - HUNG_S)
            if silent_s > HUNG_S:
                log.error("the publish process gave no sign of life for %.0f s: ending it", HUNG_S)
                process.kill()
            return
        self._failures = 0 if now_s - self._started_s > STEADY_S else self._failures + 1
        wait_s = START_AGAIN_S[min(self._failures, len(START_AGAIN_S) - 1)]
        log.error("the publish process ended with code %d; verdicts wait in memory, next start in %g s", code, wait_s)
        self._start_again_s = now_s + wait_s
        self._hang_up()
        self._process = None

    def end(self, given_up: int = 0, goes_on: Callable[[], object] = lambda: None) -> Ended:
        """Let it finish: the ring tells it that the run is over. Returns what it said, or else what is left over.

        It has all the time that it needs while it goes on storing, and END_S for the rest.
        given_up: verdicts that never came into the ring. goes_on: is called about once a second meanwhile.
        """
        for _ in range(END_STARTS):
            if self._process is not None and self._process.poll() is not None and self._ended is None:
                self._hang_up()
                self._process = None
            if self._process is None:
                self._spawn(is_first=False)
            self._wait_for_end(goes_on)
            self._hang_up()
            if self._ended is not None or self._process is None:
                break
            log.error("the publish process ended with code %d before it had stored all", self._process.returncode)
        return self._ended or Ended(Undelivered(0, 0), self._ring.pending + given_up)

    def _wait_for_end(self, goes_on: Callable[[], object]) -> None:
        """Return once the process has ended, which it is made to where it does nothing any more."""
        pending, give_up_s = self._ring.pending, time.monotonic() + HUNG_S + END_S
        while self._process is not None:
            goes_on()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
                break
            if self._ring.pending < pending:
                pending, give_up_s = self._ring.pending, time.monotonic() + HUNG_S + END_S
            if time.monotonic() >= give_up_s:
                log.error("the publish process does not end: ending it")
                self.kill()

    def kill(self) -> None:
        """End it as it stands."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._hang_up()
        self._process = None

    def _spawn(self, *, is_first: bool) -> None:
        ours, theirs = pair()
        settings = os.memfd_create("taktsight-settings", os.MFD_CLOEXEC)
        os.write(settings, self._settings)
        os.lseek(settings, 0, os.SEEK_SET)
        descriptors = (self._ring.descriptor, self._wake, theirs.fileno(), settings)
        command = [sys.executable, "-m", "agent.publishing.process", str(self._station_file), *map(str, descriptors)]
        self._answered.clear()
        self._failure = self._ended = None
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)
        finally:
            theirs.close()
            os.close(settings)
        self._started_s = time.monotonic()
        with suppress(OSError):  # it has ended already, which is seen
            ours.sendall(json.dumps(self._hello(is_first)).encode())
        self._control = Answering(ours, self._asked, self._told)

    def _hang_up(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def _on_ready(self) -> None:
        self._answered.set()

    def _on_failed(self, error: str, text: str) -> None:
        self._failure = (error, text)
        log.error("the publish process: %s", text)
        self._answered.set()

    def _on_ended(self, verdicts: int, heatmaps: int, lost: int) -> None:
        self._ended = Ended(Undelivered(verdicts, heatmaps), lost)


def _not_started(code: int | None) -> str:
    """code: with which it ended; None: it did not."""
    if code is None:
        return f"the publish process did not start within {START_S:g} s: see the log"
    return f"the publish process ended with code {code} before it was ready: see the log"
