"""The file that holds a recipe: a plain tar, its manifest first, read by rules that leave nothing to interpretation.

Every header is ustar, of a regular file without a path, listed once in the manifest with its size and digest; after the
last member only zeros. Links, devices, pax and GNU extensions, compressed archives and whatever else tar knows are
refused before a byte of theirs is used. Nothing is ever extracted: members are read into memory, after the manifest
vouched for them, and no more bytes are read than the file has.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from calibration.errors import RecipeError

FORMAT_VERSION = 3  # the newest that is read; a recipe is written in the oldest that can hold it
MANIFEST = "manifest.json"
SEAL = "manifest_sha256"  # key of the manifest: digest of all its other keys
REQUIRED = ("detector.onnx", "preparation.json", "thresholds.json", "selftest.npy", "selftest.json")
REFERENCE = ("reference.png", "weight.png")
SINCE_2 = ("detector.f16.onnx", "selftest_maps.npy")
SINCE_3 = ("zones.png",)
FOR_PEOPLE = ("metrics.json", "report.html")
MEMBERS = REQUIRED + SINCE_2 + SINCE_3 + REFERENCE + FOR_PEOPLE
GRAPHS = ("detector.onnx", "detector.f16.onnx")
MAX_BYTES = 2 * 1024**3  # of the whole file
MAX_MANIFEST_BYTES = 16 * 1024**2

_BLOCK = 512
_OCTAL = re.compile(rb"[0-7]+[\0 ]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Vouch = Callable[[Mapping[str, Any]], object]
"""Looks at a manifest before any member is read; raises RecipeError to refuse it."""


def read_members(path: Path, vouch: Vouch | None = None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return (manifest, members) after checking the format, the list of members and every digest.

    Raises RecipeError saying what is wrong, and what `vouch` raises.
    """
    try:
        with open_file(path) as file:
            return _Reader(path, file).read(vouch)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}: give the path of a recipe") from error


def write_members(path: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    """Write a recipe in one step: a crash or a full disk leaves the old file as it was.

    manifest: without its seal, which is added.

    Raises RecipeError if the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            _write_tar(file, {MANIFEST: canonical(sealed(manifest)), **members})
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}: nothing was changed, an older recipe there is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest with the digest of all its other keys, as a reader will see it."""
    plain = json.loads(canonical({key: value for key, value in manifest.items() if key != SEAL}))
    return {**plain, SEAL: sha256(canonical(plain))}


def members_digest(listed: Mapping[str, Any], names: list[str]) -> str:
    """Return one digest over those members of the manifest's list."""
    return sha256(canonical({name: listed[name]["sha256"] for name in names}))


def canonical(value: Any) -> bytes:
    """Return JSON that is the same for equal values; NaN and infinity raise ValueError."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def strict_json(data: bytes) -> Any:
    """Return the value of JSON text. Raises ValueError also on a key given twice and on numbers that are not finite."""
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def sha256(data: bytes) -> str:
    """Return the digest as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def open_file(path: Path) -> BinaryIO:
    """Return a regular file opened for reading. Raises OSError; a fifo or a device is neither waited for nor read."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "Is a directory" if stat.S_ISDIR(mode) else "not a regular file")


def sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Reader:
    """One pass over the file, header by header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._left = os.fstat(file.fileno()).st_size
        if self._left > MAX_BYTES:
            raise RecipeError(f"{path}: {self._left} bytes found, a recipe has at most {MAX_BYTES}: fetch it again")

    def read(self, vouch: Vouch | None) -> tuple[dict[str, Any], dict[str, bytes]]:
        first = self._header()
        if first is None or first[0] != MANIFEST:
            raise RecipeError(f"{self._path}: not a recipe: its first member is not {MANIFEST}: copy it again")
        manifest = checked_manifest(self._path, self._content(MANIFEST, first[1], MAX_MANIFEST_BYTES))
        if vouch is not None:
            vouch(manifest)
        listed, members = manifest["members"], dict[str, bytes]()
        while (entry := self._header()) is not None:
            name, size = entry
            if name not in listed or name in members:
                raise self._stranger(name)
            if size != listed[name]["bytes"]:
                raise RecipeError(
                    f"{self._path}: {name} has {size} bytes, its manifest lists {listed[name]['bytes']}: fetch it again"
                )
            members[name] = self._content(name, size, MAX_BYTES)
            if sha256(members[name]) != listed[name]["sha256"]:
                raise RecipeError(f"{self._path}: {name} was changed after the recipe was written: fetch it again")
        missing = [name for name in listed if name not in members]
        if missing:
            raise RecipeError(f"{self._path}: {', '.join(missing)} missing, the file is cut off: copy it again")
        return manifest, members

    def _header(self) -> tuple[str, int] | None:
        """Return (name, size) of the next member; None at the end, behind which nothing may stand."""
        block = self._take(_BLOCK)
        if len(block) < _BLOCK:
            raise RecipeError(f"{self._path}: not a recipe or cut off at a header: copy it again")
        if not block.strip(b"\0"):
            if self._left < _BLOCK:
                raise RecipeError(f"{self._path}: not a recipe or cut off at its end: copy it again")
            while rest := self._take(64 * 1024):
                if rest.strip(b"\0"):
                    raise RecipeError(f"{self._path}: something follows the end of the archive: fetch it again")
            return None
        name, kind = _text(block[:100]), block[156:157]
        if _octal(block[148:156]) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
            raise RecipeError(f"{self._path}: not a recipe, or a header is damaged: copy it again")
        size = _octal(block[124:136])
        # magic and version of POSIX ustar; no link name, no prefix before the name
        plain = block[257:265] == b"ustar\x0000" and not block[157:257].strip(b"\0") and not block[345:].strip(b"\0")
        if name is None or kind != b"0" or size is None or not plain:
            raise self._stranger(_text(block[:100]) or "?")
        return name, size

    def _content(self, name: str, size: int, limit: int) -> bytes:
        if size > limit:
            raise RecipeError(f"{self._path}: {name} claims {size} bytes, at most {limit} are read: fetch it again")
        if size > self._left:
            raise RecipeError(f"{self._path}: {name} is cut off after {self._left} of {size} bytes: copy it again")
        data = self._take(size)
        if self._take(-size % _BLOCK).strip(b"\0"):
            raise RecipeError(f"{self._path}: the padding of {name} is not empty: fetch it again")
        return data

    def _take(self, count: int) -> bytes:
        data = self._file.read(min(count, self._left))
        self._left -= len(data)
        return data

    def _stranger(self, name: str) -> RecipeError:
        return RecipeError(f"{self._path}: {name!r} is not a member that its manifest lists once: do not use it")


def checked_manifest(path: Path, data: bytes) -> dict[str, Any]:
    """Return the manifest, unharmed and complete. Raises RecipeError naming path."""
    try:
        manifest: dict[str, Any] = strict_json(data)
        version = manifest["format"]
        listed = manifest["members"]
        named = all(_is_listing(entry) for entry in listed.values())
        if not isinstance(version, int) or isinstance(version, bool) or version < 1 or not named:
            raise ValueError(f"format {version!r} or its list of members")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: its manifest is damaged ({short(error)}): fetch it again") from error
    if version > FORMAT_VERSION:
        raise RecipeError(
            f"{path}: recipe format {version} found, this taktsight reads up to {FORMAT_VERSION}: update taktsight"
        )
    unknown = [name for name in listed if name not in MEMBERS]
    absent = [name for name in REQUIRED if name not in listed]
    if unknown or absent:
        raise RecipeError(f"{path}: unknown members {unknown[:8]}, required members absent {absent}: fetch it again")
    if manifest.get(SEAL) != sealed(manifest)[SEAL]:
        raise RecipeError(f"{path}: its manifest was changed after it was written: fetch it again")
    if manifest.get("digest") != members_digest(listed, [name for name in listed if name not in FOR_PEOPLE]):
        raise RecipeError(f"{path}: its list of members does not fit its digest: fetch it again")
    return manifest


def _is_listing(entry: Any) -> bool:
    size, digest = entry["bytes"], entry["sha256"]
    is_size = isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MAX_BYTES
    return is_size and isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None


def _write_tar(file: io.BufferedWriter, members: Mapping[str, bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)  # owner, mode and time stay at their fixed defaults
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _text(field: bytes) -> str | None:
    """Return an ASCII name that ends with zeros only, None if it is none."""
    name = field.rstrip(b"\0")
    return name.decode() if name and all(32 < byte < 127 for byte in name) else None


def _octal(field: bytes) -> int | None:
    return int(field.rstrip(b"\0 "), 8) if _OCTAL.fullmatch(field) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def short(error: Exception) -> str:
    """Return an error of Python's for a message of ours, without the megabytes that it may hold."""
    text = repr(error)
    return text if len(text) <= 200 else text[:199] + "…"
