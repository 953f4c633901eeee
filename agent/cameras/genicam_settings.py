"""What station.yaml says about a GenICam camera. A key that is not given leaves the camera as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibration.errors import SettingsError
from calibration.settings import Section

FREE_RUN = "free_run"
SOFTWARE = "Software"
KEEP = "keep"
ACTIVATIONS = ("RisingEdge", "FallingEdge", "AnyEdge", "LevelHigh", "LevelLow")
COLOURS = ("red", "green", "blue")


@dataclass(frozen=True, slots=True)
class TriggerSettings:
    """What makes the camera take a picture."""

    source: str = SOFTWARE  # Software: the agent, every takt_ms; free_run: nothing; else a line of the camera
    activation: str | None = None
    delay_us: float | None = None
    debounce_us: float | None = None
    counter: str | None = None  # of the camera, such as Counter0: counts triggers, those that it ignored too
    transfer_ms: float = 0.0  # from the trigger to the frame in memory
    least_gap_ms: float = 0.0  # two exposures nearer to each other are reported

    @property
    def is_ours(self) -> bool:
        """True where the agent triggers."""
        return self.source == SOFTWARE


@dataclass(frozen=True, slots=True)
class GenicamSettings:
    """One camera, as it is to be set up."""

    producer: Path | None = None  # None: those in GENICAM_GENTL64_PATH
    serial: str | None = None
    id: str | None = None
    user_set: str = "Default"  # loaded before all else; keep: none is
    pixel_format: str | None = None
    region: tuple[int, ...] = ()  # x, y, width, height, px
    exposure_us: float | None = None
    gain_db: float | None = None
    gain_raw: int | None = None
    white_balance: Mapping[str, float] = field(default_factory=dict)  # by colour
    packet_size: int | None = None  # bytes
    rate_hz: float | None = None
    buffers: int = 16
    trigger: TriggerSettings = field(default_factory=TriggerSettings)
    strobe: str | None = None  # line that is active while the sensor is exposed
    chunks: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()  # Name=value, set last

    def as_dict(self) -> dict[str, Any]:
        """Return what `from_dict` reads, for JSON."""
        return {**asdict(self), "producer": None if self.producer is None else str(self.producer)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> GenicamSettings:
        """Return the settings that `as_dict` wrote."""
        producer = given["producer"]
        lists = {name: tuple(given[name]) for name in ("region", "chunks", "nodes")}
        return cls(
            **{
                **given,
                **lists,
                "producer": None if producer is None else Path(producer),
                "trigger": TriggerSettings(**given["trigger"]),
            }
        )

    @property
    def named(self) -> str:
        """Which camera, for people."""
        if self.serial is not None:
            return f"the camera with the serial number {self.serial}"
        return "the only camera" if self.id is None else f"the camera {self.id}"


def read_genicam(section: Section) -> GenicamSettings:
    """Return what the section says. Raises SettingsError naming the key that is wrong."""
    return GenicamSettings(
        producer=section.path("producer", None),
        serial=_text(section, "serial"),
        id=_text(section, "id"),
        user_set=section.text("user_set", "Default"),
        pixel_format=_text(section, "pixel_format"),
        region=_region(section),
        exposure_us=_number(section, "exposure_us", 0.1, 60e6),
        gain_db=_number(section, "gain_db", 0.0, 100.0),
        gain_raw=section.whole("gain_raw", minimum=0, maximum=65535) if section.has("gain_raw") else None,
        white_balance=_white_balance(section),
        packet_size=section.whole("packet_size", minimum=576, maximum=16_000) if section.has("packet_size") else None,
        rate_hz=_number(section, "rate_hz", 0.001, 10_000.0),
        buffers=section.whole("buffers", 16, minimum=3, maximum=256),
        trigger=_trigger(section.section("trigger")),
        strobe=_text(section, "strobe"),
        chunks=section.text_list("chunks"),
        nodes=_nodes(section),
    )


def node_settings(nodes: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, value) of each Name=value. Raises SettingsError."""
    wrong = [node for node in nodes if not node.partition("=")[0].isidentifier() or "=" not in node]
    if wrong:
        raise SettingsError(f"camera.nodes: {wrong} found, need Name=value, such as GammaEnable=false")
    return [(name, value) for name, _, value in (node.partition("=") for node in nodes)]


def _trigger(section: Section) -> TriggerSettings:
    return TriggerSettings(
        source=section.text("source", SOFTWARE),
        activation=section.choice("activation", ACTIVATIONS) if section.has("activation") else None,
        delay_us=_number(section, "delay_us", 0.0, 60e6),
        debounce_us=_number(section, "debounce_us", 0.0, 1e6),
        counter=_text(section, "counter"),
        transfer_ms=section.number("transfer_ms", 0.0, minimum=0.0, maximum=10_000.0),
        least_gap_ms=section.number("least_gap_ms", 0.0, minimum=0.0, maximum=60_000.0),
    )


def _white_balance(section: Section) -> dict[str, float]:
    below = section.section("white_balance")
    found = {colour: _number(below, colour, 0.01, 100.0) for colour in COLOURS}
    return {colour: ratio for colour, ratio in found.items() if ratio is not None}


def _region(section: Section) -> tuple[int, ...]:
    region = section.whole_list("region")
    if region and (len(region) != 4 or min(region) < 0 or 0 in region[2:]):
        raise SettingsError(f"camera.region: {list(region)} found, need [x, y, width, height] in px")
    return region


def _nodes(section: Section) -> tuple[str, ...]:
    nodes = section.text_list("nodes")
    node_settings(nodes)
    return nodes


def _text(section: Section, key: str) -> str | None:
    return section.text(key) if section.has(key) else None


def _number(section: Section, key: str, minimum: float, maximum: float) -> float | None:
    return section.number(key, minimum=minimum, maximum=maximum) if section.has(key) else None
