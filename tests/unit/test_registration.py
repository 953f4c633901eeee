"""Registration finds the part, says where it lies, and refuses what is not the part.

The part: a machined flange (bore, six bolt holes, one keyway) on a dark textured belt, drawn at 400 px. Its outline is
drawn four times finer and averaged down, so that its true place is known to about 0.02 px.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.errors import CalibrationError, NotRegistered
from calibration.reference import LearnedReference, learn_reference
from calibration.registration import Reference, Registration, RegistrationSettings, unregistered

SIDE = 400
MIDDLE = (SIDE - 1) / 2
FINER = 4
CORNERS = np.array([[-140, -140, 1], [140, -140, 1], [140, 140, 1], [-140, 140, 1]], float).T  # part px
Gray = NDArray[np.uint8]


@dataclass(frozen=True)
class Pose:
    dx: float = 0.0
    dy: float = 0.0
    angle_deg: float = 0.0
    scale: float = 1.0

    @property
    def image_from_part(self) -> NDArray[np.float64]:
        angle = np.radians(self.angle_deg)
        c, s = self.scale * np.cos(angle), self.scale * np.sin(angle)
        return np.array([[c, -s, MIDDLE + self.dx], [s, c, MIDDLE + self.dy], [0, 0, 1]])


def ring(radius: float, x: float = 0, y: float = 0) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def bolt_holes(count: int = 6) -> list[NDArray[np.float64]]:
    return [ring(11, 108 * np.cos(a), 108 * np.sin(a)) for a in np.arange(count) * 2 * np.pi / count]


KEYWAY = np.array([[60, -11], [88, -11], [88, 11], [60, 11]], float)
FLANGE = [ring(140)], [ring(68), KEYWAY, *bolt_holes()]
PLAIN_RING = [ring(140)], [ring(80)]
DISC = [ring(150)], []
HEX_NUT = [130 * np.stack([np.cos(np.arange(6) * np.pi / 3), np.sin(np.arange(6) * np.pi / 3)], axis=1)], [ring(60)]
BRACKET = (
    [np.array([[-130, -110], [130, -110], [130, -50], [-50, -50], [-50, 120], [-130, 120]], float)],
    [ring(20, -90, 80)],
)


def belt(generator: np.random.Generator, shape: tuple[int, int] = (SIDE, SIDE)) -> NDArray[np.float32]:
    fine, broad = (generator.normal(0, 1, shape).astype(np.float32) for _ in range(2))
    fine, broad = cv2.GaussianBlur(fine, (0, 0), 1.5), cv2.GaussianBlur(broad, (0, 0), 12)
    return np.asarray(45 + 6 * fine / fine.std() + 8 * broad / broad.std(), np.float32)


def cover(part, pose: Pose, shape: tuple[int, int] = (SIDE, SIDE)) -> NDArray[np.float32]:
    """Share of each pixel that the part covers."""
    finer = np.zeros((shape[0] * FINER, shape[1] * FINER), np.uint8)
    for value, outlines in zip((255, 0), part, strict=True):
        for outline in outlines:
            points = outline @ pose.image_from_part[:2, :2].T + pose.image_from_part[:2, 2]
            points = np.round(((points + 0.5) * FINER - 0.5) * 16).astype(np.int32)
            cv2.fillPoly(finer, [points], value, shift=4)
    return cv2.resize(finer, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def shot(part, pose: Pose, seed: int = 0, light: float = 1.0, ground: NDArray[np.float32] | None = None) -> Gray:
    generator = np.random.default_rng(seed)
    ground = belt(generator) if ground is None else ground
    share = cover(part, pose, ground.shape)
    frame = (ground * (1 - share) + 165 * share) * light + generator.normal(0, 4, ground.shape)
    return np.clip(frame, 0, 255).round().astype(np.uint8)


def poses(count: int, seed: int, shift: float = 16, angle: float = 180) -> list[Pose]:
    generator = np.random.default_rng(seed)
    return [Pose(*generator.uniform(-shift, shift, 2), generator.uniform(-angle, angle)) for _ in range(count)]


def learn(part, count: int = 4, shift: float = 16, angle: float = 180, **settings) -> tuple[LearnedReference, NDArray]:
    """The learned reference, and reference px from part px."""
    places = poses(count, 1, shift, angle)
    frames = [shot(part, pose, 100 + number) for number, pose in enumerate(places)]
    learned = learn_reference(frames, 8, RegistrationSettings(**settings))
    drawings = [
        each.reference_from_image @ pose.image_from_part
        for each, pose in zip(learned.registrations, places, strict=True)
        if isinstance(each, Registration)
    ]
    return learned, np.median(drawings, axis=0)


@pytest.fixture(scope="module")
def flange() -> tuple[LearnedReference, NDArray]:
    return learn(FLANGE)


def corner_error(found: Registration, pose: Pose, reference_from_part: NDArray) -> float:
    """Largest distance in px between the part's corners and where the registration puts them."""
    seen = found.reference_from_image @ pose.image_from_part @ CORNERS
    return float(np.linalg.norm((seen - reference_from_part @ CORNERS)[:2], axis=0).max())


def refusal(reference: Reference, frame) -> NotRegistered:
    with pytest.raises(NotRegistered) as caught:
        reference.register(frame)
    return caught.value


def test_a_part_is_found_at_any_angle_to_a_third_of_a_pixel(flange):
    learned, drawing = flange
    places = poses(25, 7)
    errors = [
        corner_error(learned.reference.register(shot(FLANGE, p, 200 + n)), p, drawing) for n, p in enumerate(places)
    ]
    assert np.median(errors) < 0.15
    assert max(errors) < 0.3


def test_the_place_is_told_in_image_pixels_and_degrees(flange):
    learned, _ = flange
    first = learned.reference.register(shot(FLANGE, Pose(), 11))
    second = learned.reference.register(shot(FLANGE, Pose(9.0, -4.0, 30.0), 12))
    turned = (second.angle_deg - first.angle_deg + 180) % 360 - 180
    assert turned == pytest.approx(30.0, abs=0.1)
    centre = np.array([*learned.reference.centre_px, 1.0])
    moved = second.image_from_reference @ centre - centre
    assert (second.dx_px, second.dy_px) == pytest.approx(tuple(moved[:2]))
    assert second.scale == pytest.approx(1.0)


def test_the_residual_of_a_good_part_is_a_fraction_of_a_pixel(flange):
    found = flange[0].reference.register(shot(FLANGE, Pose(3.3, 1.7, 77.0), 13))
    assert 0 < found.residual_px < 0.5
    assert found.similarity > 0.9


@pytest.mark.parametrize("light", [0.7, 1.3])
def test_light_that_drifts_by_a_third_changes_nothing(flange, light):
    learned, drawing = flange
    pose = Pose(5.5, -7.25, -133.0)
    found = learned.reference.register(shot(FLANGE, pose, 14, light))
    assert corner_error(found, pose, drawing) < 0.3


def test_a_defect_is_left_to_the_detector(flange):
    learned, drawing = flange
    pose = Pose(-6.0, 8.5, 48.0)
    without_hole = FLANGE[0], FLANGE[1][:-1]
    frame = shot(without_hole, pose, 15)
    cv2.line(frame, (120, 150), (290, 220), 230, 3)
    cv2.circle(frame, (250, 270), 16, 60, -1)
    assert corner_error(learned.reference.register(frame), pose, drawing) < 0.3


def test_the_keyway_decides_between_angles_that_the_bolt_holes_leave_open(flange):
    learned, drawing = flange
    places = [Pose(2.0, -3.0, step * 60.0) for step in range(6)]
    for number, pose in enumerate(places):
        assert corner_error(learned.reference.register(shot(FLANGE, pose, 300 + number)), pose, drawing) < 0.3


@pytest.mark.parametrize("kind", ["uint16", "float32", "rgb"])
def test_every_kind_of_pixels_gives_the_same_place(flange, kind):
    reference = flange[0].reference
    frame = shot(FLANGE, Pose(4.0, 4.0, 20.0), 16)
    other, bit_depth = {
        "uint16": (frame.astype(np.uint16) * 16, 12),
        "float32": ((frame / 255).astype(np.float32), 8),
        "rgb": (np.repeat(frame[:, :, None], 3, axis=2), 8),
    }[kind]
    matrix = reference.register(other, bit_depth).reference_from_image
    np.testing.assert_allclose(matrix, reference.register(frame).reference_from_image, atol=0.05)


def test_a_larger_frame_than_the_reference_is_searched_as_a_whole(flange):
    learned, drawing = flange
    pose = Pose(230.0, 90.0, 160.0)
    ground = belt(np.random.default_rng(17), (560, 720))
    found = learned.reference.register(shot(FLANGE, pose, 17, ground=ground))
    assert corner_error(found, pose, drawing) < 0.3


def test_the_same_frame_gives_the_same_answer_every_time(flange):
    frame = shot(FLANGE, Pose(1.0, 2.0, 3.0), 18)
    first, again = (flange[0].reference.register(frame).reference_from_image for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_reference_rebuilt_from_what_is_stored_answers_the_same(flange):
    old = flange[0].reference
    new = Reference(old.image, old.weight, old.settings, old.min_similarity, old.max_residual_px)
    frame = shot(FLANGE, Pose(-3.0, 2.5, 200.0), 19)
    np.testing.assert_array_equal(new.register(frame).reference_from_image, old.register(frame).reference_from_image)
    assert not new.image.flags.writeable


@pytest.mark.parametrize(
    ("name", "part"), [("disc", DISC), ("ring", PLAIN_RING), ("nut", HEX_NUT), ("bracket", BRACKET), ("belt", ([], []))]
)
def test_another_product_is_refused_as_such(flange, name, part):
    caught = refusal(flange[0].reference, shot(part, Pose(3.0, 5.0, 10.0), 20))
    assert caught.cause in ("wrong_part", "blank") if name == "belt" else caught.cause == "wrong_part"


def test_textures_are_never_taken_for_the_part(flange):
    generator = np.random.default_rng(21)
    for scale in (0.7, 2, 5, 12, 30):
        pattern = cv2.GaussianBlur(generator.normal(0, 1, (SIDE, SIDE)), (0, 0), scale)
        frame = np.clip(128 + 60 * pattern / pattern.std(), 0, 255).astype(np.uint8)
        assert refusal(flange[0].reference, frame).cause in ("wrong_part", "blank", "out_of_view")


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_field_is_blank(flange, level):
    noisy = np.random.default_rng(22).normal(level, 3, (SIDE, SIDE))
    assert refusal(flange[0].reference, np.clip(noisy, 0, 255).astype(np.uint8)).cause == "blank"
    assert refusal(flange[0].reference, np.full((SIDE, SIDE), level, np.uint8)).cause == "blank"


def test_pixels_that_are_not_numbers_are_blank(flange):
    assert refusal(flange[0].reference, np.full((SIDE, SIDE), np.nan, np.float32)).cause == "blank"


def test_a_part_half_out_of_view_is_refused(flange):
    caught = refusal(flange[0].reference, shot(FLANGE, Pose(150.0, 20.0, 70.0), 23))
    assert caught.cause == "out_of_view"
    assert "need 90%" in str(caught)


def test_a_refusal_says_what_was_found_and_what_was_wanted(flange):
    reference = flange[0].reference
    message = str(refusal(reference, shot(BRACKET, Pose(), 24)))
    assert f"need {reference.min_similarity:.0%}" in message


def test_limits_of_the_station_are_kept(flange):
    old = flange[0].reference
    angle = old.register(shot(FLANGE, Pose(), 25)).angle_deg
    narrow = replace(old.settings, max_angle_deg=10.0)
    reference = Reference(old.image, old.weight, narrow, old.min_similarity, old.max_residual_px)
    found = reference.register(shot(FLANGE, Pose(angle_deg=6.0 - angle), 26))
    assert found.angle_deg == pytest.approx(6.0, abs=0.2)
    assert refusal(reference, shot(FLANGE, Pose(angle_deg=30.0 - angle), 27)).cause == "wrong_part"


def test_scale_is_found_where_the_station_allows_it(flange):
    old, drawing = flange[0].reference, flange[1]
    free = replace(old.settings, max_scale_change=0.1)
    reference = Reference(old.image, old.weight, free, old.min_similarity, old.max_residual_px)
    for scale in (0.93, 1.07):
        pose = Pose(4.0, -3.0, 65.0, scale)
        found = reference.register(shot(FLANGE, pose, 28))
        assert found.scale == pytest.approx(scale, abs=0.002)
        assert corner_error(found, pose, drawing) < 0.4


def test_registration_is_on_where_parts_move(flange):
    learned, _ = flange
    assert learned.trustworthy, learned.why
    assert all(isinstance(each, Registration) for each in learned.registrations)


def test_learning_twice_gives_the_same_reference():
    frames = [shot(FLANGE, pose, 400 + number) for number, pose in enumerate(poses(3, 2))]
    first, again = (learn_reference(frames, 8, RegistrationSettings(), seed=5).reference for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    assert first.min_similarity == again.min_similarity


def test_the_belt_has_no_say_in_where_the_part_lies(flange):
    learned, drawing = flange
    distance = np.linalg.norm(learned.reference.contour_px - drawing[:2, 2], axis=1)
    assert (distance < 145).mean() > 0.97


def test_a_fixture_that_stands_still_does_not_hold_the_alignment():
    ground = belt(np.random.default_rng(30))
    cv2.rectangle(ground, (8, 8), (SIDE - 9, SIDE - 9), 220, 5)
    for left in range(20, 340, 60):
        cv2.rectangle(ground, (left, 18), (left + 40, 38), 200, -1)
        cv2.rectangle(ground, (left, 360), (left + 40, 380), 200, -1)
    small = [0.5 * outline for outline in HEX_NUT[0]], [np.array([[-40, -30], [10, -30], [10, 20]], float)]
    places = poses(5, 31, shift=50)
    frames = [shot(small, pose, 32 + number, ground=ground) for number, pose in enumerate(places)]
    learned = learn_reference(frames, 8, RegistrationSettings())
    assert learned.trustworthy, learned.why
    drawings = [r.reference_from_image @ p.image_from_part for r, p in zip(learned.registrations, places, strict=True)]
    spread = np.std([(drawing @ CORNERS)[:2] for drawing in drawings], axis=0)
    assert spread.max() < 0.5


def test_parts_that_already_lie_still_are_left_as_they_are():
    frames = [shot(FLANGE, Pose(), 500 + number) for number in range(5)]
    learned = learn_reference(frames, 8, RegistrationSettings())
    assert not learned.trustworthy
    assert "already" in learned.why


def test_a_round_part_is_shifted_but_not_turned():
    learned, drawing = learn(PLAIN_RING)
    assert learned.trustworthy, learned.why
    assert learned.reference.settings.max_angle_deg == 0
    pose = Pose(7.5, -2.25, 100.0)
    found = learned.reference.register(shot(PLAIN_RING, pose, 33))
    assert found.angle_deg == 0
    np.testing.assert_allclose((found.reference_from_image @ pose.image_from_part)[:2, 2], drawing[:2, 2], atol=0.3)


@pytest.mark.parametrize("length", [2, 12])
def test_a_natural_texture_is_not_registered(length):
    generator = np.random.default_rng(34)
    frames = []
    for _ in range(5):
        grain = cv2.GaussianBlur(generator.normal(0, 1, (SIDE, SIDE)), (0, 0), 2, sigmaY=length)
        frames.append(np.clip(128 + 40 * grain / grain.std(), 0, 255).astype(np.uint8))
    learned = learn_reference(frames, 8, RegistrationSettings())
    assert not learned.trustworthy


def test_a_rail_that_leaves_the_field_at_both_ends_is_not_registered():
    frames = []
    for number, pose in enumerate(poses(5, 35, shift=20, angle=3)):
        rail = [np.array([[-400, -60], [400, -60], [400, 60], [-400, 60]], float)], []
        frames.append(shot(rail, pose, 600 + number))
    learned = learn_reference(frames, 8, RegistrationSettings())
    assert not learned.trustworthy


def test_one_good_image_gives_a_reference_that_is_not_trusted_yet():
    learned = learn_reference([shot(FLANGE, Pose(), 36)], 8, RegistrationSettings())
    assert not learned.trustworthy
    assert isinstance(learned.registrations[0], Registration)


def test_no_image_or_no_contour_is_a_calibration_error():
    with pytest.raises(CalibrationError, match="no good images"):
        learn_reference([], 8, RegistrationSettings())
    with pytest.raises(CalibrationError, match="contour points"):
        learn_reference([np.full((SIDE, SIDE), 90, np.uint8)] * 3, 8, RegistrationSettings())


def test_without_registration_the_image_is_the_reference_view():
    none = unregistered()
    np.testing.assert_array_equal(none.reference_from_image, np.eye(3))
    assert (none.residual_px, none.similarity, none.dx_px, none.dy_px, none.angle_deg, none.scale) == (0, 1, 0, 0, 0, 1)
