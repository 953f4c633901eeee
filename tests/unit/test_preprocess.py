"""The detector sees each place of the part where the transforms say, in its size, colours and gamma."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from calibration.errors import BadFrame, NotRegistered
from calibration.preprocess import Rectangle, View, check_frame, in_view, picture_of, prepare, scaling, to_batch
from calibration.registration import Registration
from tests.recipes import bracket, tiny_reference


def moved(angle_deg: float, shift_px: tuple[float, float], centre_px: tuple[float, float], scale=1.0) -> Registration:
    """Return the registration of a part that was turned about centre_px, then shifted."""
    turn = np.radians(angle_deg)
    image_from_reference = np.eye(3)
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    image_from_reference[:2, :2] = rotation
    image_from_reference[:2, 2] = np.asarray(centre_px) - rotation @ centre_px + shift_px
    return Registration(np.linalg.inv(image_from_reference), residual_px=0.0, similarity=1.0)


def ramp(height: int, width: int, slope_x: float, slope_y: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return (0.5 + slope_x * (x - width / 2) + slope_y * (y - height / 2)).astype(np.float32)


def places(view: View, image_from_reference: np.ndarray, samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return where in the image each place of the view lies: x, y of (h * samples, w * samples) points."""
    offsets = (np.arange(samples) + 0.5) / samples - 0.5
    x, y = np.meshgrid(
        (np.arange(view.width)[:, None] + offsets).ravel(), (np.arange(view.height)[:, None] + offsets).ravel()
    )
    found = image_from_reference @ view.reference_from_view() @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    return found[0].reshape(x.shape), found[1].reshape(x.shape)


def smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 + 0.2 * np.sin(2 * np.pi * x / 90) + 0.2 * np.cos(2 * np.pi * (0.6 * y + 0.3 * x) / 90)


def test_scaling_keeps_pixel_corners_where_they_are():
    transform = scaling(4.0, 2.0, 10, 20)
    np.testing.assert_allclose(transform @ [-0.5, -0.5, 1], [9.5, 19.5, 1])  # the outer corner of the first pixel
    np.testing.assert_allclose(transform @ [0, 0, 1], [11.5, 20.5, 1])  # its centre: the middle of 4 x 2 pixels
    np.testing.assert_allclose(scaling(4.0, 2.0, 0, 0) @ scaling(0.25, 0.5, 0, 0), np.eye(3))


@pytest.mark.parametrize("region", [None, Rectangle(16, 8, 64, 32)])
def test_a_gradient_shrinks_to_the_closed_form_where_nothing_is_registered(region):
    view = View(16, 32, colour=False, reference_size=(96, 128), region=region)
    image = ramp(96, 128, 0.003, -0.002)
    x, y = places(view, np.eye(3))
    wanted = 0.5 + 0.003 * (x - 64) - 0.002 * (y - 48)
    np.testing.assert_allclose(to_batch(image, 8, view, None)[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "side", "line_px"), [((200, 2000), 256, 4), ((460, 1130), 512, 1), ((240, 1000), 256, 2)]
)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_line_across_a_narrow_frame_counts_wherever_it_lies(shape, side, line_px, turned, dtype):
    """One side is shorter than the view, the other shrinks: every pixel of it still has its share."""
    height, width = shape
    full_scale = 255 if dtype == np.uint8 else 1
    for place in range(width // 2, width // 2 + 12):
        image = np.full((height, width), 0.2 * full_scale, dtype)
        image[:, place : place + line_px] = full_scale
        image = np.ascontiguousarray(image.T) if turned else image
        seen = to_batch(image, 8, View(side, side, colour=False, reference_size=image.shape), None)[0, 0]
        across = seen if turned else seen.T  # (side, side), the line along its rows
        np.testing.assert_allclose(np.ptp(across, axis=1), 0.0, atol=1e-6)
        contrast = (across[:, 0] - 0.2).sum() / 0.8
        assert contrast == pytest.approx(line_px * side / width, abs=3e-6 if dtype == np.float32 else 4 / 255)


def test_a_narrow_frame_is_averaged_along_one_side_and_interpolated_along_the_other():
    view = View(32, 8, colour=False, reference_size=(16, 32))
    image = np.random.default_rng(2).uniform(0, 1, (16, 32)).astype(np.float32)
    means = image.reshape(16, 8, 4).mean(axis=2)  # (16, 8)
    places = np.clip((np.arange(32) + 0.5) / 2 - 0.5, 0, 15)
    wanted = np.stack([np.interp(places, np.arange(16), column) for column in means.T], axis=1)
    np.testing.assert_allclose(to_batch(image, 8, view, None)[0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("region", [None, Rectangle(32, 24, 64, 48)])
@pytest.mark.parametrize("angle_deg", [0.0, 30.0, -135.0])
@pytest.mark.parametrize("side", [24, 48, 96])  # reduced by 4 to 1 before the warp
def test_a_gradient_lands_where_registration_says(region, angle_deg, side):
    view = View(side, side, colour=False, reference_size=(96, 128), region=region)
    registration = moved(angle_deg, (5.25, -3.5), (63.5, 47.5))
    x, y = places(view, registration.image_from_reference)
    wanted = 0.5 + 0.003 * (x - 64) - 0.002 * (y - 48)
    inside = (x > 8) & (x < 128 - 9) & (y > 8) & (y < 96 - 9)
    assert inside.mean() > 0.5
    found = to_batch(ramp(96, 128, 0.003, -0.002), 8, view, registration)[0, 0]
    np.testing.assert_allclose(found[inside], wanted[inside], atol=2e-4)


@pytest.mark.parametrize(
    ("registration", "place"),
    [
        (moved(0, (3, -2), (31.5, 31.5)), (17, 42)),  # the part lies 3 px right and 2 px up, so the dot is seen undone
        (moved(90, (0, 0), (31.5, 31.5)), (40, 43)),  # turned clockwise on the screen: x, y was y, 63 - x
        (moved(180, (0, 0), (31.5, 31.5)), (43, 23)),
    ],
)
def test_a_dot_lands_on_its_own_pixel(registration, place):
    image = np.zeros((64, 64), np.uint8)
    image[40, 20] = 255
    view = View(64, 64, colour=False, reference_size=(64, 64))
    found = to_batch(image, 8, view, registration)[0, 0]
    x, y = place
    assert found[y, x] == pytest.approx(1.0, abs=0.02)
    assert found.sum() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("scale", "angle_deg"), [(1.0, 0.0), (1.0, 17.0), (1.07, -100.0)])
def test_reduction_then_warp_matches_the_true_area_average_of_a_smooth_picture(scale, angle_deg):
    view = View(48, 64, colour=False, reference_size=(240, 320))  # shrinks by 5
    registration = moved(angle_deg, (3.3, -2.7), (159.5, 119.5), scale)
    y, x = np.mgrid[:240, :320]
    found = to_batch(smooth(x, y).astype(np.float32), 8, view, registration)[0, 0]
    x, y = places(view, registration.image_from_reference, samples=8)
    blocks = (48, 8, 64, 8)
    wanted = smooth(x, y).reshape(blocks).mean(axis=(1, 3))
    inside = ((x > 8) & (x < 311) & (y > 8) & (y < 231)).reshape(blocks).all(axis=(1, 3))
    assert inside.mean() > 0.5
    difference = np.abs(found - wanted)[inside]
    assert difference.max() < 0.01
    assert difference.mean() < 0.004


@pytest.mark.parametrize("angle_deg", [0.0, 90.0, 180.0])
def test_noise_is_averaged_along_both_sides_of_a_long_part(angle_deg):
    view = View(32, 32, colour=False, reference_size=(64, 512))  # shrinks by 16 along x and by 2 along y
    image = np.random.default_rng(2).normal(0.5, 0.1, (512, 512)).astype(np.float32)
    view_of_middle = moved(angle_deg, (0.0, 224.0), (255.5, 31.5))
    found = to_batch(image, 8, view, view_of_middle)[0, 0]
    assert found.std() == pytest.approx(0.1 / np.sqrt(16 * 2), rel=0.1)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (97, 98), (98, 97)])
def test_a_gradient_reaches_the_last_row_and_column_where_blocks_of_pixels_do_not_fit(height, width):
    view = View(32, 32, colour=False, reference_size=(height, width))
    unmoved = Registration(np.eye(3), residual_px=0.0, similarity=1.0)
    found = to_batch(ramp(height, width, 0.003, -0.002), 8, view, unmoved)[0, 0]
    x, y = places(view, np.eye(3))
    np.testing.assert_allclose(found, 0.5 + 0.003 * (x - width / 2) - 0.002 * (y - height / 2), atol=0.003)


def test_noise_is_averaged_when_a_registered_part_shrinks():
    view = View(32, 32, colour=False, reference_size=(256, 256))
    image = np.random.default_rng(2).normal(0.5, 0.1, (256, 256)).astype(np.float32)
    found = to_batch(image, 8, view, moved(0, (0, 0), (127.5, 127.5)))[0, 0]
    assert found.std() == pytest.approx(0.1 / 8, rel=0.1)  # every one of 8 x 8 pixels counts


@pytest.mark.parametrize("registration", [None, moved(0, (0, 0), (15.5, 15.5))])
def test_a_colour_recipe_gets_red_green_and_blue_in_this_order(registration):
    image = np.zeros((32, 32, 3), np.uint8)
    image[:] = (255, 51, 0)
    batch = to_batch(image, 8, View(16, 16, colour=True, reference_size=(32, 32)), registration)
    assert batch.shape == (1, 3, 16, 16)
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous
    np.testing.assert_allclose(batch.mean(axis=(0, 2, 3)), [1.0, 0.2, 0.0], atol=1e-6)
    np.testing.assert_allclose(picture_of(batch)[0, 0], [1.0, 0.2, 0.0], atol=1e-6)


def test_a_gray_recipe_weighs_colours_as_in_bt_601():
    image = np.full((32, 32, 3), (200, 100, 50), np.uint8)
    batch = to_batch(image, 8, View(16, 16, colour=False, reference_size=(32, 32)), None)
    assert batch.shape == (1, 1, 16, 16)
    assert picture_of(batch).shape == (16, 16)
    assert batch.mean() == pytest.approx((0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255, abs=0.5 / 255)


@pytest.mark.parametrize(("dtype", "bit_depth"), [(np.uint8, 8), (np.uint16, 10), (np.uint16, 12), (np.uint16, 16)])
def test_full_scale_of_any_sensor_is_one(dtype, bit_depth):
    image = np.full((16, 16), 2**bit_depth - 1, dtype)
    batch = to_batch(image, bit_depth, View(16, 16, colour=False, reference_size=(16, 16)), None)
    np.testing.assert_allclose(batch, 1.0)


def test_gamma_is_applied_to_reflectance():
    image = np.full((16, 16), 51, np.uint8)
    batch = to_batch(image, 8, View(16, 16, colour=False, reference_size=(16, 16), gamma=2.0), None)
    np.testing.assert_allclose(batch, 0.04, atol=1e-6)


def test_a_frame_of_another_size_is_a_bad_frame():
    view = View(16, 16, colour=False, reference_size=(48, 64))
    with pytest.raises(BadFrame, match=r"the frame is 63x48 px, the recipe was trained on 64x48: set the camera's"):
        prepare(np.zeros((48, 63), np.uint8), 8, view, None)


def test_a_gray_frame_is_a_bad_frame_for_a_colour_recipe():
    view = View(16, 16, colour=True, reference_size=(48, 64))
    with pytest.raises(BadFrame, match=r"the frame is gray, the recipe was trained in colour: set the camera's pixel"):
        prepare(np.zeros((48, 64), np.uint8), 8, view, None)


def test_frames_may_differ_in_size_where_the_training_images_did():
    view = View(16, 16, colour=False, reference_size=(48, 64), fixed_size=False)
    check_frame(np.zeros((30, 70), np.uint8), 8, view)
    assert prepare(np.zeros((30, 70), np.uint8), 8, view, None).batch.shape == (1, 1, 16, 16)


def test_a_frame_too_small_for_the_region_of_interest_is_a_bad_frame():
    view = View(8, 8, False, reference_size=(48, 64), fixed_size=False, region=Rectangle(40, 8, 16, 16))
    with pytest.raises(
        BadFrame, match=r"the frame is 50x40 px, the region of interest reaches to 56x24: deliver frames"
    ):
        prepare(np.zeros((40, 50), np.uint8), 8, view, None)


def test_a_registered_part_is_seen_as_the_reference_shows_it():
    reference = tiny_reference((120, 160))
    view = View(60, 80, colour=False, reference_size=(120, 160))
    turned = np.ascontiguousarray(bracket((120, 160))[::-1, ::-1])
    prepared = prepare(turned, 8, view, reference)
    straight = prepare(bracket((120, 160)), 8, view, reference)
    assert abs(prepared.registration.angle_deg) == pytest.approx(180, abs=0.2)
    assert np.abs(prepared.picture - straight.picture).max() < 0.02


def test_a_blank_frame_is_not_registered():
    view = View(60, 80, colour=False, reference_size=(120, 160))
    with pytest.raises(NotRegistered, match="the field is blank") as caught:
        prepare(np.full((120, 160), 90, np.uint8), 8, view, tiny_reference((120, 160)))
    assert caught.value.cause == "blank"


def test_a_defect_mask_is_seen_where_the_detector_sees_the_defect():
    view = View(32, 32, colour=False, reference_size=(128, 128), region=Rectangle(32, 32, 64, 64))
    registration = moved(90, (4, -6), (63.5, 63.5))
    mask = np.zeros((128, 128), np.uint8)
    mask[50:70, 60:90] = 255
    seen = to_batch(mask, 8, view, registration)[0, 0]
    found = in_view(mask, view, registration)
    assert found.dtype == np.bool_
    assert found.shape == (32, 32)
    np.testing.assert_array_equal(found, seen >= 0.5)
    assert found.sum() == pytest.approx(20 * 30 / 4, rel=0.1)


def test_a_mask_in_reference_pixels_needs_no_registration():
    view = View(32, 32, colour=False, reference_size=(128, 128), region=Rectangle(32, 32, 64, 64))
    mask = np.zeros((128, 128), np.uint8)
    mask[40:60, 50:80] = 1
    wanted = np.zeros((32, 32), bool)
    wanted[4:14, 9:24] = True
    np.testing.assert_array_equal(in_view(mask, view, None), wanted)


def test_a_place_is_masked_where_the_mask_covers_at_least_half_of_it():
    view = View(16, 16, colour=False, reference_size=(64, 64))  # a place is 4 x 4 px
    mask = np.zeros((64, 64), np.uint8)
    mask[41:61, 18:37] = 1  # 3/4 of the first and 1/4 of the last row, 2/4 of the first and 1/4 of the last column
    wanted = np.zeros((16, 16), bool)
    wanted[11:15, 5:9] = True
    wanted[10, 5:9] = wanted[11:15, 4] = True
    np.testing.assert_array_equal(in_view(mask, view, None), wanted)


def test_outside_the_frame_nothing_is_masked():
    view = View(32, 32, colour=False, reference_size=(32, 32))
    mask = np.full((32, 32), 255, np.uint8)
    wanted = np.ones((32, 32), bool)
    wanted[:, :10] = False  # the part lies 10 px to the left: its left edge is out of the frame
    np.testing.assert_array_equal(in_view(mask, view, moved(0, (-10, 0), (15.5, 15.5))), wanted)


def test_a_mask_of_another_size_fills_the_view_where_images_differ_in_size():
    view = View(16, 16, colour=False, reference_size=(48, 64), fixed_size=False)
    mask = np.zeros((32, 64), np.uint8)
    mask[16:, :32] = 255
    wanted = np.zeros((16, 16), bool)
    wanted[8:, :8] = True
    np.testing.assert_array_equal(in_view(mask, view, None), wanted)


def test_mask_and_picture_show_the_same_region_where_images_differ_in_size():
    region = Rectangle(100, 100, 100, 100)
    view = View(64, 64, colour=False, reference_size=(200, 200), fixed_size=False, region=region)
    picture = np.zeros((400, 400), np.uint8)
    picture[100:150, 100:150] = 255
    seen = to_batch(picture, 8, view, None)[0, 0] >= 0.5
    assert seen.sum() == 32 * 32
    np.testing.assert_array_equal(in_view(picture, view, None), seen)


def test_a_frame_of_another_depth_is_refused_with_both_depths() -> None:
    view = View(16, 16, colour=False, reference_size=(16, 16), bit_depth=12)
    with pytest.raises(BadFrame, match="the frame has 8 bits, the recipe was trained on 12"):
        prepare(np.zeros((16, 16), np.uint8), 8, view, None)
    assert prepare(np.full((16, 16), 4095, np.uint16), 12, view, None).batch.max() == 1.0


@pytest.mark.parametrize("shift", [(0, 0), (9.3, -7.6), (70, 55), (-200, 30), (400, 400)])  # up to wholly out of view
@pytest.mark.parametrize("angle_deg", [0, 33, -120, 180])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_region_is_warped_as_the_whole_view_is(shift, angle_deg, channels):
    image = np.random.default_rng(8).integers(0, 256, (130, 170, channels), dtype=np.uint8).squeeze()
    registration = moved(angle_deg, shift, (84.5, 64.5))
    view = View(20, 24, colour=channels == 3, reference_size=(130, 170), region=Rectangle(60, 40, 48, 40))  # 2 px to 1
    halves = cv2.resize(image, (85, 65), interpolation=cv2.INTER_AREA)
    halves_from_image = np.linalg.inv(scaling(2, 2, 0, 0))
    turn = halves_from_image @ registration.reference_from_image @ scaling(2, 2, 0, 0)
    whole = cv2.warpAffine(halves, turn[:2], (85, 65), borderMode=cv2.BORDER_REPLICATE)
    found = picture_of(to_batch(image, 8, view, registration))
    np.testing.assert_allclose(found, whole[20:40, 30:54] / 255, atol=1.01 / 255)


def test_only_the_pixels_that_a_region_shows_are_averaged(monkeypatch):
    averaged = []
    resize = cv2.resize
    monkeypatch.setattr(
        cv2, "resize", lambda pixels, *a, **k: (averaged.append(pixels.shape), resize(pixels, *a, **k))[1]
    )
    view = View(16, 16, colour=False, reference_size=(512, 512), region=Rectangle(240, 240, 64, 64))
    to_batch(np.zeros((512, 512), np.uint8), 8, view, moved(45, (0, 0), (271.5, 271.5)))
    assert averaged
    assert max(max(shape) for shape in averaged) < 64 * 1.5 + 6 * 4


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_colours_shrink_by_four_to_the_mean_of_every_block(dtype):
    image = np.random.default_rng(8).uniform(0, 1, (64, 64, 3))
    image = (image * 255).astype(np.uint8) if dtype == np.uint8 else image.astype(np.float32)
    view = View(16, 16, colour=True, reference_size=(64, 64))
    unmoved = Registration(np.eye(3), residual_px=0.0, similarity=1.0)
    wanted = image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)) / (255 if dtype == np.uint8 else 1)
    tolerance = 1.01 / 255 if dtype == np.uint8 else 1e-5
    np.testing.assert_allclose(picture_of(to_batch(image, 8, view, unmoved)), wanted, atol=tolerance)
