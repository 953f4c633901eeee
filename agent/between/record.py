"""What crosses from the inspect to the publish process: one settled part as JSON, its pictures beside it.

Pictures are told by name, type and shape in the JSON and lie in the ring as plain bytes. The picture that people see
travels as uint8, half a grey level off at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.publishing.messages import Origin
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition
from calibration.frame import Frame
from calibration.registration import Registration

KINDS = ("anomaly_map", "picture", "frame")
MOST_DETAIL_CHARACTERS = 500
MOST_BARE_DETAIL_CHARACTERS = 200
TOO_LONG = "what belongs to this verdict does not fit into a record: shorten the part's id."
_APART = frozenset({"regions", "registration", "anomaly_map", "picture", "outcome", "reason", "detail", "condition"})


@dataclass(frozen=True, slots=True)
class Charge:
    """Who judged: the same for all parts between two commands."""

    origin: Origin
    map_threshold: float  # the recipe's units
    good_median: float | None = None  # of the scores of good parts in calibration; None: the recipe does not say
    good_deviation: float | None = None  # robust standard deviation of the same


@dataclass(frozen=True, slots=True)
class Part:
    """One settled part as the publish process gets it. Its arrays are views into shared memory."""

    verdict: Verdict
    frame: Frame | None
    charge: Charge
    is_captured: bool = False  # somebody asked for this frame


def encoded(part: Part, most_bytes: int) -> tuple[bytes, list[memoryview]]:
    """Return the record, at most most_bytes long, and the bytes of its pictures in the order that it tells.

    What is too long for a record loses what people can do without: facts of the frame, then regions, then the part's
    id, zones and what each stage took. Outcome, reason and score stay: the gate was told already.

    Raises ValueError where the charge alone is too long.
    """
    pictures = _pictures(part)
    for lean in (part, _without_facts(part), _without_regions(part), _bare(part)):
        try:
            data = json.dumps(_fields(lean, pictures), separators=(",", ":"), default=_plain).encode()
        except (TypeError, ValueError, RecursionError):  # facts that are no JSON values
            if lean is not part:
                raise
            continue
        if len(data) <= most_bytes:
            return data, [array.reshape(-1).view(np.uint8).data for array in pictures.values()]
    raise ValueError(f"part {part.verdict.trigger_id}: {len(data)} bytes found, a record holds {most_bytes}")


def decoded(data: bytes, pictures: Sequence[memoryview]) -> Part:
    """Return what `encoded` was given. Raises ValueError, KeyError or TypeError on anything else."""
    told = json.loads(data)
    arrays = {
        name: np.frombuffer(view, np.dtype(kind)).reshape(shape)
        for (name, kind, shape), view in zip(told["pictures"], pictures, strict=True)
    }
    values = told["verdict"]
    picture = arrays.get("picture")
    verdict = Verdict(
        **{
            **values,
            "outcome": Outcome(values["outcome"]),
            "reason": Reason(values["reason"]),
            "regions": tuple(Region(*numbers) for numbers in values["regions"]),
            "registration": _registration(values["registration"]),
            "condition": None if values["condition"] is None else Condition(**values["condition"]),
            "cut": tuple(values["cut"]),
            "anomaly_map": arrays.get("anomaly_map"),
            "picture": None if picture is None else picture.astype(np.float32) / np.float32(255),
        }
    )
    charge = told["charge"]
    return Part(
        verdict=verdict,
        frame=None if told["frame"] is None else Frame(pixels=arrays["frame"], **told["frame"]),
        charge=Charge(**{**charge, "origin": Origin(**charge["origin"])}),
        is_captured=told["is_captured"],
    )


def _fields(part: Part, pictures: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    verdict, frame = part.verdict, part.frame if "frame" in pictures else None
    about_frame = None
    if frame is not None:
        about_frame = {field.name: getattr(frame, field.name) for field in fields(frame) if field.name != "pixels"}
        about_frame["facts"] = dict(frame.facts)
    registration = verdict.registration
    return {
        "verdict": {
            **{field.name: getattr(verdict, field.name) for field in fields(verdict) if field.name not in _APART},
            "stage_ms": dict(verdict.stage_ms),
            "outcome": str(verdict.outcome),
            "reason": str(verdict.reason),
            "detail": verdict.detail[:MOST_DETAIL_CHARACTERS],
            "regions": [[getattr(region, field.name) for field in fields(region)] for region in verdict.regions],
            "registration": None if registration is None else _registration_fields(registration),
            "condition": None if verdict.condition is None else asdict(verdict.condition),
        },
        "frame": about_frame,
        "charge": asdict(part.charge),
        "is_captured": part.is_captured,
        "pictures": [(name, array.dtype.str, array.shape) for name, array in pictures.items()],
    }


def _registration_fields(registration: Registration) -> dict[str, Any]:
    return {
        "reference_from_image": registration.reference_from_image.ravel().tolist(),
        "residual_px": registration.residual_px,
        "similarity": registration.similarity,
        "centre_px": registration.centre_px,
    }


def _registration(values: dict[str, Any] | None) -> Registration | None:
    if values is None:
        return None
    matrix = np.array(values["reference_from_image"], dtype=np.float64).reshape(3, 3)
    centre_x, centre_y = values["centre_px"]
    return Registration(matrix, values["residual_px"], values["similarity"], (centre_x, centre_y))


def _pictures(part: Part) -> dict[str, NDArray[Any]]:
    """Return the arrays that go along, contiguous, in the order of KINDS."""
    verdict = part.verdict
    levels = None
    if verdict.picture is not None:
        levels = (np.clip(np.nan_to_num(verdict.picture), 0.0, 1.0) * np.float32(255) + np.float32(0.5)).astype(
            np.uint8
        )
    pixels = None if part.frame is None else part.frame.pixels
    found = dict(zip(KINDS, (verdict.anomaly_map, levels, pixels), strict=True))
    return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None and array.size}


def _without_facts(part: Part) -> Part:
    return part if part.frame is None else replace(part, frame=replace(part.frame, facts={}))


def _without_regions(part: Part) -> Part:
    return replace(_without_facts(part), verdict=replace(part.verdict, regions=part.verdict.regions[:1]))


def _bare(part: Part) -> Part:
    lean = _without_regions(part)
    detail = f"{TOO_LONG} {part.verdict.detail}"[:MOST_BARE_DETAIL_CHARACTERS]
    return replace(lean, verdict=replace(lean.verdict, part_id=None, regions=(), zones={}, stage_ms={}, detail=detail))


def _plain(value: object) -> object:
    """Return a number of numpy's as one of Python's. Raises TypeError for anything else that is no JSON value."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} found, need a JSON value")
