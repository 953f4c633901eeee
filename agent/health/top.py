"""`taktsight-agent top`: how a running station does, in a terminal."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from agent.cameras.several import CAMERAS, file_and_camera, settings_of_camera
from agent.health.health import DEFAULT_PORT, read_health_settings
from agent.health.message import HEALTH_SCHEMA
from agent.health.top_picture import drawn
from calibration.console import console
from calibration.errors import SettingsError, TaktsightError
from calibration.settings import read_file, read_settings

HOST = "127.0.0.1"
TIMEOUT_S = 3.0
EVERY_S = 1.0
MOST_BYTES = 1024**2  # of what a station tells; it tells about 6 KB


class NoAnswer(TaktsightError):
    """Nobody tells of a station there; one that did may come back."""


@click.command(
    "top", short_help="Show live how the running agent does.", epilog="Example: taktsight-agent top station.yaml"
)
@click.argument("station", required=False, type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(1, 65535), help=f"In place of STATION's health.port.  [{DEFAULT_PORT}]")
@click.option("--once", is_flag=True, help="One picture, then end; so it is where the output is no terminal.")
def top_command(station: Path | None, port: int | None, once: bool) -> None:
    """Show live how the running agent of STATION (or of --port) does: takt, verdicts, places, drift, queues."""
    name, settings_port = (None, DEFAULT_PORT) if station is None else _told_by(station)
    port = port or settings_port
    if port == 0:
        raise SettingsError("health.port: 0 found, the station tells nobody: give it a free port and start it anew")
    if once or not console.is_terminal:
        console.print(drawn(fetch(port, name), console))
        return
    with suppress(KeyboardInterrupt):  # the way out
        show_live(lambda: fetch(port, name), console)


def fetch(port: int, station: str | None = None) -> dict[str, Any]:
    """Return what the station on this port tells of itself.

    Raises NoAnswer if nobody answers there, SettingsError if somebody else does.
    """
    connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health.json")
        response = connection.getresponse()
        data = response.read(MOST_BYTES)
        if response.length or response.status == http.client.SERVICE_UNAVAILABLE:
            raise NoAnswer(f"{HOST}:{port} is busy or about to end: try again")
        message = json.loads(data)
    except OSError as error:
        raise NoAnswer(
            f"no station answers on {HOST}:{port} ({error.strerror or error}): start it (taktsight-agent run, or "
            "systemctl start taktsight-agent@NAME), or compare health.port in its station.yaml"
        ) from error
    except (http.client.HTTPException, ValueError, RecursionError) as error:
        raise SettingsError(f"{HOST}:{port} is no station of taktsight: see health.port in station.yaml") from error
    finally:
        connection.close()
    schema = message.get("schema") if isinstance(message, dict) else None
    if schema != HEALTH_SCHEMA:
        raise SettingsError(
            f"{HOST}:{port} answers with {str(schema)[:100]!r}, need {HEALTH_SCHEMA}: use the taktsight-agent that runs"
        )
    if station is not None and message.get("station") != station:
        raise SettingsError(
            f"{HOST}:{port} is station {str(message.get('station'))[:100]!r}, not {station!r}: give each station of "
            "this machine a health.port of its own"
        )
    return dict(message)


def show_live(
    fetched: Callable[[], dict[str, Any]], terminal: Console, *, wait: Callable[[float], None] = time.sleep
) -> None:
    """Draw the station every second until interrupted; over its restarts, once it was seen.

    Raises NoAnswer if it does not answer at first, SettingsError if another one answers.
    """
    message, trouble = fetched(), ""
    with Live(console=terminal, screen=True, auto_refresh=False) as live:
        while True:
            live.update(drawn(message, terminal, trouble), refresh=True)
            wait(EVERY_S)
            try:
                message, trouble = fetched(), ""
            except NoAnswer:
                trouble = trouble or f"no answer since {time.strftime('%H:%M:%S')}: trying again"


def _told_by(station: Path) -> tuple[str, int]:
    """Return the name and the port that STATION gives; the rest of the file may belong to others."""
    file, camera = file_and_camera(station)
    data = read_file(file)
    top = read_settings(file, data)
    if camera is not None or top.has(CAMERAS):
        top = settings_of_camera(file, data, camera)
    return top.text("station"), read_health_settings(top.section("health")).port
