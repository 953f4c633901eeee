"""Parts that a PLC announces, by Modbus/TCP: the rising edge of an input or a coil, or the steps of a counter.

The PLC is asked every `poll_ms`. What it tells came at some moment since it was asked before: where that is longer ago
than `within_ms` (it did not answer, the network hung), the part may have gone by, and is lost. A counter tells of
every part, also of several between two questions, and of those while the connection was down; an edge that is shorter
than the time between two questions is never seen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ConnectionException, ModbusException

from agent.cameras.trigger import COIL, COUNTER, Announced, Announcements, PlcSignal
from agent.errors import CameraError

logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # what fails is told by us, once

COUNTER_WRAP = 65536
MOST_STEPS = 1000  # a counter that goes further at once, or backwards, began anew
RETRY_S = 0.5

log = logging.getLogger(__name__)


class PlcTrigger:
    """A trigger source; one thread asks the PLC."""

    def __init__(self, settings: PlcSignal, announcements: Announcements) -> None:
        self._settings = settings
        self.announcements = announcements
        self._named = f"trigger: {settings.signal} {settings.address} of {settings.host}:{settings.port}"
        self._client = ModbusTcpClient(
            settings.host, port=settings.port, timeout=settings.answer_ms / 1e3, retries=0, name="taktsight"
        )
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._value = 0  # as it was told last
        self._asked_ns = 0  # when it was asked for that
        self._traced = ""  # the error that nobody foresaw and that is in the log

    def start(self, on_event: Callable[[], object]) -> None:
        """Announce parts from now on. Raises CameraError if the PLC does not answer, or not with such a signal."""
        self.announcements.on_event = on_event
        self._asked_ns = time.monotonic_ns()
        try:
            self._value = self._read()
        except CameraError:
            self._client.close()
            raise
        self._thread = threading.Thread(target=self._run, name="trigger", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._client.close()

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._ended.wait(max(due_s - time.monotonic(), 0.0)):
            asked_ns = time.monotonic_ns()
            due_s = asked_ns / 1e9 + self._settings.poll_ms / 1e3
            try:
                value = self._read()
                self.announcements.note("")
                self._take(value, asked_ns)
            except CameraError as error:
                due_s = asked_ns / 1e9 + RETRY_S
                self.announcements.note(str(error))
            except Exception as error:  # noqa: BLE001 it is logged; a line that hears of no part looks like one at rest
                due_s = asked_ns / 1e9 + RETRY_S
                self._note_unforeseen(error)

    def _note_unforeseen(self, error: Exception) -> None:
        """Note an error of whatever kind; log where it came from, once."""
        told = f"{self._named}: {type(error).__name__}: {error}"
        if told != self._traced:
            log.error("%s", told, exc_info=error)
        self._traced = told
        self.announcements.note(told)

    def _take(self, value: int, asked_ns: int) -> None:
        """Announce what came since the PLC was asked before."""
        before, self._value = self._value, value
        since_ns, self._asked_ns = self._asked_ns, asked_ns
        parts = max(value - before, 0)
        if self._settings.signal == COUNTER:
            parts = (value - before) % COUNTER_WRAP
            if parts > MOST_STEPS:
                self.announcements.note_reset(f"{self._named} went from {before} to {value}")
                return
        if parts:
            now_ns = time.monotonic_ns()
            is_timely = now_ns - since_ns <= self._settings.within_ms * 1e6
            self.announcements.put(Announced(now_ns, lost=parts - is_timely, opens=is_timely, since_ns=since_ns))

    def _read(self) -> int:
        """Return the level, 0 or 1, or the count. Raises CameraError."""
        address, unit = self._settings.address, self._settings.unit
        try:
            if not self._client.connect():
                raise CameraError(f"{self._named}: no connection: check the PLC, its address and the cable")
            if self._settings.signal == COUNTER:
                answer = self._client.read_holding_registers(address, device_id=unit)
            elif self._settings.signal == COIL:
                answer = self._client.read_coils(address, device_id=unit)
            else:
                answer = self._client.read_discrete_inputs(address, device_id=unit)
            if answer.isError():
                raise CameraError(f"{self._named}: refused ({answer}): name an address that the PLC has")
            return int(answer.registers[0] if self._settings.signal == COUNTER else answer.bits[0])
        except (ConnectionException, OSError, UnicodeError) as error:  # as pymodbus hands on: a reset; a host's name
            self._client.close()
            raise CameraError(f"{self._named}: the connection broke: check the PLC and the cable") from error
        except IndexError as error:
            self._client.close()
            raise CameraError(f"{self._named}: an answer without a value: check what speaks Modbus there") from error
        except ModbusException as error:
            self._client.close()  # an answer that comes yet belongs to nobody
            raise CameraError(
                f"{self._named}: no answer within {self._settings.answer_ms:g} ms: check the PLC and the network, or "
                "raise trigger.answer_ms"
            ) from error
