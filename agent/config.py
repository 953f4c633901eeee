"""station.yaml: one place on the line. Every key with its unit, range and default on one line."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agent.cameras.settings import CameraSettings, read_camera
from agent.cameras.several import CAMERAS, file_and_camera, names_of_cameras, settings_of_camera
from agent.cameras.trigger import TriggerSourceSettings, read_trigger
from agent.commands.message import COMMANDS
from agent.engines.engine import KINDS, RUNTIMES, TENSORRT, TOLERANCES, EngineSettings
from agent.health.health import HealthSettings, read_health_settings
from agent.line.beat import Beat
from agent.line.realtime import RealtimeSettings
from agent.mqtt.client import MqttSettings
from agent.outbox.outbox import OutboxSettings
from agent.outputs.settings import OutputSettings, read_output
from agent.publishing.archive import ArchiveSettings
from agent.publishing.messages import LINE_ACTION_FOR_POLICY
from agent.recipes.changeover import ChangeoverSettings
from agent.recipes.trust import Trust
from agent.sparkplug.messages import SparkplugSettings
from calibration.errors import InputError, SettingsError
from calibration.photometric import Photometric, read_photometric
from calibration.settings import Section, read_file, read_settings
from calibration.signing import read_public_key


@dataclass(frozen=True, slots=True)
class CommandSettings:
    """What may be asked of the station over MQTT."""

    allow: frozenset[str]  # names of commands; none: the station listens to nobody
    captures: Path  # folder for recordings made by `capture`


@dataclass(frozen=True, slots=True)
class Station:
    """Everything that station.yaml says, checked."""

    name: str
    beat: Beat
    camera: CameraSettings
    recipes: ChangeoverSettings
    mqtt: MqttSettings | None
    sparkplug: SparkplugSettings | None
    outbox: OutboxSettings
    commands: CommandSettings
    archive: ArchiveSettings | None
    output: OutputSettings | None = None  # what acts on the verdicts; None: nobody is told
    trigger: TriggerSourceSettings | None = None  # what announces parts; None: the beat, or the camera's own trigger
    realtime: RealtimeSettings = field(default_factory=RealtimeSettings)
    health: HealthSettings = field(default_factory=lambda: HealthSettings(0))
    data: bytes = b""  # the file, as it was read

    @property
    def wires(self) -> dict[str, str]:
        """Coils and pins that it has to itself, by key."""
        pin = None if self.trigger is None else self.trigger.pin
        trigger = {} if pin is None else {"trigger.line": f"{pin.chip} {pin.line}"}
        return {**trigger, **({} if self.output is None else self.output.wires)}

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def recipe(self) -> Path:
        """The recipe's file."""
        return self.recipes.recipe

    @property
    def engine(self) -> EngineSettings:
        """The engine's settings."""
        return self.recipes.engine

    @property
    def photometric(self) -> Photometric:
        """The camera's photometric correction."""
        return self.recipes.photometric


def read_station(path: Path, data: bytes | None = None) -> Station:
    """Return the station. Raises SettingsError naming the key that is unknown, missing or out of range.

    path: a station.yaml; where it has several cameras, with the name of one of them behind: cell.yaml/top.
    data: what the file held when the run began; None: what it holds.
    """
    file, camera = file_and_camera(path)
    if data is None:
        data = read_file(file)
    top = read_settings(file, data)
    if camera is None and not top.has(CAMERAS):
        return _station(top, file, data)
    top = settings_of_camera(file, data, camera)
    try:
        return _station(top, file, data)
    except SettingsError as error:
        raise SettingsError(f"{CAMERAS}.{camera}: {error}") from error


def read_stations(path: Path) -> dict[str, Station]:
    """Return the station of each of a file's cameras by the camera's name; none where the path is one station's.

    Raises SettingsError as `read_station`, and if two of them would get into each other's way.
    """
    if file_and_camera(path)[1] is not None:
        return {}
    data = read_file(path)
    read_settings(path, data)
    stations = {name: read_station(path / name, data) for name in names_of_cameras(data)}
    for what, values in _told_apart(stations).items():
        owners: dict[object, str] = {}
        for camera, value in values.items():
            if (other := owners.setdefault(value, camera)) != camera:
                raise SettingsError(f"{CAMERAS}.{camera}: {what}: {value} is that of {other}, too: give it its own")
    wired: dict[str, tuple[str, str]] = {}
    for camera, (key, wire) in ((name, item) for name, one in stations.items() for item in one.wires.items()):
        owner, its = wired.setdefault(wire, (camera, key))
        if owner != camera:
            raise SettingsError(f"{CAMERAS}.{camera}: {key}: {wire} is {its} of {owner}, too: give it its own")
    unnamed = [name for name, station in stations.items() if station.camera.is_unnamed]
    if len(stations) > 1 and unnamed:
        raise SettingsError(f"{CAMERAS}.{unnamed[0]}: camera.serial: missing: add it, to tell the cameras apart")
    return stations


def _told_apart(stations: Mapping[str, Station]) -> dict[str, dict[str, object]]:
    """Return what no two stations may share, by camera."""
    found: dict[str, dict[str, object]] = {
        "station": {name: station.name for name, station in stations.items()},
        "outbox.folder": {name: station.outbox.folder for name, station in stations.items()},
        "recipes.folder": {name: station.recipes.folder for name, station in stations.items()},
        "health.port": {name: station.health.port for name, station in stations.items() if station.health.port},
        "archive.folder": {name: one.archive.folder for name, one in stations.items() if one.archive is not None},
        "mqtt.topic": {name: one.mqtt.topic for name, one in stations.items() if one.mqtt is not None},
        "sparkplug.edge_node": {
            name: (node.group, node.edge_node) for name, one in stations.items() if (node := one.sparkplug) is not None
        },
    }
    cameras = {name: one.camera.genicam for name, one in stations.items()}
    for key in ("serial", "id"):
        found[f"camera.{key}"] = {
            name: value for name, one in cameras.items() if one is not None and (value := getattr(one, key)) is not None
        }
    return found


def _station(top: Section, file: Path, data: bytes) -> Station:
    takt_ms = top.number("takt_ms", minimum=10.0, maximum=600_000.0)
    policy = top.choice("on_no_verdict", tuple(LINE_ACTION_FOR_POLICY), "reject")
    name = top.text("station")
    if not name.isprintable():
        raise SettingsError(f"station: {name!r} found, need a name of printable characters")
    commands = top.section("commands")
    camera = read_camera(top.section("camera"))
    queue_length = top.whole("queue_length", 4, minimum=1, maximum=64)
    beat = Beat(
        takt_ms=takt_ms,
        deadline_ms=top.number("deadline_ms", 0.9 * takt_ms, minimum=1.0, maximum=queue_length * takt_ms),
        queue_length=queue_length,
        on_no_verdict=policy,
        by_camera=camera.opens_parts,
    )
    station = Station(
        name=name,
        beat=beat,
        camera=camera,
        recipes=_recipes(top, commands, file.parent, name),
        mqtt=_mqtt(top.section("mqtt")) if top.has("mqtt") else None,
        sparkplug=_sparkplug(top.section("sparkplug"), name) if top.has("sparkplug") else None,
        outbox=_outbox(top.section("outbox"), file.parent, name),
        commands=_commands(commands, file.parent, name),
        archive=_archive(top.section("archive")) if top.has("archive") else None,
        output=read_output(top.section("output"), beat) if top.has("output") else None,
        trigger=read_trigger(top.section("trigger")) if top.has("trigger") else None,
        health=read_health_settings(top.section("health")),
        realtime=_realtime(top.section("realtime")),
        data=data,
    )
    if station.sparkplug is not None and station.mqtt is None:
        raise SettingsError("sparkplug: needs the broker: add mqtt:")
    if station.commands.allow and station.mqtt is None:
        raise SettingsError("commands.allow: commands come over MQTT: add mqtt:")
    if station.trigger is not None and beat.by_camera:
        raise SettingsError("trigger: the camera has a trigger of its own: leave it out, or camera.trigger.source")
    keys: dict[str, str] = {}
    for key, wire in station.wires.items():
        if (other := keys.setdefault(wire, key)) != key:
            raise SettingsError(f"{key}: {wire} is {other}, too: give it its own")
    top.finish()
    return station


def _engine(section: Section, folder: Path, station: str) -> EngineSettings:
    kind = section.choice("kind", ("auto", *KINDS), "auto")
    return EngineSettings(
        kind=kind,
        precision=section.choice("precision", tuple(TOLERANCES), "f16" if kind == TENSORRT else "f32"),
        threads=section.whole("threads", 2, minimum=1, maximum=256),
        runtime=section.choice("runtime", RUNTIMES, RUNTIMES[0]),
        workspace_mb=section.whole("workspace_mb", 1024, minimum=16, maximum=65_536),
        cache=section.path("cache", None) or folder / "engines" / _as_file_name(station),
        fallback=section.choice("fallback", ("refuse", "allow"), "refuse") == "allow",
    )


def _recipes(top: Section, commands: Section, folder: Path, station: str) -> ChangeoverSettings:
    recipes = top.section("recipes")
    return ChangeoverSettings(
        recipe=top.required_path("recipe"),
        engine=_engine(top.section("engine"), folder, station),
        photometric=_photometric(top),
        folder=recipes.path("folder", None) or folder / "recipes" / _as_file_name(station),
        trust=_trust(recipes, folder, given=top.has("recipes")),
        threshold_factor=commands.number("threshold_factor", 2.0, minimum=1.0, maximum=100.0),
    )


def _trust(section: Section, folder: Path, *, given: bool) -> Trust:
    """Return whose recipes run; what nobody decided is an error, not a default."""
    names = section.text_list("keys")
    unsigned = section.choice("unsigned", ("refuse", "allow"), "refuse") == "allow"
    if not names and not unsigned:
        found = "no keys found, unsigned: refuse" if given else "not found"
        raise SettingsError(
            f"recipes: {found}, need whose recipes run here: write `recipes: {{keys: [release.key.pub]}}` with "
            "the public key of who signs them (taktsight-trainer keygen), or `recipes: {unsigned: allow}` to run "
            "recipes that nobody signed"
        )
    try:
        return Trust(tuple(read_public_key(folder / name) for name in names), unsigned)
    except (InputError, ValueError) as error:  # ValueError: a zero in the path
        raise SettingsError(f"recipes.keys: {error}") from error


def _realtime(section: Section) -> RealtimeSettings:
    return RealtimeSettings(
        priority=section.whole("priority", minimum=0, maximum=99) if section.has("priority") else None,
        cpus=section.whole_list("cpus"),
        lock_memory=section.flag("lock_memory", False),
    )


def _commands(section: Section, folder: Path, station: str) -> CommandSettings:
    allow = section.text_list("allow")
    unknown = sorted(set(allow) - set(COMMANDS))
    if unknown:
        raise SettingsError(f"commands.allow: {', '.join(unknown)} found, need some of {', '.join(COMMANDS)}")
    captures = section.path("captures", None) or folder / "captures" / _as_file_name(station)
    return CommandSettings(frozenset(allow), captures)


def _outbox(section: Section, folder: Path, station: str) -> OutboxSettings:
    return OutboxSettings(
        folder=section.path("folder", None) or folder / "outbox" / _as_file_name(station),
        heatmap_mb=section.number("heatmap_mb", 64.0, minimum=0.0, maximum=1e6),
        max_mb=section.number("max_mb", 2048.0, minimum=1.0, maximum=1e6),
        reserve_mb=section.number("reserve_mb", 8.0, minimum=0.0, maximum=1e5),
    )


def _sparkplug(section: Section, station: str) -> SparkplugSettings:
    return SparkplugSettings(
        group=section.text("group"),
        edge_node=section.text("edge_node"),
        device=section.text("device", station),
        primary_host=section.text("primary_host") if section.has("primary_host") else None,
    )


def _mqtt(section: Section) -> MqttSettings:
    return MqttSettings(
        topic=section.text("topic"),
        host=section.text("host", "127.0.0.1"),
        port=section.whole("port", 1883, minimum=1, maximum=65535),
        protocol=section.whole("protocol", 5, minimum=3, maximum=5),
        client_id=section.text("client_id", ""),
        username=section.text("username") if section.has("username") else None,
        password_file=section.path("password_file", None),
        ca_file=section.path("ca_file", None),
        cert_file=section.path("cert_file", None),
        key_file=section.path("key_file", None),
        keepalive_s=section.whole("keepalive_s", 10, minimum=1, maximum=3600),
        heatmaps=section.flag("heatmaps", True),
        consumers=section.text_list("consumers"),
    )


def _archive(section: Section) -> ArchiveSettings:
    return ArchiveSettings(
        folder=section.required_path("folder"),
        pictures=section.choice("pictures", ("none", "rejects", "all"), "rejects"),
        max_mb=section.number("max_mb", 1000.0, minimum=1.0, maximum=1e7),
        keep_days=section.whole("keep_days", 0, minimum=0, maximum=36_500),
    )


def _photometric(top: Section) -> Photometric:
    path = top.path("photometric", None)
    return Photometric() if path is None else read_photometric(path)


def _as_file_name(station: str) -> str:
    return re.sub(r"[^\w.-]", "_", station).lstrip(".") or "_"
