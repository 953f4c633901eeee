"""A recipe: everything that decides the verdicts of one product, in one file.

An uncompressed tar: `manifest.json` first, then the members that it lists with their sizes and digests. Nothing in it
is executable and nothing is extracted to disk: members are read into memory after the manifest vouched for them, and
the manifest after its own digest did. That finds damage and careless edits; it is no signature.

    detector.onnx       image (1, C, h, w) float32 -> anomaly_map (1, 1, h', w'), score (1,)
    preparation.json    view, registration limits
    reference.png       mean of the aligned good parts, where the product is registered
    weight.png          how much each place of the reference counts
    thresholds.json
    selftest.npy        a few prepared good parts, with their answers in selftest.json
    metrics.json, report.html   what the trainer measured; for people, outside the digest
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.errors import RecipeError
from calibration.images import decode_image, encode_png
from calibration.preprocess import Rectangle, View
from calibration.registration import Reference, RegistrationSettings
from calibration.thresholds import Thresholds

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest_sha256"  # key of the manifest: digest of all its other keys
REQUIRED = ("detector.onnx", "preparation.json", "thresholds.json", "selftest.npy", "selftest.json")
REFERENCE = ("reference.png", "weight.png")
FOR_PEOPLE = ("metrics.json", "report.html")
MEMBERS = REQUIRED + REFERENCE + FOR_PEOPLE
MAX_BYTES = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Inputs and what the trainer's own network answered, to prove an engine on the device that runs it."""

    batches: NDArray[np.float32]  # (n, C, h, w)
    scores: tuple[float, ...]  # n, torch float32
    map_peaks: tuple[float, ...]  # n, largest value of each anomaly map


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
    training: Mapping[str, Any] = field(default_factory=dict)  # seed, counts, decisions and their reasons
    metrics: Mapping[str, Any] = field(default_factory=dict)
    report: str = ""  # HTML
    digest: str = ""  # of all that decides verdicts; set by read_recipe and write_recipe
    detector_digest: str = ""  # of graph and preparation alone: scores stay comparable while it stays


def write_recipe(path: Path, recipe: Recipe) -> str:
    """Write the recipe in one step and return its digest: a crash or a full disk leaves the old file as it was.

    Raises RecipeError if the file cannot be written.
    """
    members = _members(recipe)
    manifest = _manifest(recipe, members)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write_tar(file, {MANIFEST: _json(manifest), **members})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}: nothing was changed, an older recipe there is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return str(manifest["digest"])


def read_recipe(path: Path) -> Recipe:
    """Return the recipe after checking its format, its list of members and every digest.

    Raises RecipeError saying what is wrong; a recipe that passes is complete and unchanged since it was written.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            manifest, members = _checked_members(path, archive)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}: give the path of a recipe") from error
    except tarfile.TarError as error:
        raise RecipeError(f"{path}: not a recipe or cut off ({error}): copy it again") from error
    try:
        return _from_members(manifest, members)
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{path}: a member does not hold what format {FORMAT_VERSION} says: {error!r}") from error


def _members(recipe: Recipe) -> dict[str, bytes]:
    """Return the files of the recipe, in the order in which they are stored."""
    members = {"detector.onnx": recipe.graph, "preparation.json": _json(_preparation(recipe))}
    if recipe.reference is not None:
        members["reference.png"] = encode_png(recipe.reference.image)
        members["weight.png"] = encode_png(recipe.reference.weight)
    members["thresholds.json"] = _json(asdict(recipe.thresholds))
    members["selftest.npy"] = _npy(recipe.selftest.batches)
    members["selftest.json"] = _json({"scores": recipe.selftest.scores, "map_peaks": recipe.selftest.map_peaks})
    members["metrics.json"] = _json(dict(recipe.metrics))
    members["report.html"] = recipe.report.encode()
    return members


def _manifest(recipe: Recipe, members: Mapping[str, bytes]) -> dict[str, Any]:
    listed = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in members.items()}
    manifest = {
        "format": FORMAT_VERSION,
        "product": recipe.product,
        "detector": recipe.detector,
        "written_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "training": dict(recipe.training),
        "members": listed,
        "digest": _digest(listed, [name for name in listed if name not in FOR_PEOPLE]),
    }
    manifest = json.loads(_json(manifest))  # as a reader will see it: keys are text, tuples are lists
    return {**manifest, SEAL: _sha256(_json(manifest))}


def _digest(listed: Mapping[str, Any], names: list[str]) -> str:
    return _sha256(_json({name: listed[name]["sha256"] for name in names}))


def _preparation(recipe: Recipe) -> dict[str, Any]:
    reference = recipe.reference
    limits = None
    if reference is not None:
        limits = {
            "settings": asdict(reference.settings),
            "min_similarity": reference.min_similarity,
            "max_residual_px": reference.max_residual_px,
        }
    return {"view": asdict(recipe.view), "registration": limits}


def _write_tar(file: io.BufferedWriter, members: Mapping[str, bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)  # owner, mode and time stay at their fixed defaults
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _checked_members(path: Path, archive: tarfile.TarFile) -> tuple[dict[str, Any], dict[str, bytes]]:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg():
        raise RecipeError(f"{path}: not a recipe: its first member is not {MANIFEST}")
    manifest = _checked_manifest(path, _read_member(path, archive, first, 16 * 1024**2))
    listed = manifest["members"]
    members: dict[str, bytes] = {}
    while (entry := archive.next()) is not None:
        if entry.name not in listed or entry.name in members or not entry.isreg():
            raise RecipeError(f"{path}: {entry.name!r} is not a member that its manifest lists once: do not use it")
        data = _read_member(path, archive, entry, MAX_BYTES)
        if _sha256(data) != listed[entry.name]["sha256"]:
            raise RecipeError(f"{path}: {entry.name} was changed after the recipe was written: fetch it again")
        members[entry.name] = data
    missing = [name for name in listed if name not in members]
    if missing:
        raise RecipeError(f"{path}: {', '.join(missing)} missing, the file is cut off: copy it again")
    return manifest, members


def _checked_manifest(path: Path, data: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
        version = int(manifest["format"])
        listed = manifest["members"]
        digests = {name: str(entry["sha256"]) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecipeError(f"{path}: its manifest is damaged ({error!r}): fetch it again") from error
    if version > FORMAT_VERSION:
        raise RecipeError(
            f"{path}: recipe format {version} found, this taktsight reads up to {FORMAT_VERSION}: update taktsight"
        )
    unknown = [name for name in digests if name not in MEMBERS]
    absent = [name for name in REQUIRED if name not in digests]
    if unknown or absent:
        raise RecipeError(f"{path}: unknown members {unknown}, required members absent {absent}: fetch it again")
    unsealed = {key: value for key, value in manifest.items() if key != SEAL}
    if manifest.get(SEAL) != _sha256(_json(unsealed)):
        raise RecipeError(f"{path}: its manifest was changed after it was written: fetch it again")
    if manifest["digest"] != _digest(listed, [name for name in listed if name not in FOR_PEOPLE]):
        raise RecipeError(f"{path}: its list of members does not fit its digest: fetch it again")
    return manifest


def _read_member(path: Path, archive: tarfile.TarFile, entry: tarfile.TarInfo, limit: int) -> bytes:
    if entry.size > limit:
        raise RecipeError(f"{path}: {entry.name} claims {entry.size} bytes, at most {limit} are read")
    file = archive.extractfile(entry)
    data = b"" if file is None else file.read()
    if len(data) != entry.size:
        raise RecipeError(f"{path}: {entry.name} is cut off after {len(data)} of {entry.size} bytes: copy it again")
    return data


def _from_members(manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> Recipe:
    preparation = json.loads(members["preparation.json"])
    answers = json.loads(members["selftest.json"])
    batches = np.load(io.BytesIO(members["selftest.npy"]), allow_pickle=False)
    return Recipe(
        product=str(manifest["product"]),
        detector=str(manifest["detector"]),
        graph=members["detector.onnx"],
        view=_view(preparation["view"]),
        reference=_reference(preparation["registration"], members),
        thresholds=Thresholds(**json.loads(members["thresholds.json"])),
        selftest=SelfTest(batches, tuple(answers["scores"]), tuple(answers["map_peaks"])),
        training=manifest["training"],
        metrics=json.loads(members.get("metrics.json", b"{}")),
        report=members.get("report.html", b"").decode(),
        digest=str(manifest["digest"]),
        detector_digest=_detector_digest(manifest["members"]),
    )


def _detector_digest(listed: Mapping[str, Any]) -> str:
    return _digest(listed, [name for name in listed if name in ("detector.onnx", "preparation.json", *REFERENCE)])


def _view(values: dict[str, Any]) -> View:
    region = values["region"]
    height, width = values["reference_size"]
    return View(
        **{
            **values,
            "reference_size": (int(height), int(width)),
            "region": None if region is None else Rectangle(**region),
        }
    )


def _reference(limits: dict[str, Any] | None, members: Mapping[str, bytes]) -> Reference | None:
    if limits is None:
        return None
    return Reference(
        image=np.asarray(decode_image(members["reference.png"], "reference.png"), dtype=np.uint8),
        weight=np.asarray(decode_image(members["weight.png"], "weight.png"), dtype=np.uint8),
        settings=RegistrationSettings(**limits["settings"]),
        min_similarity=float(limits["min_similarity"]),
        max_residual_px=float(limits["max_residual_px"]),
    )


def _npy(array: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
