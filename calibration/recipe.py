"""A recipe: everything that decides the verdicts of one product, in one file.

An uncompressed tar, see `calibration.recipe_file`: `manifest.json` first, then the members that it lists with their
sizes and digests. The manifest's own digest finds damage and careless edits; who stands for a recipe is said by its
signature, see `calibration.signing`.

    detector.onnx       image (1, C, h, w) float32 -> anomaly_map (1, 1, h', w'), score (1,)
    detector.f16.onnx   the same in half precision, input and outputs float32, where that is close enough; format 2
    preparation.json    view, registration limits, limits of light and focus
    reference.png       mean of the aligned good parts, where the product is registered
    weight.png          how much each place of the reference counts
    zones.png           which zone each cell of the map belongs to, where zones are drawn; format 3
    thresholds.json
    selftest.npy        a few prepared parts, with their answers in selftest.json
    selftest_maps.npy   their anomaly maps; format 2
    metrics.json, report.html   what the trainer measured; for people, outside the digest
"""

from __future__ import annotations

import io
import math
import re
import typing
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.condition import ConditionLimits
from calibration.errors import InputError, RecipeError, TaktsightError
from calibration.images import decode_image, encode_png, printable
from calibration.onnx_graph import require_self_contained
from calibration.preprocess import Rectangle, View
from calibration.recipe_file import (
    FOR_PEOPLE,
    GRAPHS,
    REFERENCE,
    SINCE_2,
    SINCE_3,
    canonical,
    members_digest,
    read_members,
    sha256,
    short,
    strict_json,
    write_members,
)
from calibration.registration import Reference, RegistrationSettings
from calibration.thresholds import Thresholds
from calibration.zones import ELSEWHERE, Zones, is_zone_name

MAX_SIDE_PX = 65_535  # of a view or a reference
MAX_REFERENCE_PX = 2**28
MOST_MM_PER_PX = 1000.0
MOST_CHARACTERS = 200  # of a name
CONTROLS = ("Cc", "Zl", "Zp")  # kinds of characters that break a line or a table

Filled = TypeVar("Filled")

_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d+), (\d+), (\d+), (\d+)\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Signature:
    """Who stands for a recipe."""

    key: str  # first 16 hexadecimal digits of the SHA-256 of the signer's raw public key
    revision: int  # set by the signer, rises from recipe to recipe of a product
    created: str  # UTC by the signer's clock, ISO 8601
    value: bytes  # Ed25519


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Inputs and what the trainer's own network answered, to prove an engine on the device that runs it."""

    batches: NDArray[np.float32]  # (n, C, h, w)
    scores: tuple[float, ...]  # n, torch float32
    map_peaks: tuple[float, ...]  # n, largest value of each anomaly map
    maps: NDArray[np.float32] | None = None  # (n, 1, h', w') anomaly maps; None in recipes of format 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """One product: how to prepare a frame, the graph that judges it, where the lines are drawn."""

    product: str
    detector: str  # the name it was trained under, such as "vae+residual"
    graph: bytes  # ONNX
    view: View
    reference: Reference | None
    thresholds: Thresholds
    selftest: SelfTest
    graph_f16: bytes | None = None  # ONNX in half precision; None where it was not close enough, and in format 1
    zones: Zones | None = None  # None where none are drawn
    mm_per_px: float | None = None  # of the reference view; None where nobody measured it
    condition: ConditionLimits | None = None  # None where light and focus were not learnt: nothing is refused for them
    training: Mapping[str, Any] = field(default_factory=dict)  # seed, counts, decisions and their reasons
    metrics: Mapping[str, Any] = field(default_factory=dict)
    report: str = ""  # HTML
    digest: str = ""  # of all that decides verdicts; set by read_recipe and write_recipe
    detector_digest: str = ""  # of graph and preparation alone: scores stay comparable while it stays
    signature: Signature | None = None  # only where a trusted key was found to have made it; never written


def write_recipe(path: Path, recipe: Recipe) -> str:
    """Write the recipe in one step, unsigned, and return its digest: a crash or a full disk leaves the old file.

    Raises RecipeError if the file cannot be written, InputError as `check_product`.
    """
    check_product(recipe.product)
    members = _members(recipe)
    manifest = _manifest(recipe, members)
    write_members(path, manifest, members)
    return str(manifest["digest"])


def read_recipe(path: Path) -> Recipe:
    """Return the recipe after checking its format, its list of members, every digest and every value.

    Raises RecipeError saying what is wrong; a recipe that passes is complete and unchanged since it was written.
    """
    return recipe_from_members(path, *read_members(path))


def recipe_from_members(path: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> Recipe:
    """Return the recipe that a checked file holds. Raises RecipeError, naming path, if a value is none it can be."""
    try:
        for name in GRAPHS:
            if name in members:
                require_self_contained(members[name])
        return _from_members(manifest, members)
    except TaktsightError as error:
        raise RecipeError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError, cv2.error) as error:
        raise RecipeError(
            f"{path}: a member does not hold what format {manifest['format']} says: {short(error)}"
        ) from error


def check_product(name: str) -> None:
    """Raises InputError for a name of a product that neither `write_recipe` nor `read_recipe` takes."""
    if name != printable(name):
        raise InputError(f"product {printable(name)!r} is not UTF-8, need a name that is: set the terminal to UTF-8")
    if not 1 <= len(name) <= MOST_CHARACTERS or any(unicodedata.category(letter) in CONTROLS for letter in name):
        raise InputError(
            f"product {name[:MOST_CHARACTERS]!r} of {len(name)} characters found, need 1 to {MOST_CHARACTERS}, none of "
            "them a control character: give another with --product"
        )


def _members(recipe: Recipe) -> dict[str, bytes]:
    """Return the files of the recipe, in the order in which they are stored."""
    members = {"detector.onnx": recipe.graph, "preparation.json": canonical(_preparation(recipe))}
    if recipe.graph_f16 is not None:
        members["detector.f16.onnx"] = recipe.graph_f16
    if recipe.reference is not None:
        members["reference.png"] = encode_png(recipe.reference.image)
        members["weight.png"] = encode_png(recipe.reference.weight)
    if recipe.zones is not None:
        members["zones.png"] = encode_png(recipe.zones.cells)
    members["thresholds.json"] = canonical(asdict(recipe.thresholds))
    members["selftest.npy"] = _npy(recipe.selftest.batches)
    members["selftest.json"] = canonical({"scores": recipe.selftest.scores, "map_peaks": recipe.selftest.map_peaks})
    if recipe.selftest.maps is not None:
        members["selftest_maps.npy"] = _npy(recipe.selftest.maps)
    members["metrics.json"] = canonical(dict(recipe.metrics))
    members["report.html"] = recipe.report.encode()
    return members


def _manifest(recipe: Recipe, members: Mapping[str, bytes]) -> dict[str, Any]:
    listed = {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in members.items()}
    needed = [version for version, names in ((2, SINCE_2), (3, SINCE_3)) if any(name in members for name in names)]
    scale = {} if recipe.mm_per_px is None else {"mm_per_px": recipe.mm_per_px}  # decides no verdict
    return {
        "format": max([1, *needed]),
        "product": recipe.product,
        "detector": recipe.detector,
        "written_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "training": dict(recipe.training),
        **scale,
        "members": listed,
        "digest": members_digest(listed, [name for name in listed if name not in FOR_PEOPLE]),
    }


def _preparation(recipe: Recipe) -> dict[str, Any]:
    reference = recipe.reference
    limits = None
    if reference is not None:
        limits = {
            "settings": asdict(reference.settings),
            "min_similarity": reference.min_similarity,
            "max_residual_px": reference.max_residual_px,
        }
    prepared = {"view": asdict(recipe.view), "registration": limits}
    if recipe.condition is not None:  # left out, not null: an older recipe keeps its detector digest
        prepared["condition"] = asdict(recipe.condition)
    if recipe.zones is not None:
        prepared["zones"] = {"names": recipe.zones.names, "gain": recipe.zones.gain, "offset": recipe.zones.offset}
    return prepared


def _from_members(manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> Recipe:
    check_product(manifest["product"])
    preparation = strict_json(members["preparation.json"])
    view = _view(preparation["view"])
    proof = _selftest(members, view)
    return Recipe(
        product=str(manifest["product"]),
        detector=_detector(manifest["detector"]),
        graph=members["detector.onnx"],
        view=view,
        reference=_reference(preparation["registration"], members, view),
        thresholds=_thresholds(strict_json(members["thresholds.json"])),
        selftest=proof,
        graph_f16=members.get("detector.f16.onnx"),
        zones=_zones(preparation.get("zones"), members, proof),
        mm_per_px=_mm_per_px(manifest.get("mm_per_px")),
        condition=_condition(preparation.get("condition")),
        training=_mapping(manifest["training"]),
        metrics=_mapping(strict_json(members.get("metrics.json", b"{}"))),
        report=members.get("report.html", b"").decode(),
        digest=str(manifest["digest"]),
        detector_digest=_detector_digest(manifest["members"]),
    )


def _detector_digest(listed: Mapping[str, Any]) -> str:
    return members_digest(
        listed, [name for name in listed if name in ("detector.onnx", "preparation.json", *SINCE_3, *REFERENCE)]
    )


def _view(values: dict[str, Any]) -> View:
    region = values["region"]
    height, width = values["reference_size"]
    box = None if region is None else _filled(Rectangle, region)
    view = _filled(View, {**values, "reference_size": (height, width), "region": box})
    _want(
        all(_is_whole(side) and 1 <= side <= MAX_SIDE_PX for side in (height, width, view.height, view.width)), values
    )
    _want(0 < view.gamma <= 100 and 8 <= view.bit_depth <= 16, values)
    if box is not None:
        _want(min(box.x_px, box.y_px) >= 0 and min(box.width_px, box.height_px) >= 1, region)
        _want(box.right_px <= width and box.low_px <= height, region)
    return view


def _reference(limits: dict[str, Any] | None, members: Mapping[str, bytes], view: View) -> Reference | None:
    if limits is None:
        return None
    settings = _filled(RegistrationSettings, limits["settings"])
    _want(0 <= settings.max_angle_deg <= 180 and 0 <= settings.max_scale_change <= 0.5, limits["settings"])
    _want((settings.max_shift_px is None or settings.max_shift_px >= 0) and 0 <= settings.min_in_view <= 1, limits)
    image = _gray_png(members, "reference.png")
    _want(image.shape == view.reference_size, f"reference.png: {image.shape} for a view of {view.reference_size}")
    return Reference(
        image=image,
        weight=_gray_png(members, "weight.png"),
        settings=settings,
        min_similarity=float(limits["min_similarity"]),
        max_residual_px=float(limits["max_residual_px"]),
    )


def _condition(values: dict[str, Any] | None) -> ConditionLimits | None:
    if values is None:
        return None
    limits = _filled(ConditionLimits, values)
    shares = (limits.least_brightness, limits.most_brightness, limits.dark_level, limits.bright_level)
    _want(all(0 <= share <= 1 for share in shares) and limits.least_brightness <= limits.most_brightness, values)
    _want(limits.most_saturated_share >= 0 and limits.least_sharpness >= 0, values)
    return limits


def _zones(values: dict[str, Any] | None, members: Mapping[str, bytes], proof: SelfTest) -> Zones | None:
    _want((values is None) == ("zones.png" not in members), "zones.png, or zones in preparation.json, alone")
    if values is None:
        return None
    names, gain, offset = values["names"], _number(values["gain"]), _number(values["offset"])
    _want(len(values) == 3 and isinstance(names, list) and len(names) >= 2 and names[0] == ELSEWHERE, values)
    _want(all(is_zone_name(name) for name in names[1:]) and len(set(names)) == len(names) and gain > 0, values)
    cells = _gray_png(members, "zones.png")
    _want(proof.maps is not None and cells.shape == proof.maps.shape[2:], f"zones.png: {cells.shape}")
    _want(int(cells.max()) < len(names), f"zones.png: zone {cells.max()} of {len(names)}")
    return Zones(tuple(names), cells, gain, offset)


def _mm_per_px(value: Any) -> float | None:
    if value is None:
        return None
    _want(0 < _number(value) <= MOST_MM_PER_PX, f"mm_per_px {value!r}")
    return float(value)


def _gray_png(members: Mapping[str, bytes], name: str) -> NDArray[np.uint8]:
    """Return a PNG's (H, W) pixels; its own header says how many there are before any is unpacked."""
    data = members[name]
    _want(data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR", name)
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    _want(1 <= width * height <= MAX_REFERENCE_PX, f"{name}: {width} x {height} px")
    pixels = decode_image(data, name)
    _want(pixels.ndim == 2 and pixels.dtype == np.uint8, f"{name}: {pixels.shape} {pixels.dtype}")
    return np.asarray(pixels, dtype=np.uint8)


def _thresholds(values: Any) -> Thresholds:
    thresholds = _filled(Thresholds, values)
    levels = (thresholds.score, thresholds.map)
    _want(all(math.isfinite(level) for level in levels) and thresholds.map > 0, f"score and map {levels}")
    rates = (thresholds.false_reject_rate, thresholds.rate_upper_bound)
    _want(all(0 <= rate <= 1 for rate in rates), f"false_reject_rate and rate_upper_bound {rates}")
    _want(thresholds.n_good >= 0, values)
    _want(thresholds.good_deviation is None or thresholds.good_deviation >= 0, values)
    _want((thresholds.good_median is None) == (thresholds.good_deviation is None), values)
    return thresholds


def _selftest(members: Mapping[str, bytes], view: View) -> SelfTest:
    batches = _array(members, "selftest.npy")
    n, *shape = batches.shape
    _want(shape == [view.channels, view.height, view.width] and n >= 1, f"selftest.npy of shape {batches.shape}")
    answers = strict_json(members["selftest.json"])
    scores, peaks = (tuple(_number(value) for value in answers[key]) for key in ("scores", "map_peaks"))
    _want(len(scores) == len(peaks) == n, "selftest.json: its answers")
    maps = None
    if "selftest_maps.npy" in members:
        maps = _array(members, "selftest_maps.npy")
        _want(maps.shape[:2] == (n, 1) and maps.size > 0, f"selftest_maps.npy of shape {maps.shape}")
    return SelfTest(batches, scores, peaks, maps)


def _array(members: Mapping[str, bytes], name: str) -> NDArray[np.float32]:
    """Return a plain float32 array of four axes; its header is read before any memory is taken."""
    data = members[name]
    head = _NPY.match(data)
    _want(head is not None, f"{name} is no plain float32 array of four axes")
    assert head is not None
    shape = tuple(int(length) for length in head.groups())
    _want(len(data) == head.end() + 4 * math.prod(shape), f"{name} of {len(data)} bytes for shape {shape}")
    array = np.frombuffer(data, np.dtype("<f4"), offset=head.end()).reshape(shape).astype(np.float32)
    _want(bool(np.isfinite(array).all()), f"{name} with numbers that are not finite")
    return array


def _filled(kind: type[Filled], values: Any) -> Filled:
    """Return the dataclass with these fields. Raises ValueError on a value of another type than declared."""
    types = typing.get_type_hints(kind)
    for name, value in _mapping(values).items():
        wanted = types[name]
        allowed = (wanted, *typing.get_args(wanted))
        fits = type(value) in allowed or (type(value) is int and float in allowed) or typing.get_origin(wanted) is tuple
        _want(fits, f"{name}: {value!r}")
    return kind(**values)


def _mapping(value: Any) -> dict[str, Any]:
    _want(isinstance(value, dict), value)
    return dict(value)


def _detector(value: Any) -> str:
    _want(isinstance(value, str) and 0 < len(value) <= MOST_CHARACTERS, f"detector {value!r}")
    return str(value)


def _number(value: Any) -> float:
    _want(type(value) in (int, float), value)
    return float(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _want(held: bool, found: Any) -> None:
    """Raises ValueError telling what was found."""
    if not held:
        raise ValueError(f"{str(found)[:200]} found")


def _npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype="<f4"), allow_pickle=False)
    return buffer.getvalue()
