"""A camera set up as station.yaml says: which nodes, in which order, and what they read back.

Names are those of the SFNC (2.7), each with the names that older cameras have for it. The order is the one that works
on all cameras known: what others depend on comes first, and the trigger is armed when all else is set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.cameras.genicam_settings import FREE_RUN, KEEP, GenicamSettings, TriggerSettings, node_settings
from agent.errors import CameraError

Value = bool | int | float | str

CLOSE = 1e-3  # share by which a number may differ: cameras round to what their sensor can
EXPOSURE = ("ExposureTime", "ExposureTimeAbs")
GAIN = ("Gain", "GainAbs")
FRAME_RATE = ("AcquisitionFrameRate", "AcquisitionFrameRateAbs")
PACKET_SIZE = ("GevSCPSPacketSize", "DeviceStreamChannelPacketSize")
DEBOUNCE = ("LineDebouncerTime", "LineDebouncerTimeAbs", "LineDebounceTime")
DELAY = ("TriggerDelay", "TriggerDelayAbs")
BALANCE = ("BalanceRatio", "BalanceRatioAbs")
RATE_ENABLE = ("AcquisitionFrameRateEnable", "AcquisitionFrameRateEnabled")


class Nodes(Protocol):
    """The nodes of one camera, by name. Every call may take seconds on a camera that is dead.

    All raise CameraError if the camera does not answer, `set` also if it refuses the value.
    """

    def has(self, name: str) -> bool:
        """Return whether the camera has this node, and it can be used as things are."""

    def get(self, name: str) -> Value:
        """Return its value as the camera says now, not as it was remembered."""

    def set(self, name: str, value: Value) -> None:
        """Write it."""

    def run(self, name: str) -> None:
        """Execute a command."""

    def choices(self, name: str) -> tuple[str, ...]:
        """Return what an enumeration may be set to; nothing for other nodes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One node to be set."""

    names: tuple[str, ...]  # the first that the camera has is taken
    value: Value | None  # None: a command
    key: str | None = None  # of station.yaml that asks for it; None: it may be missing
    selects: bool = False  # it says what the steps after it mean
    may_lack: bool = False  # a camera without it does it anyway; one that has it must take the value


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of it."""

    values: dict[str, Value]  # by node, and selector where there is one, as read back at the end
    differences: tuple[str, ...]  # what is not as it was wanted

    @property
    def digest(self) -> str:
        """SHA-256 of the values: the same for the same picture."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


def apply(nodes: Nodes, settings: GenicamSettings) -> Applied:
    """Set the camera up and read everything back.

    Raises CameraError naming the key of station.yaml: the camera has no such node, or refuses the value.
    """
    wanted: dict[str, tuple[Step | None, str, Value]] = {}  # by label; what is set twice is to be as set last
    selected: dict[str, Step] = {}
    for step in steps(settings, nodes):
        name = _apply(nodes, step)
        if name is None or step.value is None:
            continue
        if step.selects:
            selected["nodes" if step.key == "nodes" else name] = step
            continue
        selector = selected.get("nodes" if step.key == "nodes" else SELECTOR_OF.get(step.names[0], ""))
        label = name if selector is None else f"{name}[{selector.value}]"
        wanted[label] = (selector, name, step.value)
    return _read_back(nodes, wanted)


def _read_back(nodes: Nodes, wanted: dict[str, tuple[Step | None, str, Value]]) -> Applied:
    values: dict[str, Value] = {}
    differences: list[str] = []
    for label, (selector, name, value) in wanted.items():
        if selector is not None and selector.value is not None:
            nodes.set(selector.names[0], selector.value)
        values[label] = nodes.get(name)
        if not _is_close(values[label], value):
            differences.append(f"{label}: {values[label]} found, {value} wanted")
    return Applied(values, tuple(differences))


def steps(settings: GenicamSettings, nodes: Nodes) -> Iterator[Step]:
    """Yield what is to be set, in order."""
    if settings.user_set != KEEP:
        asked = None if settings.user_set == "Default" else "user_set"
        yield Step(("UserSetSelector",), settings.user_set, asked, selects=True)
        yield Step(("UserSetLoad",), None, asked)
    yield Step(("AcquisitionMode",), "Continuous")
    for selector in nodes.choices("TriggerSelector"):  # one that is left on elsewhere holds all frames back
        yield Step(("TriggerSelector",), selector, selects=True)
        yield Step(("TriggerMode",), "Off")
    if settings.packet_size is not None:
        yield Step(PACKET_SIZE, settings.packet_size, "packet_size")
    yield from _picture(settings)
    yield from _light(settings)
    yield from _trigger(settings.trigger)
    yield from _rate(settings)
    yield from _chunks(settings)
    if settings.strobe is not None:
        yield Step(("LineSelector",), settings.strobe, "strobe", selects=True)
        yield Step(("LineMode",), "Output", "strobe", may_lack=True)
        yield Step(("LineSource",), "ExposureActive", "strobe")
    for name, text in node_settings(settings.nodes):
        yield Step((name,), as_value(text), "nodes", selects=name.endswith("Selector"))


def _picture(settings: GenicamSettings) -> Iterator[Step]:
    if settings.region:
        x, y, width, height = settings.region
        yield Step(("OffsetX",), 0)  # a large offset limits the size
        yield Step(("OffsetY",), 0)
        yield Step(("Width",), width, "region")
        yield Step(("Height",), height, "region")
        yield Step(("OffsetX",), x, "region" if x else None)
        yield Step(("OffsetY",), y, "region" if y else None)
    if settings.pixel_format is not None:
        yield Step(("PixelFormat",), settings.pixel_format, "pixel_format")


def _light(settings: GenicamSettings) -> Iterator[Step]:
    """A camera that regulates light by itself hides what is to be seen."""
    for name in ("ExposureAuto", "GainAuto", "BalanceWhiteAuto"):
        yield Step((name,), "Off")
    if settings.exposure_us is not None:
        yield Step(("ExposureMode",), "Timed")
        yield Step(EXPOSURE, settings.exposure_us, "exposure_us")
    if settings.gain_db is not None or settings.gain_raw is not None:
        yield Step(("GainSelector",), "All", selects=True)
    if settings.gain_db is not None:
        yield Step(GAIN, settings.gain_db, "gain_db")
    if settings.gain_raw is not None:
        yield Step(("GainRaw",), settings.gain_raw, "gain_raw")
    for colour, ratio in settings.white_balance.items():
        yield Step(("BalanceRatioSelector",), colour.capitalize(), "white_balance", selects=True)
        yield Step(BALANCE, ratio, "white_balance")


def _trigger(trigger: TriggerSettings) -> Iterator[Step]:
    if trigger.debounce_us is not None:
        yield Step(("LineSelector",), trigger.source, "trigger.debounce_us", selects=True)
        yield Step(DEBOUNCE, trigger.debounce_us, "trigger.debounce_us")
    if trigger.counter is not None:
        yield Step(("CounterSelector",), trigger.counter, "trigger.counter", selects=True)
        yield Step(("CounterEventSource",), trigger.source, "trigger.counter", may_lack=True)
        if trigger.activation is not None:
            yield Step(("CounterEventActivation",), trigger.activation)
    if trigger.source == FREE_RUN:
        return
    yield Step(("TriggerSelector",), "FrameStart", "trigger.source", selects=True, may_lack=True)
    yield Step(("TriggerSource",), trigger.source, "trigger.source")
    if trigger.activation is not None:
        yield Step(("TriggerActivation",), trigger.activation, "trigger.activation")
    if trigger.delay_us is not None:
        yield Step(DELAY, trigger.delay_us, "trigger.delay_us")
    yield Step(("TriggerMode",), "On", "trigger.source")


def _rate(settings: GenicamSettings) -> Iterator[Step]:
    if settings.rate_hz is not None:
        yield Step(RATE_ENABLE, True)
        yield Step(FRAME_RATE, settings.rate_hz, "rate_hz")


def _chunks(settings: GenicamSettings) -> Iterator[Step]:
    counter = settings.trigger.counter
    wanted = dict.fromkeys(settings.chunks, "chunks")
    if counter is not None:
        wanted.setdefault("CounterValue", "trigger.counter")
    if wanted:
        yield Step(("ChunkModeActive",), True, "chunks")
    for chunk, key in wanted.items():
        yield Step(("ChunkSelector",), chunk, key, selects=True)
        yield Step(("ChunkEnable",), True, key)
    if counter is not None:
        yield Step(("ChunkCounterSelector",), counter, selects=True)


SELECTOR_OF = {
    **dict.fromkeys(("TriggerMode", "TriggerSource", "TriggerActivation", DELAY[0]), "TriggerSelector"),
    **dict.fromkeys((GAIN[0], "GainRaw"), "GainSelector"),
    **dict.fromkeys((DEBOUNCE[0], "LineMode", "LineSource"), "LineSelector"),
    **dict.fromkeys(("CounterEventSource", "CounterEventActivation"), "CounterSelector"),
    BALANCE[0]: "BalanceRatioSelector",
    "ChunkEnable": "ChunkSelector",
}  # by the first name of a step: what its value hangs on


def _apply(nodes: Nodes, step: Step) -> str | None:
    """Take one step; return the name of the node, None where the camera has none and need not."""
    name = next((name for name in step.names if nodes.has(name)), None)
    choices = nodes.choices(name) if name is not None else ()
    if name is None or (choices and step.value not in choices):
        if step.key is None or (name is None and step.may_lack):
            return None
        raise CameraError(_refusal(step, name, choices))
    try:
        if step.value is None:
            nodes.run(name)
        else:
            nodes.set(name, step.value)
    except CameraError as error:
        if step.key is None:  # read-only as things are: it is read back, and told if it differs
            return name if step.value is not None else None
        raise CameraError(f"camera.{step.key}: {error}") from error
    return name


def _refusal(step: Step, name: str | None, choices: Sequence[str]) -> str:
    if name is not None:
        return f"camera.{step.key}: {step.value} found, this camera takes {', '.join(choices)} for {name}"
    action = "free_run is for one without a trigger" if step.key == "trigger.source" else "leave the key out"
    return (
        f"camera.{step.key}: this camera has no {' or '.join(step.names)}: {action}; "
        "taktsight-agent camera show tells what it has"
    )


def _is_close(found: Value, wanted: Value) -> bool:
    numbers = isinstance(found, int | float) and isinstance(wanted, int | float)
    if numbers and not isinstance(found, bool):
        return abs(float(found) - float(wanted)) <= CLOSE * max(abs(float(wanted)), 1e-6)
    return found == wanted


def as_value(text: str) -> Value:
    """Return what a node of station.yaml is set to: a number, true or false where it looks like one, else text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
