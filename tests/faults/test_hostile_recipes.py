"""Whatever is brought in as a recipe or as settings: refused with a reason, and nothing else happens.

By hand: pytest tests/faults/test_hostile_recipes.py --long fuzzes for five minutes.
"""

from __future__ import annotations

import itertools
import json
import random
import time
import warnings
from pathlib import Path

import pytest
from hostile import ARCHIVES, BLOCK, Kit, body, entries
from recipes import tiny_recipe, tiny_reference, write_tiny_recipe

from agent.config import read_station
from agent.engines.engine import EngineSettings, open_engine
from agent.recipes.store import RecipeStore
from agent.recipes.trust import Trust
from calibration.errors import RecipeError, SettingsError, TaktsightError
from calibration.recipe import read_recipe, write_recipe
from calibration.recipe_file import read_members
from calibration.signing import make_key, read_public_key, read_signing_key, read_verified, sign_recipe


class Place:
    """A station's store with an active recipe, and the tools to make hostile ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("release", "stranger"):
            make_key(folder / name)
        key, stranger = (read_signing_key(folder / name) for name in ("release", "stranger"))
        self.keys = (read_public_key(folder / "release.pub"),)
        good = folder / "good.recipe"
        write_tiny_recipe(good, reference=tiny_reference((60, 80)))
        sign_recipe(good, key, 2)
        self.key = key
        self.kit = Kit(*read_members(good), key, stranger)
        self.store = RecipeStore(folder / "store", Trust(self.keys), good)
        self.store.add(good, "good", self.prove, lambda *_: None)
        self.store.activate("good", self.prove, lambda *_: None)
        self.hostile = folder / "hostile.recipe"
        self.hostile.write_bytes(b"")
        self.before = self.contents()

    @staticmethod
    def prove(recipe) -> None:
        open_engine(recipe, EngineSettings("onnxruntime", threads=1))

    def contents(self) -> dict[str, bytes]:
        """Return every file below and beside the store."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path != self.hostile
        }

    def bring_in(self, data: bytes) -> None:
        self.hostile.write_bytes(data)
        self.store.add(self.hostile, "hostile", self.prove, lambda *_: None)

    def put_there_and_activate(self, data: bytes) -> None:
        """Go round `add`: the file just lies there."""
        path = self.store.folder / "hostile.recipe"
        path.write_bytes(data)
        try:
            self.store.activate("hostile", self.prove, lambda *_: None)
        finally:
            path.unlink()

    def assert_untouched(self) -> None:
        assert self.contents() == self.before
        assert self.store.current()[0] == "good"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def fuzz_s(request) -> float:
    """How long one of the four kinds of fuzzing goes on."""
    return 75.0 if request.config.getoption("--long", default=False) else 1.5


def refused(place: Place, data: bytes) -> str:
    """Return why both ways in are barred."""
    with pytest.raises(TaktsightError) as brought:
        place.bring_in(data)
    with pytest.raises(TaktsightError):
        place.put_there_and_activate(data)
    place.assert_untouched()
    return str(brought.value)


def test_the_good_one_is_let_in(place: Place) -> None:
    """Else every refusal below would prove nothing."""
    for data in (place.kit.good(), place.kit.signed(), place.kit.before_the_end(b"")):
        place.bring_in(data)
        (place.store.folder / "hostile.recipe").unlink()
    place.assert_untouched()


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_refused_with_a_reason_and_changes_nothing(place: Place, name: str) -> None:
    reason = refused(place, ARCHIVES[name](place.kit))
    assert "hostile.recipe: " in reason or "differs from the trainer's answers" in reason
    assert 20 < len(reason) < 1200
    assert not Path("/etc/taktsight-was-here").exists()


def test_there_are_many_kinds() -> None:
    assert len(ARCHIVES) >= 80


def test_a_file_cut_off_anywhere_is_refused(place: Place) -> None:
    data = place.kit.good()
    places = {*range(0, len(body(data)), 397), *(entry.offset for entry in entries(data)), len(body(data))}
    for length in sorted(places):
        with pytest.raises(RecipeError, match=r"(copy it again|fetch it again)$"):
            place.bring_in(data[:length])
    place.assert_untouched()


def test_any_flipped_bit_is_refused_or_without_effect(place: Place) -> None:
    data, dice = place.kit.good(), random.Random(3)
    headers = [entry.offset + at for entry in entries(data) for at in range(0, BLOCK, 3)]
    manifest = range(BLOCK, BLOCK + entries(data)[0].size, 17)
    members = [entry.offset_data + dice.randrange(entry.size) for entry in entries(data) for _ in range(12)]
    good = read_verified(place.folder / "good.recipe", place.keys)
    for at in [*headers, *manifest, *members, *dice.sample(range(len(data)), 100)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << dice.randrange(8)
        place.hostile.write_bytes(damaged)
        try:
            found = read_verified(place.hostile, place.keys)
        except RecipeError:
            continue
        assert (found.digest, found.signature) == (good.digest, good.signature)


def test_an_older_recipe_with_a_good_signature_is_not_activated(place: Place) -> None:
    signature = {**place.kit.manifest["signature"], "revision": 1}
    with pytest.raises(RecipeError, match="revision 1 of tiny found, 2 was active here"):
        place.put_there_and_activate(place.kit.signed(signature=signature))
    place.assert_untouched()


def test_no_kind_is_read_even_where_unsigned_recipes_run(place: Place) -> None:
    """The signature is not what keeps them out, but for those that are about signatures alone."""
    only_signature = {name for name in ARCHIVES if "signature" in name}
    let_in = set()
    for name, make in ARCHIVES.items():
        place.hostile.write_bytes(make(place.kit))
        try:
            recipe = read_recipe(place.hostile)
            place.prove(recipe)
        except TaktsightError:
            continue
        let_in.add(name)
    assert let_in == only_signature


def rounds(seconds: float, seed: int):
    """Yield dice until the time is up."""
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        yield random.Random(f"{seed} {number}")
        number += 1


def only_our_own_errors(call, *arguments: object, seed: object) -> bool:
    """Return whether it went well; an error that is not ours goes through. seed: shown by pytest then."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(*arguments)
    except TaktsightError as error:
        assert str(error)
        assert len(str(error)) < 3000, str(error)[:300]
        return False
    return True


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Return bytes with a few flips, cuts, repeats and strange blocks."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5, 30))):
        at = dice.randrange(len(found) + 1)
        length = dice.choice((1, 2, 8, 100, 512, 5000))
        match dice.randrange(6):
            case 0:
                found[at : at + length] = dice.randbytes(length)
            case 1:
                del found[at : at + length]
            case 2:
                found[at:at] = found[at : at + length]
            case 3:
                found[at : at + length] = bytes(length)
            case 4:
                found[at:at] = dice.choice((b"\0", b"\xff", b'"', b"{", b"-", b"9" * 20, b"\n", b"NaN", b"1e999"))
            case 5 if at < len(found):
                found[at] ^= 1 << dice.randrange(8)
    return bytes(found)


STRANGE = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, 2**200, float("nan"), float("inf"), "", "0",
    "\0", "x" * 5000, "../..", [], {}, [[]], [1, 2], [2, 1], [0, 0], {"a": {}}, [1e9] * 3,
)  # fmt: skip


def strange_json(value, dice: random.Random):
    """Return the value with something strange somewhere in it."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        if dice.random() < 0.1:
            return {name: kept for name, kept in value.items() if name != key}
        return {**value, key: strange_json(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.5:
        at = dice.randrange(len(value))
        return [*value[:at], strange_json(value[at], dice), *value[at + 1 :]]
    return dice.choice(STRANGE)


def test_fuzzed_files_bring_nothing_but_our_own_errors(place: Place, fuzz_s: float) -> None:
    data = place.kit.good()
    for dice in rounds(fuzz_s, 1):
        place.hostile.write_bytes(damaged(data, dice))
        only_our_own_errors(read_recipe, place.hostile, seed=dice)
    place.assert_untouched()


def test_fuzzed_members_under_a_good_signature_bring_nothing_but_our_own_errors(place: Place, fuzz_s: float) -> None:
    plain = place.folder / "plain.bin"
    write_recipe(plain, tiny_recipe())
    _, unregistered = read_members(plain)
    plain.unlink()
    for number, dice in enumerate(rounds(fuzz_s, 2)):
        name = dice.choice([*unregistered, "preparation.json", "reference.png", "detector.onnx"])
        content = place.kit.members[name]
        if name.endswith(".json") and dice.random() < 0.8:
            content = json.dumps(strange_json(json.loads(content), dice)).encode()
        else:
            content = damaged(content, dice)
        place.hostile.write_bytes(place.kit.signed({name: content}))
        only_our_own_errors(read_verified, place.hostile, place.keys, seed=(number, name, content[:2000]))
    place.assert_untouched()


def test_fuzzed_manifests_under_a_good_signature_bring_nothing_but_our_own_errors(place: Place, fuzz_s: float) -> None:
    for number, dice in enumerate(rounds(fuzz_s, 3)):
        top = {}
        while not top:
            key = dice.choice([name for name in place.kit.manifest if name not in ("signature", "manifest_sha256")])
            value = strange_json(place.kit.manifest[key], dice)
            text = json.dumps(value)
            top = {} if "NaN" in text or "Infinity" in text else {key: value}
        try:
            data = place.kit.signed(**top)
        except (TypeError, ValueError, LookupError, AttributeError):  # the forger cannot digest a list that is none
            continue
        place.hostile.write_bytes(data)
        only_our_own_errors(read_verified, place.hostile, place.keys, seed=(number, top))
    place.assert_untouched()


STATION = """
station: cell7
recipe: good.recipe
recipes: {keys: [release.pub], unsigned: refuse, folder: store}
takt_ms: 500
deadline_ms: 450.5
queue_length: 4
on_no_verdict: reject
camera:
  kind: simulated
  seed: 7
  lost: [3, 5]
  colour: false
engine: {kind: onnxruntime, precision: f32, threads: 1}
mqtt: {topic: a/b/c/d/e, host: broker, port: 1883, protocol: 5, consumers: [mes], heatmaps: true}
sparkplug: {group: g, edge_node: n}
outbox: {max_mb: 100, heatmap_mb: 1.5}
commands: {allow: [pause, recipe], threshold_factor: 2}
archive: {folder: archive, pictures: none}
"""
YAML_BITS = (
    "&a", "*a", "!!python/object/apply:os.system", "!!binary", "!!timestamp", "!!float", "!!int", "!!set", "!!omap",
    "<<: ", "? ", "- ", "[", "]", "{", "}", "'", '"', "|", ">", "%", "@", "\t", "\0", "\u2028", "\ufeff", ".nan",
    ".inf", "1e999", "9" * 5000, "0o17", "0x" + "f" * 300, "1:60:60", "2001-99-99", "~", "null", "true", "-1",
    "\\x00", '"\\0"', '"a\\0b"',
)  # fmt: skip


def test_fuzzed_settings_bring_nothing_but_our_own_errors(place: Place, fuzz_s: float) -> None:
    path = place.folder / "hostile.recipe"  # the one file that `contents` leaves out
    path.write_text(STATION)
    read_station(path)
    for number, dice in enumerate(rounds(fuzz_s, 4)):
        text = STATION
        for _ in range(dice.choice((1, 1, 2, 6))):
            at = dice.randrange(len(text))
            if dice.random() < 0.5:  # in place of a value
                start = text.find(": ", at) + 2
                ends = [end for end in (text.find(mark, start) for mark in (",", "\n", "}")) if end >= 0]
                text = text[:start] + dice.choice(YAML_BITS) + text[min(ends, default=start) :]
            else:
                text = text[:at] + dice.choice(YAML_BITS) + text[at + dice.choice((0, 0, 1, 7)) :]
        path.write_bytes(damaged(text.encode(), dice) if dice.random() < 0.2 else text.encode())
        only_our_own_errors(read_station, path, seed=(number, text))
    place.assert_untouched()


BILLION_LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 20_000,
        "{a: " * 20_000,
        BILLION_LAUGHS,
        "station: &a [*a]\n",
        "station: !!python/object/apply:os.system ['touch outside']\n",
        "station: x\nrecipe: \"a\\0b\"\n",
        "x" * 5_000_000,
    ],
    ids=["nested lists", "nested blocks", "a billion laughs", "a list that holds itself", "code", "a zero", "too long"],
)  # fmt: skip
def test_settings_made_to_do_harm_are_refused_at_once(place: Place, text: str) -> None:
    place.hostile.write_text(text)
    began_s = time.monotonic()
    with pytest.raises(SettingsError) as caught:
        read_station(place.hostile)
    assert time.monotonic() - began_s < 5.0
    assert len(str(caught.value)) < 3000
    place.assert_untouched()
