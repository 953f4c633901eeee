"""Whatever is brought in as a recipe or as settings: refused with a reason, and nothing else happens.

By hand: python tests/soak/fuzz.py fuzzes for five minutes, and counts.
"""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
from fuzzing import FUZZERS, STATION, Place, dice_of, only_our_own_errors
from hostile import ARCHIVES, BLOCK, body, entries

from agent.config import read_station
from calibration.errors import RecipeError, SettingsError, TaktsightError
from calibration.recipe import read_recipe
from calibration.signing import read_verified

FUZZ_S, LEAST_FILES = 1.5, 40  # of each kind; among so many files each kind has some that are read well


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("hostile"))


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


@pytest.mark.parametrize("kind", FUZZERS)
def test_what_is_fuzzed_brings_nothing_but_our_own_errors(place: Place, kind: str) -> None:
    until_s, number, read_well = time.monotonic() + FUZZ_S, 0, 0
    while number < LEAST_FILES or time.monotonic() < until_s:
        read = FUZZERS[kind](place, dice_of(kind, number))
        read_well += read is not None and only_our_own_errors(read)
        number += 1
    place.assert_untouched()
    assert 0 < read_well < number


def test_the_settings_that_are_fuzzed_are_good_ones(place: Place) -> None:
    place.hostile.write_text(STATION)
    read_station(place.hostile)


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
    began_s = time.process_time()  # of this process: others may be busy
    with pytest.raises(SettingsError) as caught:
        read_station(place.hostile)
    assert time.process_time() - began_s < 5.0
    assert len(str(caught.value)) < 3000
    place.assert_untouched()
