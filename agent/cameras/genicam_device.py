"""The one file that knows harvesters and genicam: a camera opened through a GenTL producer.

Nothing here holds a deadline: on a dead camera the nodes block for seconds, and waiting for a frame holds Python's
lock. That is why it runs in a process of its own (`agent.cameras.process`). What harvesters does that is not wanted is
not used: its `fetch` never returns while every frame is incomplete, `try_fetch` waits for as long as the wall clock is
set back, its images keep their padding, its threads block for ever.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genicam import genapi, gentl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from harvesters.core import Harvester, ImageAcquirer

from agent.cameras.genicam_formats import Layout
from agent.cameras.genicam_nodes import Value
from agent.cameras.genicam_settings import GenicamSettings
from agent.errors import CameraError

PRODUCER_PATH = "GENICAM_GENTL64_PATH"
COMMAND_S = 5.0  # for a command such as UserSetLoad
IMAGES = (1, 4)  # payload types of GenTL: an image, an image with chunks
GIGE_REGISTERS = {0x0A00: "has let go of us", 0x0D00: "sends its frames nowhere"}  # 0: of privilege, of stream's port
FIRST_FRAME_ID = {"U3V": 0}  # of cameras that do not begin with 1

_FAULTS = (genapi.GenericException, gentl.GenericException)


@dataclass(frozen=True, slots=True)
class Found:
    """A camera that a producer knows of."""

    producer: str
    id: str
    vendor: str
    model: str
    serial: str
    kind: str  # of transport: GEV, U3V, ...
    firmware: str
    producer_version: str


@dataclass(frozen=True, slots=True)
class RawFrame:
    """A complete frame in the producer's buffer: ours until `give_back`."""

    data: memoryview  # the image first
    layout: Layout
    frame_id: int
    exposed_ns: int  # camera clock; 0: it does not tell
    buffer: Any


class GenicamNodes:
    """`agent.cameras.genicam_nodes.Nodes` of a real camera."""

    def __init__(self, node_map: Any) -> None:
        self._map = node_map

    def has(self, name: str) -> bool:
        """Return whether the camera has this node, and it can be used as things are."""
        try:
            return bool(genapi.is_available(self._map.get_node(name)))
        except genapi.LogicalErrorException:  # there is none
            return False
        except _FAULTS as error:
            raise CameraError(f"the camera does not answer ({name}): {_short(error)}") from error

    def get(self, name: str) -> Value:
        """Return its value as the camera says now."""
        node = self._node(name)
        try:
            value = node.to_string(False, True) if not hasattr(node, "get_value") else node.get_value(False, True)
        except _FAULTS as error:
            raise CameraError(f"{name} cannot be read: {_short(error)}") from error
        return value if isinstance(value, bool | int | float) else str(value)

    def set(self, name: str, value: Value) -> None:
        """Write it."""
        node = self._node(name)
        try:
            node.value = _converted(node, value)
        except (*_FAULTS, TypeError, ValueError, AttributeError) as error:
            raise CameraError(f"{name} = {value} is refused{self._limits(node)}: {_short(error)}") from error

    def run(self, name: str) -> None:
        """Execute a command and wait until it is done."""
        node = self._node(name)
        give_up_s = time.monotonic() + COMMAND_S
        try:
            node.execute()
            while not node.is_done() and time.monotonic() < give_up_s:
                time.sleep(0.01)
        except _FAULTS as error:
            raise CameraError(f"{name} cannot be executed: {_short(error)}") from error

    def choices(self, name: str) -> tuple[str, ...]:
        """Return what an enumeration may be set to."""
        node = getattr(self._map, name) if self.has(name) else None
        if not isinstance(node, genapi.IEnumeration):
            return ()
        try:
            return tuple(entry.symbolic for entry in node.entries if genapi.is_available(entry))
        except _FAULTS as error:
            raise CameraError(f"the camera does not answer ({name}): {_short(error)}") from error

    def listed(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, value and limits of every node that can be read, by category."""
        seen = set()
        for category in self._map.nodes:
            feature = getattr(self._map, category.node.name, None) if hasattr(category, "node") else None
            for node in feature.features if isinstance(feature, genapi.ICategory) else ():
                name = node.node.name
                if name not in seen and genapi.is_readable(node) and not isinstance(node, genapi.ICategory):
                    seen.add(name)
                    with suppress(*_FAULTS):
                        yield name, str(node.to_string()), self._limits(node).removeprefix(", need ")

    def software_trigger(self) -> Callable[[], None]:
        """Return what gives one trigger, raising CameraError on a camera that does not answer."""
        node = self._map.TriggerSoftware

        def trigger() -> None:
            try:
                node.execute()
            except _FAULTS as error:
                raise CameraError(f"the camera does not take the trigger: {_short(error)}") from error

        return trigger

    def _node(self, name: str) -> Any:
        try:
            return getattr(self._map, name)
        except (*_FAULTS, AttributeError) as error:
            raise CameraError(f"the camera has no {name}, or does not answer: {_short(error)}") from error

    @staticmethod
    def _limits(node: Any) -> str:
        with suppress(*_FAULTS, AttributeError):
            if isinstance(node, genapi.IEnumeration):
                return f", need one of {', '.join(entry.symbolic for entry in node.entries)}"
            if isinstance(node, genapi.IInteger) and node.inc > 1:
                return f", need {node.min} to {node.max} in steps of {node.inc}"
            if isinstance(node, genapi.IInteger | genapi.IFloat):
                return f", need {node.min:g} to {node.max:g}"
        return ""


class Device:
    """One camera, opened for us alone. One thread."""

    def __init__(self, settings: GenicamSettings) -> None:
        """Find and open it. Raises CameraError with what to check."""
        self._harvester = _harvester(producers(settings))
        try:
            self.found, info = _chosen(self._harvester, settings)
            self._acquirer: ImageAcquirer = self._harvester.create(info)
        except (*_FAULTS, ValueError) as error:
            self._forget()
            raise CameraError(
                f"{settings.named} cannot be opened: {_short(error)}: another program has it, or it has just "
                "been let go; it is free some seconds after its last master has gone"
            ) from error
        except CameraError:
            self._forget()
            raise
        self._map = self._acquirer.remote_device.node_map
        self.nodes = GenicamNodes(self._map)
        self.incomplete = 0
        self._arrivals: Any = None  # what tells of filled buffers, once it takes pictures

    @property
    def first_frame_id(self) -> int:
        """What its count of frames begins with."""
        return FIRST_FRAME_ID.get(self.found.kind, 1)

    @property
    def pixel_format(self) -> int:
        """PFNC code of the format that it is set to."""
        try:
            return int(self._map.PixelFormat.get_int_value())
        except _FAULTS as error:
            raise CameraError(f"PixelFormat cannot be read: {_short(error)}") from error

    def start(self, buffers: int) -> None:
        """Take pictures from now on. Raises CameraError."""
        try:
            self._acquirer.num_buffers = buffers
            self._acquirer.start()
        except _FAULTS as error:
            raise CameraError(f"the camera cannot be started: {_short(error)}") from error
        self._arrivals = next(iter(self._acquirer._new_buffer_event_monitor_dict.values()), None)
        if self._arrivals is None:
            raise CameraError("the camera has no stream of frames: another program may have it")

    def fetch(self, wait_ms: int) -> RawFrame | None:
        """Return the next complete frame, None if none came within wait_ms. Raises CameraError.

        One that is incomplete is counted in `incomplete` and given back at once.
        """
        try:
            buffer = self._filled(wait_ms)
            return None if buffer is None else self._raw(buffer)
        except _FAULTS as error:
            raise CameraError(f"no frame can be fetched: {_short(error)}") from error

    def give_back(self, frame: RawFrame) -> None:
        """Let the producer fill this buffer again: whatever was not copied is gone."""
        try:
            frame.buffer.parent.queue_buffer(frame.buffer)
        except _FAULTS as error:
            raise CameraError(f"a buffer cannot be given back: {_short(error)}") from error

    def check(self) -> None:
        """Raises CameraError if the camera is gone, has another master, or sends its frames nowhere any more."""
        if self.found.kind != "GEV":
            return
        for address, what in GIGE_REGISTERS.items():
            try:
                _, value = self._acquirer.remote_device.port.read(address, 4)
            except (*_FAULTS, AttributeError) as error:
                raise CameraError(f"the camera does not answer: {_short(error)}") from error
            if not any(value):
                raise CameraError(f"the camera {what}: it was restarted, or did not hear from us for too long")

    def close(self) -> None:
        """Let the camera go; takes up to 15 s if it is dead. Never raises."""
        for end in (self._acquirer.stop, self._acquirer.destroy):
            with suppress(*_FAULTS, AttributeError, KeyError, RuntimeError):
                end()
        self._forget()

    def _forget(self) -> None:
        with suppress(*_FAULTS, AttributeError, KeyError, RuntimeError):
            self._harvester.reset()

    def _filled(self, wait_ms: int) -> Any:
        """Return the next complete buffer, with its chunks in the nodes; None as `fetch` does."""
        try:
            self._arrivals.update_event_data(wait_ms)
        except gentl.TimeoutException:
            return None
        buffer = self._arrivals.buffer
        if _told(buffer.is_complete, False):
            self._acquirer._update_chunk_data(buffer=buffer, is_manual=False)
            return buffer
        buffer.parent.queue_buffer(buffer)
        self.incomplete += 1
        return None

    def _raw(self, buffer: Any) -> RawFrame:
        kind = int(_told(lambda: buffer.payload_type, IMAGES[0]))
        if kind not in IMAGES:
            raise CameraError(f"payload of type {kind} came, need one image per frame: switch off other components")
        offset = int(_told(lambda: buffer.image_offset, 0))
        data = buffer.raw_buffer
        layout = Layout(
            code=int(_told(lambda: buffer.pixel_format, 0)) or self.pixel_format,
            width=int(_told(lambda: buffer.width, 0)) or int(self._map.Width.value),
            height=int(_told(lambda: buffer.height, 0)) or int(self._map.Height.value),
            filled_bytes=int(_told(lambda: buffer.size_filled, len(data))) - offset,
            padding_x=int(_told(lambda: buffer.padding_x, 0)),
            has_chunks=bool(_told(buffer.is_containing_chunk_data, False)),
        )
        image = memoryview(data)[offset:]
        return RawFrame(image, layout, int(buffer.frame_id), _clock_ns(buffer), buffer)


def producers(settings: GenicamSettings) -> list[Path]:
    """Return the producers' files. Raises CameraError where there are none."""
    if settings.producer is not None:
        if not settings.producer.is_file():
            raise CameraError(
                f"camera.producer: {settings.producer}: no such file: give the .cti of the camera's maker"
            )
        return [settings.producer]
    places = [Path(place) for place in os.environ.get(PRODUCER_PATH, "").split(os.pathsep) if place]
    files = sorted({file for place in places if place.is_dir() for file in place.glob("*.cti")})
    if not files:
        raise CameraError(
            "no GenTL producer found: give camera.producer the .cti file of the camera's maker, or set "
            f"{PRODUCER_PATH} to its folder"
        )
    return files


def cameras(files: list[Path]) -> list[Found]:
    """Return the cameras that these producers know of. Raises CameraError."""
    harvester = _harvester(files)
    try:
        return [_found(info) for info in harvester.device_info_list]
    finally:
        with suppress(*_FAULTS):
            harvester.reset()


def _harvester(files: list[Path]) -> Harvester:
    """Return harvesters with an up to date list of cameras. Raises CameraError if a producer cannot be loaded."""
    logger = logging.getLogger("harvesters.core")
    logger.setLevel(logging.CRITICAL)  # what fails is told by us
    harvester = Harvester(logger=logger)
    for file in files:
        try:
            harvester.add_file(str(file), check_existence=True, check_validity=True)
        except OSError as error:
            raise CameraError(
                f"camera.producer: {file} cannot be loaded: {error or 'no such file'}: install the maker's package "
                "for this machine"
            ) from error
    harvester.update()
    return harvester


def _chosen(harvester: Harvester, settings: GenicamSettings) -> tuple[Found, Any]:
    listed = [(_found(info), info) for info in harvester.device_info_list]
    fitting = [
        (found, info)
        for found, info in listed
        if settings.serial in (None, found.serial) and settings.id in (None, found.id)
    ]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(f"{found.serial or found.id} ({found.model})" for found, _ in listed) or "none"
    if fitting:
        raise CameraError(f"{len(fitting)} cameras found ({there}), need one: give camera.serial")
    raise CameraError(f"{settings.named} was not found; found: {there}: check power, cable, address and camera.serial")


def _found(info: Any) -> Found:
    system = info.parent.parent
    file = str(_told(lambda: system.path_name, "")) or str(_told(lambda: system.id_, "?"))
    return Found(
        producer=Path(file).name,
        id=str(_told(lambda: info.id_, "")),
        vendor=str(_told(lambda: info.vendor, "")),
        model=str(_told(lambda: info.model, "")),
        serial=str(_told(lambda: info.serial_number, "")),
        kind=str(_told(lambda: info.tl_type, "")),
        firmware=str(_told(lambda: info.version, "")),
        producer_version=str(_told(lambda: system.version, "")),
    )


def _clock_ns(buffer: Any) -> int:
    stamp_ns = _told(lambda: buffer.timestamp_ns, 0)
    if stamp_ns:
        return int(stamp_ns)
    ticks = _told(lambda: buffer.timestamp, 0)
    frequency = _told(lambda: buffer.parent.parent.timestamp_frequency, 0) if ticks else 0
    return int(ticks) * 10**9 // int(frequency) if frequency else 0


def _told(ask: Callable[[], Any], default: Any) -> Any:
    """Return what a producer tells, the default where it does not know."""
    try:
        return ask()
    except (*_FAULTS, AttributeError):
        return default


def _converted(node: Any, value: Value) -> Value:
    if isinstance(node, genapi.IBoolean):
        return bool(value)
    if isinstance(node, genapi.IFloat):
        return float(value)
    if isinstance(node, genapi.IInteger):
        if float(value) != int(float(value)):
            raise ValueError("a whole number is needed")
        return int(float(value))
    return str(value)


def _short(error: BaseException) -> str:
    """Return the first sentence of an error: what follows are places in somebody's source."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.removeprefix("GenTL exception: ").replace(" (Message from the source: )", "")
    return text.partition(" (ID:")[0].partition(" : ")[0].rstrip(".")[:200]
