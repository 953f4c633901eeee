"""The defects of the simulated flange: each has a random place, size and strength within what a line really sees.

A defect is sketched in part coordinates (so that it turns with the part) and painted into the layers of one frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from agent.simulation.parts import (
    BORE_RADIUS,
    FLAT_BRIGHTNESS,
    HOLE_COUNT,
    HOLE_RADIUS,
    SINK_RADIUS,
    Field,
    Values,
    hole_centres,
    metal_depth,
)

FAINTEST = 0.05  # share of a defect's strength below which it is not painted and not in the mask

VISIBLE = 1 / 512  # coverage of a pixel by the part, below which nothing reaches the sensor's 8 bits
Paint = Callable[[Field, Field, Field], Field]
"""(layers (h, w, 4), x (h, w), y (h, w) in part px) -> weight (h, w), 0 where nothing was changed."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """One defect before it is painted."""

    centre: tuple[float, float]  # part px
    reach_px: float  # nothing is painted farther from the centre
    paint: Paint


def paint_defect(
    name: str,
    layers: Field,
    image_from_part: NDArray[np.float64],
    radius_px: float,
    random: np.random.Generator,
) -> NDArray[np.bool_]:
    """Paint the defect into layers (H, W, 4), in place, and return its mask (H, W).

    name: one of the keys of SKETCHES. layers: as in `Surface`, already in the pose image_from_part.
    """
    sketch = SKETCHES[name](radius_px, random)
    mask = np.zeros(layers.shape[:2], np.bool_)
    centre = image_from_part @ (*sketch.centre, 1.0)
    left, top = (max(0, math.floor(value - sketch.reach_px)) for value in centre[:2])
    right, bottom = (max(0, math.ceil(value + sketch.reach_px) + 1) for value in centre[:2])
    patch = layers[top:bottom, left:right]
    if patch.size == 0:
        return mask
    rows, columns = np.mgrid[top : top + patch.shape[0], left : left + patch.shape[1]]
    part_from_image = np.linalg.inv(image_from_part)
    x = part_from_image[0, 0] * columns + part_from_image[0, 1] * rows + part_from_image[0, 2]
    y = part_from_image[1, 0] * columns + part_from_image[1, 1] * rows + part_from_image[1, 2]
    weight = sketch.paint(patch, x.astype(np.float32), y.astype(np.float32))
    mask[top:bottom, left:right] = (weight != 0) & (patch[:, :, 3] > VISIBLE)
    return mask


def _scratch(radius: float, random: np.random.Generator) -> Sketch:
    centre = _place_on_metal(radius, random, margin_px=0.04 * radius)
    length = random.uniform(0.16, 0.5) * radius
    turn, bend = random.uniform(0, 2 * math.pi), random.uniform(-0.5, 0.5)
    steps = np.linspace(-0.5, 0.5, 11)
    along, across = steps * length, bend * (steps**2 - 1 / 12) * length
    path_x = along * math.cos(turn) - across * math.sin(turn)
    path_y = along * math.sin(turn) + across * math.cos(turn)
    path = np.stack([path_x, path_y], axis=1) + centre
    half_width = random.uniform(0.45, 0.9) * radius / 243
    strength = random.uniform(0.28, 0.6) * (1 if random.random() < 0.7 else -0.8)
    pressure = np.concatenate([[0.2], random.uniform(0.5, 1.0, 7), [0.2]])

    def paint(layers: Field, x: Field, y: Field) -> Field:
        distance, share = _distance_to_path(x, y, path)
        local = np.interp(share, np.linspace(0, 1, pressure.size), pressure)
        weight = _without_faint(_line_weight(distance, half_width) * local)
        layers[:, :, 0] *= 1 + strength * weight
        return weight

    return Sketch(centre, 0.6 * length + 4, paint)


def _dent(radius: float, random: np.random.Generator) -> Sketch:
    centre = _place_on_metal(radius, random, margin_px=0.05 * radius)
    half_length = random.uniform(0.04, 0.08) * radius
    aspect, turn = random.uniform(0.6, 1.0), random.uniform(0, math.pi)
    steepness = random.uniform(0.5, 0.95)  # slope at the steepest place

    def paint(layers: Field, x: Field, y: Field) -> Field:
        along = ((x - centre[0]) * math.cos(turn) + (y - centre[1]) * math.sin(turn)) / half_length
        across = ((y - centre[1]) * math.cos(turn) - (x - centre[0]) * math.sin(turn)) / (half_length * aspect)
        bowl = _without_faint(np.maximum(1 - along**2 - across**2, 0))
        slope_along, slope_across = (steepness * 3.5 * bowl**2 * value for value in (along, across / aspect))
        layers[:, :, 1] += slope_along * math.cos(turn) - slope_across * math.sin(turn)
        layers[:, :, 2] += slope_along * math.sin(turn) + slope_across * math.cos(turn)
        layers[:, :, 0] *= 1 + 0.3 * bowl**6 - 0.5 * np.minimum(slope_along**2 + slope_across**2, 1)  # floor and wall
        return bowl

    return Sketch(centre, half_length + 2, paint)


def _stain(radius: float, random: np.random.Generator) -> Sketch:
    centre = _place_on_metal(radius, random, margin_px=0.06 * radius)
    size = random.uniform(0.055, 0.12) * radius
    drops = random.normal(0, 0.55 * size, (9, 2)) + centre
    drop_sizes = random.uniform(0.3, 0.75, 9) * size
    darkness, rim, softness = random.uniform(0.18, 0.38), random.uniform(0.0, 0.5), random.uniform(0.5, 1.6)

    def paint(layers: Field, x: Field, y: Field) -> Field:
        wet = np.zeros_like(x)
        for (drop_x, drop_y), drop_size in zip(drops, drop_sizes, strict=True):
            wet += np.exp(-((x - drop_x) ** 2 + (y - drop_y) ** 2) / drop_size**2)
        body = np.clip((wet - 0.3) / softness, 0, 1)
        edge = 4 * body * (1 - body)  # a drying drop leaves most at its rim
        weight = _without_faint(np.minimum((1 - rim) * body + rim * edge, 1))
        layers[:, :, 0] *= 1 - darkness * weight
        return weight

    return Sketch(centre, 3.2 * size, paint)


def _crack(radius: float, random: np.random.Generator) -> Sketch:
    """Starts at a bolt hole or at the bore, where the stress is."""
    if random.random() < 0.7:
        hole = hole_centres(radius)[int(random.integers(HOLE_COUNT))]
        turn = random.uniform(0, 2 * math.pi)
        start = np.array(hole) + (HOLE_RADIUS + 0.01) * radius * np.array([math.cos(turn), math.sin(turn)])
    else:
        turn = random.uniform(0, math.pi)  # the lower half: the keyway is above
        start = (BORE_RADIUS + 0.005) * radius * np.array([math.cos(turn), math.sin(turn)])
    steps = int(random.integers(8, 16))
    turns = turn + np.cumsum(random.normal(0, 0.22, steps)) + random.normal(0, 0.35, steps)
    lengths = random.uniform(0.011, 0.022, steps) * radius
    path = np.vstack([start, start + np.cumsum(np.stack([np.cos(turns), np.sin(turns)], axis=1) * lengths[:, None], 0)])
    half_width = random.uniform(0.5, 0.95) * radius / 243
    opening = np.linspace(1.1, 0.1, 9) * random.uniform(0.6, 1.2, 9)  # it closes towards its tip
    darkness = random.uniform(0.5, 0.75)
    centre = (path.min(axis=0) + path.max(axis=0)) / 2

    def paint(layers: Field, x: Field, y: Field) -> Field:
        distance, share = _distance_to_path(x, y, path)
        local = np.interp(share, np.linspace(0, 1, opening.size), opening)
        weight = _without_faint(_line_weight(distance, half_width * local) * np.minimum(1, 0.3 + local))
        layers[:, :, 0] *= 1 - darkness * weight
        return weight

    return Sketch((float(centre[0]), float(centre[1])), float(np.abs(path - centre).max()) * 1.42 + 4, paint)


def _burr(radius: float, random: np.random.Generator) -> Sketch:
    """A ragged flake that stands out over the outer rim."""
    turn = random.uniform(0, 2 * math.pi)
    half_arc = random.uniform(0.04, 0.12)  # radians
    height = random.uniform(0.014, 0.032) * radius
    knots = np.linspace(-1, 1, 13)
    ragged = np.convolve(random.uniform(0.2, 1.2, 14), [0.5, 0.5], "valid") * (1 - knots**2) ** 0.6
    sheen = np.convolve(random.uniform(0.4, 2.0, 15), np.full(3, 1 / 3), "valid")

    def paint(layers: Field, x: Field, y: Field) -> Field:
        away = np.angle(np.exp(1j * (np.arctan2(y, x) - turn))) / half_arc
        outward = np.hypot(x, y) - radius  # px
        flake = height * np.interp(away, knots, ragged, left=0.0, right=0.0)
        cover = np.clip(flake - outward + 0.5, 0, 1) * np.clip(outward + 0.010 * radius, 0, 1)
        weight = _without_faint(np.where(flake > 0.3, cover, 0).astype(np.float32))
        tone = FLAT_BRIGHTNESS * np.interp(away, knots, sheen) * (1 - 0.3 * np.clip(outward / height, 0, 1))
        layers[:, :, 0] += weight * (tone - layers[:, :, 0])
        layers[:, :, 1:3] *= 1 - weight[:, :, None]
        layers[:, :, 3] = np.maximum(layers[:, :, 3], weight)
        return weight

    return Sketch((radius * math.cos(turn), radius * math.sin(turn)), half_arc * radius + height + 3, paint)


def _missing_hole(radius: float, random: np.random.Generator) -> Sketch:
    """The drill did not come: the turned face goes on."""
    centre = hole_centres(radius)[int(random.integers(HOLE_COUNT))]
    reach = (SINK_RADIUS + 0.01) * radius

    def paint(layers: Field, x: Field, y: Field) -> Field:
        weight = np.asarray(np.clip(reach - np.hypot(x - centre[0], y - centre[1]) + 0.5, 0, 1), np.float32)
        face = np.array([FLAT_BRIGHTNESS, 0, 0, 1], np.float32)
        layers += weight[:, :, None] * (face - layers)
        return weight

    return Sketch(centre, reach + 2, paint)


SKETCHES: dict[str, Callable[[float, np.random.Generator], Sketch]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "crack": _crack,
    "burr": _burr,
    "missing_hole": _missing_hole,
}


def _place_on_metal(radius: float, random: np.random.Generator, *, margin_px: float) -> tuple[float, float]:
    """Return a point of the face at least margin_px from every edge."""
    candidates = random.uniform(-radius, radius, (64, 2))  # every other one lies on metal
    depths = metal_depth(candidates[:, 0], candidates[:, 1], radius)
    x, y = candidates[int(np.argmax(depths > margin_px))]
    return float(x), float(y)


def _distance_to_path(x: Field, y: Field, path: NDArray[np.float64]) -> tuple[Field, Field]:
    """Return the distance in px to a polyline (n, 2) and the share 0..1 of its length at the nearest point."""
    lengths = np.hypot(*np.diff(path, axis=0).T)
    nearest = np.full(x.shape, np.inf, np.float32)
    share = np.zeros(x.shape, np.float32)
    walked = 0.0
    for (start, end), length in zip(pairwise(path), lengths, strict=True):
        direction = (end - start) / length
        along = np.clip((x - start[0]) * direction[0] + (y - start[1]) * direction[1], 0, length)
        distance = np.hypot(x - start[0] - along * direction[0], y - start[1] - along * direction[1])
        closer = distance < nearest
        nearest[closer] = distance[closer]
        share[closer] = ((walked + along) / lengths.sum())[closer]
        walked += length
    return nearest, share


def _line_weight(distance: Field, half_width: float | Values) -> Field:
    """Return 0..1: a line of this half width as a lens of 0.6 px blur shows it."""
    return np.asarray(np.clip(half_width + 0.9 - distance, 0, 1.4) / 1.4, np.float32)


def _without_faint(weight: Values) -> Field:
    return np.asarray(np.where(weight < FAINTEST, 0, weight), np.float32)
