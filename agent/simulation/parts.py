"""What the simulated line shows, drawn once: the flange, another product, the belt.

Part coordinates: image pixels with the origin at the part's centre, x right, y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Values = NDArray[np.floating[Any]]

OVERSAMPLING = 2  # canvas pixels per image pixel
FLAT_BRIGHTNESS = 0.58  # of a face square to the camera
RADIUS_SHARE = 0.38  # outer radius of the flange as a share of the frame's shorter side
HOLE_COUNT = 6
HOLE_PITCH, HOLE_RADIUS, SINK_RADIUS = 0.775, 0.072, 0.112  # these and all below in units of the outer radius
BORE_RADIUS, HUB_RADIUS = 0.30, 0.56
KEYWAY_HALF_WIDTH, KEYWAY_REACH = 0.05, 0.385
MARK = "TS-06"


@dataclass(frozen=True, slots=True)
class Surface:
    """One product, drawn at OVERSAMPLING; the canvas is square with the part in its centre."""

    layers: Field  # (n, n, 4): brightness in even light, slope along x, slope along y, coverage 0..1
    texture: Field  # (n, n) tool marks, mean 1: multiplies brightness
    shadow: Field  # (n / 8, n / 8) share of light that reaches the belt beside and below the part
    radius_px: float  # outer radius in image px
    glint: float  # strength of the lamp's two reflections in concentric grooves, 0 = straight tool marks
    canvas_from_part: NDArray[np.float64]  # (3, 3)


def flange(frame_side_px: int, random: np.random.Generator) -> Surface:
    """Return the product: a turned flange with hub, keyed bore, six countersunk bolt holes and an engraved mark.

    frame_side_px: the shorter side of the frame.
    """
    radius = RADIUS_SHARE * frame_side_px
    x, y = _part_grid(radius)
    distance = np.hypot(x, y)
    bore, holes = _bore_depth(x, y, radius), _hole_depth(x, y, radius)
    height = -_chamfer(radius - distance, 0.022 * radius) - _chamfer(bore, 0.022 * radius)
    height -= _chamfer(holes, (SINK_RADIUS - HOLE_RADIUS) * radius)
    height += 0.022 * radius * _smoothstep((HUB_RADIUS * radius - distance) / (0.035 * radius) + 0.5)
    mark = _engraved_mark(x.shape[0], radius)
    brightness = _ring_light(height) * (1 - 0.55 * mark)
    brightness = brightness * (1 + 0.05 * _smoothstep((HUB_RADIUS * radius - distance) / 4))  # a finer finish
    inside = metal_depth(x, y, radius)
    return _surface(brightness, height - 1.2 * mark, inside, _turned_texture(x.shape[0], random), radius, glint=0.14)


def plate(frame_side_px: int, random: np.random.Generator) -> Surface:
    """Return another product: a milled square plate with four plain holes and a slot."""
    radius = RADIUS_SHARE * frame_side_px
    x, y = _part_grid(radius)
    corner = np.hypot(np.maximum(np.abs(x) - 0.6 * radius, 0), np.maximum(np.abs(y) - 0.6 * radius, 0))
    edge = 0.12 * radius - corner
    holes = np.hypot(np.abs(x) - 0.5 * radius, np.abs(y) - 0.5 * radius) - 0.11 * radius
    slot = np.hypot(np.maximum(np.abs(x) - 0.25 * radius, 0), y + 0.1 * radius) - 0.13 * radius
    inside = np.minimum.reduce([edge, holes, slot])
    height = -_chamfer(inside, 0.022 * radius)
    return _surface(_ring_light(height), height, inside, _milled_texture(x.shape[0], random), radius, glint=0.0)


def belt(width_px: int, height_px: int, random: np.random.Generator) -> Field:
    """Return (height_px, length) reflectance of a dark woven belt that repeats along x; length is over 2 widths."""
    period_px = 6
    length_px = period_px * math.ceil(2 * width_px / period_px)
    x, y = np.meshgrid(np.arange(length_px), np.arange(height_px))
    weave = np.sin(2 * np.pi * (x + y) / period_px) * np.sin(2 * np.pi * (x - y) / period_px)
    cloth = 0.115 + 0.014 * weave
    cloth += 0.012 * _periodic_noise((height_px, length_px), (0.7, 0.9), random)  # yarn
    cloth += 0.007 * _periodic_noise((height_px, length_px), (1.0, 60.0), random)  # scuffs along the travel
    cloth += 0.006 * _periodic_noise((height_px, length_px), (40.0, 40.0), random)  # wear
    lint = random.random((height_px, length_px)) > 1 - 6e-5
    cloth += 0.25 * cv2.GaussianBlur(lint.astype(np.float32), (0, 0), 1.0)
    return np.clip(cloth, 0.04, 0.3).astype(np.float32)


def hole_centres(radius_px: float) -> list[tuple[float, float]]:
    """Return the part coordinates of the flange's bolt holes."""
    turns = [2 * math.pi * hole / HOLE_COUNT for hole in range(HOLE_COUNT)]
    return [(HOLE_PITCH * radius_px * math.cos(turn), HOLE_PITCH * radius_px * math.sin(turn)) for turn in turns]


def metal_depth(x: Values, y: Values, radius_px: float) -> Values:
    """Return how far inside the flange's metal points are, in px; negative outside and in openings."""
    rim = radius_px - np.hypot(x, y)
    openings = np.minimum(_bore_depth(x, y, radius_px), _hole_depth(x, y, radius_px))
    return np.asarray(np.minimum(rim, openings))


def _bore_depth(x: Values, y: Values, radius: float) -> Values:
    """Return the distance in px to the bore with its keyway, which lies above it; negative inside the opening."""
    keyway = np.maximum(np.abs(x) - KEYWAY_HALF_WIDTH * radius, np.maximum(y, -KEYWAY_REACH * radius - y))
    return np.asarray(np.minimum(np.hypot(x, y) - BORE_RADIUS * radius, keyway))


def _hole_depth(x: Values, y: Values, radius: float) -> Values:
    """Return the distance in px to the nearest bolt hole; negative inside it."""
    distances = np.stack([np.hypot(x - centre_x, y - centre_y) for centre_x, centre_y in hole_centres(radius)])
    return np.asarray(distances.min(axis=0) - HOLE_RADIUS * radius)


def _surface(
    brightness: Values, height: Values, inside: Values, texture: Field, radius: float, *, glint: float
) -> Surface:
    """Blur to the lens's sharpness (which is also what a 2:1 reduction needs) and stack the layers."""
    slope_y, slope_x = np.gradient(cv2.GaussianBlur(height.astype(np.float32), (0, 0), 1.0), 1 / OVERSAMPLING)
    coverage = np.clip(inside * OVERSAMPLING + 0.5, 0, 1)
    layers = np.dstack([brightness, slope_x, slope_y, coverage]).astype(np.float32)
    layers = np.asarray(cv2.GaussianBlur(layers, (0, 0), 1.1), np.float32)
    side = layers.shape[0]
    small = cv2.resize(layers[:, :, 3], (side // 8, side // 8), interpolation=cv2.INTER_AREA)
    near = cv2.GaussianBlur(small, (0, 0), 0.012 * side / 8) + cv2.GaussianBlur(small, (0, 0), 0.035 * side / 8)
    centre = (side - 1) / 2
    return Surface(
        layers=layers,
        texture=texture,
        shadow=(1 - 0.42 * near).astype(np.float32),
        radius_px=radius,
        glint=glint,
        canvas_from_part=np.array([[OVERSAMPLING, 0, centre], [0, OVERSAMPLING, centre], [0, 0, 1.0]]),
    )


def _part_grid(radius: float) -> tuple[Field, Field]:
    """Return x and y in part coordinates at every canvas pixel; 6 % of the radius stays free around the part."""
    side = 16 * math.ceil(1.06 * radius * 2 * OVERSAMPLING / 16)
    axis = ((np.arange(side) - (side - 1) / 2) / OVERSAMPLING).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _chamfer(depth: Values, width: float) -> Field:
    """Return how far a 45 degree chamfer of this width lowers a surface, at this distance inside the edge."""
    return np.asarray(np.maximum(width - depth, 0), np.float32)


def _smoothstep(value: Values) -> Field:
    clipped = np.clip(value, 0, 1)
    return np.asarray(clipped * clipped * (3 - 2 * clipped), np.float32)


def _ring_light(height: Values) -> Field:
    """Return brightness under an even ring light: faces are grey, 45 degree slopes see the lamp, walls are dark."""
    smooth = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 1.2)
    slope_y, slope_x = np.gradient(smooth, 1 / OVERSAMPLING)
    slope = np.hypot(slope_x, slope_y)
    lobe = np.exp(-(((slope - 0.95) / 0.3) ** 2))
    return np.asarray(FLAT_BRIGHTNESS * (0.55 / (1 + 8 * slope**2) + 0.45) + 0.36 * lobe, np.float32)


def _engraved_mark(side: int, radius: float) -> Field:
    """Return (side, side) 0..1: MARK between two bolt holes, opposite the keyway."""
    canvas = np.zeros((side, side), np.uint8)
    scale = 0.0042 * radius * OVERSAMPLING
    thickness = max(1, round(0.014 * radius * OVERSAMPLING))
    (width, height), _ = cv2.getTextSize(MARK, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
    corner = (round((side - width) / 2), round(side / 2 + 0.775 * radius * OVERSAMPLING + height / 2))
    cv2.putText(canvas, MARK, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thickness, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), 0.8), np.float32)


def _turned_texture(side: int, random: np.random.Generator) -> Field:
    """Return (side, side) concentric tool marks, mean 1: full rings, and arcs where the insert chattered."""
    turns, radii = 1440, side
    rings = _periodic_noise((1, radii), (1.0, 1.3), random) + 0.7 * _periodic_noise((1, radii), (1.0, 9.0), random)
    arcs = _periodic_noise((turns, radii), (60.0, 1.1), random)
    polar = (1 + 0.026 * rings + 0.022 * arcs).astype(np.float32)
    polar = np.vstack([polar, polar[:2]])  # so that interpolation closes the circle
    axis = (np.arange(side) - (side - 1) / 2).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    distance, turn = cv2.cartToPolar(x, y)
    row = turn * np.float32(turns / (2 * np.pi))
    return np.asarray(cv2.remap(polar, distance, row, cv2.INTER_LINEAR), np.float32)


def _milled_texture(side: int, random: np.random.Generator) -> Field:
    """Return (side, side) straight tool marks along x, mean 1."""
    return np.asarray(1 + 0.035 * _periodic_noise((side, side), (1.3, 70.0), random), np.float32)


def _periodic_noise(
    shape: tuple[int, int], sigma_px: tuple[float, float], random: np.random.Generator
) -> NDArray[np.float64]:
    """Return Gaussian noise of standard deviation 1, smoothed by sigma_px (y, x), that repeats without a seam."""
    spectrum = np.fft.rfft2(random.standard_normal(shape))
    frequency_y = np.fft.fftfreq(shape[0])[:, None]
    frequency_x = np.fft.rfftfreq(shape[1])[None, :]
    spectrum *= np.exp(-2 * np.pi**2 * ((frequency_y * sigma_px[0]) ** 2 + (frequency_x * sigma_px[1]) ** 2))
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, shape)
    return np.asarray(noise / noise.std())
