"""Who stands for a recipe: Ed25519 signatures, made where recipes are approved and checked where they run.

The signature is a key of the manifest:

    "signature": {"key": ID, "revision": 1700000000, "created": "2026-11-22T10:00:00+00:00", "ed25519": 128 hex digits}

Signed is the seal that the manifest has without its seal and without the 64 bytes themselves: all members by their
digests, product, training, key, revision and date. The manifest's own seal then covers the signature, too, so that
readers of format 1 from before there were signatures take a signed recipe for what it is, and the digest of what
decides verdicts does not change by signing. Whatever is written anew with `write_recipe` is unsigned.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from calibration.errors import InputError, RecipeError
from calibration.recipe import Recipe, Signature, recipe_from_members
from calibration.recipe_file import SEAL, open_file, read_members, sealed, sha256, sync_folder, write_members

SIGNATURE = "signature"
VALUE = "ed25519"
MAX_REVISION = 2**53  # the largest whole number that every reader of JSON gets right
MAX_KEY_BYTES = 4096
_DOMAIN = b"taktsight recipe signature 1\0"  # a signature over anything else is never one over a recipe
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that may be trusted."""

    raw: bytes  # 32
    name: str  # of its file, for people

    @property
    def key_id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the raw key."""
        return sha256(self.raw)[:16]


class SigningKey:
    """A private key, as read from its file."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = PublicKey(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), "own")

    def sign(self, statement: bytes) -> bytes:
        """Return the 64 bytes."""
        return self._key.sign(statement)


def make_key(path: Path) -> PublicKey:
    """Write a new private key to path, for its owner's eyes only, and its public key to path + ".pub".

    Raises InputError if one of the files is there already, or cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    private_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public_file = public_key_file(path)
    if public_file.exists():
        raise InputError(f"{public_file}: is there already: choose another name, or keep that key")
    _write_new(path, private_pem, 0o600)
    _write_new(public_file, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return PublicKey(public.public_bytes(Encoding.Raw, PublicFormat.Raw), public_file.name)


def public_key_file(path: Path) -> Path:
    """Return where the public key of a private key file lies."""
    return path.with_name(f"{path.name}.pub")


def read_signing_key(path: Path) -> SigningKey:
    """Return a private key. Raises InputError if it is none, or if others than its owner may read it."""
    try:
        key = load_pem_private_key(_key_bytes(path, owner_only=True), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no private key: give the file that taktsight-trainer keygen made") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: a key of another kind found, need Ed25519: make one with taktsight-trainer keygen")
    return SigningKey(key)


def read_public_key(path: Path) -> PublicKey:
    """Return a public key. Raises InputError if it is none."""
    data = _key_bytes(path, owner_only=False)
    if b"PRIVATE KEY" in data:
        raise InputError(f"{path}: a private key found, need the public one: give {path.name}.pub, keep this one away")
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no public key: give the .pub file that taktsight-trainer keygen made") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: a key of another kind found, need Ed25519: make one with taktsight-trainer keygen")
    return PublicKey(key.public_bytes(Encoding.Raw, PublicFormat.Raw), path.name)


def sign_recipe(path: Path, key: SigningKey, revision: int | None = None) -> Signature:
    """Sign a recipe, in place of a signature it may have, in one step; return the signature.

    revision: what a station goes by when it refuses an older recipe of the same product; None: the Unix time, seconds.

    Raises RecipeError if the recipe is not whole or cannot be written, InputError if the revision is out of range.
    """
    revision = int(time.time()) if revision is None else revision
    if not 1 <= revision <= MAX_REVISION:
        raise InputError(f"revision {revision} found, need 1 to {MAX_REVISION}: leave it out, it then is the Unix time")
    manifest, members = read_members(path)
    recipe_from_members(path, manifest, members)  # nobody signs what no station can read
    created = datetime.now(UTC).isoformat(timespec="seconds")
    fields = {"key": key.public.key_id, "revision": revision, "created": created}
    value = key.sign(_statement({**manifest, SIGNATURE: fields}))
    write_members(path, {**manifest, SIGNATURE: {**fields, VALUE: value.hex()}}, members)
    return Signature(key.public.key_id, revision, created, value)


def read_verified(path: Path, keys: Sequence[PublicKey]) -> Recipe:
    """Return a recipe that one of the keys signed, with its signature; no member is read before that is certain.

    Raises RecipeError if nobody signed it, none of these, or anything in it is not what was signed.
    """
    manifest, members = read_members(path, lambda manifest: verify(path, manifest, keys))
    return replace(recipe_from_members(path, manifest, members), signature=verify(path, manifest, keys))


def verified(path: Path, keys: Sequence[PublicKey]) -> Signature:
    """Return the signature of a whole recipe that one of the keys made. Raises RecipeError as `read_verified`."""
    manifest, _ = read_members(path, lambda manifest: verify(path, manifest, keys))
    return verify(path, manifest, keys)


def verify(path: Path, manifest: Mapping[str, Any], keys: Sequence[PublicKey]) -> Signature:
    """Return the signature of a manifest. Raises RecipeError, naming path, if none of the keys made it."""
    signature = signature_of(path, manifest)
    if signature is None:
        raise RecipeError(f"{path}: not signed: have it signed with taktsight-trainer sign by {_told(keys)}")
    for key in keys:
        if key.key_id == signature.key:
            try:
                Ed25519PublicKey.from_public_bytes(key.raw).verify(signature.value, _statement(manifest))
            except InvalidSignature as error:
                raise RecipeError(
                    f"{path}: its signature is not over this recipe, or forged: do not use it, fetch it from its signer"
                ) from error
            return signature
    raise RecipeError(
        f"{path}: signed by key {signature.key}, trusted here: {_told(keys)}: have it signed by one of these, or add "
        "that key's file to recipes.keys in station.yaml"
    )


def signature_of(path: Path, manifest: Mapping[str, Any]) -> Signature | None:
    """Return what the manifest says about its signer, which nothing proves yet; None: it is not signed.

    Raises RecipeError if the fields are none of a signature.
    """
    if SIGNATURE not in manifest:
        return None
    fields = manifest[SIGNATURE]
    is_whole = isinstance(fields, dict) and set(fields) == {"key", "revision", "created", VALUE}
    if is_whole:
        key, revision, created, value = (fields[name] for name in ("key", "revision", "created", VALUE))
        texts = [(key, 16), (value, 128)]
        is_whole = all(isinstance(text, str) and len(text) == n and _HEX.fullmatch(text) for text, n in texts)
        is_whole &= type(revision) is int and 1 <= revision <= MAX_REVISION
        is_whole &= isinstance(created, str) and 0 < len(created) <= 40 and created.isprintable()
    if not is_whole:
        raise RecipeError(f"{path}: its signature is damaged: have it signed again with taktsight-trainer sign")
    return Signature(key, revision, created, bytes.fromhex(value))


def _statement(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed."""
    fields = {name: value for name, value in manifest[SIGNATURE].items() if name != VALUE}
    return _DOMAIN + bytes.fromhex(sealed({**manifest, SIGNATURE: fields})[SEAL])


def _told(keys: Sequence[PublicKey]) -> str:
    return ", ".join(f"{key.key_id} ({key.name})" for key in keys) or "no key at all"


def _key_bytes(path: Path, *, owner_only: bool) -> bytes:
    try:
        with open_file(path) as file:
            found = os.fstat(file.fileno())
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}: give a key file, make one with taktsight-trainer keygen"
        ) from error
    if len(data) > MAX_KEY_BYTES:
        raise InputError(f"{path}: no key file: give one that taktsight-trainer keygen made")
    if owner_only and found.st_mode & 0o077:
        raise InputError(
            f"{path}: mode {stat.S_IMODE(found.st_mode):04o} lets others read the private key: chmod 600 it, "
            "or make a new one if somebody may have"
        )
    return data


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except FileExistsError as error:
        raise InputError(f"{path}: is there already: choose another name, or keep that key") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a file that can be written") from error
