"""Lamp, lens and sensor are undone exactly, and a lamp out of range is told apart from a part."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import BadFrame, CalibrationError, InputError
from calibration.frame import reflectance
from calibration.photometric import (
    PHOTOMETRIC_FILE,
    Photometric,
    ReferencePatch,
    flat_field,
    gamma_corrected,
    mean_field,
    patch_gain,
    read_photometric,
    recorded_photometric,
    without_dead_pixels,
    write_photometric,
)

PATCH = ReferencePatch(2, 3, 6, 4, level=0.8)


def vignette(height: int, width: int) -> np.ndarray:
    """Return a lens that delivers all light in the middle and 40 % in the corners."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (1.0 - 0.3 * (x**2 + y**2)).astype(np.float32)


def part(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).uniform(0.1, 0.9, shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 3)])
def test_dark_and_flat_field_undo_vignetting_and_sensor_offset(shape):
    light, dark = vignette(48, 64), np.full(shape, 0.02, np.float32)
    light = light if len(shape) == 2 else light[:, :, None] * np.float32([1.0, 0.9, 0.8])  # a yellowish lamp
    true = part(shape)
    seen = true * light + dark
    correction = Photometric(dark=dark, flat=light + dark)
    np.testing.assert_allclose(correction.correct(seen, 8), true * light.mean(), atol=1e-5)


def test_16_bit_counts_are_corrected_to_within_a_thousandth():
    light, dark, true = vignette(48, 64), np.full((48, 64), 0.02, np.float32), part((48, 64))
    counts = ((true * light + dark) * 65535).round().astype(np.uint16)
    white = ((light + dark) * 4095 / 2).round().astype(np.uint16)  # at half exposure, from a 12-bit sensor
    black = ((dark / 2) * 4095).round().astype(np.uint16)
    correction = Photometric(dark=2 * mean_field([black], 12), flat=2 * mean_field([white], 12))
    assert np.abs(correction.correct(counts, 16) - true * light.mean()).max() < 1e-3


def test_a_dark_field_alone_is_subtracted_and_nothing_falls_below_zero():
    seen = np.float32([[0.1, 0.3], [0.5, 0.0]])
    corrected = Photometric(dark=np.full((2, 2), 0.2, np.float32)).correct(seen, 8)
    np.testing.assert_allclose(corrected, [[0.0, 0.1], [0.3, 0.0]], atol=1e-7)


def test_without_correction_the_very_same_pixels_come_back():
    pixels = np.zeros((4, 4), np.uint8)
    assert Photometric().is_identity
    assert Photometric().correct(pixels, 8) is pixels


@pytest.mark.parametrize("dimming", [0.55, 0.8, 1.2])
def test_the_reference_patch_brings_the_brightness_back(dimming):
    true = part((20, 30)) * np.float32(0.8)
    true[PATCH.y_px : PATCH.y_px + PATCH.height_px, PATCH.x_px : PATCH.x_px + PATCH.width_px] = PATCH.level
    corrected = Photometric(patch=PATCH).correct(true * np.float32(dimming), 8)
    np.testing.assert_allclose(corrected, true, rtol=1e-5)


def test_a_speck_on_the_reference_patch_does_not_change_the_gain():
    pixels = np.full((20, 30), 0.4, np.float32)
    pixels[4:6, 4:7] = 0.0  # a quarter of the patch
    assert patch_gain(pixels, PATCH) == pytest.approx(2.0)


def test_a_gain_out_of_range_is_a_bad_frame():
    with pytest.raises(BadFrame, match=r"reads 0\.080, should read 0\.800: gain 10\.00 is outside 0\.5\.\.2\.0: check"):
        patch_gain(np.full((20, 30), 0.08, np.float32), PATCH)
    with pytest.raises(BadFrame, match=r"check the lamp, the exposure"):
        patch_gain(np.zeros((20, 30), np.float32), PATCH)


def test_a_patch_outside_the_frame_is_a_bad_frame():
    with pytest.raises(BadFrame, match=r"the reference patch is not inside the frame of 7x20 px"):
        patch_gain(np.ones((20, 7), np.float32), PATCH)


@pytest.mark.parametrize(
    "values", [{"x_px": -10}, {"width_px": 0}, {"level": 0.0}, {"level": np.nan}, {"level": 80.0}, {"min_gain": 3.0}]
)
def test_a_patch_that_no_frame_can_have_is_refused(values):
    with pytest.raises(CalibrationError, match=r"reference patch .* found, need .*: (measure it|give what)"):
        dataclasses.replace(PATCH, **values)


@pytest.mark.parametrize("patch", [ReferencePatch(26, 3, 6, 4, 0.8), ReferencePatch(40, 30, 6, 4, 0.8)])
def test_a_frame_without_the_patch_is_a_bad_frame_under_any_fields(patch):
    with pytest.raises(BadFrame, match=r"the reference patch is not inside the frame of 30x20 px"):
        Photometric(flat=np.ones((20, 30), np.float32), patch=patch).correct(np.full((20, 30), 200, np.uint8), 8)


@pytest.mark.parametrize(("dtype", "bit_depth"), [(np.uint8, 8), (np.uint16, 12), (np.float32, 8)])
@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 3)])
@pytest.mark.parametrize("fields", [(), ("dark",), ("flat",), ("dark", "flat")])
def test_fields_and_patch_together_are_the_closed_form(dtype, bit_depth, shape, fields):
    generator = np.random.default_rng(3)
    full_scale = 1 if dtype == np.float32 else 2**bit_depth - 1
    pixels = np.asarray(generator.uniform(0.0, 0.9, shape) * full_scale).astype(dtype)
    light = generator.uniform(0.5, 1.0, shape).astype(np.float32)
    stored = {"dark": generator.uniform(0.0, 0.1, shape).astype(np.float32), "flat": light}
    dark = stored["dark"].astype(float) if "dark" in fields else 0.0
    gain = (light - dark).mean() / (light - dark) if "flat" in fields else 1.0
    wanted = np.maximum((pixels / full_scale - dark) * gain, 0)
    patch = dataclasses.replace(PATCH, level=0.5)
    wanted *= patch.level / np.median(wanted[patch.window])
    before = pixels.copy()
    found = Photometric(**{name: stored[name] for name in fields}, patch=patch).correct(pixels, bit_depth)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_array_equal(pixels, before)


def test_what_is_no_number_stays_none():
    pixels = np.full((20, 37), 0.5, np.float32)
    pixels[3], pixels[7, 11], pixels[9] = np.nan, np.nan, -1
    fields = np.full((20, 37), 0.1, np.float32)
    for correction in (Photometric(dark=fields), Photometric(flat=5 * fields), Photometric(fields, 5 * fields)):
        found = correction.correct(pixels, 8)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(pixels))
        assert np.nanmin(found) == 0.0


def test_a_frame_of_another_size_than_the_fields_is_a_bad_frame():
    correction = Photometric(flat=np.ones((4, 4), np.float32))
    with pytest.raises(BadFrame, match=r"frame is \(4, 5\), dark and flat field are \(4, 4\): capture them again"):
        correction.correct(np.zeros((4, 5), np.uint8), 8)


def test_a_flat_field_without_light_is_refused():
    flat = np.ones((4, 4), np.float32)
    flat[1, 2] = 0.1
    with pytest.raises(CalibrationError, match=r"reads 0\.010 above dark at its darkest pixel, need 0\.02: capture"):
        Photometric(dark=np.full((4, 4), 0.09, np.float32), flat=flat)
    flat[1, 2] = np.nan
    with pytest.raises(CalibrationError, match="reads nan above dark"):
        Photometric(flat=flat)


@pytest.mark.parametrize("shape", [(100, 200), (100, 200, 3)])
def test_a_white_frame_that_saturates_is_refused_with_its_share(shape):
    white, clipped = np.full(shape, 0.9, np.float32), np.full(shape, 0.9, np.float32)
    clipped[:4, :5] = 0.98  # 20 of 20000 pixels, a thousandth
    np.testing.assert_allclose(flat_field([white, clipped])[0, 0], 0.94)
    clipped[50, 60] = 1.0
    wanted = (
        r"0\.105% of a white frame's pixels read 98% of full scale or more, need at most 0\.1%: shorten the exposure"
    )
    with pytest.raises(CalibrationError, match=wanted):
        flat_field([white, clipped])


def test_a_white_frame_that_saturates_in_one_colour_is_refused():
    white = np.full((10, 20, 3), 0.9, np.float32)
    white[:, :, 0] = 0.99
    with pytest.raises(CalibrationError, match=r"^100\.000% of a white frame's pixels"):
        flat_field([white])


@pytest.mark.parametrize("shape", [(100, 200), (100, 200, 3)])
@pytest.mark.parametrize("offset", [None, 0.05])
def test_dead_pixels_of_a_flat_field_become_the_median_of_their_neighbours(shape, offset):
    light = np.random.default_rng(8).uniform(0.5, 0.9, shape).astype(np.float32)
    dark = None if offset is None else np.full(shape, offset, np.float32)
    flat = light if dark is None else light + dark
    seen = flat.copy()
    seen[0, 0], seen[50, 60] = 0.0, 0.01  # 2 of 20000: all that may be
    found, count = without_dead_pixels(seen, dark)
    assert count == 2
    for place, beside in (
        ((0, 0), [(0, 1), (1, 0), (1, 1)]),
        ((50, 60), [(y, x) for y in (49, 50, 51) for x in (59, 60, 61)]),
    ):
        wanted = np.median([flat[at] for at in beside if at != place], axis=0)
        np.testing.assert_allclose(found[place], wanted, rtol=1e-6)
        found[place] = flat[place]
    np.testing.assert_array_equal(found, flat)
    Photometric(dark, without_dead_pixels(seen, dark)[0])  # is taken
    seen[99, 199] = np.nan
    wanted = (
        r"3 of 20000 pixels of the flat field \(0\.015%\) read less than 0\.02 above dark, need at most 0\.01%: capture"
    )
    with pytest.raises(CalibrationError, match=wanted):
        without_dead_pixels(seen, dark)


def test_dead_pixels_beside_each_other_take_the_median_of_those_that_are_lit():
    flat = np.full((300, 400), 0.5, np.float32)
    flat[10:13, 20:23] = 0.0
    found, count = without_dead_pixels(flat, None)
    assert count == 9
    np.testing.assert_array_equal(found, np.full((300, 400), 0.5, np.float32))


def test_a_pixel_dead_in_one_colour_keeps_the_others():
    flat = np.full((20, 30, 3), 0.5, np.float32)
    flat[4, 5] = (0.7, 0.0, 0.6)
    found, count = without_dead_pixels(flat, None)
    assert count == 1
    np.testing.assert_array_equal(found[4, 5], np.float32([0.7, 0.5, 0.6]))


def test_one_pixel_may_be_dead_but_not_the_only_one():
    flat = np.full((4, 4), 0.5, np.float32)
    flat[1, 2] = 0.0
    assert without_dead_pixels(flat, None)[1] == 1
    with pytest.raises(CalibrationError, match=r"1 of 1 pixels of the flat field \(100\.000%\) read less"):
        without_dead_pixels(np.zeros((1, 1), np.float32), None)
    with pytest.raises(CalibrationError, match=r"dark is \(4, 5\), flat is \(4, 4\): capture both the same way"):
        without_dead_pixels(flat, np.zeros((4, 5), np.float32))


def test_fields_of_two_sizes_are_refused():
    with pytest.raises(CalibrationError, match=r"dark is \(4, 4\), flat is \(4, 5\): capture both the same way"):
        Photometric(dark=np.zeros((4, 4), np.float32), flat=np.ones((4, 5), np.float32))


@pytest.mark.parametrize("gamma", [0.5, 2.2, 6.0])
def test_gamma_is_a_power_of_reflectance(gamma):
    values = np.linspace(0, 1, 50, dtype=np.float32).reshape(5, 10)
    corrected = gamma_corrected(values, gamma)
    assert corrected.dtype == np.float32
    np.testing.assert_allclose(corrected, np.exp(gamma * np.log(np.maximum(values, 1e-30))), atol=1e-6)


def test_gamma_clips_what_is_no_reflectance():
    np.testing.assert_array_equal(gamma_corrected(np.float32([-0.1, 1.5]), 2.0), [0.0, 1.0])


def test_gamma_one_returns_the_very_same_pixels():
    values = np.float32([0.2, 1.5])
    assert gamma_corrected(values, 1.0) is values


def test_averaging_frames_lowers_noise_with_the_root_of_their_number():
    generator = np.random.default_rng(11)
    frames = [(2000 + generator.normal(0, 40, (64, 64))).astype(np.uint16) for _ in range(64)]
    field = mean_field(frames, 12)
    assert field.dtype == np.float32
    assert field.std() == pytest.approx(40 / 4095 / 8, rel=0.05)


def test_a_field_is_the_mean_of_the_stack_and_takes_no_stack():
    generator = np.random.default_rng(4)
    frames = [generator.integers(0, 4096, (300, 400), np.uint16) for _ in range(40)]
    wanted = np.mean([reflectance(frame, 12) for frame in frames], axis=0, dtype=np.float64)
    tracemalloc.start()
    field = mean_field(frames, 12)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(field, wanted.astype(np.float32))
    assert most < 8 * wanted.nbytes


def test_no_frame_or_frames_of_two_shapes_make_no_field():
    with pytest.raises(CalibrationError, match="0 frames of 0 shapes found, need at least 1 of one shape"):
        mean_field([], 8)
    with pytest.raises(CalibrationError, match="2 frames of 2 shapes found"):
        mean_field([np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8)], 8)


@pytest.mark.parametrize("name", ["station.npz", "station"])
def test_a_correction_survives_its_file(tmp_path: Path, name):
    dark, flat = np.full((6, 8, 3), 0.01, np.float32), part((6, 8, 3))
    write_photometric(tmp_path / name, Photometric(dark, flat, PATCH))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    found = read_photometric(tmp_path / name)
    np.testing.assert_array_equal(found.dark, dark)
    np.testing.assert_array_equal(found.flat, flat)
    assert found.patch == PATCH


def test_the_identity_survives_its_file(tmp_path: Path):
    write_photometric(tmp_path / "x.npz", Photometric())
    assert read_photometric(tmp_path / "x.npz").is_identity


def test_a_recording_without_correction_was_captured_under_the_identity(tmp_path: Path):
    assert recorded_photometric(tmp_path).is_identity
    write_photometric(tmp_path / PHOTOMETRIC_FILE, Photometric(patch=PATCH))
    assert recorded_photometric(tmp_path).patch == PATCH


def test_a_correction_cut_anywhere_is_refused(tmp_path: Path):
    path = tmp_path / "x.npz"
    write_photometric(path, Photometric(flat=part((6, 8))))
    data = path.read_bytes()
    for length in (0, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"x\.npz: not a photometric calibration .* make it with taktsight-calib"):
            read_photometric(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_changed_byte_is_refused_or_changes_nothing(tmp_path: Path, save):
    path, flat = tmp_path / "x.npz", np.full((6, 8), 0.75, np.float32)
    save(path, flat=flat)
    data = path.read_bytes()
    refused = 0
    places = [*range(80), *range(data.index(b"PK\x01\x02"), len(data))]  # what zip itself writes round the array
    for place in places:
        for value in {0, 1, 14, 0xFF, data[place] ^ 1} - {data[place]}:
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                np.testing.assert_array_equal(read_photometric(path).flat, flat)
            except InputError:
                refused += 1
    assert refused > len(places)


def test_a_flipped_byte_in_a_field_is_refused(tmp_path: Path):
    path = tmp_path / "x.npz"
    write_photometric(path, Photometric(flat=part((60, 80))))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a photometric calibration"):
        read_photometric(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": np.zeros(3)},
        {"flat": np.ones(5, np.float32)},
        {"flat": np.ones((4, 4), np.int64)},
        {"flat": np.zeros((4, 4), np.float32)},
        {"patch": np.zeros(3)},
        {"patch": np.float64(1)},
        {"patch": np.array([np.inf, 0, 2, 2, 0.8, 0.5, 2.0])},
        {"dark": np.array([{"an": "object"}])},
    ],
)
def test_a_foreign_npz_is_refused(tmp_path: Path, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=r"x\.npz: not a photometric calibration"):
        read_photometric(tmp_path / "x.npz")


def test_a_bare_npy_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.ones((4, 4)))
    for path, reason in (
        (tmp_path / "x.npy", "not a zip file"),
        (tmp_path / "none.npz", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(InputError, match=reason):
            read_photometric(path)


def test_a_correction_that_cannot_be_written_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="No such file or directory: give a file that can be written"):
        write_photometric(tmp_path / "none" / "x.npz", Photometric())
