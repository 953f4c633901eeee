"""A signature stands for exactly one recipe, by exactly one key."""

from __future__ import annotations

import dataclasses
import json
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from recipes import tiny_recipe, write_tiny_recipe

from calibration.errors import InputError, RecipeError
from calibration.recipe import read_recipe, write_recipe
from calibration.recipe_file import SEAL, canonical, read_members, sha256, write_members
from calibration.signing import (
    MAX_REVISION,
    make_key,
    read_public_key,
    read_signing_key,
    read_verified,
    sign_recipe,
    signature_of,
    verified,
)
from trainer.__main__ import commands


@pytest.fixture
def key(tmp_path: Path):
    make_key(tmp_path / "release.key")
    return read_signing_key(tmp_path / "release.key")


@pytest.fixture
def trusted(tmp_path: Path, key):
    return [read_public_key(tmp_path / "release.key.pub")]


@pytest.fixture
def signed(tmp_path: Path, key) -> Path:
    write_tiny_recipe(tmp_path / "x.recipe")
    sign_recipe(tmp_path / "x.recipe", key, 7)
    return tmp_path / "x.recipe"


def with_manifest(path: Path, change) -> Path:
    """Write the file anew with a changed manifest, sealed as a stranger could."""
    manifest, members = read_members(path)
    change(manifest)
    write_members(path, manifest, members)
    return path


def test_a_key_id_is_the_beginning_of_the_raw_keys_digest(tmp_path: Path, trusted) -> None:
    assert trusted[0].key_id == sha256(trusted[0].raw)[:16]
    assert len(trusted[0].raw) == 32


def test_the_private_key_is_its_owners_alone_and_is_never_overwritten(tmp_path: Path) -> None:
    made = make_key(tmp_path / "k")
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert (tmp_path / "k").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert read_signing_key(tmp_path / "k").public.raw == read_public_key(tmp_path / "k.pub").raw == made.raw
    before = (tmp_path / "k").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        make_key(tmp_path / "k")
    (tmp_path / "k.pub").unlink()
    with pytest.raises(InputError, match="k: is there already"):
        make_key(tmp_path / "k")
    assert (tmp_path / "k").read_bytes() == before


def test_a_private_key_that_others_may_read_signs_nothing(tmp_path: Path, key) -> None:
    (tmp_path / "release.key").chmod(0o640)
    with pytest.raises(InputError, match="mode 0640 lets others read the private key"):
        read_signing_key(tmp_path / "release.key")


def test_a_private_key_in_place_of_the_public_one_is_pointed_out(tmp_path: Path, key) -> None:
    with pytest.raises(InputError, match=r"give release\.key\.pub, keep this one away"):
        read_public_key(tmp_path / "release.key")


@pytest.mark.parametrize(
    "content", [b"", b"key", b"\0" * 10_000, b"-----BEGIN PUBLIC KEY-----\nAA\n-----END PUBLIC KEY-----"]
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content) -> None:
    (tmp_path / "k").write_bytes(content)
    (tmp_path / "k").chmod(0o600)
    for read in (read_public_key, read_signing_key):
        with pytest.raises(InputError, match=r"no (key file|public key|private key)"):
            read(tmp_path / "k")
    with pytest.raises(InputError, match="No such file"):
        read_public_key(tmp_path / "absent")


def test_a_signed_recipe_is_the_same_recipe_with_a_signer(signed: Path, key, trusted) -> None:
    plain = tiny_recipe()
    found = read_verified(signed, trusted)
    assert (found.signature.key, found.signature.revision) == (key.public.key_id, 7)
    assert found.signature == verified(signed, trusted)
    assert found.digest == write_recipe(signed.with_name("plain"), plain)
    assert dataclasses.replace(found, signature=None).thresholds == plain.thresholds
    assert [path.name for path in signed.parent.glob(".*")] == []


def test_readers_from_before_signatures_see_a_well_sealed_recipe_of_format_1(signed: Path) -> None:
    """What they check: the format, and the seal over all keys but the seal."""
    manifest, _ = read_members(signed)
    assert manifest["format"] == 1
    others = {name: value for name, value in manifest.items() if name != SEAL}
    assert manifest[SEAL] == sha256(canonical(others))
    assert read_recipe(signed).signature is None  # nothing was proven


def test_the_signature_is_ed25519_over_the_seal_without_it(signed: Path, trusted) -> None:
    """Worked out by hand, with nothing of ours but the JSON."""
    manifest, _ = read_members(signed)
    value = bytes.fromhex(manifest["signature"].pop("ed25519"))
    del manifest["manifest_sha256"]
    seal = bytes.fromhex(sha256(json.dumps(manifest, indent=1, sort_keys=True).encode()))
    public = Ed25519PublicKey.from_public_bytes(trusted[0].raw)
    public.verify(value, b"taktsight recipe signature 1\0" + seal)


def test_signing_again_replaces_the_signature(tmp_path: Path, signed: Path, trusted) -> None:
    make_key(tmp_path / "other")
    sign_recipe(signed, read_signing_key(tmp_path / "other"), 9)
    assert verified(signed, [read_public_key(tmp_path / "other.pub")]).revision == 9
    with pytest.raises(RecipeError, match=r"signed by key \w{16}, trusted here: \w{16} \(release\.key\.pub\)"):
        verified(signed, trusted)


def test_a_revision_is_the_time_unless_it_is_given(tmp_path: Path, key) -> None:
    write_tiny_recipe(tmp_path / "x")
    assert abs(sign_recipe(tmp_path / "x", key).revision - time.time()) < 5
    for wrong in (0, -1, MAX_REVISION + 1):
        with pytest.raises(InputError, match=f"revision {wrong} found, need 1 to"):
            sign_recipe(tmp_path / "x", key, wrong)


def test_an_unsigned_recipe_has_no_signer(tmp_path: Path, trusted) -> None:
    write_tiny_recipe(tmp_path / "x")
    with pytest.raises(RecipeError, match="not signed: have it signed with taktsight-trainer sign by"):
        read_verified(tmp_path / "x", trusted)
    with pytest.raises(RecipeError, match="no key at all"):
        read_verified(tmp_path / "x", [])


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(product="other"),
        lambda manifest: manifest.update(training={}),
        lambda manifest: manifest.update(written_utc="2030-01-01"),
        lambda manifest: manifest.update(extra=1),
        lambda manifest: manifest["signature"].update(revision=8),
        lambda manifest: manifest["signature"].update(created="2030-01-01T00:00:00+00:00"),
        lambda manifest: manifest["signature"].update(ed25519="0" * 128),
    ],
)
def test_nothing_that_the_manifest_says_can_be_changed_under_its_signature(signed: Path, trusted, change) -> None:
    with pytest.raises(RecipeError, match="its signature is not over this recipe, or forged"):
        read_verified(with_manifest(signed, change), trusted)


@pytest.mark.parametrize(
    "fields",
    [None, {}, [], "x", {"key": 1}, {"revision": True}, {"revision": 0}, {"revision": 1.5}, {"key": "Z" * 16},
     {"ed25519": "00"}, {"created": "\x1b[2J"}, {"more": 1}],
)  # fmt: skip
def test_a_signature_that_is_none_is_damaged(signed: Path, trusted, fields) -> None:
    def change(manifest):
        is_part = isinstance(fields, dict) and fields
        manifest["signature"] = {**manifest["signature"], **fields} if is_part else fields

    with pytest.raises(RecipeError, match="its signature is damaged"):
        read_verified(with_manifest(signed, change), trusted)


def test_the_signature_of_another_recipe_does_not_fit(tmp_path: Path, signed: Path, key, trusted) -> None:
    write_tiny_recipe(tmp_path / "y", level=0.4)
    sign_recipe(tmp_path / "y", key, 7)
    foreign = read_members(tmp_path / "y")[0]["signature"]
    with pytest.raises(RecipeError, match="its signature is not over this recipe"):
        read_verified(with_manifest(signed, lambda manifest: manifest.update(signature=foreign)), trusted)


def test_a_recipe_that_is_written_anew_is_unsigned(signed: Path, trusted) -> None:
    found = read_verified(signed, trusted)
    write_recipe(signed, dataclasses.replace(found, thresholds=dataclasses.replace(found.thresholds, score=0.3)))
    assert signature_of(signed, read_members(signed)[0]) is None


def test_what_cannot_be_read_cannot_be_signed(tmp_path: Path, key) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="not a recipe"):
        sign_recipe(tmp_path / "x", key)
    assert (tmp_path / "x").read_bytes() == b"nothing"


def test_keygen_and_sign_as_a_user_types_them(tmp_path: Path) -> None:
    recipe, keyfile = tmp_path / "x.recipe", tmp_path / "release.key"
    write_tiny_recipe(recipe)
    made = CliRunner().invoke(commands, ["keygen", str(keyfile)], catch_exceptions=False)
    assert "name it in station.yaml under recipes.keys" in made.output
    CliRunner().invoke(
        commands, ["sign", str(recipe), "--key", str(keyfile), "--revision", "3"], catch_exceptions=False
    )
    assert verified(recipe, [read_public_key(tmp_path / "release.key.pub")]).revision == 3
