"""Every message that the code can make keeps to its published schema, and to no looser one."""

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from agent.clock import Stamp
from agent.publishing.messages import (
    LINE_ACTION_FOR_POLICY,
    STATES,
    Alarm,
    HeatmapPayload,
    Origin,
    missing_message,
    numbered,
    status_message,
    verdict_message,
)
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition
from calibration.registration import Registration
from tests.schemas import INTERFACE, closed, faults, schema

NAMES = sorted(path.name.removesuffix(".schema.json") for path in INTERFACE.glob("*.schema.json"))
VERDICT = closed(schema("verdict"))
NOON = Stamp(datetime(2026, 11, 22, 12, tzinfo=UTC), 1500.25, 0.0, True)
EPOCH = "5f0c61a2b9de"
ANSWERS = [
    (outcome, reason)
    for outcome in Outcome
    for reason in Reason
    if (outcome is Outcome.NO_VERDICT) != (reason is Reason.SCORE)
]
DIGEST = "0123456789abcdef" * 4
ORIGIN = Origin("cell7", "0123456789ab", "bottle", DIGEST, "onnx", simulated=False, on_no_verdict="reject")

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
lengths = st.floats(min_value=0, max_value=1e6)
any_number = st.floats()
registrations = st.builds(
    lambda angle, x, y, residual, similarity: Registration(
        np.array([[np.cos(angle), -np.sin(angle), x], [np.sin(angle), np.cos(angle), y], [0, 0, 1]]),
        residual_px=residual,
        similarity=similarity,
    ),
    *(st.floats(-3, 3), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), any_number, any_number),
)
conditions = st.builds(Condition, *(lengths,) * 4, st.none() | lengths)
regions = st.builds(Region, finite, finite, lengths, lengths, lengths, any_number)
origins = st.builds(
    Origin,
    station=st.text("abcXYZ019-_. ", min_size=1),
    run=st.from_regex(r"[0-9a-f]{12}", fullmatch=True),
    recipe=st.text(min_size=1),
    recipe_digest=st.just(DIGEST),
    engine=st.text(),
    simulated=st.booleans(),
    on_no_verdict=st.sampled_from(sorted(LINE_ACTION_FOR_POLICY)),
)
heatmaps = st.builds(
    HeatmapPayload,
    data=st.binary(),
    sha256=st.just(DIGEST),
    width=st.integers(1, 4096),
    height=st.integers(1, 4096),
    full_scale=st.floats(1e-6, 1e6),
)
stamps = st.builds(
    Stamp,
    created_utc=st.datetimes(timezones=st.just(UTC)),
    monotonic_ms=lengths,
    clock_step_ms=finite,
    synchronized=st.none() | st.booleans(),
)


@st.composite
def verdicts(draw):
    outcome, reason = draw(st.sampled_from(ANSWERS))
    numbers = st.floats(allow_nan=False) if reason is Reason.SCORE else st.none() | any_number
    return Verdict(
        trigger_id=draw(st.integers(1, 2**40)),
        outcome=outcome,
        reason=reason,
        detail=draw(st.text(max_size=2000)),
        part_id=draw(st.none() | st.text()),
        score=draw(numbers),
        threshold=draw(numbers),
        regions=tuple(draw(st.lists(regions, max_size=40))),
        registration=draw(st.none() | registrations),
        condition=draw(st.none() | conditions),
        stage_ms=draw(st.dictionaries(st.text(), lengths, max_size=4)),
        latency_ms=draw(st.none() | lengths),
    )


def valid_message(outcome=Outcome.PASS, reason=Reason.SCORE, *, heatmap=None):
    score = 0.5 if reason is Reason.SCORE else None
    verdict = Verdict(1, outcome, reason, score=score, threshold=score, regions=(Region(1, 2, 3, 4, 9, 0.7),))
    return numbered(verdict_message(verdict, ORIGIN, NOON, heatmap), epoch=EPOCH, seq=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_schema_is_a_valid_schema_with_a_name_and_a_version(name):
    Draft202012Validator.check_schema(schema(name))
    assert schema(name)["$id"] == f"urn:taktsight:schema:{name}:1"


def test_there_is_a_schema_for_every_kind_of_message():
    assert set(NAMES) == {"verdict", "missing", "status", "ack", "command", "reply"}


@pytest.mark.parametrize(("outcome", "reason"), ANSWERS)
def test_every_outcome_with_every_reason_that_fits_it_validates(outcome, reason):
    assert faults(valid_message(outcome, reason), VERDICT) == []


@settings(max_examples=150, deadline=None)
@given(verdict=verdicts(), origin=origins, stamp=stamps, seq=st.integers(1, 2**53), heatmap=st.none() | heatmaps)
def test_every_verdict_that_can_be_made_validates(verdict, origin, stamp, seq, heatmap):
    message = numbered(verdict_message(verdict, origin, stamp, heatmap), epoch=EPOCH, seq=seq)
    assert faults(message, VERDICT) == []
    assert faults(message, schema("verdict")) == []


def test_a_verdict_has_every_field_of_the_schema_always():
    assert set(valid_message()) == set(valid_message(Outcome.NO_VERDICT, Reason.LATE)) == set(VERDICT["properties"])


def test_the_schema_knows_the_reasons_of_the_code_and_no_others():
    no_longer_sent = {"queue_full"}
    assert set(VERDICT["properties"]["reason"]["anyOf"][0]["enum"]) == set(Reason) | no_longer_sent


@pytest.mark.parametrize("field", VERDICT["required"])
def test_a_message_without_one_of_its_fields_is_refused(field):
    message = valid_message()
    del message[field]
    assert faults(message, schema("verdict"))


@pytest.mark.parametrize(
    "change",
    [
        {"score": None},
        {"threshold": None},
        {"score": "0.5"},
        {"reason": "late"},
        {"reason": "Tired Today"},
        {"outcome": "no_verdict"},
        {"outcome": "maybe"},
        {"lineAction": "divert"},
        {"resultState": 4},
        {"seq": 0},
        {"seq": None},
        {"trigger": 0},
        {"epoch": "0123456789AB"},
        {"epoch": None},
        {"run": "1"},
        {"monotonicMs": None},
        {"clockStepMs": None},
        {"clockSynchronized": "yes"},
        {"creationTime": "2026-11-22 12:00:00"},
        {"recipeDigest": "abc"},
        {"schema": "taktsight.verdict/2"},
        {"regions": [{"xPx": 1}]},
        {"heatmap": {"topic": "heatmap/1"}},
        {"registration": {}},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items())[:40],
)
def test_a_pass_with_something_wrong_is_refused(change):
    assert faults({**valid_message(), **change}, schema("verdict"))


def test_a_part_without_verdict_cannot_have_the_reason_score():
    assert faults({**valid_message(Outcome.NO_VERDICT, Reason.LATE), "reason": "score"}, schema("verdict"))


def test_a_reject_cannot_be_accepted():
    assert faults({**valid_message(Outcome.REJECT), "lineAction": "accept"}, schema("verdict"))


def test_a_verdict_of_a_later_station_with_more_fields_and_reasons_is_taken_by_the_published_schema():
    later = {**valid_message(Outcome.NO_VERDICT, Reason.LATE), "reason": "tired", "colour": "red"}
    assert faults(later, schema("verdict")) == []
    assert len(faults(later, VERDICT)) == 2


@given(
    first=st.integers(1, 2**53),
    count=st.integers(0, 2**20),
    why=st.text(min_size=1, max_size=2000),
    created=st.datetimes(timezones=st.just(UTC)),
)
def test_every_notice_of_missing_verdicts_validates(first, count, why, created):
    notice = missing_message("cell7", epoch=EPOCH, first=first, last=first + count, why=why, created_utc=created)
    assert faults(notice, closed(schema("missing"))) == []
    assert notice["seq"] == first


def test_the_last_will_validates_as_it_is():
    assert faults(status_message(ORIGIN, "offline"), closed(schema("status"))) == []


def test_alarms_validate_and_an_alarm_of_a_later_station_does_too():
    alarms = [Alarm("storage_low", "x" * 600), Alarm("lens_dirty", "clean it")]
    message = status_message(ORIGIN, "offline", alarms=alarms)
    assert faults(message, schema("status")) == []
    assert len(faults(message, closed(schema("status")))) == 1


@pytest.mark.parametrize("state", [state for state in STATES if state != "offline"])
def test_every_other_state_needs_a_time_and_what_the_publisher_adds(state):
    complaints = " ".join(faults(status_message(ORIGIN, state), schema("status")))
    assert all(
        field in complaints for field in ("epoch", "firstSeq", "lastSeq", "delivery", "consumers", "undelivered")
    )
    assert faults({**status_message(ORIGIN, "offline"), "state": state}, schema("status"))


def test_the_schema_knows_the_states_of_the_code_and_no_others():
    assert schema("status")["properties"]["state"]["enum"] == list(STATES)


@pytest.mark.parametrize("change", [{"upto": -1}, {"upto": 1.5}, {"epoch": "x"}, {"resend": 1}, {"schema": "ack"}])
def test_an_acknowledgement_with_something_wrong_is_refused(change):
    good = {"schema": "taktsight.ack/1", "epoch": EPOCH, "upto": 0, "resend": True}
    assert faults(good, schema("ack")) == []
    assert faults({**good, **change}, schema("ack"))
