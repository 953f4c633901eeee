"""What the two processes of a station ask of each other, as JSON over a socket pair that keeps messages apart.

    publish -> inspect    ask (answered, one after the other), tell (acted on at once, not answered)
    inspect -> publish    answers

The socket's end is the end of the other process: nothing else tells it sooner.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import agent.errors
import calibration.errors
from agent.errors import CommandError
from calibration.errors import TaktsightError

log = logging.getLogger(__name__)

MOST_BYTES = 128 * 1024
CARRY_OUT_S = 120.0  # a recipe takes seconds to load; a large one on a slow disk longer
ANSWER_S = CARRY_OUT_S + 15.0  # what was begun in time has this long to be told
POLL_S = 0.2
NOT_KNOWN = (
    "whether it was done is not known, later it will not be: look at the station's status, then send it with a new id "
    "if it was not"
)

Answerer = Callable[..., Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Asking:
    """The publish process's end. Any thread may call."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._number = 0

    def fileno(self) -> int:
        """The socket, to poll for the other side's end."""
        return self._end.fileno()

    def ask(self, what: str, **arguments: Any) -> Any:
        """Return the other process's answer.

        Raises the TaktsightError that it raised; CommandError, which says that the outcome is not known, if it does not
        answer, or nothing that can be read.
        """
        with self._lock:
            self._number += 1
            request = json.dumps({"id": self._number, "what": what, "arguments": arguments}).encode()
            give_up_s = time.monotonic() + ANSWER_S
            try:
                self._end.settimeout(ANSWER_S)
                self._end.sendall(request)
                while (left_s := give_up_s - time.monotonic()) > 0:
                    self._end.settimeout(left_s)
                    answer = _received(self._end)
                    if answer is None:
                        break
                    if answer.get("id") == self._number:
                        return _opened(answer)
            except (OSError, ValueError, TypeError, KeyError) as error:  # gone, too slow, or not as agreed
                raise CommandError(f"the inspection does not answer: {error}: {NOT_KNOWN}") from error
            raise CommandError(f"the inspection does not answer: {NOT_KNOWN}")

    def tell(self, what: str, **arguments: Any) -> None:
        """Say something that needs no answer; one that is gone does not hear it."""
        with suppress(OSError):
            self._end.sendall(json.dumps({"id": None, "what": what, "arguments": arguments}).encode())

    def close(self) -> None:
        """Hang up."""
        self._end.close()


class Answering:
    """The inspect process's end: one thread listens and acts on what is told, another answers what is asked."""

    def __init__(self, end: socket.socket, asked: Mapping[str, Answerer], told: Mapping[str, Answerer]) -> None:
        self._end = end
        self._asked, self._told = asked, told
        self._requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("control", self._listen), ("commands", self._answer))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Hang up; what came before is still carried out, its answer is not heard."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._requests.put(None)
        for thread in self._threads:
            thread.join(POLL_S)
        self._end.close()

    def _listen(self) -> None:
        while True:
            try:
                request = _received(self._end)
            except OSError:
                return
            except (ValueError, TypeError):
                log.exception("told something that cannot be read")
                continue
            if request is None:
                return
            if request.get("id") is not None:
                self._requests.put(request)
                continue
            try:
                self._told[request["what"]](**request["arguments"])
            except Exception:
                log.exception("told %s, which could not be done", request.get("what"))

    def _answer(self) -> None:
        while (request := self._requests.get()) is not None:
            try:
                answer = json.dumps({"id": request["id"], "value": self._value(**request)})
            except TaktsightError as error:
                answer = json.dumps({"id": request["id"], "error": type(error).__name__, "text": str(error)})
            except Exception as error:
                log.exception("asked %s, which could not be done", request.get("what"))
                text = f"{type(error).__name__}: {error}: see the log"
                answer = json.dumps({"id": request["id"], "error": CommandError.__name__, "text": text})
            with suppress(OSError):
                self._end.sendall(answer.encode())

    def _value(self, what: str, arguments: dict[str, Any], **_: Any) -> Any:
        return self._asked[what](**arguments)


def error_named(name: str, text: str) -> TaktsightError:
    """Return the error of that class, as the other process raised it; a CommandError where it is none of ours."""
    kind = getattr(agent.errors, name, None) or getattr(calibration.errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, TaktsightError)):
        return CommandError(text)
    try:
        return kind(text)
    except TypeError:  # NotRegistered wants a cause
        return CommandError(text)


def _received(end: socket.socket) -> dict[str, Any] | None:
    """Return the next message, None at the other side's end. Raises TimeoutError, OSError; ValueError on garbage."""
    data = end.recv(MOST_BYTES)
    return None if not data else dict(json.loads(data))


def _opened(answer: dict[str, Any]) -> Any:
    if "error" in answer:
        raise error_named(answer["error"], answer["text"])
    return answer["value"]
