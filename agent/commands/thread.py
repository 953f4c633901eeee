"""Commands as they come from the broker, one by one, on a thread of their own: a recipe takes seconds to load."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from agent.commands.commands import Commands
from agent.publishing.publisher import Incoming

log = logging.getLogger(__name__)

MOST_WAITING = 16  # commands; what comes beyond is dropped and not answered, as its sender can see
STOP_S = 15.0

Reply = Callable[[str, dict[str, Any], bytes | None], None]


class CommandThread:
    """Carries out commands in the order of their coming. `put` never blocks."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._waiting: queue.Queue[Incoming | None] = queue.Queue(MOST_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="commands", daemon=True)
        self.reply: Reply = lambda _name, _message, _correlation: None
        self.dropped = 0

    def start(self) -> None:
        """Begin to carry out commands."""
        self._thread.start()

    def put(self, incoming: Incoming) -> None:
        """Let a command wait for its turn; a flood is dropped."""
        try:
            self._waiting.put_nowait(incoming)
        except queue.Full:
            self.dropped += 1

    def counters(self) -> dict[str, int]:
        """Return what came to nothing since the start; any thread may ask."""
        return {"commands_refused": self._commands.refused, "commands_dropped": self.dropped}

    def stop(self) -> None:
        """Finish the command under way and forget those that wait: they have changed nothing."""
        self._stopping.set()
        with suppress(queue.Full):  # full: it wakes up by itself
            self._waiting.put_nowait(None)
        self._thread.join(STOP_S)

    def _work(self) -> None:
        while (incoming := self._waiting.get()) is not None and not self._stopping.is_set():
            reply = self._commands.handle(incoming.name, incoming.payload, incoming.retained)
            if reply is not None:
                self.reply(reply["command"], reply, incoming.correlation)
