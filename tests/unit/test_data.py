"""A folder of images is understood or refused before anything is learnt from it."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.errors import InputError
from calibration.frame import Frame
from calibration.images import encode_png
from calibration.photometric import PHOTOMETRIC_FILE, Photometric, ReferencePatch, write_photometric
from calibration.recording import RecordingWriter
from trainer.data import Item, Pictures, Survey, folds, read_dataset, survey

GRAY = np.full((6, 8), 100, np.uint8)
COLOUR = np.full((6, 8, 3), 100, np.uint8)


def store(path: Path, pixels: np.ndarray = GRAY) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(pixels))
    return path


def surveyed(root: Path, bit_depth: int | None = None) -> Survey:
    dataset = read_dataset(root, bit_depth=bit_depth)
    return survey(dataset.good, Pictures(dataset.photometric))


@pytest.fixture
def mvtec(tmp_path: Path) -> Path:
    """Return a folder in the layout of MVTec AD."""
    root = tmp_path / "bottle"
    for name in ("train/good/10.png", "train/good/9.png", "test/good/1.png", "test/dent/1.png", "test/dent/2.png"):
        store(root / name)
    store(root / "ground_truth/dent/1_mask.png")
    return root


def test_a_plain_folder_is_good_images_in_natural_order(tmp_path: Path):
    for name in ("10.png", "9.png", "1.PNG"):
        store(tmp_path / "flange" / name)
    dataset = read_dataset(tmp_path / "flange")
    assert dataset.product == "flange"
    assert [item.name for item in dataset.good] == ["1.PNG", "9.png", "10.png"]
    assert {item.label for item in dataset.good} == {"good"}
    assert (dataset.test, dataset.notes, dataset.photometric.is_identity) == ((), (), True)


def test_the_layout_of_mvtec_ad_is_good_to_learn_from_and_labelled_to_test_on(mvtec: Path):
    dataset = read_dataset(mvtec)
    assert [item.name for item in dataset.good] == ["train/good/9.png", "train/good/10.png"]
    assert [(item.name, item.label) for item in dataset.test] == [
        ("test/dent/1.png", "dent"),
        ("test/dent/2.png", "dent"),
        ("test/good/1.png", "good"),
    ]
    assert [item.mask for item in dataset.test] == [mvtec / "ground_truth/dent/1_mask.png", None, None]


def test_labelled_defects_stand_beside_the_good_images_to_learn_from(mvtec: Path):
    store(mvtec / "train/dent/1.png")
    store(mvtec / "train/crack+dent/7.png")
    dataset = read_dataset(mvtec)
    assert [(item.name, item.label) for item in dataset.defects] == [
        ("train/crack+dent/7.png", "crack+dent"),
        ("train/dent/1.png", "dent"),
    ]
    assert [item.mask for item in dataset.defects] == [None, None]  # ground_truth/dent/1_mask.png is of test/dent/1.png
    assert {item.label for item in dataset.good} == {"good"}
    assert len(dataset.test) == 3


def test_a_layout_without_test_images_has_none(tmp_path: Path):
    store(tmp_path / "train/good/1.png")
    assert read_dataset(tmp_path).test == ()


def test_a_recording_brings_its_part_ids_its_bit_depth_and_its_correction(tmp_path: Path):
    root = tmp_path / "recording"
    writer = RecordingWriter(root)
    for number in (1, 2):
        pixels = np.full((6, 8), 4095 * number // 2, np.uint16)
        writer.append(Frame(pixels, number, number, 0, 0, 12, {"part_id": "A"}))
    write_photometric(root / PHOTOMETRIC_FILE, Photometric(dark=np.full((6, 8), 0.1, np.float32)))
    dataset = read_dataset(root)
    assert [(item.part_id, item.bit_depth) for item in dataset.good] == [("A", 12), ("A", 12)]
    pixels, _ = Pictures(dataset.photometric)(dataset.good[1])
    np.testing.assert_allclose(pixels, 0.9, atol=1e-6)


def test_pictures_read_again_are_the_same(tmp_path: Path):
    store(tmp_path / "1.png")
    (item,) = read_dataset(tmp_path).good
    pictures = Pictures(Photometric())
    first, depth = pictures(item)
    item.file.unlink()  # held in memory: an epoch reads no file twice
    again, _ = pictures(item)
    assert depth == 8
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", ["", "train/good"])
def test_an_empty_folder_is_refused(tmp_path: Path, name):
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=r": no good images found: put images \(\.png, \.jpg.*\) of good parts there$"):
        read_dataset(tmp_path)


def test_images_beside_folders_of_images_are_refused(tmp_path: Path):
    store(tmp_path / "1.png")
    store(tmp_path / "scratch/1.png")
    store(tmp_path / "dent/1.png")
    wanted = r"1 images found beside folders of images \(dent, scratch\): give one folder of good images only, or the"
    with pytest.raises(InputError, match=wanted):
        read_dataset(tmp_path)


def test_folders_of_images_alone_are_refused_too(tmp_path: Path):
    store(tmp_path / "good/1.png")
    with pytest.raises(InputError, match=r"0 images found beside folders of images \(good\)"):
        read_dataset(tmp_path)


def test_a_folder_without_images_beside_the_images_does_not_matter(tmp_path: Path):
    store(tmp_path / "1.png")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "shift.txt").touch()
    assert len(read_dataset(tmp_path).good) == 1


def test_what_is_no_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="none: not found: give a folder of images"):
        read_dataset(tmp_path / "none")
    with pytest.raises(InputError, match=r"1\.png: not a folder: give a folder of images"):
        read_dataset(store(tmp_path / "1.png"))


def test_files_that_are_no_images_are_left_out_with_a_note(tmp_path: Path):
    store(tmp_path / "1.png")
    for name in ("notes.txt", "Thumbs.db"):
        (tmp_path / name).touch()
    dataset = read_dataset(tmp_path)
    assert len(dataset.good) == 1
    assert dataset.notes == ("2 files are not images and were left out: Thumbs.db, notes.txt",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (encode_png(GRAY)[:-20], "the image is cut off"),
        (b"text", "not a readable image"),
    ],
)
def test_the_first_file_that_cannot_be_used_is_named(tmp_path: Path, content, reason):
    store(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(InputError, match=rf"2\.png: {reason}.*: copy it again or remove it"):
        surveyed(tmp_path)


def test_the_first_frame_under_a_fault_of_the_light_is_named(tmp_path: Path):
    for number, level in enumerate((200, 200, 20, 20)):
        store(tmp_path / f"{number}.png", np.full((6, 8), level, np.uint8))
    pictures = Pictures(Photometric(patch=ReferencePatch(0, 0, 4, 4, 0.8)))
    with pytest.raises(InputError, match=r"/2\.png: the reference patch reads 0\.078, should read 0\.800"):
        survey(read_dataset(tmp_path).good, pictures)


@pytest.mark.parametrize("folder", [b"test/d\xe9faut", b"train/d\xe9faut"])
def test_a_label_that_is_not_utf8_is_refused_before_it_ends_a_training(mvtec: Path, folder):
    store(mvtec / os.fsdecode(folder) / "1.png")
    with pytest.raises(
        InputError, match=r"the name of d\ufffdfaut is not UTF-8, need one that is: rename it"
    ) as refused:
        read_dataset(mvtec)
    str(refused.value).encode()  # can be printed


@pytest.mark.parametrize("image", ["1.png", "train/good/1.png"])
def test_a_product_that_is_not_utf8_is_refused_before_it_ends_a_training(tmp_path: Path, image):
    root = tmp_path / os.fsdecode(b"pr\xe9cis")
    store(root / image)
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        with pytest.raises(InputError, match=r"the name of pr\ufffdcis is not UTF-8, need one that is: rename it"):
            read_dataset(path)


def test_a_stranger_that_is_not_utf8_is_named_as_far_as_it_can_be(tmp_path: Path):
    store(tmp_path / "1.png")
    (tmp_path / os.fsdecode(b"pr\xe9cis.txt")).touch()
    assert read_dataset(tmp_path).notes == ("1 files are not images and were left out: pr\ufffdcis.txt",)


@pytest.mark.parametrize("folder", ["train/good", "train/dent", "test/good", "test/dent"])
def test_images_below_a_labelled_folder_are_not_passed_over(mvtec: Path, folder):
    store(mvtec / folder / "1.png")
    store(mvtec / folder / "line1/camera2/7.png")
    (mvtec / folder / "notes").mkdir()
    store(mvtec / folder / ".thumbnails/1.png")
    with pytest.raises(InputError, match=rf"{folder}: images found in folders below it \(line1\), which would be pass"):
        read_dataset(mvtec)
    shutil.rmtree(mvtec / folder / "line1")
    assert len(read_dataset(mvtec).good) > 0


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"part_pattern": r"\d+"}, "a recording names its parts itself: leave --part-pattern out"),
        ({"bit_depth": 10}, r"000001\.png: recorded with 12 bits, 10 were given: .* leave --bit-depth out"),
    ],
)
def test_what_a_recording_knows_itself_is_not_asked_of_the_user(tmp_path: Path, asked, reason):
    writer = RecordingWriter(tmp_path / "recording")
    writer.append(Frame(np.full((6, 8), 4000, np.uint16), 1, 1, 0, 0, 12))
    with pytest.raises(InputError, match=reason):
        read_dataset(tmp_path / "recording", **asked)
    (item,) = read_dataset(tmp_path / "recording", bit_depth=12).good  # as a recipe of 12 bits asks for
    assert item.bit_depth == 12


def test_images_of_one_size_and_kind_need_no_note(tmp_path: Path):
    for number in range(3):
        store(tmp_path / f"{number}.png")
    found = surveyed(tmp_path)
    assert (found.one_size, found.size, found.gray, found.colour) == (True, (6, 8), 3, 0)
    assert found.notes() == []


def test_sizes_that_differ_are_noted_with_their_range(tmp_path: Path):
    for number, (height, width) in enumerate([(6, 8), (6, 8), (4, 20), (9, 5)]):
        store(tmp_path / f"{number}.png", np.zeros((height, width), np.uint8))
    found = surveyed(tmp_path)
    assert not found.one_size
    assert found.size == (6, 8)
    (note,) = found.notes()
    assert note.startswith("the images have 3 sizes, from 5x4 to 20x9 px: each is stretched to the detector's size")


def test_mixed_gray_and_colour_is_noted(tmp_path: Path):
    store(tmp_path / "1.png", COLOUR)
    store(tmp_path / "2.png", GRAY)
    store(tmp_path / "3.png", GRAY)
    assert surveyed(tmp_path).notes() == [
        "2 gray and 1 colour images are mixed: all are used as colour; a station refuses gray frames"
    ]


@pytest.mark.parametrize(("brightest", "bits"), [(4095, 12), (1000, 10), (200, 9)])
def test_12_bit_pixels_in_16_bit_files_are_refused_until_the_depth_is_given(tmp_path: Path, brightest, bits):
    store(tmp_path / "1.png", np.full((6, 8), brightest, np.uint16))
    wanted = (
        rf"16-bit images whose brightest pixel is {brightest}: a {bits}-bit camera\? Give the sensor's depth with --b"
    )
    with pytest.raises(InputError, match=wanted):
        surveyed(tmp_path)
    assert surveyed(tmp_path, bit_depth=bits).gray == 1


def test_dark_images_of_a_true_16_bit_camera_are_taken_at_the_word_of_the_user(tmp_path: Path):
    store(tmp_path / "1.png", np.full((6, 8), 4095, np.uint16))
    assert surveyed(tmp_path, bit_depth=16).gray == 1


@pytest.mark.parametrize(("pixels", "bit_depth"), [(GRAY, 12), (np.full((6, 8), 4096, np.uint16), 12)])
def test_a_depth_that_does_not_fit_the_pixels_is_refused(tmp_path: Path, pixels, bit_depth):
    store(tmp_path / "1.png", pixels)
    wanted = (
        rf"1\.png: {8 * pixels.itemsize}-bit image whose brightest pixel is \d+, 12 bits were given: give the sensor"
    )
    with pytest.raises(InputError, match=wanted):
        surveyed(tmp_path, bit_depth=bit_depth)


@pytest.mark.parametrize(
    ("pattern", "parts"), [(r"part(\d+)_", ["7", "7", "12"]), (r"part\d+", ["part7", "part7", "part12"])]
)
def test_a_part_pattern_finds_the_part_id_in_a_file_name(tmp_path: Path, pattern, parts):
    for name in ("part7_left.png", "part7_right.png", "part12_left.png"):
        store(tmp_path / name)
    assert [item.part_id for item in read_dataset(tmp_path, part_pattern=pattern).good] == parts


@pytest.mark.parametrize("pattern", [r"serial(\d+)", r"part(X)?", r"X*"])
def test_a_part_pattern_that_finds_nothing_is_refused(tmp_path: Path, pattern):
    store(tmp_path / "part7_left.png")
    with pytest.raises(InputError, match=r"part7_left\.png: the part pattern .* finds nothing in its name: mend the p"):
        read_dataset(tmp_path, part_pattern=pattern)


def test_only_good_images_to_learn_from_need_a_part_number(mvtec: Path):
    """MVTec's test images are called 000.png: where a pattern finds nothing, each is a part of its own."""
    store(mvtec / "train/dent/1.png")
    dataset = read_dataset(mvtec, part_pattern=r"(?:9|10)")
    assert [item.part for item in dataset.good] == ["9", "10"]
    assert [item.part for item in dataset.test] == ["test/dent/1.png", "test/dent/2.png", "test/good/1.png"]
    assert [item.part for item in dataset.defects] == ["train/dent/1.png"]


def test_a_part_pattern_that_is_no_expression_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"part pattern '\(': missing \).*: give a regular expression"):
        read_dataset(tmp_path, part_pattern="(")


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=1, max_size=60),
    st.integers(2, 6),
    st.integers(0, 2**32 - 1),
)
def test_images_of_one_part_share_a_fold_and_folds_are_as_even_as_parts_allow(part_ids, count, seed):
    items = [Item(Path(f"{index}.png"), f"{index}.png", "good", part_id) for index, part_id in enumerate(part_ids)]
    fold = folds(items, count, seed)
    assert fold.shape == (len(items),)
    assert set(fold.tolist()) <= set(range(count))
    for part_id in ("a", "b", "c", "d"):
        assert len({int(fold[index]) for index, found in enumerate(part_ids) if found == part_id}) <= 1
    largest = max(Counter(part_id for part_id in part_ids if part_id).values(), default=1)
    sizes = np.bincount(fold, minlength=count)
    assert sizes.max() - sizes.min() <= largest
    np.testing.assert_array_equal(folds(items, count, seed), fold)


def test_another_seed_deals_the_folds_anew():
    items = [Item(Path(f"{index}.png"), f"{index}.png", "good") for index in range(40)]
    assert (folds(items, 5, 1) != folds(items, 5, 2)).any()
    assert np.bincount(folds(items, 5, 1)).tolist() == [8] * 5
