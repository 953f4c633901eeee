"""A gate on a coil of a PLC, by Modbus/TCP.

This file and `agent.cameras.trigger_plc`, which reads from one, alone import pymodbus.

The coil is on while the gate is open. Every write is confirmed by the PLC, or the gate has failed; a coil that was on
when the connection broke is the PLC's to reset: it must watch the heartbeat. See docs/output.md.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from pymodbus.client import ModbusTcpClient
from pymodbus.exceptions import ConnectionException, ModbusException

from agent.errors import OutputError
from agent.outputs.settings import ModbusSettings

logging.getLogger("pymodbus").setLevel(logging.CRITICAL)  # what fails is told by us, once


class ModbusDriver:
    """Opens the gate while the coil is on; connects when it has to."""

    def __init__(self, settings: ModbusSettings) -> None:
        self._settings = settings
        self._named = f"Modbus {settings.host}:{settings.port} unit {settings.unit}"
        self._heartbeat = False
        self._client = ModbusTcpClient(
            settings.host, port=settings.port, timeout=settings.confirm_ms / 1e3, retries=0, name="taktsight"
        )
        self.idle_ns = 0 if settings.heartbeat_coil is None else round(settings.heartbeat_ms * 1e6)

    def drive(self, *, is_open: bool) -> None:
        """Write the coil; the PLC has confirmed it when this returns. Raises OutputError."""
        self._write(self._settings.coil, is_on=is_open)

    def idle(self) -> None:
        """Change the heartbeat coil. Raises OutputError."""
        if self._settings.heartbeat_coil is not None:
            self._heartbeat = not self._heartbeat
            self._write(self._settings.heartbeat_coil, is_on=self._heartbeat)

    def close(self) -> None:
        """Let the gate rest if the PLC can be reached, also anew, and disconnect."""
        with suppress(OutputError):
            self.drive(is_open=False)
        self._client.close()

    def _write(self, coil: int, *, is_on: bool) -> None:
        try:
            if not self._client.connect():
                raise OutputError(f"{self._named}: no connection: check the PLC, its address and the cable")
            answer = self._client.write_coil(coil, is_on, device_id=self._settings.unit)
        except (ConnectionException, OSError, UnicodeError) as error:  # as pymodbus hands on: a reset; a host's name
            self._client.close()
            raise OutputError(f"{self._named}: the connection broke: check the PLC and the cable") from error
        except (ModbusException, IndexError) as error:  # IndexError: an answer without what was asked for
            self._client.close()  # an answer that comes yet belongs to nobody
            raise OutputError(
                f"{self._named}: coil {coil} not confirmed within {self._settings.confirm_ms:g} ms: check the PLC and "
                "the network, or raise output.confirm_ms"
            ) from error
        if answer.isError():
            raise OutputError(f"{self._named}: coil {coil} refused ({answer}): name a coil that the PLC lets us write")
