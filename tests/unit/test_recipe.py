"""A recipe comes back as it was written; one that was damaged, changed or made by a stranger is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import GraphProto, ModelProto, TensorProto

from calibration.condition import ConditionLimits
from calibration.errors import InputError, RecipeError
from calibration.images import encode_png
from calibration.preprocess import Rectangle, View
from calibration.recipe import Recipe, read_recipe, write_recipe
from calibration.recipe_file import FOR_PEOPLE, MANIFEST, MEMBERS, SEAL, members_digest
from calibration.zones import ELSEWHERE, Zones
from tests.recipes import bracket, tiny_answer, tiny_graph, tiny_recipe, tiny_reference, write_tiny_recipe

CONDITION = ConditionLimits(0.2, 0.5, 0.05, 0.8, 0.1, 1.5)
BLOCK = 512  # bytes: tar headers and members start at multiples of it


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    """Return the bytes of a registered recipe with two graphs and zones: it has every member there is."""
    path = tmp_path_factory.mktemp("recipe") / "full.recipe"
    write_tiny_recipe(path, reference=tiny_reference((60, 80)), zones=zones(), **of_format_2())
    return path.read_bytes()


def of_format_2() -> dict[str, Any]:
    """Return what recipes have since format 2: a graph in half precision, here another one, and whole maps."""
    recipe = tiny_recipe()
    maps = np.stack([tiny_answer(batch[None])[0][None] for batch in recipe.selftest.batches])
    return {
        "graph_f16": tiny_graph(recipe.view, level=0.4),
        "selftest": dataclasses.replace(recipe.selftest, maps=maps),
    }


def zones(**changes: Any) -> Zones:
    """Return two zones and elsewhere on the 4 x 4 cells of a tiny recipe's map."""
    cells = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2]], np.uint8)
    return Zones(**{"names": (ELSEWHERE, "thread", "label 2"), "cells": cells, "gain": 0.5, "offset": -0.1, **changes})


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    """Return a function that stores bytes as a recipe."""

    def write(content: bytes) -> Path:
        (tmp_path / "x.recipe").write_bytes(content)
        return tmp_path / "x.recipe"

    return write


def entries(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()


def unpacked(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def packed(members: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    """Return a tar of members, then of extra entries without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in extra:
            archive.addfile(entry)
    return buffer.getvalue()


def with_manifest(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return the recipe with a changed manifest that is sealed anew: what a stranger could make."""
    members = unpacked(data)
    manifest = json.loads(members[MANIFEST])
    change(manifest)
    manifest.pop(SEAL, None)
    manifest[SEAL] = hashlib.sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()).hexdigest()
    return packed({**members, MANIFEST: json.dumps(manifest).encode()})


def with_member(data: bytes, name: str, *, replace: bool = False, **values: Any) -> bytes:
    """Return the recipe with values in one JSON member, in place of what it held or beside it, sealed anew."""
    return with_content(
        data, {name: json.dumps(values if replace else {**json.loads(unpacked(data)[name]), **values}).encode()}
    )


def with_content(data: bytes, contents: dict[str, bytes]) -> bytes:
    """Return the recipe with other members of these names, sealed anew."""

    def listed_anew(manifest: dict[str, Any]) -> None:
        listed = manifest["members"]
        for name, content in contents.items():
            listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["digest"] = members_digest(listed, [name for name in listed if name not in FOR_PEOPLE])

    return with_manifest(packed({**unpacked(data), **contents}), listed_anew)


def link(name: str, kind: bytes, target: str = "thresholds.json") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def assert_same(found: Recipe, recipe: Recipe) -> None:
    for field in dataclasses.fields(Recipe):
        if field.name not in ("selftest", "reference", "zones", "detector_digest"):
            assert getattr(found, field.name) == getattr(recipe, field.name), field.name
    assert (found.zones is None) == (recipe.zones is None)
    if found.zones is not None:
        np.testing.assert_array_equal(found.zones.cells, recipe.zones.cells)
        assert dataclasses.replace(found.zones, cells=0) == dataclasses.replace(recipe.zones, cells=0)
    np.testing.assert_array_equal(found.selftest.batches, recipe.selftest.batches)
    assert found.selftest.scores == recipe.selftest.scores
    assert found.selftest.map_peaks == recipe.selftest.map_peaks
    assert (found.selftest.maps is None) == (recipe.selftest.maps is None)
    if found.selftest.maps is not None:
        np.testing.assert_array_equal(found.selftest.maps, recipe.selftest.maps)


@pytest.mark.parametrize("region", [None, Rectangle(4, 8, 16, 24)])
def test_a_recipe_comes_back_as_it_was_written(tmp_path: Path, region):
    view = View(16, 16, colour=True, reference_size=(40, 50), fixed_size=False, region=region, gamma=2.2)
    written = write_tiny_recipe(tmp_path / "x.recipe", view=view, training={"seed": 3, "why": "ä"}, report="<p>Ö</p>")
    assert_same(read_recipe(tmp_path / "x.recipe"), written)
    assert [path.name for path in tmp_path.iterdir()] == ["x.recipe"]


def test_a_reference_comes_back_and_registers_alike(tmp_path: Path):
    reference = tiny_reference()
    write_tiny_recipe(tmp_path / "x.recipe", reference=reference)
    found = read_recipe(tmp_path / "x.recipe").reference
    np.testing.assert_array_equal(found.image, reference.image)
    np.testing.assert_array_equal(found.weight, reference.weight)
    assert found.settings == reference.settings
    assert (found.min_similarity, found.max_residual_px) == (reference.min_similarity, reference.max_residual_px)
    picture = np.ascontiguousarray(np.rot90(bracket(), 2))
    np.testing.assert_array_equal(
        found.register(picture).reference_from_image, reference.register(picture).reference_from_image
    )


def test_limits_of_light_and_focus_come_back_and_decide_verdicts(tmp_path: Path):
    plain, limited = write_tiny_recipe(tmp_path / "a"), write_tiny_recipe(tmp_path / "b", condition=CONDITION)
    assert read_recipe(tmp_path / "b").condition == CONDITION
    assert limited.digest != plain.digest
    assert read_recipe(tmp_path / "a").detector_digest != read_recipe(tmp_path / "b").detector_digest


def test_a_recipe_from_before_these_limits_reads_and_keeps_its_detector_digest(tmp_path: Path):
    write_tiny_recipe(tmp_path / "a")
    before = read_recipe(tmp_path / "a")
    assert "condition" not in json.loads(unpacked((tmp_path / "a").read_bytes())["preparation.json"])
    assert before.condition is None
    write_recipe(tmp_path / "b", dataclasses.replace(before, product="renamed"))
    assert read_recipe(tmp_path / "b").detector_digest == before.detector_digest


@pytest.mark.parametrize(
    "change",
    [
        {"least_brightness": -0.1},
        {"least_brightness": 0.6},  # above the most
        {"most_brightness": 1.5},
        {"dark_level": "0.1"},
        {"bright_level": None},
        {"most_saturated_share": -1.0},
        {"least_sharpness": -1.0},
        {"colour": 0.5},
    ],
)
def test_limits_that_cannot_be_are_refused(data: bytes, written, change):
    values = {**dataclasses.asdict(CONDITION), **change}
    with pytest.raises(RecipeError):
        read_recipe(written(with_member(data, "preparation.json", condition=values)))


def test_limits_that_lack_one_are_refused(data: bytes, written):
    values = dataclasses.asdict(CONDITION)
    assert read_recipe(written(with_member(data, "preparation.json", condition=values))).condition == CONDITION
    del values["dark_level"]
    with pytest.raises(RecipeError):
        read_recipe(written(with_member(data, "preparation.json", condition=values)))


def test_thresholds_from_before_they_told_their_good_scores_read_as_none(data: bytes, written):
    thresholds = json.loads(unpacked(data)["thresholds.json"])
    old = {name: value for name, value in thresholds.items() if not name.startswith("good_")}
    assert len(thresholds) == len(old) + 2
    found = read_recipe(written(with_member(data, "thresholds.json", replace=True, **old))).thresholds
    assert (found.good_median, found.good_deviation) == (None, None)


@pytest.mark.parametrize("change", [{"good_median": 0.1}, {"good_median": 0.1, "good_deviation": -1.0}])
def test_half_a_statement_on_the_good_scores_is_refused(data: bytes, written, change):
    with pytest.raises(RecipeError):
        read_recipe(written(with_member(data, "thresholds.json", **change)))


@pytest.mark.parametrize(
    "change",
    [
        {"map": 0},
        {"map": -1.0},
        {"score": 10**400},
        {"false_reject_rate": -0.01},
        {"rate_upper_bound": 5.0},
    ],
)
def test_thresholds_that_cannot_be_are_refused(data: bytes, written, change):
    with pytest.raises(RecipeError, match=r"x\.recipe: a member does not hold what format 3 says"):
        read_recipe(written(with_member(data, "thresholds.json", **change)))


@pytest.mark.parametrize("size", [(30, 40), (1, 1), (6, 5000)])
def test_a_reference_of_another_size_than_the_view_is_refused(data: bytes, written, size):
    image = encode_png(bracket(size) if min(size) > 1 else np.full(size, 128, np.uint8))
    weight = encode_png(np.full(size, 255, np.uint8))
    changed = with_content(data, {"reference.png": image, "weight.png": weight})
    with pytest.raises(RecipeError, match=rf"reference\.png: \({size[0]}, {size[1]}\) for a view of \(60, 80\) found"):
        read_recipe(written(changed))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (6, 5000)])
def test_a_reference_too_small_to_be_one_is_refused(data: bytes, written, size):
    image, weight = (encode_png(np.full(size, level, np.uint8)) for level in (128, 255))
    view = {**json.loads(unpacked(data)["preparation.json"])["view"], "reference_size": size}
    changed = with_member(
        with_content(data, {"reference.png": image, "weight.png": weight}), "preparation.json", view=view
    )
    with pytest.raises(RecipeError, match=r"x\.recipe: a member does not hold what format 3 says"):
        read_recipe(written(changed))


def test_two_graphs_and_whole_maps_come_back(tmp_path: Path):
    recipe = write_tiny_recipe(tmp_path / "x.recipe", **of_format_2())
    found = read_recipe(tmp_path / "x.recipe")
    assert_same(found, recipe)
    assert found.graph_f16 not in (None, found.graph)
    assert found.selftest.maps.shape == (2, 1, 4, 4)


def test_a_recipe_without_what_newer_formats_brought_is_written_for_older_versions_too(tmp_path: Path):
    write_tiny_recipe(tmp_path / "a", mm_per_px=0.1)
    write_tiny_recipe(tmp_path / "b", graph_f16=tiny_recipe().graph)
    write_tiny_recipe(tmp_path / "c", zones=zones(), **of_format_2())
    formats = [json.loads(unpacked((tmp_path / name).read_bytes())[MANIFEST])["format"] for name in "abc"]
    assert formats == [1, 2, 3]


def test_zones_come_back_and_are_part_of_the_detector(tmp_path: Path):
    zoned = write_tiny_recipe(tmp_path / "x", zones=zones(), **of_format_2())
    plain = write_tiny_recipe(tmp_path / "y", **of_format_2())
    found = read_recipe(tmp_path / "x")
    assert_same(found, zoned)
    assert found.zones.scores(np.arange(16, dtype=np.float32).reshape(4, 4)) == {
        "elsewhere": 0.5 * 11 - 0.1,
        "thread": 0.5 * 7 - 0.1,
        "label 2": 0.5 * 15 - 0.1,
    }
    assert zoned.digest != plain.digest
    assert found.detector_digest != read_recipe(tmp_path / "y").detector_digest


@pytest.mark.parametrize(
    "change",
    [
        {"names": ("thread", "elsewhere", "label")},
        {"names": ("elsewhere", "thread", "thread")},
        {"names": ("elsewhere", "thread", "a/b")},
        {"names": ("elsewhere", "thread")},  # zone 2 has no name
        {"gain": 0.0},
        {"gain": "0.5"},
        {"cells": np.zeros((4, 5), np.uint8)},
    ],
    ids=str,
)
def test_zones_that_cannot_be_are_refused(tmp_path: Path, change):
    write_tiny_recipe(tmp_path / "x", zones=zones(**change), **of_format_2())
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "x")


def test_zones_without_their_cells_or_with_more_keys_are_refused(data: bytes, written):
    told = json.loads(unpacked(data)["preparation.json"])["zones"]
    assert read_recipe(written(with_member(data, "preparation.json", zones=told))).zones is not None
    for strange in (None, {**told, "colour": 1}, {"names": told["names"]}):
        with pytest.raises(RecipeError):
            read_recipe(written(with_member(data, "preparation.json", zones=strange)))


def test_the_scale_comes_back_and_decides_no_verdict(tmp_path: Path):
    plain, measured = write_tiny_recipe(tmp_path / "a"), write_tiny_recipe(tmp_path / "b", mm_per_px=0.125)
    assert read_recipe(tmp_path / "b").mm_per_px == 0.125
    assert read_recipe(tmp_path / "a").mm_per_px is None
    assert measured.digest == plain.digest


@pytest.mark.parametrize("scale", [0, -1.0, 1e9, "0.1", True, [0.1]])
def test_a_scale_that_cannot_be_is_refused(data: bytes, written, scale):
    with pytest.raises(RecipeError):
        read_recipe(written(with_manifest(data, lambda manifest: manifest.update(mm_per_px=scale))))


@pytest.mark.parametrize(
    ("product", "told"),
    [
        ("", "product '' of 0 characters found, need 1 to 200"),
        ("x" * 201, "of 201 characters found, need 1 to 200"),
        ("a\nb", r"product 'a\\nb' .* none of them a control character"),
        ("a\u2028b", "none of them a control character"),
        ("a\x1b[2Jb", "none of them a control character"),
    ],
)
def test_a_name_of_a_product_that_no_recipe_holds_is_neither_written_nor_read(
    data: bytes, written, tmp_path: Path, product: str, told: str
):
    with pytest.raises(InputError, match=told):
        write_recipe(tmp_path / "a.recipe", tiny_recipe(product=product))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match=told):
        read_recipe(written(with_manifest(data, lambda manifest: manifest.update(product=product))))


@pytest.mark.parametrize(("key", "value"), [("product", 7), ("product", None), ("detector", ""), ("detector", 7)])
def test_a_name_that_is_none_is_refused(data: bytes, written, key: str, value: object):
    with pytest.raises(RecipeError, match="a member does not hold what format 3 says"):
        read_recipe(written(with_manifest(data, lambda manifest: manifest.update({key: value}))))


@pytest.mark.parametrize("product", ["x" * 200, "Flansch \u00e4\u00a0\u4e2d [blau]", "a/b:c"])
def test_any_text_of_200_characters_is_a_name_of_a_product(tmp_path: Path, product: str):
    write_tiny_recipe(tmp_path / "a.recipe", product=product)
    assert read_recipe(tmp_path / "a.recipe").product == product


def test_a_half_precision_graph_that_names_other_files_is_refused(tmp_path: Path):
    tensor = TensorProto(name="level", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    model = ModelProto(graph=GraphProto(name="x", initializer=[tensor]))
    write_tiny_recipe(tmp_path / "x", graph_f16=model.SerializeToString())
    with pytest.raises(RecipeError, match="takes weights from another file"):
        read_recipe(tmp_path / "x")


@pytest.mark.parametrize(
    "maps", [np.zeros((1, 1, 4, 4)), np.zeros((2, 2, 4, 4)), np.zeros((2, 1, 0, 4)), np.full((2, 1, 4, 4), np.nan)]
)
def test_maps_that_are_none_of_the_self_test_are_refused(tmp_path: Path, maps):
    selftest = dataclasses.replace(tiny_recipe().selftest, maps=maps.astype(np.float32))
    write_tiny_recipe(tmp_path / "x", selftest=selftest)
    with pytest.raises(RecipeError, match=r"selftest_maps\.npy"):
        read_recipe(tmp_path / "x")


def test_the_same_inputs_give_the_same_digest(tmp_path: Path):
    first = write_recipe(tmp_path / "a", tiny_recipe(reference=tiny_reference()))
    second = write_recipe(tmp_path / "b", tiny_recipe(reference=tiny_reference()))
    assert first == second == read_recipe(tmp_path / "a").digest
    assert len(first) == 64


def test_what_is_for_people_does_not_change_the_digest(tmp_path: Path):
    plain = write_tiny_recipe(tmp_path / "a")
    told = write_tiny_recipe(tmp_path / "b", report="<h1>other</h1>", metrics={"auroc": 1.0}, training={"seed": 9})
    assert told.digest == plain.digest


def test_what_decides_verdicts_changes_the_digest(tmp_path: Path):
    recipe = tiny_recipe()
    changes = {
        "graph": tiny_recipe(level=0.4).graph,
        "graph_f16": tiny_recipe(level=0.4).graph,
        "view": dataclasses.replace(recipe.view, gamma=2.0),
        "reference": tiny_reference(),
        "thresholds": dataclasses.replace(recipe.thresholds, score=0.11),
        "selftest": dataclasses.replace(recipe.selftest, scores=(0.0, 0.0)),
    }
    digests = {write_recipe(tmp_path / "x", dataclasses.replace(recipe, **{name: changes[name]})) for name in changes}
    assert len(digests | {write_recipe(tmp_path / "x", recipe)}) == 7


def test_new_thresholds_leave_the_detector_digest(tmp_path: Path):
    path = tmp_path / "x"
    recipe = tiny_recipe()
    write_recipe(path, recipe)
    before = read_recipe(path)
    write_recipe(path, dataclasses.replace(recipe, thresholds=dataclasses.replace(recipe.thresholds, score=0.3)))
    after = read_recipe(path)
    assert after.digest != before.digest
    assert after.detector_digest == before.detector_digest
    write_recipe(path, tiny_recipe(level=0.4))
    assert read_recipe(path).detector_digest != before.detector_digest


def test_the_file_holds_the_members_that_its_description_names(data: bytes):
    first, *others = [entry.name for entry in entries(data)]
    assert first == MANIFEST
    assert sorted(others) == sorted(MEMBERS)


@pytest.mark.parametrize("member", [MANIFEST, *MEMBERS])
def test_one_flipped_bit_in_any_member_is_refused(data: bytes, written, member):
    (entry,) = (entry for entry in entries(data) if entry.name == member)
    places = [0, entry.size - 1, *random.Random(8).sample(range(entry.size), min(12, entry.size))]
    for place in places:
        damaged = bytearray(data)
        damaged[entry.offset_data + place] ^= 1
        wanted = "manifest" if member == MANIFEST else rf"{member} was changed after the recipe was written: fetch it"
        with pytest.raises(RecipeError, match=rf"x\.recipe: .*{wanted}"):
            read_recipe(written(damaged))


def test_any_flipped_byte_is_refused_or_changes_nothing(data: bytes, written):
    generator = random.Random(9)
    whole = read_recipe(written(data))
    headers = [entry.offset + generator.randrange(BLOCK) for entry in entries(data) for _ in range(12)]
    for place in headers + generator.sample(range(len(data)), 60):
        damaged = bytearray(data)
        damaged[place] ^= generator.randrange(1, 256)
        try:
            found = read_recipe(written(damaged))
        except RecipeError:
            continue
        assert_same(found, whole)


def test_a_file_cut_anywhere_before_its_end_is_refused(data: bytes, written):
    last = entries(data)[-1]
    end = last.offset_data + last.size  # what follows is padding
    edges = [entry.offset for entry in entries(data)] + [entry.offset_data for entry in entries(data)]
    lengths = {0, 1, 100, end - 1, *edges, *random.Random(10).sample(range(end), 60)}
    for length in sorted(lengths):
        with pytest.raises(RecipeError, match=r"x\.recipe: .*(copy it again|fetch it again|is not manifest)"):
            read_recipe(written(data[:length]))


def test_a_newer_format_is_refused_with_the_way_out(data: bytes, written):
    path = written(with_manifest(data, lambda manifest: manifest.update(format=4)))
    with pytest.raises(RecipeError, match=r"recipe format 4 found, this taktsight reads up to 3: update taktsight$"):
        read_recipe(path)


def test_a_member_that_the_manifest_does_not_list_is_refused(data: bytes, written):
    path = written(packed({**unpacked(data), "extra.py": b"print()"}))
    with pytest.raises(RecipeError, match=r"'extra\.py' is not a member that its manifest lists once: do not use it"):
        read_recipe(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../thresholds.json", "./thresholds.json"])
def test_a_path_in_place_of_a_member_name_is_refused(data: bytes, written, name):
    with pytest.raises(RecipeError, match="is not a member that its manifest lists once"):
        read_recipe(written(packed({**unpacked(data), name: b"{}"})))


@pytest.mark.parametrize("name", ["extra.py", "/etc/passwd"])
def test_a_member_of_unknown_name_is_refused_even_where_the_manifest_lists_it(data: bytes, written, name):
    def list_it(manifest: dict[str, Any]) -> None:
        manifest["members"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}

    with pytest.raises(RecipeError, match=rf"unknown members \['{name}'\]"):
        read_recipe(written(with_manifest(data, list_it)))


def test_a_member_given_twice_is_refused(data: bytes, written):
    twice = data[: entries(data)[-1].offset] + packed({"thresholds.json": unpacked(data)["thresholds.json"]})
    with pytest.raises(RecipeError, match=r"'thresholds\.json' is not a member that its manifest lists once"):
        read_recipe(written(twice))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("name", ["report.html", MANIFEST])
def test_a_link_a_folder_or_a_device_is_refused(data: bytes, written, kind, name):
    members = {key: value for key, value in unpacked(data).items() if key != name}
    path = written(packed({} if name == MANIFEST else members, link(name, kind)))
    with pytest.raises(RecipeError, match=r"not a member that its manifest lists once|first member is not manifest"):
        read_recipe(path)


@pytest.mark.parametrize("name", sorted(set(MEMBERS) - {"detector.onnx"}))
def test_a_member_left_out_is_named(data: bytes, written, name):
    members = {key: value for key, value in unpacked(data).items() if key != name}
    with pytest.raises(RecipeError, match=rf"x\.recipe: {name} missing, the file is cut off: copy it again"):
        read_recipe(written(packed(members)))


def test_a_manifest_without_a_required_member_is_refused(data: bytes, written):
    path = written(with_manifest(data, lambda manifest: manifest["members"].pop("detector.onnx")))
    with pytest.raises(RecipeError, match=r"required members absent \['detector\.onnx'\]: fetch it again"):
        read_recipe(path)


@pytest.mark.parametrize("key", ["product", "detector", "training", "digest", "written_utc", SEAL])
def test_an_edited_manifest_is_refused(data: bytes, written, key):
    members = unpacked(data)
    manifest = json.loads(members[MANIFEST])
    edited = {**manifest, key: "other"}
    without = {name: value for name, value in manifest.items() if name != key}
    for changed in (edited, without):
        with pytest.raises(RecipeError, match="its manifest was changed after it was written: fetch it again"):
            read_recipe(written(packed({**members, MANIFEST: json.dumps(changed).encode()})))


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{}", b"null", b'{"format": 1}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_none_is_refused(data: bytes, written, manifest):
    with pytest.raises(RecipeError, match=r"its manifest is damaged .*: fetch it again"):
        read_recipe(written(packed({**unpacked(data), MANIFEST: manifest})))


def test_a_well_sealed_recipe_with_foreign_contents_is_refused(data: bytes, written):
    members = unpacked(data)
    members["thresholds.json"] = b'{"colour": "red"}'
    manifest = json.loads(members[MANIFEST])
    listed = manifest["members"]
    listed["thresholds.json"]["bytes"] = len(members["thresholds.json"])
    listed["thresholds.json"]["sha256"] = hashlib.sha256(members["thresholds.json"]).hexdigest()
    digests = {name: listed[name]["sha256"] for name in listed if name not in FOR_PEOPLE}
    manifest["digest"] = hashlib.sha256(json.dumps(digests, indent=1, sort_keys=True).encode()).hexdigest()
    path = written(with_manifest(packed({**members, MANIFEST: json.dumps(manifest).encode()}), lambda _: None))
    with pytest.raises(RecipeError, match="a member does not hold what format 3 says"):
        read_recipe(path)


def test_a_claimed_size_beyond_the_file_reads_no_further_than_the_file(data: bytes, written):
    entry = entries(data)[0]
    entry.size = 2**32
    with pytest.raises(RecipeError, match=r"manifest\.json claims 4294967296 bytes, at most 16777216 are read"):
        read_recipe(written(entry.tobuf(tarfile.USTAR_FORMAT) + data[BLOCK:]))


@pytest.mark.parametrize("content", [b"", b"not a recipe", b"\0" * 10240, b"PK\x03\x04" + b"\0" * 600])
def test_another_file_is_refused(written, content):
    with pytest.raises(RecipeError, match=r"x\.recipe: not a recipe"):
        read_recipe(written(content))


def test_a_path_that_is_not_there_or_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="No such file or directory: give the path of a recipe"):
        read_recipe(tmp_path / "none.recipe")
    with pytest.raises(RecipeError, match="Is a directory: give the path of a recipe"):
        read_recipe(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on a file system of 64 KiB; skips where we may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "taktsight-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_recipe_and_nothing_half_written(small_disk: Path):
    path = small_disk / "x.recipe"
    old = write_tiny_recipe(path)
    with pytest.raises(RecipeError, match=r"No space left on device: nothing was changed, an older recipe there is in"):
        write_recipe(path, tiny_recipe(report="x" * 100_000))
    assert [found.name for found in small_disk.iterdir()] == ["x.recipe"]
    assert_same(read_recipe(path), old)


def test_a_disk_that_fails_while_flushing_leaves_the_old_recipe(tmp_path: Path, monkeypatch):
    path = tmp_path / "x.recipe"
    old = write_tiny_recipe(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match="No space left on device: nothing was changed"):
        write_recipe(path, tiny_recipe(level=0.4))
    assert [found.name for found in tmp_path.iterdir()] == ["x.recipe"]
    assert_same(read_recipe(path), old)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="No such file or directory: nothing was changed"):
        write_recipe(tmp_path / "none" / "x.recipe", tiny_recipe())
