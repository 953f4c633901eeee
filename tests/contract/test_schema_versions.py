"""Within one version of a message there are only additions. Baselines are frozen: to change one is a new version."""

import copy
import json

import pytest

from tests.schemas import BASELINES, breaking_changes, closed, schema

FROZEN = sorted(BASELINES.glob("*.json"))
MADE_UP = {
    "type": "object",
    "required": ["outcome", "score"],
    "properties": {
        "outcome": {"enum": ["pass", "reject"]},
        "score": {"type": ["number", "null"], "minimum": 0},
        "reason": {"anyOf": [{"enum": ["late", "lost"]}, {"type": "string", "pattern": "^[a-z]+$"}]},
        "regions": {"type": "array", "maxItems": 32, "items": {"$ref": "#/$defs/region"}},
        "times": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    "oneOf": [{"properties": {"outcome": {"const": "pass"}}}, {"properties": {"outcome": {"const": "reject"}}}],
    "$defs": {"region": {"type": "object", "required": ["x"], "properties": {"x": {"type": "number"}}}},
}


def changed(path, value):
    """MADE_UP with one place changed; None takes the place away."""
    result = copy.deepcopy(MADE_UP)
    *way, last = path.split("/")
    place = result
    for step in way:
        place = place[int(step) if isinstance(place, list) else step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result


def test_there_is_a_baseline_of_the_verdict():
    assert "verdict-1.json" in [path.name for path in FROZEN]


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_since_the_baseline_there_were_only_additions(path):
    name, version = path.stem.split("-")
    baseline, today = json.loads(path.read_text(encoding="utf-8")), schema(name)
    assert today["properties"]["schema"] == {"const": f"taktsight.{name}/{version}"}
    assert breaking_changes(baseline, today) == []


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_what_is_published_leaves_room_for_additions_and_says_so(path):
    published = schema(path.stem.split("-")[0])
    assert "additionalProperties" not in published
    assert "there are only additions" in published["description"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("properties/score", None, "properties.score"),
        ("properties/score/type", "number", "properties.score.type"),
        ("properties/score/type", ["number"], "'null' is gone"),
        ("properties/score/type", ["number", "null", "string"], "'string' is new"),
        ("properties/score/minimum", 1, "properties.score.minimum"),
        ("properties/score/maximum", 9, "properties.score.maximum"),
        ("properties/outcome/enum", ["pass"], "'reject' is gone"),
        ("properties/outcome/enum", ["pass", "reject", "maybe"], "'maybe' is new"),
        ("properties/reason/anyOf", [{"enum": ["late"]}, {"type": "string", "pattern": "^[a-z]+$"}], "'lost' is gone"),
        ("properties/reason/anyOf", [{"enum": ["late", "lost"]}, {"type": "string", "pattern": "^x$"}], "pattern"),
        ("properties/reason/anyOf", [{"enum": ["late", "lost"]}], "properties.reason.anyOf"),
        ("properties/regions/maxItems", 16, "properties.regions.maxItems"),
        ("properties/regions/items", {"$ref": "#/$defs/place"}, "properties.regions.items"),
        ("properties/times/additionalProperties", False, "properties.times.additionalProperties"),
        ("properties/times/additionalProperties/type", "integer", "properties.times.additionalProperties.type"),
        ("required", ["outcome"], "'score' is gone"),
        ("required", ["outcome", "score", "colour"], "'colour' is new"),
        ("additionalProperties", False, "additionalProperties: new"),
        ("oneOf", [{"properties": {"outcome": {"const": "pass"}}}], "oneOf"),
        ("oneOf/0/properties/outcome/const", "fail", "oneOf.0.properties.outcome.const"),
        ("$defs/region", None, "$defs.region"),
        ("$defs/region/required", [], "'x' is gone"),
        ("$defs/region/properties/x/type", "string", "$defs.region.properties.x.type"),
    ],
)
def test_a_breaking_change_is_found_and_named(path, value, named):
    found = breaking_changes(MADE_UP, changed(path, value))
    assert len(found) == 1
    assert named in found[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("properties/colour", {"type": "string"}),
        ("properties/reason/anyOf/0/enum", ["late", "lost", "tired"]),
        ("properties/score/description", "in the recipe's units"),
        ("description", "better words"),
        ("$defs/place", {"type": "object"}),
        ("$defs/region/properties/y", {"type": "number"}),
    ],
)
def test_an_addition_is_no_breaking_change(path, value):
    assert breaking_changes(MADE_UP, changed(path, value)) == []


def test_a_closed_schema_refuses_fields_and_values_that_are_not_named():
    shut = closed(MADE_UP)
    assert shut["additionalProperties"] is False
    assert shut["$defs"]["region"]["additionalProperties"] is False
    assert shut["properties"]["times"]["additionalProperties"] == {"type": "number"}
    assert shut["properties"]["reason"]["anyOf"] == [{"enum": ["late", "lost"]}]
