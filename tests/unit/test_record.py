"""What the publish process gets is what the inspect process decided."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.between.record import KINDS, MOST_DETAIL_CHARACTERS, Charge, Part, decoded, encoded
from agent.between.ring import Ring
from agent.publishing.messages import Origin
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition
from calibration.frame import Frame
from calibration.registration import Registration

MOST_BYTES = 8096
DICE = np.random.default_rng(5)
ORIGIN = Origin("cell7", "0123456789ab", "flange", "d" * 64, "openvino f32", simulated=False, on_no_verdict="pass")
CHARGE = Charge(ORIGIN, 0.25, good_median=0.04, good_deviation=0.01)
VERDICT = Verdict(
    trigger_id=2**40,
    outcome=Outcome.REJECT,
    reason=Reason.SCORE,
    detail='Kratzer "links"\n\u2028 \N{GRINNING FACE}',
    part_id="ü-17",
    score=0.1 + 0.2,
    threshold=1e-300,
    regions=(Region(1.5, 2.5, 3.0, 4.0, 5.0, 6.25, "thread"), Region(0.0, 0.0, 1.0, 1.0, 1.0, 0.1)),
    zones={"elsewhere": -0.25, "thread": 6.25},
    mm_per_px=0.125,
    registration=Registration(DICE.normal(size=(3, 3)), 0.123, 0.987, (640.5, 480.25)),
    condition=Condition(0.5, 0.1, 0.9, 0.002, 1.75),
    anomaly_map=DICE.normal(size=(12, 20)).astype(np.float32),
    picture=(DICE.integers(0, 256, (24, 40, 3)) / 255).astype(np.float32),
    cut=("heatmap", "scale"),
    stage_ms={"photometric": 0.5, "engine": 7.25},
    latency_ms=31.5,
    decided_ns=2**62,
)
FRAME = Frame(
    DICE.integers(0, 2**12, (30, 50)).astype(np.uint16),
    frame_id=11,
    trigger_id=2**40,
    exposed_ns=2**61,
    received_ns=2**60,
    bit_depth=12,
    facts={"part_id": "ü-17", "gain_db": 1.5, "lines": [1, None, True]},
)
PART = Part(VERDICT, FRAME, CHARGE, is_captured=True)


def through(part: Part, most_bytes: int = MOST_BYTES) -> Part:
    """Return what arrives."""
    data, pictures = encoded(part, most_bytes)
    assert len(data) <= most_bytes
    return decoded(data, [memoryview(bytes(picture)) for picture in pictures])


def assert_same(found: Any, wanted: Any, path: str = "part") -> None:
    """Compare all that there is, field by field, whatever the fields are called."""
    assert type(found) is type(wanted), path
    if is_dataclass(wanted):
        for field in fields(wanted):
            assert_same(getattr(found, field.name), getattr(wanted, field.name), f"{path}.{field.name}")
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype, path
        np.testing.assert_array_equal(found, wanted, err_msg=path)
    elif isinstance(wanted, tuple):
        assert len(found) == len(wanted), path
        for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{path}[{place}]")
    elif isinstance(wanted, float) and math.isnan(wanted):
        assert math.isnan(found), path
    else:
        assert found == wanted, path


def test_every_field_arrives_as_it_was():
    assert_same(through(PART), PART)


def test_the_example_above_leaves_no_field_at_its_default():
    """Else a field that nobody carries over would not be missed."""
    for part in (VERDICT, FRAME, CHARGE, PART):
        for field in fields(part):
            if field.default is not dataclasses.MISSING:
                assert getattr(part, field.name) is not field.default, field.name
            if field.default_factory is not dataclasses.MISSING:
                assert getattr(part, field.name) != field.default_factory(), field.name


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.SCORE])
def test_a_part_without_verdict_and_without_anything_else_arrives(reason):
    part = Part(Verdict(1, Outcome.NO_VERDICT, reason), None, replace(CHARGE, good_median=None))
    assert_same(through(part), part)


@pytest.mark.parametrize(
    "left_out", ["registration", "condition", "anomaly_map", "picture", "latency_ms", "decided_ns"]
)
def test_what_was_not_measured_arrives_as_none(left_out):
    part = replace(PART, verdict=replace(VERDICT, **{left_out: None}))
    assert_same(through(part), part)


@pytest.mark.parametrize(
    "pixels",
    [
        DICE.integers(0, 256, (30, 50)).astype(np.uint8),
        DICE.integers(0, 256, (30, 50, 3)).astype(np.uint8),
        DICE.integers(0, 2**16, (30, 50, 3)).astype(np.uint16),
        DICE.random((30, 50)).astype(np.float32),
        DICE.integers(0, 2**16, (30, 50)).astype(">u2"),
        DICE.integers(0, 256, (60, 100, 3)).astype(np.uint8)[::2, ::2, ::-1],
    ],
    ids=["gray", "colour", "16-bit", "float", "big-endian", "not-contiguous"],
)
def test_pixels_of_every_kind_arrive_bit_by_bit(pixels):
    part = replace(PART, frame=replace(FRAME, pixels=pixels))
    assert_same(through(part), part)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0, 3)])
def test_an_empty_picture_is_none(shape):
    empty = np.zeros(shape, np.float32)
    verdict = replace(VERDICT, anomaly_map=empty, picture=empty)
    found = through(replace(PART, verdict=verdict, frame=replace(FRAME, pixels=empty)))
    assert (found.verdict.anomaly_map, found.verdict.picture, found.frame) == (None, None, None)
    assert found.verdict.score == VERDICT.score


def test_numbers_that_are_none_arrive_too():
    nan, inf = math.nan, math.inf
    anomaly_map = np.array([[nan, inf, -inf, 0]], np.float32)
    verdict = replace(VERDICT, score=nan, threshold=inf, latency_ms=-inf, anomaly_map=anomaly_map)
    part = replace(PART, verdict=verdict)
    assert_same(through(part), part)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_picture_for_people_is_half_a_gray_level_off_at_most(levels):
    picture = np.array([levels], np.float32)
    found = through(replace(PART, verdict=replace(VERDICT, picture=picture))).verdict.picture
    wanted = np.clip(np.nan_to_num(picture), 0, 1)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() <= 0.5 / 255 + 1e-6


def test_numbers_of_numpy_are_told_as_numbers():
    verdict = replace(VERDICT, score=np.float32(0.5), latency_ms=np.float64(2.5), trigger_id=np.int64(7))
    found = through(replace(PART, verdict=verdict)).verdict
    assert (found.score, found.latency_ms, found.trigger_id) == (0.5, 2.5, 7)


def test_a_long_detail_is_cut():
    found = through(replace(PART, verdict=replace(VERDICT, detail="x" * 10_000)))
    assert found.verdict.detail == "x" * MOST_DETAIL_CHARACTERS
    assert found.frame.facts == FRAME.facts


def with_huge_facts() -> Part:
    return replace(PART, frame=replace(FRAME, facts={"log": "x" * MOST_BYTES}))


def endless() -> dict[str, Any]:
    facts: dict[str, Any] = {}
    facts["self"] = facts
    return facts


@pytest.mark.parametrize("facts", [{"log": "x" * MOST_BYTES}, {"what": object()}, {(1, 2): 3}, endless()])
def test_facts_that_are_too_long_or_no_json_are_left_behind_and_nothing_else(facts):
    found = through(replace(PART, frame=replace(FRAME, facts=facts)))
    assert_same(found, replace(PART, frame=replace(FRAME, facts={})))


def test_of_too_many_regions_the_first_is_kept():
    many = tuple(replace(VERDICT.regions[0], peak=float(place)) for place in range(2000))
    found = through(replace(with_huge_facts(), verdict=replace(VERDICT, regions=many)))
    assert_same(found, replace(PART, frame=replace(FRAME, facts={}), verdict=replace(VERDICT, regions=many[:1])))


def test_a_huge_part_id_is_left_behind_and_outcome_and_score_stay():
    found = through(replace(PART, verdict=replace(VERDICT, part_id="x" * 10_000)))
    assert found.verdict.part_id is None
    assert "shorten the part's id. Kratzer" in found.verdict.detail
    told = (found.verdict.outcome, found.verdict.reason, found.verdict.score, found.verdict.decided_ns)
    assert told == (VERDICT.outcome, VERDICT.reason, VERDICT.score, VERDICT.decided_ns)
    assert_same(found.verdict.registration, VERDICT.registration)
    assert_same(found.verdict.anomaly_map, VERDICT.anomaly_map)


def test_a_charge_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match=rf"bytes found, a record holds {MOST_BYTES}"):
        encoded(replace(PART, charge=replace(CHARGE, origin=replace(ORIGIN, station="x" * MOST_BYTES))), MOST_BYTES)


TEXT = st.text(max_size=3000)


@given(
    detail=TEXT, part_id=st.none() | TEXT, facts=st.dictionaries(TEXT, TEXT, max_size=4), regions=st.integers(0, 300)
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_record_is_never_longer_than_it_may_be_and_says_the_outcome(detail, part_id, facts, regions):
    verdict = replace(VERDICT, detail=detail, part_id=part_id, regions=VERDICT.regions[:1] * regions)
    found = through(replace(PART, verdict=verdict, frame=replace(FRAME, facts=facts)))
    assert (found.verdict.outcome, found.verdict.score) == (VERDICT.outcome, VERDICT.score)
    assert found.verdict.part_id in (None, part_id)
    assert_same(found.frame.pixels, FRAME.pixels)


def test_through_a_ring_the_arrays_are_views_into_it():
    ring = Ring.make(slots=2, slot_bytes=8192, picture_bytes=2**16)
    data, pictures = encoded(PART, ring.most_bytes)
    assert ring.write(data, pictures)
    (record,) = ring.read(1)
    found = decoded(record.data, record.pictures)
    assert_same(found, PART)
    assert not found.frame.pixels.flags.owndata
    assert not found.verdict.anomaly_map.flags.owndata


def broken() -> list[bytes]:
    data = encoded(PART, MOST_BYTES)[0]
    told = json.loads(data)
    without = [{key: value for key, value in told.items() if key != name} for name in told]
    verdicts = [{**told, "verdict": {**told["verdict"], "outcome": "perhaps"}}, {**told, "verdict": 3}]
    shapes = [{**told, "pictures": [[*told["pictures"][0][:2], [7, 7]], *told["pictures"][1:]]}]
    return [b"", b"{", b"[]", b"3", data[:-1], *(json.dumps(one).encode() for one in (*without, *verdicts, *shapes))]


@pytest.mark.parametrize("data", broken())
def test_what_is_no_record_is_refused(data):
    pictures = [memoryview(bytes(picture)) for picture in encoded(PART, MOST_BYTES)[1]]
    with pytest.raises((ValueError, KeyError, TypeError)):
        decoded(data, pictures)


def test_pictures_come_in_the_order_of_their_kinds():
    data, pictures = encoded(PART, MOST_BYTES)
    assert [name for name, _, _ in json.loads(data)["pictures"]] == list(KINDS)
    assert [len(picture) for picture in pictures] == [12 * 20 * 4, 24 * 40 * 3, 30 * 50 * 2]
