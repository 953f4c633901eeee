import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import agent
from agent.messages import LINE_ACTION_FOR_POLICY, HeatmapPayload, Origin, status_message, verdict_message
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.registration import Registration

SCHEMA = json.loads((Path(agent.__file__).parent / "verdict.schema.json").read_text(encoding="utf-8"))
PAGE = (Path(agent.__file__).parents[1] / "docs" / "connect-the-mes.md").read_text(encoding="utf-8")
VALIDATOR = Draft202012Validator(SCHEMA)
NOON = datetime(2025, 3, 4, 12, tzinfo=UTC)
ANSWERS = [
    (outcome, reason)
    for outcome in Outcome
    for reason in Reason
    if (outcome is Outcome.NO_VERDICT) != (reason is Reason.SCORE)
]
DIGEST = "0123456789abcdef" * 4

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
regions = st.builds(Region, finite, finite, lengths, lengths, lengths, any_number)
origins = st.builds(
    Origin,
    station=st.text("abcXYZ019-_. ", min_size=1),
    epoch=st.from_regex(r"[0-9a-f]{12}", fullmatch=True),
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


@st.composite
def verdicts(draw):
    outcome, reason = draw(st.sampled_from(ANSWERS))
    numbers = st.floats(allow_nan=False) if reason is Reason.SCORE else st.none() | any_number
    return Verdict(
        trigger_id=draw(st.integers(0, 2**40)),
        outcome=outcome,
        reason=reason,
        detail=draw(st.text(max_size=2000)),
        part_id=draw(st.none() | st.text()),
        score=draw(numbers),
        threshold=draw(numbers),
        regions=tuple(draw(st.lists(regions, max_size=40))),
        registration=draw(st.none() | registrations),
        stage_ms=draw(st.dictionaries(st.text(), lengths, max_size=4)),
        latency_ms=draw(st.none() | lengths),
    )


def errors(message):
    """What the schema says about the message after a trip over the wire."""
    return list(VALIDATOR.iter_errors(json.loads(json.dumps(message, allow_nan=False))))


def valid_message(outcome=Outcome.PASS, reason=Reason.SCORE):
    score = 0.5 if reason is Reason.SCORE else None
    origin = Origin("cell7", "0123456789ab", "bottle", DIGEST, "onnx", simulated=False, on_no_verdict="reject")
    verdict = Verdict(1, outcome, reason, score=score, threshold=score, regions=(Region(1, 2, 3, 4, 9, 0.7),))
    return verdict_message(verdict, origin, seq=1, created_utc=NOON)


def test_the_schema_is_a_valid_schema_and_closed():
    Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["required"]) == set(SCHEMA["properties"])


@pytest.mark.parametrize(("outcome", "reason"), ANSWERS)
def test_every_outcome_with_every_reason_that_fits_it_validates(outcome, reason):
    assert errors(valid_message(outcome, reason)) == []


@settings(max_examples=150, deadline=None)
@given(verdict=verdicts(), origin=origins, seq=st.integers(1, 2**53), heatmap=st.none() | heatmaps)
def test_every_verdict_that_can_be_made_validates(verdict, origin, seq, heatmap):
    assert errors(verdict_message(verdict, origin, seq=seq, created_utc=NOON, heatmap=heatmap)) == []


@pytest.mark.parametrize("field", SCHEMA["required"])
def test_a_message_without_one_of_its_fields_is_refused(field):
    message = valid_message()
    del message[field]
    assert errors(message)


@pytest.mark.parametrize(
    "change",
    [
        {"score": None},
        {"threshold": None},
        {"score": "0.5"},
        {"reason": "late"},
        {"reason": "tired"},
        {"outcome": "no_verdict"},
        {"outcome": "maybe"},
        {"lineAction": "divert"},
        {"resultState": 4},
        {"seq": 0},
        {"epoch": "0123456789AB"},
        {"creationTime": "2025-03-04 12:00:00"},
        {"recipeDigest": "abc"},
        {"schema": "taktsight.verdict/2"},
        {"regions": [{"xPx": 1}]},
        {"heatmap": {"topic": "heatmap/1"}},
        {"registration": {}},
        {"colour": "red"},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items())[:40],
)
def test_a_pass_with_something_wrong_is_refused(change):
    assert errors({**valid_message(), **change})


def test_a_part_without_verdict_cannot_have_the_reason_score():
    assert errors({**valid_message(Outcome.NO_VERDICT, Reason.LATE), "reason": "score"})


def test_a_reject_cannot_be_accepted():
    assert errors({**valid_message(Outcome.REJECT), "lineAction": "accept"})


def sample(name):
    """The JSON that the integrator's page shows under this name."""
    return json.loads(PAGE.split(f"<!-- sample: {name} -->\n```json\n")[1].split("```")[0])


def test_the_verdict_on_the_integrators_page_validates():
    assert list(VALIDATOR.iter_errors(sample("verdict"))) == []


def test_the_integrators_page_explains_every_field_of_a_verdict():
    explained = {word for line in PAGE.splitlines() if line.startswith("| `") for word in line.split("`")[1::2]}
    assert set(SCHEMA["properties"]) <= explained


def test_the_status_on_the_integrators_page_has_the_fields_that_are_sent():
    origin = Origin("cell7", "0123456789ab", "bottle", DIGEST, "onnx", simulated=False, on_no_verdict="reject")
    added_by_the_publisher = {"undelivered", "delivery"}
    assert set(sample("status")) == set(status_message(origin, "running")) | added_by_the_publisher
