"""A line that does not exist: machined parts on a belt, drawn with their exact pose and defects known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.simulation.defects import SKETCHES, paint_defect
from agent.simulation.parts import Field, Surface, belt, flange, plate
from calibration.errors import SettingsError
from calibration.frame import Pixels

DEFECTS = tuple(SKETCHES)  # scratch, dent, stain, crack, burr, missing_hole

SPECIAL = ("lost", "dark", "saturated", "blurred", "wrong_part", "half_out", "late")  # kinds that settings list
LIGHT_OF_KIND = {"dark": 0.0, "saturated": 2.0}  # times the light that is due
BLUR_SHARE = 0.01  # of the frame's shorter side: a Gaussian of 2.5 px where the detector's input has 256
SMALLEST_SIDE_PX = 64  # below, the bolt holes are under 4 px wide
FULL_WELL_ELECTRONS = 10_000.0  # a 3.45 um pixel
READ_NOISE_COUNTS = 0.4
BLACK_COUNTS = 3.0
# How much brighter a 45 degree slope towards (right, down) is: a good ring light, 6 % stronger from the upper left.
# The lamp does not turn with the part, so this moves edges: 0.15 px at the rim (median over all angles, frame of 640).
LAMP_TILT = (-0.038, -0.046)
PLAN_STREAM, SURFACE_STREAM, DEFECT_STREAM, NOISE_STREAM = range(4)  # independent random numbers per trigger


@dataclass(frozen=True, slots=True)
class LineSettings:
    """What the simulated line does; the same settings give the same pixels."""

    seed: int = 0  # the machine and the belt: surface, tool marks, texture, drift
    lot: int = 0  # which parts off that machine; another lot never repeats a part
    width_px: int = 640
    height_px: int = 640
    shift_px: float = 20.0  # uniform in +-, each axis
    angle_deg: float = 180.0  # uniform in +-
    light_drift: float = 0.1  # share of brightness, peak
    noise: float = 1.0  # 1 = a decent industrial camera
    defect_share: float = 0.0  # 0..1
    lost: tuple[int, ...] = ()  # trigger ids whose frame never arrives
    dark: tuple[int, ...] = ()  # trigger ids with the lamp off
    saturated: tuple[int, ...] = ()  # trigger ids exposed twice as long
    blurred: tuple[int, ...] = ()  # trigger ids out of focus
    wrong_part: tuple[int, ...] = ()  # trigger ids that show another product
    half_out: tuple[int, ...] = ()  # trigger ids with the part half out of view
    late: tuple[int, ...] = ()  # trigger ids whose frame arrives late_ms later
    late_ms: float = 400.0
    colour: bool = False  # (H, W, 3) RGB instead of (H, W) gray

    def __post_init__(self) -> None:
        """Raises SettingsError where nothing could be drawn."""
        if min(self.width_px, self.height_px) < SMALLEST_SIDE_PX:
            found = f"{self.width_px} x {self.height_px} px"
            raise SettingsError(f"simulation: frame of {found}, need at least {SMALLEST_SIDE_PX} px per side")
        if not 0 <= self.defect_share <= 1:
            raise SettingsError(f"simulation: defect_share {self.defect_share}, need a share from 0 to 1")
        if min(self.seed, self.lot) < 0:
            raise SettingsError(f"simulation: seed {self.seed}, lot {self.lot}, need whole numbers from 0")


@dataclass(frozen=True, slots=True)
class PartPlan:
    """The truth about one part."""

    trigger_id: int
    part_id: str  # "P000017"
    kind: str  # "good", "defective", or one of SPECIAL
    defect: str | None  # one of DEFECTS
    shift_px: tuple[float, float]  # (right, down) of the part's centre from the frame's centre
    angle_deg: float  # turns the x axis towards the y axis: clockwise on the screen
    gain: float  # brightness of the lamp, 1 = nominal

    def truth(self) -> dict[str, Any]:
        """Return the plan as JSON values for `Frame.facts["truth"]`."""
        return {
            "kind": self.kind,
            "defect": self.defect,
            "shift_px": list(self.shift_px),
            "angle_deg": self.angle_deg,
            "gain": self.gain,
        }


class SimulatedLine:
    """Plans and draws parts. Every answer is a pure function of the settings and the trigger id; thread-safe."""

    def __init__(self, settings: LineSettings) -> None:
        self.settings = settings
        random = np.random.default_rng(settings.seed)
        self._drift_phases = random.uniform(0, 2 * math.pi, 2)
        self._belt = belt(settings.width_px, settings.height_px, random)
        self._flange = flange(min(settings.width_px, settings.height_px), random)
        self._lamp = _lamp(settings.width_px, settings.height_px)

    def plan(self, trigger_id: int) -> PartPlan:
        """Return what happens at this trigger; independent of the order of calls."""
        settings = self.settings
        random = self._random(trigger_id, PLAN_STREAM)
        shift_x, shift_y = random.uniform(-settings.shift_px, settings.shift_px, 2)
        angle_deg = random.uniform(-settings.angle_deg, settings.angle_deg)
        defective = random.random() < settings.defect_share
        defect = DEFECTS[int(random.integers(len(DEFECTS)))]
        kind = self._special_kind(trigger_id) or ("defective" if defective else "good")
        if kind == "half_out":
            shift_x += math.copysign(settings.width_px / 2, shift_x)
        return PartPlan(
            trigger_id=trigger_id,
            part_id=f"P{trigger_id:06d}",
            kind=kind,
            defect=defect if kind == "defective" else None,
            shift_px=(float(shift_x), float(shift_y)),
            angle_deg=float(angle_deg),
            gain=self._gain(trigger_id),
        )

    def image_from_part(self, plan: PartPlan) -> NDArray[np.float64]:
        """Return (3, 3): part px (origin at the part's centre, x right, y down) -> image px (centres at integers)."""
        angle_rad = math.radians(plan.angle_deg)
        cosine, sine = math.cos(angle_rad), math.sin(angle_rad)
        centre_x = (self.settings.width_px - 1) / 2 + plan.shift_px[0]
        centre_y = (self.settings.height_px - 1) / 2 + plan.shift_px[1]
        return np.array([[cosine, -sine, centre_x], [sine, cosine, centre_y], [0.0, 0.0, 1.0]])

    def render(self, plan: PartPlan) -> tuple[Pixels, NDArray[np.bool_]]:
        """Return the frame's pixels and the (H, W) mask of its defect, all False where there is none."""
        surface = self._plate if plan.kind == "wrong_part" else self._flange
        pose = self.image_from_part(plan)
        size = (self.settings.width_px, self.settings.height_px)
        layers = _warp(surface.layers, surface.canvas_from_part @ np.linalg.inv(pose), size)  # (H, W, 4)
        mask = np.zeros(layers.shape[:2], np.bool_)
        if plan.defect is not None:
            random = self._random(plan.trigger_id, DEFECT_STREAM)
            mask = paint_defect(plan.defect, layers, pose, surface.radius_px, random)
        light = plan.gain * LIGHT_OF_KIND.get(plan.kind, 1.0)
        scene = light * self._lamp * self._scene(plan, surface, layers, pose)
        if self.settings.colour:
            scene = _tinted(scene, layers[:, :, 3])
        if plan.kind == "blurred":
            scene = np.asarray(cv2.GaussianBlur(scene, (0, 0), BLUR_SHARE * min(size)), np.float32)
        return self._exposed(scene, plan.trigger_id), mask

    def _scene(self, plan: PartPlan, surface: Surface, layers: Field, pose: NDArray[np.float64]) -> Field:
        """Return (H, W) brightness 0..1 in even light: the part with this one's tool marks, on the belt."""
        random = self._random(plan.trigger_id, SURFACE_STREAM)
        size = (self.settings.width_px, self.settings.height_px)
        canvas_from_image = surface.canvas_from_part @ np.linalg.inv(pose)
        marks = _warp(surface.texture, _own_tool_marks(surface, random) @ canvas_from_image, size, outside=1.0)
        face = layers[:, :, 0] * marks
        face *= np.float32(random.normal(1, 0.012)) * (1 + _highlights(layers, surface, pose))
        _add_specks(face, surface.radius_px, pose, random)
        shrink = np.array([[1 / 8, 0, -7 / 16], [0, 1 / 8, -7 / 16], [0, 0, 1]])  # canvas px -> shadow px
        shade = _warp(surface.shadow, shrink @ canvas_from_image, size, outside=1.0)
        offset_px = int(random.integers(self._belt.shape[1]))
        ground = np.take(self._belt, np.arange(offset_px, offset_px + size[0]), axis=1, mode="wrap") * shade
        return ground + layers[:, :, 3] * (face - ground)

    def _exposed(self, scene: Field, trigger_id: int) -> NDArray[np.uint8]:
        """Return what the sensor makes of scene (brightness, full scale 1): black level, photon and read noise."""
        signal = np.maximum(scene, 0) * np.float32(255)
        variance = signal * np.float32(255 / FULL_WELL_ELECTRONS)
        variance += np.float32(READ_NOISE_COUNTS**2)
        noise = self._random(trigger_id, NOISE_STREAM).standard_normal(scene.shape, np.float32)
        noise *= np.sqrt(variance)
        signal += noise * np.float32(self.settings.noise)
        signal += np.float32(BLACK_COUNTS + 0.5)
        return np.clip(signal, 0, 255).astype(np.uint8)

    @cached_property
    def _plate(self) -> Surface:
        """Another product, drawn when it first comes along: most lines never see it."""
        random = np.random.default_rng(self.settings.seed)
        return plate(min(self.settings.width_px, self.settings.height_px), random)

    def _special_kind(self, trigger_id: int) -> str | None:
        for kind in SPECIAL:
            if trigger_id in getattr(self.settings, kind):
                return kind
        return None

    def _gain(self, trigger_id: int) -> float:
        """Drift as two slow waves: bounded, and computable for any trigger without the ones before it."""
        waves = 0.75 * math.sin(2 * math.pi * trigger_id / 211 + self._drift_phases[0])
        waves += 0.25 * math.sin(2 * math.pi * trigger_id / 37 + self._drift_phases[1])
        return 1.0 + self.settings.light_drift * waves

    def _random(self, trigger_id: int, stream: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, self.settings.lot, trigger_id, stream))


def _warp(canvas: Field, canvas_from_image: NDArray[np.float64], size: tuple[int, int], outside: float = 0.0) -> Field:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(canvas, canvas_from_image[:2], size, flags=flags, borderValue=(outside,) * 4)
    return np.asarray(warped, np.float32)


def _own_tool_marks(surface: Surface, random: np.random.Generator) -> NDArray[np.float64]:
    """Return (3, 3) texture from canvas: no two parts meet the tool at the same angle and radius."""
    centre = float(surface.canvas_from_part[0, 2])
    turn = random.uniform(0, 2 * math.pi) if surface.glint else 0.0
    scale = random.uniform(0.9, 1.0)
    cosine, sine = scale * math.cos(turn), scale * math.sin(turn)
    about = np.array([[1, 0, centre], [0, 1, centre], [0, 0, 1.0]])
    turned = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return np.asarray(about @ turned @ np.linalg.inv(about))


def _highlights(layers: Field, surface: Surface, pose: NDArray[np.float64]) -> Field:
    """Return (H, W) relative brightness added by a lamp that is a little stronger from the upper left."""
    to_lamp = np.array(LAMP_TILT) @ pose[:2, :2]  # image -> part coordinates
    added = layers[:, :, 1] * np.float32(-to_lamp[0]) + layers[:, :, 2] * np.float32(-to_lamp[1])
    if surface.glint:
        height, width = added.shape
        columns, rows = (_coarse_centres(length) for length in (width, height))  # it is smooth: every 8th px will do
        x, y = np.meshgrid(columns - pose[0, 2], rows - pose[1, 2])
        towards = (0.64 * x + 0.77 * y) ** 2 / (x**2 + y**2 + 1)  # grooves glint along the lamp's direction
        glint = surface.glint * (towards**2 - 0.375)  # 3/8 is the mean over a circle
        added += cv2.resize(glint.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return added


def _coarse_centres(length_px: int) -> NDArray[np.float64]:
    """Return where the centres of a row of about length_px / 8 pixels fall in a row of length_px."""
    count = math.ceil(length_px / 8)
    return (np.arange(count) + 0.5) * length_px / count - 0.5


def _add_specks(face: Field, radius: float, pose: NDArray[np.float64], random: np.random.Generator) -> None:
    """Paint a few specks of dust, as on every good part: under 2 px, under 15 % of the brightness."""
    for _ in range(int(random.poisson(7))):
        distance, turn = radius * math.sqrt(random.uniform(0.1, 1)), random.uniform(0, 2 * math.pi)
        strength, size_px = random.uniform(-0.15, 0.12), random.uniform(0.6, 1.1)
        x, y, _ = pose @ (distance * math.cos(turn), distance * math.sin(turn), 1.0)
        left, top = max(0, round(x) - 4), max(0, round(y) - 4)
        patch = face[top : max(0, round(y) + 5), left : max(0, round(x) + 5)]
        rows = np.arange(top, top + patch.shape[0])[:, None] - y
        columns = np.arange(left, left + patch.shape[1])[None, :] - x
        patch *= 1 + strength * np.exp(-(rows**2 + columns**2) / (2 * size_px**2))


def _lamp(width_px: int, height_px: int) -> Field:
    """Return (H, W) illumination: falls off towards the corners, and is not quite centred."""
    x, y = np.meshgrid(np.linspace(-1, 1, width_px), np.linspace(-1, 1, height_px))
    return np.asarray(1.04 - 0.11 * ((x + 0.12) ** 2 + (y + 0.18) ** 2), np.float32)


def _tinted(scene: Field, coverage: Field) -> Field:
    """Return (H, W, 3) RGB: steel is a little blue, the belt a little green."""
    belt_tint, steel_tint = np.array([0.88, 1.04, 0.95], np.float32), np.array([0.97, 1.0, 1.04], np.float32)
    return scene[:, :, None] * (belt_tint + coverage[:, :, None] * (steel_tint - belt_tint))
