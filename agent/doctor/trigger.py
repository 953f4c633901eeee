"""What a station needs that announces its parts: a PLC that tells the signal in time, a pin that is there.

The PLC is asked for the signal once, which changes nothing in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from agent.cameras.trigger import PlcSignal, TriggerSourceSettings
from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case
from agent.doctor.plant import lacking, pin
from agent.errors import CameraError


def trigger(case: Case) -> Iterator[Finding]:
    """Yield whether what announces the parts is there; nothing where the beat or the camera does."""
    settings = case.station.trigger
    if settings is None:
        return
    if settings.plc is not None:
        missing = [*lacking("trigger", "pymodbus", "modbus")]
        yield from missing or _plc(settings, settings.plc)
    if settings.pin is not None:
        missing = [*lacking("trigger", "gpiod", "gpio")]
        yield from missing or pin("trigger", settings.pin.chip, settings.pin.line)


def _plc(settings: TriggerSourceSettings, plc: PlcSignal) -> Iterator[Finding]:
    named = f"{plc.signal} {plc.address} of {plc.host}:{plc.port}"
    source = settings.open()
    started = time.monotonic()
    try:
        source.start(lambda: None)
    except CameraError as error:
        told = str(error).removeprefix("trigger: ")
        yield fail("trigger", told, "a PLC that tells the signal", "as it says: see docs/camera.md")
        return
    answer_ms = 1e3 * (time.monotonic() - started)
    source.stop()
    yield ok("trigger", f"{named} is told within {answer_ms:.0f} ms, connection included")
    if answer_ms + plc.poll_ms > plc.within_ms:
        yield warn(
            "trigger.within",
            f"poll {plc.poll_ms:g} ms, answer up to {answer_ms:.0f} ms: later than within_ms, {plc.within_ms:g} ms",
            "parts of which the agent hears in time for a picture",
            "look at the network, ask more often (trigger.poll_ms), or raise trigger.within_ms if a part stays longer",
        )
