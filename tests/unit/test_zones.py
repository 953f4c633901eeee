"""Zones are read as they were drawn, and a file that is not as it should be is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from calibration.errors import InputError
from calibration.zones import DrawnZone, Zones, read_zones

SIZE = (60, 80)  # height, width of the reference view
SQUARE = [[10, 20], [30, 20], [30, 50], [10, 50]]


def drawn(folder: Path, *zones: dict[str, Any], **more: Any) -> list[DrawnZone]:
    """Return the zones of a file that holds these."""
    path = folder / "zones.json"
    path.write_text(json.dumps({"format": "taktsight.zones/1", "zones": list(zones), **more}), encoding="utf-8")
    return read_zones(path, SIZE)


def test_a_polygon_covers_the_pixels_between_its_corners(tmp_path: Path) -> None:
    (zone,) = drawn(tmp_path, {"name": "thread", "factor": 0.5, "polygon": SQUARE})
    wanted = np.zeros(SIZE, bool)
    wanted[20:50, 10:30] = True
    assert (zone.name, zone.factor, zone.ignore) == ("thread", 0.5, False)
    assert abs(int((zone.inside ^ wanted).sum())) <= 20 + 30 + 1  # OpenCV draws the low and the right border too
    assert zone.inside[20:50, 10:30].all()


def test_pixels_that_the_outline_passes_are_inside(tmp_path: Path) -> None:
    corners = [[0, 0], [8, 0], [8, 8], [0, 8]]
    (zone,) = drawn(tmp_path, {"name": "thread", "polygon": corners})
    wanted = np.zeros(SIZE, bool)
    wanted[:9, :9] = True
    np.testing.assert_array_equal(zone.inside, wanted)


def test_a_mask_is_the_picture_beside_the_file(tmp_path: Path) -> None:
    picture = np.zeros((*SIZE, 3), np.uint8)
    picture[5:9, 7:70, 1] = 255
    cv2.imwrite(str(tmp_path / "label.png"), picture)
    (zone,) = drawn(tmp_path, {"name": "label", "mask": "label.png", "ignore": True})
    np.testing.assert_array_equal(zone.inside, picture.any(axis=2))
    assert zone.ignore


@pytest.mark.parametrize(
    ("zone", "named"),
    [
        ({"polygon": SQUARE}, r"zones\[0\]\.name: None found"),
        ({"name": "elsewhere", "polygon": SQUARE}, "other than elsewhere"),
        ({"name": "a/b", "polygon": SQUARE}, r"zones\[0\]\.name"),
        ({"name": "a"}, "either a polygon or a mask"),
        ({"name": "a", "polygon": SQUARE, "mask": "a.png"}, "either a polygon or a mask"),
        ({"name": "a", "polygon": SQUARE[:2]}, "at least three corners"),
        ({"name": "a", "polygon": [[0, 0], [9, 9], [0, "9"]]}, "at least three corners"),
        ({"name": "a", "polygon": [[0, 0], [81, 0], [0, 9]]}, "outside the reference view of 80x60 px"),
        ({"name": "a", "polygon": [[math.nan, 0], [9, 0], [0, 9]]}, "outside the reference view of 80x60 px"),
        ({"name": "a", "polygon": [[0, 0], [9, 0], [0, 10**400]]}, "outside the reference view of 80x60 px"),
        ({"name": "a", "polygon": SQUARE, "factor": 0}, "factor: 0 found, need 0.1 to 10"),
        ({"name": "a", "polygon": SQUARE, "factor": True}, "factor: True found"),
        ({"name": "a", "polygon": SQUARE, "factor": 2, "ignore": True}, "no factor beside true"),
        ({"name": "a", "polygon": SQUARE, "ignore": 1}, "need true or false"),
        ({"name": "a", "polygon": SQUARE, "colour": "red"}, r"zones\[0\]\.colour: unknown key"),
        ({"name": "a", "mask": "../a.png"}, "name of a picture beside zones.json"),
        ({"name": "a", "mask": "none.png"}, "none.png"),
        (["a"], "need an object"),
    ],
)
def test_a_zone_that_cannot_be_is_refused_by_name(tmp_path: Path, zone: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        drawn(tmp_path, zone)


def test_a_mask_of_another_size_or_without_a_pixel_is_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((60, 81), 255, np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros(SIZE, np.uint8))
    with pytest.raises(InputError, match="the mask is 81x60 px, the reference view 80x60"):
        drawn(tmp_path, {"name": "a", "mask": "a.png"})
    with pytest.raises(InputError, match="b covers nothing"):
        drawn(tmp_path, {"name": "b", "mask": "b.png"})


def test_a_file_that_is_none_of_zones_is_refused(tmp_path: Path) -> None:
    zone = {"name": "a", "polygon": SQUARE}
    with pytest.raises(InputError, match="'a' is drawn twice"):
        drawn(tmp_path, zone, zone)
    with pytest.raises(InputError, match="1 to 32 zones"):
        drawn(tmp_path)
    with pytest.raises(InputError, match="nothing else"):
        drawn(tmp_path, zone, colour="red")
    (tmp_path / "zones.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="give a JSON file of zones"):
        read_zones(tmp_path / "zones.json", SIZE)


def test_a_zones_score_is_that_of_its_highest_cell_and_one_without_cells_has_none() -> None:
    cells = np.array([[1, 1], [2, 2]], np.uint8)
    zones = Zones(("elsewhere", "thread", "label"), cells, gain=2.0, offset=1.0)
    assert zones.scores(np.array([[3, -1], [-4, 0.5]], np.float32)) == {"thread": 7.0, "label": 2.0}
