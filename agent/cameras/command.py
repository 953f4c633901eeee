"""`taktsight-agent camera`: find, set up and measure a GenICam camera, before a station uses it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_nodes import apply, as_value
from agent.cameras.genicam_settings import KEEP, SOFTWARE, GenicamSettings, TriggerSettings, node_settings
from agent.cameras.process import NOT_INSTALLED, open_device
from agent.capture import read_station_without_recipe
from agent.errors import CameraError
from calibration.console import console, latency_table, note, progress_bars, say
from calibration.errors import InputError, MissingPackage, SettingsError
from calibration.frame import Frame
from calibration.images import encode_png

FRAME_S = 5.0  # for one frame; a line may send its parts seldom
PAUSE_S = 0.02  # between two triggers of `bench`

STATION = click.argument("station", required=False, type=click.Path(path_type=Path))
PRODUCER = click.option("--producer", type=click.Path(path_type=Path), help="The .cti file.  [GENICAM_GENTL64_PATH]")
SERIAL = click.option("--serial", help="Serial number.  [the only camera]")
SOURCE = click.option("--source", help="Software, free_run, or a line of the camera.  [Software]")


@click.group(
    "camera",
    short_help="Find, set up and measure a GenICam camera.",
    epilog="Example: taktsight-agent camera snap station.yaml --out part.png",
)
def camera_commands() -> None:
    """Find, set up and measure a GenICam camera: that of a STATION, or one given by --producer and --serial.

    A camera has one master at a time: the agent must not run meanwhile.
    """


@camera_commands.command(
    "list", short_help="Show the cameras that are found.", epilog="Example: taktsight-agent camera list"
)
@STATION
@PRODUCER
def list_command(station: Path | None, producer: Path | None) -> None:
    """Show the cameras that the GenTL producers find."""
    try:
        from agent.cameras.genicam_device import cameras, producers  # noqa: PLC0415 an optional package
    except ImportError as error:
        raise MissingPackage(NOT_INSTALLED) from error
    files = producers(_settings(station, producer, None))
    for file in files:
        say(f"producer: {file}")
    found = cameras(files)
    if not found:
        note("no camera found: check power, cable and address; docs/camera.md")
        return
    table = Table()
    for heading in ("serial", "model", "transport", "firmware", "id", "producer"):
        table.add_column(heading, overflow="fold")
    for one in found:
        model = f"{one.vendor} {one.model}"
        table.add_row(one.serial, model, one.kind, one.firmware, one.id, f"{one.producer} {one.producer_version}")
    console.print(table)


@camera_commands.command(
    "show",
    short_help="Show a camera's nodes.",
    epilog="Example: taktsight-agent camera show station.yaml --like Trigger",
)
@STATION
@PRODUCER
@SERIAL
@click.option("--like", default="", help="Only nodes whose name holds this.")
def show_command(station: Path | None, producer: Path | None, serial: str | None, like: str) -> None:
    """Show the camera's nodes, with their values and limits, as the camera is now; nothing is changed."""
    with _device(_settings(station, producer, serial)) as device:
        table = Table()
        for heading in ("node", "value", "limits"):
            table.add_column(heading, overflow="fold")
        for name, value, limits in device.nodes.listed():
            if like.lower() in name.lower():
                table.add_row(escape(name), escape(value), escape(limits))
        console.print(table)


@camera_commands.command(
    "set", short_help="Set a camera up.", epilog="Example: taktsight-agent camera set station.yaml"
)
@STATION
@PRODUCER
@SERIAL
@click.option("--node", "nodes", multiple=True, help="Name=value; may be given more than once.")
def set_command(station: Path | None, producer: Path | None, serial: str | None, nodes: tuple[str, ...]) -> None:
    """Set the camera up as STATION says, or the nodes given, and show what it reads back."""
    settings = _settings(station, producer, serial)
    if (station is None) != bool(nodes):
        raise click.UsageError("give STATION, or --node at least once")
    with _device(settings) as device:
        if station is None:
            for name, text in node_settings(nodes):
                device.nodes.set(name, as_value(text))
                say(f"{name} = {device.nodes.get(name)}")
            return
        applied = apply(device.nodes, settings)
    for name, value in applied.values.items():
        say(f"{name} = {value}")
    for difference in applied.differences:
        note(difference)
    say(f"settings {applied.digest[:16]}")


@camera_commands.command(
    "snap", short_help="Take one picture.", epilog="Example: taktsight-agent camera snap station.yaml --out picture.png"
)
@STATION
@click.option("--out", "picture", required=True, type=click.Path(path_type=Path), help="File to write (.png).")
@PRODUCER
@SERIAL
@SOURCE
def snap_command(
    station: Path | None, picture: Path, producer: Path | None, serial: str | None, source: str | None
) -> None:
    """Take one picture the way the agent takes it."""
    with _started(_settings(station, producer, serial, source)) as camera:
        frame = _shot(camera, 1)
    pixels: NDArray[Any] = frame.pixels
    try:
        picture.write_bytes(encode_png(pixels))
    except OSError as error:
        raise InputError(f"{picture}: {error.strerror}: give a file that can be written") from error
    height, width = frame.size
    full = 2**frame.bit_depth - 1
    say(f"{picture}: {width} x {height} px, {frame.facts['format']}, {frame.bit_depth} bits")
    say(f"brightness {float(pixels.mean()) / full:.3f}, at full scale {float((pixels >= full).mean()):.2%}")
    for name in ("camera", "model", "firmware", "producer", "settings"):
        say(f"{name}: {frame.facts[name] or '-'}")


@camera_commands.command(
    "bench", short_help="Measure from trigger to frame.", epilog="Example: taktsight-agent camera bench station.yaml"
)
@STATION
@PRODUCER
@SERIAL
@SOURCE
@click.option("--count", type=click.IntRange(min=1), default=300, show_default=True, help="Pictures.")
def bench_command(
    station: Path | None, producer: Path | None, serial: str | None, source: str | None, count: int
) -> None:
    """Measure from trigger to frame; for a trigger of the camera's own, from frame to frame."""
    settings = _settings(station, producer, serial, source)
    took_ms: list[float] = []
    lost = 0
    with _started(settings) as camera, progress_bars() as progress:
        before_ns = 0
        for number in range(1, count + 1):
            given_ns = time.monotonic_ns()
            try:
                frame = _shot(camera, number)
            except CameraError as error:
                if camera.is_up:
                    lost += 1
                    continue
                raise CameraError(f"after {number - 1} pictures: {error}") from error
            now_ns = time.monotonic_ns()
            if settings.trigger.is_ours:
                took_ms.append((now_ns - given_ns) / 1e6)
                time.sleep(PAUSE_S)
            elif before_ns:
                took_ms.append((frame.received_ns - before_ns) / 1e6)
            before_ns = frame.received_ns
            progress("pictures", number, count)
        counters = camera.counters
    what = "trigger to frame" if settings.trigger.is_ours else "frame to frame"
    console.print(latency_table({what: took_ms}, f"{len(took_ms)} pictures, {lost} lost"))
    for name, number in counters.items():
        if number:
            note(f"{name.replace('_', ' ')}: {number}")


def _settings(
    station: Path | None, producer: Path | None, serial: str | None, source: str | None = None
) -> GenicamSettings:
    """Return the station's settings, or those of a camera that is left as it is but for its trigger."""
    if station is None:
        return GenicamSettings(producer, serial, user_set=KEEP, trigger=TriggerSettings(source or SOFTWARE))
    settings = read_station_without_recipe(station).camera.genicam
    if settings is None:
        raise SettingsError(f"{station}: camera.kind is not genicam: there is no camera to be looked at")
    if producer is not None or serial is not None or source is not None:
        raise click.UsageError("STATION says which camera, and how: leave --producer, --serial and --source out")
    return settings


@contextmanager
def _device(settings: GenicamSettings) -> Iterator[Any]:
    device = open_device(settings)
    try:
        yield device
    finally:
        device.close()


@contextmanager
def _started(settings: GenicamSettings) -> Iterator[GenicamCamera]:
    camera = GenicamCamera(settings)
    camera.start()
    try:
        yield camera
    finally:
        camera.stop()


def _shot(camera: GenicamCamera, number: int) -> Frame:
    """Return the next frame. Raises CameraError if none comes."""
    camera.trigger(number)
    give_up_s = time.monotonic() + FRAME_S
    while (left_s := give_up_s - time.monotonic()) > 0:
        if (frame := camera.next_frame(left_s)) is not None:
            return frame
    source = camera.settings.trigger.source
    raise CameraError(f"no frame within {FRAME_S:g} s (trigger.source is {source}): check the trigger, docs/camera.md")
