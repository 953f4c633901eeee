"""Several cameras in one station.yaml: each is a station of its own, with what the file says of all and of it.

    station: cell7                          cell.yaml/top: station cell7-top, topic .../cell7-top,
    takt_ms: 500                            folders outbox/top, archive/top, ..., health.port 9465
    mqtt: {topic: acme/.../cell7}
    cameras:                                cell.yaml/side: station cell7-side, topic .../cell7-side,
      top: {recipe: a, camera: {...}}       folders outbox/side, archive/side, ..., health.port 9466
      side: {recipe: b, camera: {...}}

What stands under a camera's name is taken as it is, and goes before what is said of all. The path of one camera is the
file's with its name behind: every command that takes a station.yaml takes that too.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from agent.health.health import DEFAULT_PORT
from calibration.errors import SettingsError
from calibration.settings import Section

CAMERAS = "cameras"
NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
OWN = ("camera", "output", "photometric")  # no two cameras share these
NAMED = (("mqtt", "topic"), ("mqtt", "client_id"), ("sparkplug", "edge_node"), ("sparkplug", "device"))
FOLDERS = (
    *(("outbox", "folder"), ("archive", "folder"), ("recipes", "folder"), ("commands", "captures")),
    ("engine", "cache"),
)


def file_and_camera(path: Path) -> tuple[Path, str | None]:
    """Return the file that a station's path means, and which of its cameras; None: the path is the file's own."""
    return (path.parent, path.name) if path.parent.is_file() else (path, None)


def names_of_cameras(data: bytes) -> tuple[str, ...]:
    """Return the names of a file's cameras in its order, none where it has one alone.

    data: of a file that `calibration.settings.read_settings` takes. Raises SettingsError.
    """
    cameras = _values(data).get(CAMERAS)
    if cameras is None:
        return ()
    if not isinstance(cameras, dict) or not cameras:
        raise SettingsError(f"{CAMERAS}: {reprlib.repr(cameras)} found, need a block with one name per camera")
    for name, own in cameras.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SettingsError(
                f"{CAMERAS}: {reprlib.repr(name)} found, need names of letters, digits, `_` and `-`, 32 at most"
            )
        if not isinstance(own, dict):
            raise SettingsError(f"{CAMERAS}.{name}: {reprlib.repr(own)} found, need a block of indented keys")
    return tuple(cameras)


def settings_of_camera(file: Path, data: bytes, camera: str | None) -> Section:
    """Return the settings of one camera's station. Raises SettingsError if the file has no such camera."""
    names = names_of_cameras(data)
    known = ", ".join(f"{file.name}/{name}" for name in names)
    if camera is None:
        raise SettingsError(f"{CAMERAS}: {len(names)} found, need one here: name it, {known}")
    if camera not in names:
        wanted = f"need one of {known}" if names else f"need {file}: it has no {CAMERAS}"
        raise SettingsError(f"{file}/{camera}: no such camera: {wanted}")
    values = _values(data)
    for key in OWN:
        if key in values:
            raise SettingsError(f"{key}: found for all cameras, need one for each: move it below {CAMERAS}.{camera}")
    return Section(_merged(values, camera, names.index(camera)), folder=file.parent)


def _merged(values: Mapping[str, Any], camera: str, number: int) -> dict[str, Any]:
    """Return what is said of all, told apart by the camera's name, and over it what is said of this one."""
    own: dict[str, Any] = values[CAMERAS][camera]
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items() if key != CAMERAS}
    merged.setdefault("health", {})
    _change(merged, "health", "port", lambda port: port + number, default=DEFAULT_PORT)
    for section, key in NAMED:
        _change(merged, section, key, lambda text: f"{text}-{camera}")
    for section, key in FOLDERS:
        _change(merged, section, key, lambda folder: f"{folder}/{camera}")
    if isinstance(merged.get("station"), str):
        merged["station"] = f"{merged['station']}-{camera}"
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _change(
    merged: dict[str, Any], section: str, key: str, change: Callable[[Any], Any], default: int | None = None
) -> None:
    """Tell a value apart by its camera; an empty one, or one of a wrong type, stays for its reader to complain of."""
    block = merged.get(section)
    if not isinstance(block, dict):
        return
    value = block.get(key, default)
    if value and isinstance(value, str if default is None else int) and not isinstance(value, bool):
        block[key] = change(value)


def _values(data: bytes) -> dict[str, Any]:
    """Return what the file says; `read_settings` has refused what is not strict."""
    values: dict[str, Any] = yaml.safe_load(data)
    return values
