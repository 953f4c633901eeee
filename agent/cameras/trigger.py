"""Port: what announces a part, where neither the beat nor the camera does: a signal of a PLC, a pin of this computer.

The agent then gives the camera its software trigger. A part of which it heard too late for a picture is a part all the
same: it is announced as lost, and gets its no_verdict. So does a part that it comes to too late itself: nobody triggers
the camera later than `within_ms` after the part (`agent.line.pace`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.journal import fields
from calibration.errors import MissingPackage, SettingsError
from calibration.settings import Section

log = logging.getLogger(__name__)

KINDS = ("modbus", "gpio")
INPUT, COIL, COUNTER = "input", "coil", "counter"
WITHIN_MS = 50.0
COUNTED = ("parts_announced", "parts_announced_late", "parts_too_near", "trigger_source_losses", "trigger_count_resets")


@dataclass(frozen=True, slots=True)
class Announced:
    """Parts that have come."""

    at_ns: int  # time.monotonic_ns()
    lost: int = 0  # parts before, for whose picture it is too late
    opens: bool = True  # whether one stands before the camera now
    since_ns: int | None = None  # the earliest moment at which that one may have come; None: at_ns
    unseen: int = 0  # parts before those, too many to be told one by one: they get no verdict


class TriggerSource(Protocol):
    """Announces parts. `start` and `stop` are for one thread."""

    announcements: Announcements

    def start(self, on_event: Callable[[], object]) -> None:
        """Announce what comes from now on; on_event is called with each, by a thread of its own.

        Raises CameraError with what to check if the signal cannot be had.
        """

    def stop(self) -> None:
        """Announce nothing more; never raises."""


@dataclass(frozen=True, slots=True)
class PlcSignal:
    """Which signal of which PLC, by Modbus/TCP."""

    host: str
    port: int = 502
    unit: int = 1
    signal: str = INPUT  # its rising edge, or a coil's, is a part; a counter's every step
    address: int = 0  # in the protocol, from 0
    poll_ms: float = 5.0
    answer_ms: float = 100.0  # within which the PLC must answer
    within_ms: float = WITHIN_MS  # a part heard of later may have gone by


@dataclass(frozen=True, slots=True)
class PinSignal:
    """Which pin of this computer."""

    chip: Path  # /dev/gpiochip0
    line: int  # its number on the chip
    is_active_low: bool = False  # a part comes with the falling edge
    debounce_us: float = 0.0
    within_ms: float = WITHIN_MS  # a part whose edge was longer ago may have gone by


@dataclass(frozen=True, slots=True)
class TriggerSourceSettings:
    """What announces parts; exactly one of plc and pin is set."""

    plc: PlcSignal | None = None
    pin: PinSignal | None = None
    least_gap_ms: float = 0.0  # two parts nearer to each other are counted

    def open(self) -> TriggerSource:
        """Return the source, not started yet. Raises MissingPackage naming the extra."""
        try:
            if self.plc is not None:
                from agent.cameras.trigger_plc import PlcTrigger  # noqa: PLC0415

                return PlcTrigger(self.plc, Announcements(self.least_gap_ms, self.plc.within_ms))
            from agent.cameras.trigger_pin import PinTrigger  # noqa: PLC0415
        except ImportError as error:
            kind = "gpio" if self.plc is None else "modbus"
            raise MissingPackage(f"trigger.kind {kind}: {error}: pip install 'taktsight[{kind}]'") from error
        assert self.pin is not None
        return PinTrigger(self.pin, Announcements(self.least_gap_ms, self.pin.within_ms))


def read_trigger(section: Section) -> TriggerSourceSettings:
    """Return the settings under `trigger`. Raises SettingsError."""
    kind = section.choice("kind", KINDS)
    least_gap_ms = section.number("least_gap_ms", 0.0, minimum=0.0, maximum=60_000.0)
    if kind == "modbus":
        return TriggerSourceSettings(plc=_plc(section), least_gap_ms=least_gap_ms)
    chip = section.path("chip", None) or Path("/dev/gpiochip0")
    level = section.choice("active", ("high", "low"), "high")
    pin = PinSignal(
        chip,
        section.whole("line", minimum=0, maximum=1023),
        is_active_low=level == "low",
        debounce_us=section.number("debounce_us", 0.0, minimum=0.0, maximum=1e6),
        within_ms=_within_ms(section),
    )
    return TriggerSourceSettings(pin=pin, least_gap_ms=least_gap_ms)


def _plc(section: Section) -> PlcSignal:
    plc = PlcSignal(
        host=section.text("host"),
        port=section.whole("port", 502, minimum=1, maximum=65535),
        unit=section.whole("unit", 1, minimum=0, maximum=255),
        signal=section.choice("signal", (INPUT, COIL, COUNTER)),
        address=section.whole("address", minimum=0, maximum=65535),
        poll_ms=section.number("poll_ms", 5.0, minimum=1.0, maximum=1000.0),
        answer_ms=section.number("answer_ms", 100.0, minimum=5.0, maximum=10_000.0),
        within_ms=_within_ms(section),
    )
    if plc.poll_ms >= plc.within_ms:
        raise SettingsError(
            f"trigger.poll_ms: {plc.poll_ms:g} found, need less than within_ms ({plc.within_ms:g}): the agent would "
            "hear of every part too late"
        )
    return plc


def _within_ms(section: Section) -> float:
    return section.number("within_ms", WITHIN_MS, minimum=1.0, maximum=10_000.0)


class Announcements:
    """What a source has announced and nobody has taken yet; one thread announces, another takes."""

    def __init__(self, least_gap_ms: float = 0.0, within_ms: float = WITHIN_MS) -> None:
        """within_ms: after which a part may have gone by, and is not pictured."""
        self.within_ns = round(within_ms * 1e6)
        self._least_gap_ns = round(least_gap_ms * 1e6)
        self._waiting: deque[Announced] = deque()
        self._last_ns = 0
        self._counts: Counter[str] = Counter()
        self.on_event: Callable[[], object] = lambda: None
        self.fault = ""  # why parts go by unnoticed now; empty: none do

    def put(self, announced: Announced) -> None:
        """Announce parts."""
        self._counts["parts_announced"] += announced.lost + announced.opens
        self._counts["parts_announced_late"] += announced.lost
        if announced.opens:
            self._counts["parts_too_near"] += 0 < announced.at_ns - self._last_ns < self._least_gap_ns
            self._last_ns = announced.at_ns
        self._waiting.append(announced)
        self.on_event()

    def note(self, fault: str) -> None:
        """Note why the signal is gone, empty that it is back; log what changes."""
        if fault and not self.fault:
            self._counts["trigger_source_losses"] += 1
            log.warning("%s", fault, extra=fields(trigger="down"))
        if self.fault and not fault:
            log.warning("the trigger's signal is back", extra=fields(trigger="up"))
        self.fault = fault

    def note_reset(self, what: str) -> None:
        """Note that a count of parts began anew: how many came meanwhile, nobody knows."""
        self._counts["trigger_count_resets"] += 1
        log.warning("%s: it began anew, parts may be missing", what)

    def take(self) -> Announced | None:
        """Return what was announced first and not taken yet; None while nothing was."""
        return self._waiting.popleft() if self._waiting else None

    def counters(self) -> dict[str, int]:
        """Return what was counted since the start, by names as in the status."""
        return {name: self._counts[name] for name in COUNTED}
