"""`output` in station.yaml: what acts on the verdicts. What a kind needs is imported when it is chosen, not before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.cameras.camera import Camera
from agent.cameras.genicam import GenicamCamera
from agent.line.beat import Beat
from agent.outputs.camera import CameraLine
from agent.outputs.gate import Driver, Gate, GateTiming
from agent.outputs.output import FileOutput, Output
from calibration.errors import MissingPackage, SettingsError
from calibration.settings import Section

KINDS = ("file", "modbus", "gpio", "camera")


@dataclass(frozen=True, slots=True)
class ModbusSettings:
    """Which coil of which PLC, by Modbus/TCP."""

    host: str
    port: int = 502
    unit: int = 1
    coil: int = 0  # address in the protocol, from 0; on: the gate is open
    confirm_ms: float = 100.0  # within which the PLC must confirm a write
    heartbeat_coil: int | None = None  # changes every heartbeat_ms for as long as the agent drives the gate
    heartbeat_ms: float = 500.0

    @property
    def wires(self) -> dict[str, str]:
        """What it writes, by key of station.yaml, such as `coil 3 of plc:502 unit 1`."""
        coils = {"output.coil": self.coil, "output.heartbeat_coil": self.heartbeat_coil}
        plc = f"{self.host.lower()}:{self.port} unit {self.unit}"
        return {key: f"coil {coil} of {plc}" for key, coil in coils.items() if coil is not None}


@dataclass(frozen=True, slots=True)
class GpioSettings:
    """Which pin of this computer."""

    chip: Path  # /dev/gpiochip0
    line: int  # its number on the chip
    is_active_low: bool = False  # the gate opens at 0 V

    @property
    def wires(self) -> dict[str, str]:
        """What it drives, by key of station.yaml: `/dev/gpiochip0 17`."""
        return {"output.line": f"{self.chip} {self.line}"}


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """What is told; exactly one of file, modbus, gpio and user_output is set."""

    file: Path | None = None
    modbus: ModbusSettings | None = None
    gpio: GpioSettings | None = None
    user_output: str | None = None  # of the GenICam camera, such as UserOutput0
    timing: GateTiming | None = None  # of a gate; None: a file has none

    @property
    def wires(self) -> dict[str, str]:
        """Which coils or pin it moves, by key of station.yaml; the camera's own outputs are its own."""
        driven = self.modbus or self.gpio
        return {} if driven is None else driven.wires

    def open(self, camera: Camera | None = None) -> Output:
        """Return the output, at rest.

        Raises OutputError if it cannot be driven, MissingPackage naming the extra, SettingsError without such a camera.

        camera: the station's; one of its lines may be the gate.
        """
        if self.file is not None:
            return FileOutput(self.file)
        assert self.timing is not None
        if self.user_output is not None:
            if not isinstance(camera, GenicamCamera):
                raise SettingsError("output.kind camera: this camera has no outputs: it needs camera.kind genicam")
            return Gate(CameraLine(camera, self.user_output), self.timing)
        return Gate(_driver(self), self.timing)


def read_output(section: Section, beat: Beat) -> OutputSettings:
    """Return the output's settings. Raises SettingsError."""
    kind = section.choice("kind", KINDS)
    if kind == "file":
        return OutputSettings(section.required_path("file"))
    timing = GateTiming(
        at_ms=section.number("at_ms", beat.deadline_ms, minimum=beat.deadline_ms, maximum=600_000.0),
        pulse_ms=section.number("pulse_ms", 100.0, minimum=1.0, maximum=600_000.0),
    )
    if kind == "camera":
        return OutputSettings(user_output=section.text("user_output", "UserOutput0"), timing=timing)
    if kind == "modbus":
        return OutputSettings(modbus=_modbus(section), timing=timing)
    return OutputSettings(gpio=_gpio(section), timing=timing)


def _modbus(section: Section) -> ModbusSettings:
    beats = section.has("heartbeat_coil")
    return ModbusSettings(
        host=section.text("host"),
        port=section.whole("port", 502, minimum=1, maximum=65535),
        unit=section.whole("unit", 1, minimum=0, maximum=255),
        coil=section.whole("coil", minimum=0, maximum=65535),
        confirm_ms=section.number("confirm_ms", 100.0, minimum=5.0, maximum=10_000.0),
        heartbeat_coil=section.whole("heartbeat_coil", minimum=0, maximum=65535) if beats else None,
        heartbeat_ms=section.number("heartbeat_ms", 500.0, minimum=50.0, maximum=60_000.0),
    )


def _gpio(section: Section) -> GpioSettings:
    chip = section.path("chip", None) or Path("/dev/gpiochip0")
    level = section.choice("active", ("high", "low"), "high")
    return GpioSettings(chip, section.whole("line", minimum=0, maximum=1023), is_active_low=level == "low")


def _driver(settings: OutputSettings) -> Driver:
    """Return what the gate is driven by; its package is imported now, where it is chosen."""
    try:
        if settings.modbus is not None:
            from agent.outputs.modbus import ModbusDriver  # noqa: PLC0415

            return ModbusDriver(settings.modbus)
        from agent.outputs.gpio import GpioDriver  # noqa: PLC0415
    except ImportError as error:
        kind = "gpio" if settings.modbus is None else "modbus"
        raise MissingPackage(f"output.kind {kind}: {error}: pip install 'taktsight[{kind}]'") from error
    assert settings.gpio is not None
    return GpioDriver(settings.gpio)
