"""A gate behind the camera: what a part's verdict does to it, at the moment when that part is before it.

Rest is divert. A gate opens for a part that is accepted, `at_ms` after that part's trigger, and for `pulse_ms` at most:

    trigger ---- deadline --- at_ms ============ at_ms + pulse_ms
                              open  |            |  rest
                                    the next part's at_ms, if earlier: open or rest, as that part's verdict says

Several parts may be between camera and gate: each has its own moment, whatever the order of their verdicts. A part of
which nothing is heard is diverted, because the pulse of the part before it is over or its own verdict closes the gate.

`Gate` is the output, a `Driver` what it drives: a coil of a PLC (`agent.outputs.modbus`), a pin (`agent.outputs.gpio`).
One thread owns the driver. `act` returns at once, so it tells of a driver that failed with the part that comes next.

A write that is not confirmed may have been carried out, or be carried out yet. So the gate is let rest at once, again
for each part that is diverted, and again RETRY_NS later; only then is the driver taken to work. No error ends the
thread: a gate that nobody drives may stand open.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from agent.errors import OutputError

log = logging.getLogger(__name__)

MOST_WAITING = 2000  # parts between camera and gate; half of them such as the beat tells of after a stall
RETRY_NS = 500_000_000  # before a driver that failed is tried again
NO_PART = (0, 0, False)
LATE_NS = 5_000_000  # beyond its moment, from which a part counts as late


class Driver(Protocol):
    """Moves one gate. Called by one thread."""

    idle_ns: int  # `idle` is due so often; 0: never

    def drive(self, *, is_open: bool) -> None:
        """Open the gate, or let it rest; return when that is certain. Raises OutputError."""

    def idle(self) -> None:
        """Say that we live. Raises OutputError."""

    def close(self) -> None:
        """Let the gate rest and let go of it; never raises."""


@dataclass(frozen=True, slots=True)
class GateTiming:
    """When a part is before the gate."""

    at_ms: float  # after its trigger
    pulse_ms: float  # for which the gate stays open at most


class Gate:
    """An output that moves a gate. Make one, and it is at rest."""

    def __init__(self, driver: Driver, timing: GateTiming, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """now_ns: the clock by which triggers were opened.

        Raises OutputError if the driver cannot let the gate rest: a line whose gate is not there does not start.
        """
        self._driver = driver
        self._now_ns = now_ns
        self._at_ns, self._pulse_ns = round(timing.at_ms * 1e6), round(timing.pulse_ms * 1e6)
        self._due: list[tuple[int, int, bool]] = []  # heap of (moment, trigger, open it)
        self._diverts_at_ns: int | None = None  # the moment of the part that came in last, if it is diverted
        self._changed = threading.Condition()
        self._closing = False
        self._is_open = False
        self._rest_ns = self._idle_at_ns = self._retry_ns = 0
        self._sure_ns = 0  # from when a rest that is confirmed is the last word
        self._fault = ""  # why the driver failed; empty: it works
        self._is_traced = False  # an error that nobody foresaw is in the log
        self._counts = dict.fromkeys(("gate_opened", "gate_late", "gate_failed"), 0)
        self.worst_late_ns = 0
        try:
            driver.drive(is_open=False)
        except OutputError:
            driver.close()
            raise
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        """Have the gate moved when this part is before it. Raises OutputError while the driver does not work."""
        with self._changed:
            fault, moment_ns, opens = self._fault, opened_ns + self._at_ns, action == "accept"
            if opens or fault or moment_ns != self._diverts_at_ns:  # parts lost at one moment wait as one
                if len(self._due) >= MOST_WAITING:
                    fault = fault or f"{MOST_WAITING} parts wait for their moment: is output.at_ms right?"
                else:
                    heapq.heappush(self._due, (moment_ns, trigger_id, opens))
                    self._diverts_at_ns = None if opens else moment_ns
            self._changed.notify()
        if fault:
            raise OutputError(fault)

    def counters(self) -> dict[str, int]:
        """Return how many accepted parts went through, how many met a gate that moved late, how many it failed."""
        return dict(self._counts)

    def close(self) -> None:
        """Let the gate rest. Parts that are not before it yet are diverted. Never raises, may be called twice."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                if (event := self._next_event()) is None:
                    break
                if event is not NO_PART:
                    self._meet(event[0], opens=event[2])
                self._come_round()
            except Exception as error:  # noqa: BLE001 it is logged, and the gate is still to be driven
                self._fail(error)
        self._driver.close()

    def _next_event(self) -> tuple[int, int, bool] | None:
        """Wait for what is due; return the part that is before the gate now, NO_PART where something else is."""
        with self._changed:
            while not self._closing:
                now_ns = self._now_ns()
                if self._due and self._due[0][0] <= now_ns:
                    return heapq.heappop(self._due)
                moments = [self._due[0][0]] if self._due else []
                moments += [self._rest_ns] if self._is_open else []
                moments += [self._retry_ns] if self._fault else []
                moments += [self._idle_at_ns] if self._driver.idle_ns and not self._fault else []
                if moments and min(moments) <= now_ns:
                    return NO_PART
                self._changed.wait((min(moments) - now_ns) / 1e9 if moments else None)
            return None

    def _meet(self, moment_ns: int, *, opens: bool) -> None:
        """A part is before the gate: open it, or let it rest."""
        late_ns = self._now_ns() - moment_ns
        self.worst_late_ns = max(self.worst_late_ns, late_ns)
        self._counts["gate_late"] += late_ns > LATE_NS
        if opens and (self._fault or late_ns >= self._pulse_ns):
            self._counts["gate_failed"] += 1  # it has gone by, diverted
            return
        if opens:
            self._rest_ns = moment_ns + self._pulse_ns
            went_through = self._is_open or self._drives(is_open=True)
            self._counts["gate_opened" if went_through else "gate_failed"] += 1
        elif self._is_open or self._fault:
            self._drives(is_open=False)

    def _come_round(self) -> None:
        """Do what is due beside the parts: end a pulse, say that we live, try a driver again that failed."""
        now_ns = self._now_ns()
        if self._fault:
            if now_ns >= self._retry_ns:
                self._drives(is_open=False)
        elif self._is_open and now_ns >= self._rest_ns:
            self._drives(is_open=False)
        elif self._driver.idle_ns and now_ns >= self._idle_at_ns:
            self._idle_at_ns = now_ns + self._driver.idle_ns
            self._does(self._driver.idle)

    def _drives(self, *, is_open: bool) -> bool:
        """Move the gate; False, and it counts as failed, where the driver cannot say that it did."""
        if not self._does(lambda: self._driver.drive(is_open=is_open)):
            return False
        self._is_open = is_open
        if self._fault:
            self._retry_ns = self._sure_ns
            if self._now_ns() >= self._sure_ns:
                log.warning("the gate answers again, and rests")
                self._fault, self._is_traced = "", False
        return True

    def _does(self, work: Callable[[], None]) -> bool:
        """Have the driver do something; False where it does not say that it did."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 whatever it is, the part that meets the gate counts as failed
            self._fail(error)
            return False
        return True

    def _fail(self, error: Exception) -> None:
        """From now on parts are diverted, if the gate rests where nobody drives it: see docs/output.md."""
        is_foreseen = isinstance(error, OutputError)
        told = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
        now_ns, is_first = self._now_ns(), not self._fault
        if is_first or not (is_foreseen or self._is_traced):
            log.error("the gate failed: %s", told, exc_info=None if is_foreseen else error)
        self._is_traced = self._is_traced or not is_foreseen
        self._fault, self._is_open = told, False
        self._retry_ns = now_ns if is_first else now_ns + RETRY_NS
        self._sure_ns = now_ns + RETRY_NS if is_first else self._sure_ns
