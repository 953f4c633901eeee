"""The published schemas for tests: read, closed, compared with those of an earlier day; and the integrator's page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from referencing import Registry, Resource

import agent

INTERFACE = Path(agent.__file__).parent / "interface"
PAGE = (Path(agent.__file__).parents[1] / "docs" / "connect-the-mes.md").read_text(encoding="utf-8")
BASELINES = Path(__file__).parent / "contract" / "baseline"

ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "examples"}
NAMED_SCHEMAS = ("properties", "$defs")  # keyword -> {name: schema}
LISTED_SCHEMAS = ("oneOf", "anyOf", "allOf")  # keyword -> [schema]
ONE_SCHEMA = ("items", "additionalProperties", "if", "then", "else", "not")  # keyword -> schema, or a plain value


@cache
def schema(name: str) -> dict[str, Any]:
    """Return agent/interface/{name}.schema.json."""
    return json.loads((INTERFACE / f"{name}.schema.json").read_text(encoding="utf-8"))


@cache
def registry() -> Registry:
    """Return all schemas of the folder by the name of their file, as `$ref: ./verdict.schema.json` wants them."""
    files = INTERFACE.glob("*.schema.json")
    return Registry().with_resources(
        (path.name, Resource.from_contents(json.loads(path.read_text(encoding="utf-8")))) for path in files
    )


def faults(message: Any, against: dict[str, Any]) -> list[str]:
    """Return what the schema says against the message after a trip over the wire."""
    validator = jsonschema.Draft202012Validator(against, registry=registry())
    return [error.message for error in validator.iter_errors(json.loads(json.dumps(message, allow_nan=False)))]


def closed(published: Any) -> Any:
    """Return the schema of what is sent today: no field beyond those named, no value beyond those listed.

    The published one leaves room for additions, so that it does not refuse what a later station says.
    """
    if isinstance(published, list):
        return [closed(item) for item in published]
    if not isinstance(published, dict):
        return published
    here = {key: closed(value) for key, value in published.items()}
    if here.get("type") == "object" and "properties" in here:
        here.setdefault("additionalProperties", False)
    if _is_open_list(published):
        here["anyOf"] = here["anyOf"][:1]
    return here


def breaking_changes(baseline: Any, today: Any, path: str = "") -> list[str]:
    """Return every change between two versions of a schema that is more than an addition, as "path: what".

    Allowed: new optional properties, new $defs, more values in an enum beside a pattern (`anyOf` of the two), and other
    words for people. All else may make a consumer of the baseline refuse or misread what comes today, or make today's
    schema refuse what an earlier station sends.
    """
    if not isinstance(baseline, dict) or not isinstance(today, dict):
        return [] if baseline == today else [f"{path}: {baseline!r} became {today!r}"]
    if _is_open_list(baseline) and _is_open_list(today):
        gone = set(baseline["anyOf"][0]["enum"]) - set(today["anyOf"][0]["enum"])
        rest = breaking_changes(baseline["anyOf"][1], today["anyOf"][1], f"{path}.anyOf.1")
        return [f"{path}: value {value!r} is gone" for value in sorted(gone)] + rest
    found = [f"{path}.{key}: new" for key in today.keys() - baseline.keys() - ANNOTATIONS - {"$defs"}]
    for key in baseline.keys() - ANNOTATIONS:
        here = f"{path}.{key}".lstrip(".")
        found += list(_changes_of_keyword(key, baseline[key], today[key], here)) if key in today else [f"{here}: gone"]
    return found


def _changes_of_keyword(key: str, before: Any, after: Any, path: str) -> Iterator[str]:
    if key in NAMED_SCHEMAS:
        yield from (f"{path}.{name}: gone" for name in before.keys() - after.keys())
        for name in before.keys() & after.keys():
            yield from breaking_changes(before[name], after[name], f"{path}.{name}")
    elif key in LISTED_SCHEMAS and len(before) == len(after):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from breaking_changes(*pair, f"{path}.{number}")
    elif key in ONE_SCHEMA:
        yield from breaking_changes(before, after, path)
    elif key in ("required", "enum", "type") and isinstance(before, list) and isinstance(after, list):
        yield from (f"{path}: {value!r} is gone" for value in before if value not in after)
        yield from (f"{path}: {value!r} is new" for value in after if value not in before)
    elif before != after:
        yield f"{path}: {before!r} became {after!r}"


def _is_open_list(part: dict[str, Any]) -> bool:
    """True for a list of known values with room for more: anyOf an enum and a pattern."""
    choices = part.get("anyOf", [])
    return len(choices) == 2 and "enum" in choices[0] and "pattern" in choices[1]


def sample(name: str) -> dict[str, Any]:
    """Return the JSON that the integrator's page shows under this name."""
    return json.loads(PAGE.split(f"<!-- sample: {name} -->\n```json\n")[1].split("```")[0])


def sample_names() -> list[str]:
    """Return the names of all samples of the page."""
    return [part.split(" -->")[0] for part in PAGE.split("<!-- sample: ")[1:]]


def commands(name: str) -> str:
    """Return the shell commands that the integrator's page shows under this name."""
    return PAGE.split(f"<!-- run: {name} -->\n```sh\n")[1].split("```")[0]
