"""Where a part lies in the frame, relative to the reference view of its product."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.alignment import (
    Agreement,
    Contour,
    Freedom,
    Indices,
    Poses,
    agreement,
    contour,
    distinct,
    edge_points,
    hull,
    refine,
    texture,
)
from calibration.errors import CalibrationError, NotRegistered
from calibration.frame import Pixels, reflectance
from calibration.pyramid import Complexes, Floats, Level, Slopes, fine_level, level_place, reduced, slopes
from calibration.search import Templates, search, templates

FINE_SIDE_PX = 512  # the last refinement runs on a picture of at most this many pixels per side
COARSE_SIDE_PX = 80  # the search runs on about this many, more where the part is small in the frame
COARSE_PART_PX = 36  # a part smaller than this shows no shape
COARSE_WIDTH_PX = 6  # nor does one narrower than this
FINE_POINTS, MID_POINTS, TEXTURE_POINTS = 1000, 320, 1500
SEARCH_CANDIDATES, POLAR_CANDIDATES, FINE_CANDIDATES = 6, 30, 2
MID_ITERATIONS, TURN_ITERATIONS, FINE_ITERATIONS, LAST_ITERATIONS = 5, 3, 2, 5
LEAST_TURN, LOOKS_ALIKE = 0.4, 0.6  # turned by this (a chord), a part this similar to itself is round
SAME_TURN = 0.03  # rad, as a chord: candidates nearer than this become one by refinement
SEARCH_SHARE = 0.4  # of the turns; the candidates were among the best 0.2 at half the resolution
LEAST_SCORE = 0.6  # share of the best score below which a turn is no candidate
MID_SETTLED_PX = 0.03  # the fine level goes on from there
CLOSE_RANK = 0.05  # candidates this much worse than the best are not refined further
MIN_CONTOUR_POINTS = 40
BLANK_SHARE = 0.1  # a frame whose edges are weaker than this share of the reference's shows no part


@dataclass(frozen=True, slots=True)
class RegistrationSettings:
    """How far parts may stray from the reference pose at this station."""

    max_angle_deg: float = 180.0  # 180 = any angle
    max_shift_px: float | None = None  # None = the whole field of view
    max_scale_change: float = 0.0  # 0 = scale fixed; 0.1 = 0.9 .. 1.1
    min_in_view: float = 0.9  # share of the reference's contour points that must lie inside the frame


@dataclass(frozen=True, slots=True)
class Registration:
    """Where one part was found. Pixel centres lie at whole numbers."""

    reference_from_image: NDArray[np.float64]  # (3, 3) image px -> reference px
    residual_px: float  # median displacement between the part's contour and the reference's, image px
    similarity: float  # 0..1, share of the contour found with the right direction
    centre_px: tuple[float, float] = (0.0, 0.0)  # (x, y) of the part's centre in the reference

    @property
    def image_from_reference(self) -> NDArray[np.float64]:
        """(3, 3) reference px -> image px."""
        return np.asarray(np.linalg.inv(self.reference_from_image))

    @property
    def dx_px(self) -> float:
        """How far the part's centre lies to the right of where the reference has it."""
        x, y = self.centre_px
        a, b, shift = self.image_from_reference[0]
        return float(a * x + b * y + shift - x)

    @property
    def dy_px(self) -> float:
        """How far the part's centre lies below where the reference has it."""
        x, y = self.centre_px
        a, b, shift = self.image_from_reference[1]
        return float(a * x + b * y + shift - y)

    @property
    def angle_deg(self) -> float:
        """Turn of the part, -180..180, clockwise on the screen."""
        matrix = self.image_from_reference
        return float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))

    @property
    def scale(self) -> float:
        """Size of the part in the image, 1 = as in the reference."""
        matrix = self.image_from_reference
        return float(np.hypot(matrix[0, 0], matrix[1, 0]))


def unregistered() -> Registration:
    """Return the registration of a product that is not registered: the image is the reference view."""
    return Registration(np.eye(3), residual_px=0.0, similarity=1.0)


@dataclass(frozen=True, slots=True)
class _Stage:
    """What one level of the pyramid knows of the reference."""

    factor: int  # image px per level px
    shape: Contour


class Reference:
    """What a good part looks like, and where: made once per product, used for every frame.

    image: (H, W) mean of aligned good parts. weight: (H, W) how consistent the edge direction is there over the good
    parts, 255 = always the same. Both are read-only copies. Coarse search by gradient direction over all angles and
    places, then profile-based refinement, see `calibration.alignment`.

    Raises CalibrationError if the image shows hardly any contour.
    """

    def __init__(
        self,
        image: NDArray[np.uint8],
        weight: NDArray[np.uint8],
        settings: RegistrationSettings,
        min_similarity: float,
        max_residual_px: float,
    ) -> None:
        if image.ndim != 2 or image.shape != weight.shape:
            raise CalibrationError(
                f"reference of shape {image.shape} with weights {weight.shape}: need two equal (H, W)"
            )
        self.image = _frozen(image)
        self.weight = _frozen(weight)
        self.settings = settings
        self.min_similarity = float(min_similarity)
        self.max_residual_px = float(max_residual_px)
        self._prepare()

    def _prepare(self) -> None:
        self._freedom = Freedom(angle=self.settings.max_angle_deg > 0, scale=self.settings.max_scale_change > 0)
        factor = -(-max(self.image.shape) // FINE_SIDE_PX)
        fine, weight = fine_level(self.image, 8, factor), reduced(reflectance(self.weight, 8), factor)
        centre = _centre(*edge_points(fine, weight, FINE_POINTS))
        self._home = (centre + (0.5 + 0.5j)) * factor - (0.5 + 0.5j)
        self._fine = _Stage(factor, contour(fine, weight, centre, FINE_POINTS))
        halving, coarsening = _level_factors(fine, self._fine.shape)
        mid, coarse = reduced(fine, halving), reduced(fine, coarsening)
        middle = level_place(centre, halving)
        self._mid = _Stage(factor * halving, contour(mid, reduced(weight, halving), middle, MID_POINTS))
        self._coarse_factor = factor * coarsening
        offset, radius_px = self._fine.shape.offset / coarsening, self._fine.shape.radius_px / coarsening
        self._coarse_shape = replace(self._fine.shape, offset=offset, radius_px=radius_px)
        self._edge_strength = slopes(coarse).strong
        self._templates: dict[tuple[int, int], Templates] = {}
        self._axis = self._find_axis(coarse, mid)
        inside = hull(mid, self._mid.shape, middle)
        self._texture = texture(mid, middle, middle + (self._axis or 0), inside, TEXTURE_POINTS)

    def _find_axis(self, coarse: Level, mid: Level) -> complex | None:
        """Return what the part can be turned about and look alike, in mid px from its centre; None if nothing.

        The reference is looked for in its own picture, turned: a ring, a gear, a nut is found, and the fixed point of
        that motion is the axis.
        """
        poses = self._turned_candidates(slopes(coarse))
        if poses.turn.size == 0:
            return None
        poses, _ = refine(mid, poses, self._mid.shape, MID_ITERATIONS, self._freedom)
        similarity = agreement(mid, poses, self._mid.shape).similarity
        best = int(np.argmax(similarity))
        turn = complex(poses.turn[best])
        if similarity[best] < LOOKS_ALIKE or abs(1 - turn) < LEAST_TURN / 2:
            return None
        return (complex(poses.position[best]) - level_place(self._home, self._mid.factor)) / (1 - turn)

    @property
    def centre_px(self) -> tuple[float, float]:
        """(x, y) of the part's centre in the reference."""
        return self._home.real, self._home.imag

    @property
    def level_factor(self) -> int:
        """Image px per px of the picture on which the last refinement runs."""
        return self._fine.factor

    @property
    def contour_px(self) -> NDArray[np.float64]:
        """(P, 2) x, y of the contour points in the reference."""
        place = self._home + self._fine.shape.offset.astype(complex) * self._fine.factor
        return np.stack([place.real, place.imag], axis=1)

    @property
    def firmness(self) -> tuple[float, float]:
        """How firmly the contour holds place and angle, see `Contour.firmness`."""
        return self._fine.shape.firmness()

    @property
    def radius_px(self) -> float:
        """Root mean square distance of the contour points from the part's centre."""
        return self._fine.shape.rms_radius_px * self._fine.factor

    def _templates_for(self, coarse: Slopes) -> Templates:
        """Return the search templates for frames of this size; the station's frames all have one size."""
        height, width = (cv2.getOptimalDFTSize(int(32 * np.ceil(1.15 * side / 32))) for side in coarse.x.shape)
        known = self._templates.get((height, width))
        if known is None:
            known = templates(self._coarse_shape, self._turns(), (height, width))
            self._templates = {**dict(list(self._templates.items())[-7:]), (height, width): known}
        return known

    def _turns(self) -> Complexes:
        """Return the angles and scales of the search: neighbours differ by about 2 coarse px at the contour."""
        if self.settings.max_angle_deg <= 0:
            return np.asarray(self._scales(), np.complex128)
        step = float(np.clip(2.0 / self._coarse_shape.rms_radius_px, np.radians(1.5), np.radians(8)))
        largest = np.radians(self.settings.max_angle_deg)
        count = int(np.ceil(2 * largest / step))
        around = largest >= np.pi  # the last angle would be the first again
        angle = np.linspace(-largest, largest, count if around else count + 1, endpoint=not around)
        return np.asarray((self._scales()[:, None] * np.exp(1j * angle)[None, :]).ravel())

    def _scales(self) -> Floats:
        growth = np.log1p(self.settings.max_scale_change)
        return np.asarray(np.exp(np.linspace(-growth, growth, 2 * int(np.ceil(growth / 0.06)) + 1)))

    def register(self, pixels: Pixels, bit_depth: int = 8) -> Registration:
        """Return where the part lies in the frame.

        pixels: gray or RGB, of any size; the part must be as large as in the reference unless the scale is free.

        Raises NotRegistered with cause blank, wrong_part, out_of_view or poor_fit.
        """
        if min(pixels.shape[:2]) < 4 * self._coarse_factor:
            raise NotRegistered(
                f"frame of {pixels.shape[1]} x {pixels.shape[0]} px cannot hold the part: check the camera's region",
                cause="out_of_view",
            )
        fine = fine_level(pixels, bit_depth, self._fine.factor)
        mid = reduced(fine, self._mid.factor // self._fine.factor)
        coarse = slopes(self._coarse_level(fine, mid))
        self._refuse_blank(coarse)
        poses, rank = self._with_other_angles(mid, self._middling(mid, self._candidates(coarse), MID_ITERATIONS))
        close = np.where(rank > rank.max() - CLOSE_RANK, rank, -np.inf)
        poses = poses[distinct(poses, close, FINE_CANDIDATES)].at_scale(self._mid.factor / self._fine.factor)
        poses, _ = refine(fine, poses, self._fine.shape, FINE_ITERATIONS, self._freedom)
        if poses.turn.size > 1:
            rank = self._rank(mid, poses.at_scale(self._fine.factor / self._mid.factor), self._fit(fine, poses))
            poses = poses[distinct(poses, rank, 1)]
        pose, shift = refine(fine, poses, self._fine.shape, LAST_ITERATIONS, self._freedom)
        fit = self._fit(fine, pose)
        found = Registration(
            self._matrix(complex(pose.turn[0]), complex(pose.position[0])),
            _median_size(shift[0]) * self._fine.factor,
            float(np.clip(fit.similarity[0], 0, 1)),
            self.centre_px,
        )
        self._judge(found, float(fit.in_view[0]))
        return found

    def _coarse_level(self, fine: Level, mid: Level) -> Level:
        """Return the level of the search, from the middle one where that divides it: a quarter of the pixels."""
        if self._coarse_factor % self._mid.factor == 0:
            return reduced(mid, self._coarse_factor // self._mid.factor)
        return reduced(fine, self._coarse_factor // self._fine.factor)

    def _middling(self, mid: Level, poses: Poses, iterations: int) -> Poses:
        """Return the poses refined on the middle level."""
        return refine(mid, poses, self._mid.shape, iterations, self._freedom, settled_px=MID_SETTLED_PX)[0]

    def _fit(self, fine: Level, poses: Poses) -> Agreement:
        return agreement(fine, poses, self._fine.shape)

    def _rank(self, mid: Level, poses: Poses, fit: Agreement) -> Floats:
        return np.asarray(fit.similarity * np.minimum(1, fit.in_view) + self._texture.correlation(mid, poses))

    def _mid_rank(self, mid: Level, poses: Poses) -> Floats:
        return self._rank(mid, poses, agreement(mid, poses, self._mid.shape))

    def _refuse_blank(self, coarse: Slopes) -> None:
        strength = coarse.strong
        if not strength >= BLANK_SHARE * self._edge_strength:
            raise NotRegistered(
                f"the field is blank: edges {strength:.2f} gray levels / px strong, need "
                f"{BLANK_SHARE * self._edge_strength:.2f}: check that a part is there and the light is on",
                cause="blank",
            )

    def _candidates(self, coarse: Slopes) -> Poses:
        """Return the best poses of the coarse search, in mid px."""
        score, poses = self._searched(coarse, SEARCH_SHARE)
        score[score < LEAST_SCORE * score.max()] = -np.inf
        return self._best(score, poses)

    def _turned_candidates(self, coarse: Slopes) -> Poses:
        """Return the best poses turned by more than LEAST_TURN, in mid px."""
        score, poses = self._searched(coarse, 1.0)
        return self._best(np.where(np.abs(poses.turn - 1) >= LEAST_TURN, score, -np.inf), poses)

    def _searched(self, coarse: Slopes, share: float) -> tuple[Floats, Poses]:
        home = level_place(self._home, self._coarse_factor)
        allowed = self.settings.max_shift_px
        reach = np.inf if allowed is None else allowed / self._coarse_factor + 1
        return search(coarse, self._templates_for(coarse), reach, home, share=share)

    def _best(self, score: Floats, poses: Poses) -> Poses:
        return poses[distinct(poses, score, SEARCH_CANDIDATES)].at_scale(self._coarse_factor / self._mid.factor)

    def _with_other_angles(self, mid: Level, poses: Poses) -> tuple[Poses, Floats]:
        """Return the poses, and the likely turns of the best of them about the part's axis, and how good each is.

        The coarse search cannot tell apart the angles of a round part, or of a gear but for its keyway: a polar
        correlation of the gray values about the axis can.
        """
        rank = self._mid_rank(mid, poses)
        if self._axis is None:
            return poses, rank
        best = int(np.argmax(rank))
        axis = complex(poses.position[best] + poses.turn[best] * self._axis)
        angle = self._texture.angles(mid, axis, POLAR_CANDIDATES, np.radians(self.settings.max_angle_deg))
        turn = np.abs(poses.turn[best]) * np.exp(1j * angle)
        turn = turn[[np.abs(each - poses.turn).min() > SAME_TURN for each in turn]]
        if turn.size == 0:
            return poses, rank
        turned = self._middling(mid, Poses(turn, axis - turn * self._axis), TURN_ITERATIONS)
        return Poses.joined(poses, turned), np.append(rank, self._mid_rank(mid, turned))

    def _matrix(self, turn: complex, position: complex) -> NDArray[np.float64]:
        """Return reference_from_image in image px for a pose in fine px."""
        factor = self._fine.factor
        place = (position + (0.5 + 0.5j)) * factor - (0.5 + 0.5j)
        back = 1 / turn
        shift = self._home - back * place
        return np.array([[back.real, -back.imag, shift.real], [back.imag, back.real, shift.imag], [0, 0, 1]])

    def _judge(self, found: Registration, in_view: float) -> None:
        similarity, wanted = found.similarity, self.min_similarity
        if in_view < self.settings.min_in_view and similarity >= 0.7 * wanted:
            raise NotRegistered(
                f"part out of view: {in_view:.0%} of it lies in the frame, need {self.settings.min_in_view:.0%}: "
                "check the trigger delay and the part's position",
                cause="out_of_view",
            )
        if similarity < wanted or in_view < self.settings.min_in_view:
            raise NotRegistered(
                f"another product, or covered: contour found to {similarity:.0%}, need {wanted:.0%}: check what is fed",
                cause="wrong_part",
            )
        self._refuse_beyond_limits(found)
        if found.residual_px > self.max_residual_px:
            raise NotRegistered(
                f"contour lies {found.residual_px:.2f} px beside the reference's, need {self.max_residual_px:.2f} px: "
                "this is another product, or focus or camera distance has changed",
                cause="poor_fit",
            )

    def _refuse_beyond_limits(self, found: Registration) -> None:
        """Refuse what refinement has carried out of the station's limits (2 degrees, 5 % of room for its noise)."""
        allowed = self.settings
        shift = float(np.hypot(found.dx_px, found.dy_px))
        too_far = allowed.max_shift_px is not None and shift > 1.05 * allowed.max_shift_px + 2
        too_large = abs(np.log(found.scale)) > np.log1p(allowed.max_scale_change) + 0.02
        if too_far or too_large or abs(found.angle_deg) > allowed.max_angle_deg + 2:
            raise NotRegistered(
                f"part lies {shift:.0f} px off, turned {found.angle_deg:.1f} deg, {found.scale:.3f} times as large, "
                "more than the station's registration limits allow: check the feeding, or widen the limits",
                cause="poor_fit",
            )


def _frozen(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    copy = np.array(picture, np.uint8)
    copy.setflags(write=False)
    return copy


def _median_size(shift: Floats) -> float:
    """Return the median length of the displacements that were seen (not NaN), infinite if none was."""
    seen = np.abs(shift[np.isfinite(shift)])
    return float(np.median(seen)) if seen.size else float("inf")


def _centre(rows: Indices, columns: Indices) -> complex:
    """Return the middle of the contour, strays left out."""
    if rows.size < MIN_CONTOUR_POINTS:
        raise CalibrationError(
            f"{rows.size} contour points in the reference, need {MIN_CONTOUR_POINTS}: "
            "light the part so that its outline shows, or turn registration off"
        )
    return complex(*(float(np.quantile(each, [0.02, 0.98]).mean()) for each in (columns, rows)))


def _level_factors(fine: Level, shape: Contour) -> tuple[int, int]:
    """Return how much smaller than the fine level the middle and the coarse one are."""
    radius = float(np.quantile(np.abs(shape.offset), 0.98))
    halving = 2 if min(fine.shape) >= 2 * COARSE_SIDE_PX and radius >= COARSE_PART_PX else 1
    smallest = min(2 * radius / COARSE_PART_PX, shape.width_px / COARSE_WIDTH_PX)
    return halving, max(1, int(min(max(fine.shape) / COARSE_SIDE_PX, smallest)))
