"""Zones: places of the view that a person has drawn, each judged by a limit of its own, or not looked at.

A file of zones is JSON, in pixels of the reference view; where zones overlap, the later one holds:

    {"format": "taktsight.zones/1",
     "zones": [{"name": "thread", "factor": 0.5, "polygon": [[212, 80], [260, 80], [260, 410], [212, 410]]},
               {"name": "label", "factor": 2, "mask": "label.png"},
               {"name": "clamp", "ignore": true, "polygon": [[0, 0], [90, 0], [90, 60]]}]}

mask: a picture of the reference view beside the file, nonzero inside the zone. factor: how much stranger than elsewhere
a place may be before the part is rejected; below 1 is stricter. What no zone covers is the zone `elsewhere`, factor 1.

The graph of a recipe with zones applies them itself: its map is in one unit everywhere, and its score is that of the
strangest zone. So one threshold holds for the part and for each of its zones, and its promise is that of the part.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.errors import InputError
from calibration.images import read_image

FORMAT = "taktsight.zones/1"
ELSEWHERE = "elsewhere"
MOST_ZONES = 32
LEAST_FACTOR, MOST_FACTOR = 0.1, 10.0
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,39}")
KEYS = {"name", "factor", "ignore", "polygon", "mask"}


@dataclass(frozen=True, slots=True)
class DrawnZone:
    """One zone as it was drawn."""

    name: str
    inside: NDArray[np.bool_]  # (H, W) of the reference view
    factor: float = 1.0
    ignore: bool = False  # nothing is looked at there


@dataclass(frozen=True, slots=True)
class Zones:
    """The zones of a recipe, as its graph applies them."""

    names: tuple[str, ...]  # names[0] is elsewhere
    cells: NDArray[np.uint8]  # (h', w') of the anomaly map: which name each cell belongs to
    gain: float  # a zone's score is gain * the highest value of the map inside + offset
    offset: float

    def scores(self, anomaly_map: NDArray[np.float32]) -> dict[str, float]:
        """Return each zone's score, to be compared with the part's threshold. anomaly_map: (h', w')."""
        return {
            name: self.gain * float(anomaly_map[self.cells == number].max()) + self.offset
            for number, name in enumerate(self.names)
            if bool((self.cells == number).any())
        }


def read_zones(path: Path, reference_size: tuple[int, int]) -> list[DrawnZone]:
    """Return the zones of a file, in its order. reference_size: (height, width), px.

    Raises InputError naming the zone that is not as the file's format wants it.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}: give a JSON file of zones, as docs/train.md shows") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT or set(told) != {"format", "zones"}:
        raise InputError(f'{path}: need an object with "format": "{FORMAT}" and "zones": [...], nothing else')
    entries = told["zones"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST_ZONES:
        raise InputError(f"{path}: zones: need a list of 1 to {MOST_ZONES} zones")
    zones = [_zone(path, number, entry, reference_size) for number, entry in enumerate(entries)]
    names = [zone.name for zone in zones]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path}: zone {twice[0]!r} is drawn twice: give each zone a name of its own")
    return zones


def _zone(path: Path, number: int, entry: Any, reference_size: tuple[int, int]) -> DrawnZone:
    place = f"{path}: zones[{number}]"
    if not isinstance(entry, dict):
        raise InputError(f'{place}: need an object such as {{"name": "thread", "polygon": [[x, y], ...]}}')
    unknown = sorted(set(entry) - KEYS)
    if unknown:
        raise InputError(f"{place}.{unknown[0]}: unknown key; there are {', '.join(sorted(KEYS))}")
    name = entry.get("name")
    if not is_zone_name(name):
        raise InputError(
            f"{place}.name: {name!r} found, need 1 to 40 letters, digits, _ . - or spaces, other than {ELSEWHERE}"
        )
    factor, ignore = entry.get("factor", 1.0), entry.get("ignore", False)
    if type(factor) not in (int, float) or not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise InputError(f"{place}.factor: {factor!r} found, need {LEAST_FACTOR:g} to {MOST_FACTOR:g}")
    if not isinstance(ignore, bool) or (ignore and "factor" in entry):
        raise InputError(f"{place}.ignore: need true or false, and no factor beside true")
    if ("polygon" in entry) == ("mask" in entry):
        raise InputError(f"{place}: need either a polygon or a mask")
    if "polygon" in entry:
        inside = _polygon(place, entry["polygon"], reference_size)
    else:
        inside = _mask(place, path, entry["mask"], reference_size)
    if not inside.any():
        raise InputError(f"{place}: {name} covers nothing of the reference view: draw it inside")
    return DrawnZone(name, inside, float(factor), ignore)


def is_zone_name(name: Any) -> TypeGuard[str]:
    """Return whether a drawn zone may be called so: 1 to 40 plain characters, and not as what is not drawn."""
    return isinstance(name, str) and NAME.fullmatch(name) is not None and name != ELSEWHERE


def _polygon(place: str, corners: Any, reference_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (H, W), True inside and where the outline passes; corners are in px from the view's upper left corner.

    Between two pixels it passes through the right or the lower one, so that a square from 0 to 8 covers 9 x 9 px.
    """
    height, width = reference_size
    is_list = isinstance(corners, list) and 3 <= len(corners) <= 1000
    if not is_list or not all(_is_point(corner) for corner in corners):
        raise InputError(f"{place}.polygon: need at least three corners [x, y] in px of the reference view")
    if not all(0 <= x <= width and 0 <= y <= height for x, y in corners):  # a NaN is nowhere
        raise InputError(f"{place}.polygon: a corner lies outside the reference view of {width}x{height} px")
    points = np.array(corners, dtype=np.float64)
    fine = np.rint((points - 0.5) * 16).astype(np.int32)  # 4 bits below the pixel; centres are whole numbers
    drawn = np.zeros((height, width), np.uint8)
    cv2.fillPoly(drawn, [fine], 1, cv2.LINE_8, 4)
    return drawn > 0


def _is_point(corner: Any) -> bool:
    return isinstance(corner, list) and len(corner) == 2 and all(type(side) in (int, float) for side in corner)


def _mask(place: str, path: Path, name: Any, reference_size: tuple[int, int]) -> NDArray[np.bool_]:
    if not isinstance(name, str) or Path(name).name != name:
        raise InputError(f"{place}.mask: {name!r} found, need the name of a picture beside {path.name}")
    return drawn_mask(path.parent / name, reference_size)


def drawn_mask(path: Path, reference_size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (H, W), True where the picture is not black. Raises InputError if it has another size than the view."""
    mask = read_image(path)
    if mask.ndim == 3:
        mask = mask.max(axis=2)
    if mask.shape != reference_size:
        raise InputError(
            f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]} px, the reference view "
            f"{reference_size[1]}x{reference_size[0]}: draw it on a picture of that size"
        )
    return np.asarray(mask > 0)
