"""What a station's gate needs: a PLC that answers, a pin that is there. Nothing is written: a gate may be in use."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case
from agent.doctor.plant import lacking, pin
from agent.outputs.settings import ModbusSettings

CONNECT_TIMEOUT_S = 2.0


def output(case: Case) -> Iterator[Finding]:
    """Yield whether what acts on the verdicts is there."""
    settings = case.station.output
    if settings is None:
        yield ok("output", "none: nobody is told")
        return
    if settings.file is not None:
        yield ok("output", f"file {settings.file}: for commissioning, no gate moves")
    if settings.modbus is not None:
        missing = [*lacking("output", "pymodbus", "modbus")]
        yield from missing or _plc(settings.modbus)
    if settings.gpio is not None:
        missing = [*lacking("output", "gpiod", "gpio")]
        yield from missing or pin("output", settings.gpio.chip, settings.gpio.line)
    timing, takt_ms = settings.timing, case.station.beat.takt_ms
    if timing is not None and timing.pulse_ms > takt_ms:
        yield warn(
            "output.timing",
            f"the gate stays open for {timing.pulse_ms:g} ms, parts come every {takt_ms:g} ms",
            "a pulse shorter than the takt: a part that no trigger announced must not find the gate open",
            "set output.pulse_ms below takt_ms",
        )


def _plc(settings: ModbusSettings) -> Iterator[Finding]:
    address = f"{settings.host}:{settings.port}"
    try:
        socket.create_connection((settings.host, settings.port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        yield fail(
            "output", f"PLC at {address}: {error}", "a PLC that takes connections", "check its address, power and cable"
        )
        return
    yield ok("output", f"PLC at {address} takes connections; coil {settings.coil} of unit {settings.unit} not touched")
    if settings.heartbeat_coil is None:
        yield warn(
            "output.heartbeat",
            "no heartbeat_coil: a coil that is on when the agent dies stays on",
            "a PLC that lets the gate rest when the heartbeat stands still",
            "set output.heartbeat_coil, and have the PLC watch it",
        )
