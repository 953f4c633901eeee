"""Several stations under one parent, one for each camera of a station.yaml: what `run` does with such a file.

    parent    taktsight-agent run cell.yaml
    child     taktsight-agent run cell.yaml/top      inspects, and has a publish process of its own
    child     taktsight-agent run cell.yaml/side

Nothing of one goes through another, or through the parent, which is to its children what the service manager is to it:
it hears that they are ready and alive (the protocol of `agent.notify`), ends one that hangs and starts one that died
again, while the others go on inspecting. What a person must mend (`FOR_A_PERSON`, as in the unit) at the start ends
them all; later it is that one's end alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agent.journal import stderr_is_journal
from agent.notify import Supervisor

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "agent", "run")
FOR_A_PERSON = (2, 4, 5, 7)  # usage, station.yaml, recipe, missing package: the same again after every restart
START_AGAIN_S = (1.0, 2.0, 5.0, 10.0)
STEADY_S = 60.0  # after so long the waits begin anew
START_S = 170.0  # until it is ready; the unit waits 3 minutes for all
ABORT_S = 15.0  # from SIGABRT, which shows where it hangs, to SIGKILL
STOP_S = 30.0  # from SIGTERM; it asks for more where it must
REST_S = 2.0  # for what was printed last
POLL_S = 0.1
STATUS_EVERY_S = 5.0
MOST_BYTES = 65536
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a parent waits, seconds."""

    start_again_s: Sequence[float] = START_AGAIN_S
    abort_s: float = ABORT_S
    watchdog_s: float | None = None  # between two signs of life; None: for ever


@dataclass(slots=True)
class Child:
    """One station's process."""

    name: str
    path: Path
    process: subprocess.Popen[bytes] | None = None
    was_ready: bool = False  # once, in any of its lives
    is_ready: bool = False
    status: str = "starting"
    failures: int = 0  # in a row
    restarts: int = 0
    ended: int | None = None  # its exit code, once it is not started again
    began_s: float = 0.0
    heard_s: float = 0.0  # when it last gave a sign of life
    start_again_s: float = 0.0
    kill_s: float = field(default=float("inf"))  # when it is ended as it stands


class Stations:
    """One process per camera. Construct, then `run`; `stop` is safe in a signal handler."""

    def __init__(
        self,
        paths: dict[str, Path],
        supervisor: Supervisor,
        *,
        count: int | None = None,
        program: Sequence[str] = PROGRAM,
        patience: Patience | None = None,
    ) -> None:
        """paths: of each camera's station, by the camera's name; count: parts of each; None: until `stop`."""
        self.children = {name: Child(name, path) for name, path in paths.items()}
        self._supervisor = supervisor
        self._options = () if count is None else ("--count", str(count))
        self._program = program
        self._patience = patience or Patience(watchdog_s=supervisor.watchdog_s)
        self._selector = selectors.DefaultSelector()
        self._width = max(len(name) for name in paths)
        self._is_stopping = self._told_to_stop = False
        self._refused = 0  # the exit code for which all were ended
        self._status_due_s = 0.0
        self._has_streams = not stderr_is_journal()  # the journal knows whose line it is
        self._streams: dict[int, bytes] = {}  # descriptors from which children's output comes, lines that have begun

    def stop(self) -> None:
        """End them all; open triggers get their verdicts first."""
        self._is_stopping = True

    def run(self) -> int:
        """Return the exit code once all have ended: that of the first one that did not end well."""
        sockets = [self._listen(child) for child in self.children.values()]
        try:
            for child in self.children.values():
                self._start(child)
            while any(child.ended is None for child in self.children.values()):
                self._come_round()
            give_up_s = time.monotonic() + REST_S
            while self._streams and time.monotonic() < give_up_s:
                self._listen_round()
        finally:
            for child in self.children.values():
                if child.process is not None:
                    child.process.kill()
                    child.process.wait()
            self._selector.close()
            for descriptor in (*(one.detach() for one in sockets), *self._streams):
                os.close(descriptor)
        codes = [child.ended for child in self.children.values() if child.ended]
        return self._refused or next(iter(codes), 0)

    def _listen_round(self) -> None:
        for key, _ in self._selector.select(POLL_S):
            hear: Callable[[], None] = key.data
            hear()

    def _come_round(self) -> None:
        self._listen_round()
        if self._is_stopping and not self._told_to_stop:
            self._told_to_stop = True
            self._supervisor.stopping()
            for child in self.children.values():
                self._tell_to_stop(child)
        for child in self.children.values():
            self._look_after(child)
        self._tell_supervisor()

    def _listen(self, child: Child) -> socket.socket:
        """Return the socket at which a child's signs of life come."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        end.bind(f"\0taktsight-{os.getpid()}-{child.name}")
        self._selector.register(end, selectors.EVENT_READ, lambda: self._hear(child, end))
        return end

    def _start(self, child: Child) -> None:
        outs = [self._stream(child, out) for out in (1, 2)] if self._has_streams else [None, None]
        environment = {**os.environ, "NOTIFY_SOCKET": f"@taktsight-{os.getpid()}-{child.name}", "PYTHONUNBUFFERED": "1"}
        for key in ("WATCHDOG_PID", "WATCHDOG_USEC"):
            environment.pop(key, None)
        if self._patience.watchdog_s is not None:
            environment["WATCHDOG_USEC"] = str(round(self._patience.watchdog_s * 1e6))
        child.process = subprocess.Popen(
            [*self._program, str(child.path), *self._options],
            stdin=subprocess.DEVNULL,
            stdout=outs[0],
            stderr=outs[1],
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
            preexec_fn=_end_with_parent,  # noqa: PLW1509 no Python thread beside this one
        )
        child.began_s = child.heard_s = time.monotonic()
        child.is_ready, child.status, child.kill_s = False, "starting", float("inf")
        for end in outs:
            if end is not None:
                os.close(end)

    def _stream(self, child: Child, out: int) -> int:
        """Return a descriptor for a child to print to; each line goes to `out` with the child's name before it."""
        ours, theirs = os.pipe()
        self._streams[ours] = b""
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._pass_on(child, ours, out))
        return theirs

    def _pass_on(self, child: Child, stream: int, out: int) -> None:
        """Print what came. The end comes with the child's last descendant."""
        data = os.read(stream, MOST_BYTES)
        *lines, begun = (self._streams.pop(stream) + data).split(b"\n")
        if data:
            self._streams[stream] = begun
        else:
            self._selector.unregister(stream)
            os.close(stream)
        for line in lines if data or not begun else [*lines, begun]:
            with suppress(OSError):  # nobody reads it any more
                os.write(out, f"{child.name:{self._width}} | ".encode() + line + b"\n")

    def _hear(self, child: Child, end: socket.socket) -> None:
        """Take in what a child tells its service manager."""
        now_s = time.monotonic()
        with suppress(BlockingIOError):
            for line in end.recv(MOST_BYTES).decode(errors="replace").splitlines():
                key, _, value = line.partition("=")
                if key == "READY":
                    child.is_ready = child.was_ready = True
                elif key == "STATUS":
                    child.status = value
                elif key == "EXTEND_TIMEOUT_USEC" and value.isdecimal():
                    child.kill_s = max(child.kill_s, now_s + int(value) / 1e6) if self._told_to_stop else child.kill_s
                    self._supervisor.extend(int(value) / 1e6)
                if key in ("READY", "WATCHDOG", "STOPPING"):
                    child.heard_s = now_s

    def _tell_to_stop(self, child: Child) -> None:
        if child.process is None:
            child.ended = child.ended or 0  # it waits for its next start
            return
        child.kill_s = time.monotonic() + STOP_S
        child.process.send_signal(signal.SIGTERM)

    def _look_after(self, child: Child) -> None:
        """End a child that hangs; start one that died again when it is time."""
        now_s = time.monotonic()
        if child.process is None:
            if child.ended is None and now_s >= child.start_again_s:
                child.restarts += 1
                self._start(child)
            return
        code = child.process.poll()
        if code is None:
            self._end_if_hanging(child, now_s)
            return
        child.process = None
        if code == 0 or self._told_to_stop:
            child.ended, child.status = _as_exit_code(code), "ended"
            return
        self._count_failure(child, code, now_s)

    def _end_if_hanging(self, child: Child, now_s: float) -> None:
        assert child.process is not None
        if now_s >= child.kill_s:
            child.process.kill()
            return
        if self._told_to_stop or child.kill_s < float("inf"):
            return
        limit_s = self._patience.watchdog_s if child.is_ready else START_S
        if limit_s is not None and now_s - child.heard_s > limit_s:
            log.error("%s: no sign of life for %g s: ending it", child.name, limit_s)
            child.kill_s = now_s + self._patience.abort_s
            child.process.send_signal(signal.SIGABRT)

    def _count_failure(self, child: Child, code: int, now_s: float) -> None:
        """Plan a child's next start, or none where it would fail again."""
        waits = self._patience.start_again_s
        child.failures = 1 if child.is_ready and now_s - child.began_s > STEADY_S else child.failures + 1
        wait_s = waits[min(child.failures, len(waits)) - 1]
        told = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        child.is_ready = False
        if code in FOR_A_PERSON:
            child.ended, child.status = code, f"{told}: not started again"
            log.error("%s: %s: a person must mend that, then start the agent anew", child.name, told)
            if not child.was_ready:
                self._refuse(code)
            return
        child.status, child.start_again_s = f"{told}: to be started again", now_s + wait_s
        log.error("%s: %s; started again in %g s", child.name, told, wait_s)
        if all(one.failures and not one.was_ready for one in self.children.values()):
            self._refuse(_as_exit_code(code))

    def _refuse(self, code: int) -> None:
        """End them all: this is no start."""
        self._refused = self._refused or code
        self.stop()

    def _tell_supervisor(self) -> None:
        """Feed the watchdog; READY once each is ready, or has been tried in vain, and one is."""
        children, now_s = self.children.values(), time.monotonic()
        if not self._is_stopping and all(child.was_ready or child.failures or child.ended == 0 for child in children):
            self._supervisor.heartbeat(time.monotonic_ns())
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + STATUS_EVERY_S
            self._supervisor.status(" | ".join(f"{child.name}: {child.status}" for child in children))


def _as_exit_code(code: int) -> int:
    """Return what a shell would make of it: 128 and the signal's number."""
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """Be told to stop if the parent dies. Runs in the child, before its program."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
