"""The simulated line tells the truth about what it draws, and its camera behaves like a real one."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest

from agent.cameras.simulated import BUFFERS, SimulatedCamera
from agent.errors import CameraError
from agent.simulation.line import DEFECTS, SPECIAL, LineSettings, PartPlan, SimulatedLine
from agent.simulation.parts import RADIUS_SHARE, hole_centres
from calibration.errors import SettingsError

RADIUS_PX = RADIUS_SHARE * 640
SMALL = {"width_px": 96, "height_px": 96, "shift_px": 4.0}


@pytest.fixture(scope="module")
def line() -> SimulatedLine:
    return SimulatedLine(LineSettings(seed=3))


@pytest.fixture(scope="module")
def quiet_line() -> SimulatedLine:
    return SimulatedLine(LineSettings(seed=3, noise=0.0, light_drift=0.0))


def defective(line: SimulatedLine, trigger_id: int, defect: str) -> PartPlan:
    return replace(line.plan(trigger_id), kind="defective", defect=defect)


def distance_from_centre(line: SimulatedLine, plan: PartPlan) -> np.ndarray:
    centre = line.image_from_part(plan)[:2, 2]
    rows, columns = np.mgrid[: line.settings.height_px, : line.settings.width_px]
    return np.hypot(columns - centre[0], rows - centre[1])


def metal_area(pixels: np.ndarray) -> int:
    return int((pixels > 80).sum())


# --- the plan ------------------------------------------------------------------------------------------------------


def test_a_plan_does_not_depend_on_what_was_asked_before():
    line = SimulatedLine(LineSettings(**SMALL, defect_share=0.5))
    forwards = [line.plan(trigger_id) for trigger_id in range(1, 20)]
    backwards = [SimulatedLine(line.settings).plan(trigger_id) for trigger_id in range(19, 0, -1)]
    assert forwards == backwards[::-1]


def test_poses_stay_within_the_settings_and_use_them():
    line = SimulatedLine(LineSettings(**{**SMALL, "shift_px": 7.0}, angle_deg=15.0))
    plans = [line.plan(trigger_id) for trigger_id in range(1, 400)]
    shifts = np.array([plan.shift_px for plan in plans])
    angles = np.array([plan.angle_deg for plan in plans])
    assert np.abs(shifts).max() <= 7
    assert np.abs(angles).max() <= 15
    np.testing.assert_allclose(shifts.std(axis=0), 7 / math.sqrt(3), rtol=0.1)  # of a uniform distribution
    np.testing.assert_allclose(angles.std(), 15 / math.sqrt(3), rtol=0.1)


def test_the_share_of_defects_is_as_set_and_all_kinds_occur():
    line = SimulatedLine(LineSettings(**SMALL, defect_share=0.25))
    plans = [line.plan(trigger_id) for trigger_id in range(1, 1201)]
    defects = Counter(plan.defect for plan in plans if plan.kind == "defective")
    assert abs(defects.total() / 1200 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 1200)
    assert set(defects) == set(DEFECTS)
    assert all(plan.defect is None for plan in plans if plan.kind == "good")


def test_light_drifts_slowly_and_within_its_bound(line):
    gains = np.array([line.plan(trigger_id).gain for trigger_id in range(1, 500)])
    assert np.abs(gains - 1).max() <= 0.1
    assert np.ptp(gains) > 0.1
    assert np.abs(np.diff(gains)).max() < 0.01


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_listed_trigger_is_of_that_kind_and_has_no_defect(kind):
    line = SimulatedLine(LineSettings(**SMALL, **{kind: (2, 5)}, defect_share=1.0))
    kinds = [line.plan(trigger_id).kind for trigger_id in range(1, 6)]
    assert kinds == ["defective", kind, "defective", "defective", kind]
    assert line.plan(2).defect is None


def test_the_truth_survives_json(line):
    plan = defective(line, 17, "dent")
    truth = json.loads(json.dumps(plan.truth()))
    assert truth == plan.truth()
    assert (truth["kind"], truth["defect"], plan.part_id) == ("defective", "dent", "P000017")


@pytest.mark.parametrize("wrong", [{"width_px": 10}, {"defect_share": 1.5}, {"seed": -1}])
def test_settings_that_cannot_be_drawn_are_refused(wrong):
    with pytest.raises(SettingsError, match="need"):
        LineSettings(**wrong)


# --- the picture ---------------------------------------------------------------------------------------------------


def test_the_same_settings_and_trigger_give_the_same_pixels():
    line = SimulatedLine(LineSettings(width_px=200, height_px=200))
    plan = defective(line, 4, "scratch")
    other = SimulatedLine(line.settings)
    other.render(other.plan(1))
    np.testing.assert_array_equal(line.render(plan)[0], other.render(plan)[0])
    np.testing.assert_array_equal(line.render(plan)[1], other.render(plan)[1])


@pytest.mark.parametrize(("colour", "shape"), [(False, (120, 200)), (True, (120, 200, 3))])
def test_frames_have_the_size_and_channels_that_were_set(colour, shape):
    line = SimulatedLine(LineSettings(width_px=200, height_px=120, colour=colour))
    pixels, mask = line.render(line.plan(1))
    assert pixels.shape == shape
    assert pixels.dtype == np.uint8
    assert mask.shape == (120, 200)
    assert not mask.any()


def hole_errors_px(line: SimulatedLine, plan: PartPlan) -> np.ndarray:
    """(6, 2) where the holes are, by their moments on an eightfold magnification, less where the pose says."""
    pixels, _ = line.render(plan)
    errors = []
    for centre in hole_centres(RADIUS_PX):
        x, y, _ = line.image_from_part(plan) @ (*centre, 1.0)
        left, top = round(x) - 24, round(y) - 24
        patch = cv2.resize(pixels[top : top + 49, left : left + 49], None, fx=8, fy=8, interpolation=cv2.INTER_LINEAR)
        moments = cv2.moments((patch < 80).astype(np.uint8), binaryImage=True)
        found = (np.array([moments["m10"], moments["m01"]]) / moments["m00"] + 0.5) / 8 - 0.5 + (left, top)
        errors.append(found - (x, y))
    return np.array(errors)


def test_every_bolt_hole_lies_where_the_pose_says(quiet_line):
    """The lamp stands at the upper left and moves every hole's edge by 0.05 px that way, whatever the pose."""
    errors = np.array([hole_errors_px(quiet_line, quiet_line.plan(trigger_id)) for trigger_id in range(1, 7)])
    assert np.abs(errors).max() < 0.1
    by_pose = errors.mean(axis=1)  # (6 poses, 2)
    assert np.abs(by_pose - by_pose.mean(axis=0)).max() < 0.02


def test_the_keyway_points_where_the_pose_says(quiet_line):
    """Six equal holes do not tell the angle: the keyway does. It lies towards -y of the part."""
    plan = quiet_line.plan(5)
    pixels, _ = quiet_line.render(plan)
    pose = quiet_line.image_from_part(plan)
    distance = distance_from_centre(quiet_line, plan)
    opening = (distance > 0.325 * RADIUS_PX) & (distance < 0.37 * RADIUS_PX) & (pixels < 80)
    rows, columns = np.nonzero(opening)
    towards = np.array([columns.mean(), rows.mean()]) - pose[:2, 2]
    angle_deg = math.degrees(math.atan2(towards[1], towards[0])) + 90
    assert (angle_deg - plan.angle_deg + 180) % 360 - 180 == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_changes_pixels_inside_its_mask_only_and_visibly(line, defect):
    for trigger_id in range(1, 7):
        plan = defective(line, trigger_id, defect)
        pixels, mask = line.render(plan)
        twin, nothing = line.render(replace(plan, kind="good", defect=None))
        difference = np.abs(pixels.astype(int) - twin)
        assert difference[~mask].max() == 0
        assert np.percentile(difference[mask], 90) > 15  # over 7 standard deviations of the noise
        assert 50 < mask.sum() < 0.05 * metal_area(twin)
        assert not nothing.any()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_mask_lies_on_the_part(line, defect):
    for trigger_id in range(1, 7):
        plan = defective(line, trigger_id, defect)
        _, mask = line.render(plan)
        farthest = distance_from_centre(line, plan)[mask].max()
        assert farthest < RADIUS_PX * (1.04 if defect == "burr" else 1.0) + 2  # a burr stands out over the rim


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_turns_with_its_part(line, defect):
    plan = replace(defective(line, 8, defect), angle_deg=0.0, shift_px=(0.0, 0.0))
    turned = replace(plan, angle_deg=90.0)
    overlap = np.rot90(line.render(plan)[1], -1) & line.render(turned)[1]  # 90 degrees clockwise, without resampling
    assert overlap.sum() > 0.95 * line.render(plan)[1].sum()


def test_the_belt_moves_between_parts_and_the_part_does_not_carry_it(quiet_line):
    still = {"angle_deg": 0.0, "shift_px": (0.0, 0.0)}
    first, second = (quiet_line.render(replace(quiet_line.plan(number), **still))[0] for number in (1, 2))
    corner, metal = np.s_[:90, :90], np.s_[300:340, 470:560]
    assert abs(np.corrcoef(first[corner].ravel(), second[corner].ravel())[0, 1]) < 0.2
    assert abs(float(first[metal].mean()) - float(second[metal].mean())) < 0.06 * float(first[metal].mean())


def test_good_parts_differ_in_their_tool_marks(quiet_line):
    still = {"angle_deg": 0.0, "shift_px": (0.0, 0.0)}
    first, second = (quiet_line.render(replace(quiet_line.plan(number), **still))[0] for number in (1, 2))
    face = np.s_[395:432, 465:500]  # between two bolt holes
    assert abs(np.corrcoef(first[face].ravel(), second[face].ravel())[0, 1]) < 0.5
    assert 2 < first[face].std() < 20


def test_noise_follows_the_photon_law(line, quiet_line):
    """Variance in counts = signal * 255 / 10,000 electrons + read noise 0.4^2 + two roundings of 1/12 each."""
    plan = replace(line.plan(1), gain=1.0)
    noisy, clean = line.render(plan)[0].astype(float), quiet_line.render(plan)[0].astype(float)
    for low, high in ((15, 40), (120, 180)):
        chosen = (clean > low) & (clean < high)
        expected = (clean[chosen].mean() - 3) * 255 / 10_000 + 0.4**2 + 2 / 12
        assert (noisy - clean)[chosen].var() == pytest.approx(expected, rel=0.05)


def test_a_dark_frame_shows_the_black_level_only():
    line = SimulatedLine(LineSettings(**SMALL, dark=(1,)))
    pixels, _ = line.render(line.plan(1))
    assert pixels.mean() == pytest.approx(3, abs=0.1)
    assert pixels.max() < 8
    assert pixels.std() > 0


def test_a_saturated_part_has_twice_the_light_and_a_blurred_one_its_brightness_without_its_edges():
    line = SimulatedLine(LineSettings(**SMALL, noise=0.0))
    plain, bright, soft = (
        line.render(replace(line.plan(1), kind=kind))[0].astype(float) for kind in ("good", "saturated", "blurred")
    )
    dim = plain < 100  # above, twice the light is beyond the sensor
    assert (bright[dim] - 3).mean() == pytest.approx(2 * (plain[dim] - 3).mean(), rel=0.02)
    assert bright.max() == 255
    assert soft.mean() == pytest.approx(plain.mean(), rel=0.01)
    assert np.abs(np.diff(soft, axis=1)).max() < 0.6 * np.abs(np.diff(plain, axis=1)).max()


def test_the_wrong_part_is_another_product():
    line = SimulatedLine(LineSettings(width_px=200, height_px=200, wrong_part=(2,)))
    right, wrong = (metal_area(line.render(line.plan(trigger_id))[0]) for trigger_id in (1, 2))
    assert abs(wrong / right - 1) > 0.15


def test_a_part_half_out_of_view_shows_about_half_its_metal():
    line = SimulatedLine(LineSettings(width_px=200, height_px=200, shift_px=5.0, half_out=(2, 3)))
    whole, *halves = (metal_area(line.render(line.plan(trigger_id))[0]) for trigger_id in (1, 2, 3))
    assert all(0.35 < half / whole < 0.65 for half in halves)


# --- the camera ----------------------------------------------------------------------------------------------------


@pytest.fixture
def started():
    """Return a function that makes a started camera; all are stopped at the end."""
    cameras = []

    def start(**settings) -> SimulatedCamera:
        cameras.append(SimulatedCamera(SimulatedLine(LineSettings(**SMALL, **settings))))
        cameras[-1].start()
        return cameras[-1]

    yield start
    for camera in cameras:
        camera.stop()


def test_a_frame_carries_its_trigger_its_truth_and_its_times(started):
    camera = started()
    before_ns = time.monotonic_ns()
    camera.trigger(7)
    frame = camera.next_frame(2.0)
    assert (frame.frame_id, frame.trigger_id, frame.size) == (1, 7, (96, 96))
    assert before_ns <= frame.exposed_ns <= frame.received_ns - 2_000_000  # the default exposure of 2 ms
    assert frame.received_ns <= time.monotonic_ns()
    assert frame.facts["part_id"] == "P000007"
    assert frame.facts["simulated"] is True
    assert frame.facts["truth"]["kind"] == "good"


def test_a_lost_frame_leaves_a_gap_in_frame_id(started):
    camera = started(lost=(2,))
    for trigger_id in (1, 2, 3):
        camera.trigger(trigger_id)
    frames = [camera.next_frame(2.0) for _ in range(2)]
    assert [(frame.frame_id, frame.trigger_id) for frame in frames] == [(1, 1), (3, 3)]
    assert camera.next_frame(0.02) is None


def test_a_late_frame_does_not_hold_up_the_next_one(started):
    camera = started(late=(1,), late_ms=150.0)
    camera.trigger(1)
    camera.trigger(2)
    punctual, late = camera.next_frame(2.0), camera.next_frame(2.0)
    assert [(frame.frame_id, frame.trigger_id) for frame in (punctual, late)] == [(2, 2), (1, 1)]
    assert late.received_ns - late.exposed_ns >= 150_000_000
    assert punctual.received_ns < late.received_ns


def test_without_a_trigger_there_is_no_frame_after_the_timeout(started):
    camera = started()
    before_ns = time.monotonic_ns()
    assert camera.next_frame(0.03) is None
    assert time.monotonic_ns() - before_ns >= 30_000_000


class WatchedLine(SimulatedLine):
    """A line that tells which triggers were taken up."""

    def __init__(self, settings: LineSettings, last: int) -> None:
        super().__init__(settings)
        self.taken: list[int] = []
        self.last = last
        self.last_taken = threading.Event()

    def plan(self, trigger_id: int) -> PartPlan:
        self.taken.append(trigger_id)
        if trigger_id == self.last:
            self.last_taken.set()
        return super().plan(trigger_id)


def test_a_slow_consumer_loses_the_newest_frames_and_sees_a_gap():
    line = WatchedLine(LineSettings(**SMALL), last=BUFFERS + 5)
    camera = SimulatedCamera(line)
    camera.start()
    for trigger_id in range(1, line.last + 1):
        camera.trigger(trigger_id)
    assert line.last_taken.wait(10.0)
    kept = [camera.next_frame(0.0).frame_id for _ in range(BUFFERS)]
    camera.trigger(line.last + 1)
    later = [frame.frame_id for frame in iter(lambda: camera.next_frame(0.2), None)]
    camera.stop()
    assert kept == list(range(1, BUFFERS + 1))
    assert later[-1] == line.last + 1
    assert set(later) <= {line.last, line.last + 1}  # the last one may still have been under way


def test_stopping_does_not_work_off_the_backlog():
    line = WatchedLine(LineSettings(**SMALL), last=1)
    camera = SimulatedCamera(line)
    camera.start()
    for trigger_id in range(1, 1001):
        camera.trigger(trigger_id)
    assert line.last_taken.wait(10.0)
    camera.stop()
    assert len(line.taken) < 1000


def test_an_unplugged_camera_says_what_to_check_and_forgets_its_frames(started):
    camera = started()
    camera.trigger(1)
    camera.unplug()
    with pytest.raises(CameraError, match="check its cable"):
        camera.next_frame(2.0)
    camera.trigger(2)
    camera.plug()
    camera.trigger(3)
    assert camera.next_frame(2.0).trigger_id == 3


def test_an_unplugged_camera_cannot_be_started():
    camera = SimulatedCamera(SimulatedLine(LineSettings(**SMALL)))
    camera.unplug()
    with pytest.raises(CameraError, match="check its cable"):
        camera.start()
    camera.stop()


def test_a_camera_that_is_not_started_says_so():
    camera = SimulatedCamera(SimulatedLine(LineSettings(**SMALL)))
    for call in (lambda: camera.trigger(1), lambda: camera.next_frame(0.0)):
        with pytest.raises(CameraError, match="call start"):
            call()


def test_frame_ids_begin_anew_after_a_restart(started):
    camera = started()
    for _ in range(2):
        camera.start()
        camera.trigger(9)
        assert camera.next_frame(2.0).frame_id == 1
        camera.stop()
        camera.stop()


def test_stopping_wakes_whoever_waits_for_a_frame(started):
    camera = started()
    heard: list[str] = []

    def wait() -> None:
        try:
            camera.next_frame(5.0)
        except CameraError as error:
            heard.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    camera.stop()
    waiter.join(2.0)
    assert "not started" in heard[0]


class CountingLine(SimulatedLine):
    """A line that counts what it drew."""

    drawn = 0

    def render(self, plan):
        self.drawn += 1
        return super().render(plan)


def test_parts_drawn_beforehand_come_round_with_their_own_truth():
    line = CountingLine(LineSettings(**SMALL, defect_share=0.5))
    camera = SimulatedCamera(line, prerendered=3)
    camera.start()
    frames = []
    for trigger_id in range(1, 8):
        camera.trigger(trigger_id)
        frames.append(camera.next_frame(2.0))
    camera.stop()
    camera.start()
    camera.stop()
    assert line.drawn == 3
    assert [frame.facts["part_id"] for frame in frames] == [f"P{number:06d}" for number in range(1, 8)]
    for number, frame in enumerate(frames):
        first = SimulatedLine(line.settings).plan(number % 3 + 1)
        assert frame.facts["truth"] == first.truth()
        np.testing.assert_array_equal(frame.pixels, line.render(first)[0])


def test_a_frame_drawn_beforehand_belongs_to_the_consumer():
    camera = SimulatedCamera(SimulatedLine(LineSettings(**SMALL)), prerendered=1)
    camera.start()
    camera.trigger(1)
    first = camera.next_frame(2.0)
    kept = first.pixels.copy()
    first.pixels[:] = 0
    camera.trigger(2)
    second = camera.next_frame(2.0)
    camera.stop()
    np.testing.assert_array_equal(second.pixels, kept)


def test_special_parts_are_drawn_when_they_come_and_never_kept():
    camera = SimulatedCamera(SimulatedLine(LineSettings(**SMALL, dark=(1, 4), lost=(2,))), prerendered=1)
    camera.start()
    for trigger_id in (1, 2, 3, 4):
        camera.trigger(trigger_id)
    kinds = {frame.trigger_id: frame.facts["truth"]["kind"] for frame in iter(lambda: camera.next_frame(0.3), None)}
    camera.stop()
    assert kinds == {1: "dark", 3: "good", 4: "dark"}
