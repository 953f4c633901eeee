"""What is tried on the readers of recipes and settings, at random: bytes, members, manifests and settings.

`FUZZERS` maps a kind to a function that makes one file and returns who is to read it; None where the forger failed. A
file comes from its dice alone: `dice_of(kind, number)` makes one that did harm once more.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

from hostile import Kit
from recipes import tiny_reference, write_tiny_recipe

from agent.config import read_station
from agent.engines.engine import EngineSettings, open_engine
from agent.recipes.store import RecipeStore
from agent.recipes.trust import Trust
from calibration.errors import TaktsightError
from calibration.recipe import read_recipe
from calibration.recipe_file import read_members
from calibration.signing import make_key, read_public_key, read_signing_key, read_verified, sign_recipe

Reader = Callable[[], object]
ADDED = "brought-in"


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
        self.good = self.kit.good()
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


def only_our_own_errors(read: Reader) -> bool:
    """Return whether it went well; a warning, and an error that is not ours, go through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read()
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


def dice_of(kind: str, number: int) -> random.Random:
    """Return the dice that make file `number` of a kind."""
    return random.Random(f"{kind} {number}")


def damaged_file(place: Place, dice: random.Random) -> Reader:
    """A recipe with other bytes somewhere."""
    place.hostile.write_bytes(damaged(place.good, dice))
    return lambda: read_recipe(place.hostile)


def damaged_member(place: Place, dice: random.Random) -> Reader:
    """A recipe with one member that means something else, well signed."""
    name = dice.choice([*place.kit.members, "preparation.json", "reference.png", "detector.onnx"])
    content = place.kit.members[name]
    if name.endswith(".json") and dice.random() < 0.8:
        content = json.dumps(strange_json(json.loads(content), dice)).encode()
    else:
        content = damaged(content, dice)
    place.hostile.write_bytes(place.kit.signed({name: content}))
    return lambda: read_verified(place.hostile, place.keys)


def strange_manifest(place: Place, dice: random.Random) -> Reader | None:
    """A recipe with a manifest that says something else, well signed."""
    key = dice.choice([name for name in place.kit.manifest if name not in ("signature", "manifest_sha256")])
    value = strange_json(place.kit.manifest[key], dice)
    text = json.dumps(value)
    if "NaN" in text or "Infinity" in text:
        return None
    try:
        data = place.kit.signed(**{key: value})
    except (TypeError, ValueError, LookupError, AttributeError):  # the forger cannot digest a list that is none
        return None
    place.hostile.write_bytes(data)
    return lambda: read_verified(place.hostile, place.keys)


def brought_in(place: Place, dice: random.Random) -> Reader:
    """A recipe with one damaged member, well signed, on its way into the store; what comes in is taken out again."""
    name = dice.choice([*place.kit.members])
    place.hostile.write_bytes(place.kit.signed({name: damaged(place.kit.members[name], dice)}))

    def bring() -> None:
        place.store.add(place.hostile, ADDED, place.prove, lambda *_: None)
        place.store.path(ADDED).unlink()

    return bring


def strange_settings(place: Place, dice: random.Random) -> Reader:
    """A station.yaml with other words and bytes somewhere."""
    text = STATION
    for _ in range(dice.choice((1, 1, 2, 6))):
        at = dice.randrange(len(text))
        if dice.random() < 0.5:  # in place of a value
            start = text.find(": ", at) + 2
            ends = [end for end in (text.find(mark, start) for mark in (",", "\n", "}")) if end >= 0]
            text = text[:start] + dice.choice(YAML_BITS) + text[min(ends, default=start) :]
        else:
            text = text[:at] + dice.choice(YAML_BITS) + text[at + dice.choice((0, 0, 1, 7)) :]
    path = place.hostile  # the one file that `contents` leaves out
    path.write_bytes(damaged(text.encode(), dice) if dice.random() < 0.2 else text.encode())
    return lambda: read_station(path)


FUZZERS: dict[str, Callable[[Place, random.Random], Reader | None]] = {
    "bytes of a recipe": damaged_file,
    "members under a good signature": damaged_member,
    "manifests under a good signature": strange_manifest,
    "recipes brought into the store": brought_in,
    "settings": strange_settings,
}
