"""A station's recipes: what comes in, what judges, what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from recipes import SIDE, write_tiny_recipe

from agent.__main__ import commands
from agent.audit import AuditLog
from agent.engines.engine import EngineSettings
from agent.errors import EngineError, StorageError
from agent.recipes.changeover import Changeover, ChangeoverSettings
from agent.recipes.staging import STAGING
from agent.recipes.store import ACTIVE_FILE, ChosenThreshold, RecipeStore
from agent.recipes.trust import Trust
from calibration.errors import InputError, RecipeError
from calibration.photometric import Photometric
from calibration.preprocess import View
from calibration.recipe_file import canonical, sha256
from calibration.signing import make_key, read_public_key, read_signing_key, sign_recipe


def nothing(*_: object) -> None:
    """Prove nothing, record nothing."""


class Bench:
    """A store, a key that it trusts, and recipes to bring in."""

    def __init__(self, folder: Path, *, unsigned: bool = False) -> None:
        self.folder = folder
        make_key(folder / "release.key")
        self.key = read_signing_key(folder / "release.key")
        self.trust = Trust((read_public_key(folder / "release.key.pub"),), unsigned)
        self.own = self.recipe("own", product="own", revision=1)
        self.store = self.reopened()

    def reopened(self, own: Path | None = None) -> RecipeStore:
        return RecipeStore(self.folder / "store", self.trust, own or self.own)

    def recipe(self, name: str, *, revision: int | None, level: float = 0.5, product: str = "flange") -> Path:
        path = self.folder / f"{name}.recipe"
        write_tiny_recipe(path, level=level, product=product)
        if revision is not None:
            sign_recipe(path, self.key, revision)
        return path

    def add(self, name: str, **facts) -> None:
        self.store.add(self.recipe(name, **facts), name, nothing, nothing)

    def active(self) -> str:
        return self.reopened().current()[0]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture
def stocked(bench: Bench) -> Bench:
    bench.add("one", revision=10)
    bench.add("two", revision=20, level=0.4)
    return bench


def test_a_store_that_was_never_used_is_empty_and_nothing_is_written(bench: Bench) -> None:
    assert bench.store.names() == []
    assert bench.active() == ""
    assert not (bench.folder / "store").exists()


def test_what_is_added_is_there_and_judges_nothing_yet(stocked: Bench) -> None:
    assert stocked.store.names() == ["one", "two"]
    assert [(one.name, one.trouble) for one in stocked.store.listed()] == [("one", ""), ("two", "")]
    assert stocked.active() == ""
    assert list((stocked.folder / "store" / STAGING).iterdir()) == []


def test_the_activated_recipe_judges_from_the_next_start_and_the_one_before_is_kept(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    old, new = stocked.store.activate("two", nothing, nothing)
    assert (old.name, new.name, new.revision) == ("one", "two", 20)
    assert stocked.active() == "two"
    assert stocked.reopened().state().previous.name == "one"


def test_rollback_goes_back_and_forth(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    stocked.store.activate("two", nothing, nothing)
    for expected in ("one", "two", "one"):
        assert stocked.store.roll_back(nothing, nothing)[1].name == expected
        assert stocked.active() == expected


def test_rollback_from_the_first_one_goes_back_to_what_station_yaml_says(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    old, new = stocked.store.roll_back(nothing, nothing)
    assert (old.name, new.name, new.product) == ("one", "", "own")
    assert stocked.active() == ""


def test_there_is_nothing_to_go_back_to_at_first(stocked: Bench) -> None:
    with pytest.raises(RecipeError, match="no recipe was active before this one"):
        stocked.store.roll_back(nothing, nothing)


def test_activating_the_active_one_again_keeps_the_one_before(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    stocked.store.activate("two", nothing, nothing)
    stocked.store.activate("two", nothing, nothing)
    assert stocked.store.state().previous.name == "one"


def test_an_older_revision_is_refused_unless_it_is_a_rollback(stocked: Bench) -> None:
    stocked.store.activate("two", nothing, nothing)
    with pytest.raises(RecipeError, match="revision 10 of flange found, 20 was active here: go back"):
        stocked.store.activate("one", nothing, nothing)
    assert stocked.active() == "two"


def test_two_recipes_of_one_revision_are_not_taken_for_each_other(stocked: Bench) -> None:
    stocked.add("twin", revision=20, level=0.3)
    stocked.store.activate("two", nothing, nothing)
    with pytest.raises(RecipeError, match="revision 20 of flange found, 20 was active here"):
        stocked.store.activate("twin", nothing, nothing)


def test_revisions_count_per_product_and_outlive_a_changeover(stocked: Bench) -> None:
    stocked.add("gear", revision=3, product="gear")
    for name in ("two", "gear", "two", "gear"):
        stocked.store.activate(name, nothing, nothing)
    with pytest.raises(RecipeError, match="revision 10 of flange"):
        stocked.store.activate("one", nothing, nothing)


def test_an_older_file_in_place_of_station_yamls_own_does_not_start(bench: Bench) -> None:
    bench.recipe("own", product="own", revision=5, level=0.4)
    bench.store.note_running(bench.store.current()[1])
    bench.recipe("own", product="own", revision=4)
    with pytest.raises(RecipeError, match="revision 4 of own found, 5 was active here"):
        bench.reopened().current()


def test_another_recipe_in_station_yaml_ends_the_choice_but_not_the_protection(stocked: Bench) -> None:
    stocked.store.activate("two", nothing, nothing)
    other = stocked.recipe("other", product="other", revision=1)
    assert stocked.reopened(other).current()[1].product == "other"
    with pytest.raises(RecipeError, match="revision 10 of flange"):
        stocked.reopened(stocked.folder / "one.recipe").current()


@pytest.fixture
def spelled(stocked: Bench, monkeypatch) -> list[Path]:
    """The recipe of station.yaml as commands name it from several folders."""
    (stocked.folder / "sub").mkdir()
    (stocked.folder / "line").symlink_to(stocked.folder, target_is_directory=True)
    monkeypatch.chdir(stocked.folder / "sub")
    name = stocked.own.name
    return [stocked.own, Path("..", name), stocked.folder / "sub" / ".." / name, stocked.folder / "line" / name]


def test_a_choice_holds_from_whatever_folder_a_command_is_given(stocked: Bench, spelled: list[Path]) -> None:
    for chosen_by, name in zip(spelled, ("one", "two", "one", "two"), strict=True):
        store = stocked.reopened(chosen_by)
        store.activate(name, nothing, nothing)
        store.choose_threshold(THRESHOLD)
        for asked_by in spelled:
            assert stocked.reopened(asked_by).current()[0] == name
            assert stocked.reopened(asked_by).state().threshold == THRESHOLD
        if name == "two":
            assert store.roll_back(nothing, nothing)[1].name == "one"


def test_a_choice_that_was_stored_under_another_spelling_holds(stocked: Bench, spelled: list[Path]) -> None:
    stocked.store.activate("two", nothing, nothing)
    path = stocked.folder / "store" / ACTIVE_FILE
    for spelling in spelled[2:]:
        fields = {**json.loads(path.read_text()), "instead_of": str(spelling)}
        del fields["sha256"]
        path.write_bytes(canonical({**fields, "sha256": sha256(canonical(fields))}))
        assert (stocked.active(), stocked.store.ended()) == ("two", "")


def test_a_link_in_place_of_the_recipe_itself_is_a_recipe_of_its_own(stocked: Bench) -> None:
    (stocked.folder / "linked.recipe").symlink_to(stocked.own)
    stocked.store.activate("two", nothing, nothing)
    assert stocked.reopened(stocked.folder / "linked.recipe").current()[0] == ""


def test_a_choice_that_is_not_used_is_told_of(stocked: Bench) -> None:
    other = stocked.recipe("other", product="other", revision=1)
    assert stocked.reopened(other).ended() == ""
    stocked.store.activate("two", nothing, nothing)
    stocked.store.choose_threshold(THRESHOLD)
    assert stocked.store.ended() == ""
    assert stocked.reopened(other).ended() == (
        f"not used: recipe two and threshold 0.125, chosen in place of {stocked.own}; station.yaml names {other}"
    )


def test_an_active_recipe_that_was_exchanged_does_not_start(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    (stocked.folder / "two.recipe").replace(stocked.folder / "store" / "one.recipe")
    with pytest.raises(RecipeError, match="is not the recipe that was commanded last"):
        stocked.reopened().current()


def test_a_recipe_whose_self_test_fails_here_is_not_taken_in(bench: Bench) -> None:
    def fail(_: object) -> None:
        raise EngineError("differs")

    with pytest.raises(EngineError):
        bench.store.add(bench.recipe("bad", revision=1), "bad", fail, nothing)
    assert bench.store.names() == []
    assert list((bench.folder / "store" / STAGING).iterdir()) == []


def test_a_change_that_cannot_be_recorded_does_not_happen(stocked: Bench) -> None:
    def full(*_: object) -> None:
        raise StorageError("disk full")

    stocked.store.activate("one", nothing, nothing)
    for attempt in (
        lambda: stocked.store.activate("two", nothing, full),
        lambda: stocked.store.roll_back(nothing, full),
        lambda: stocked.store.add(stocked.recipe("three", revision=30), "three", nothing, full),
    ):
        with pytest.raises(StorageError, match="disk full"):
            attempt()
    assert stocked.active() == "one"
    assert stocked.store.names() == ["one", "two"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "ä", "x" * 101, "a\0b", "-x", "a\n"])
def test_a_name_that_could_mean_a_path_is_refused(bench: Bench, name: str) -> None:
    with pytest.raises(InputError, match="need letters, digits"):
        bench.store.add(bench.own, name, nothing, nothing)


def test_a_name_in_use_is_not_overwritten(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    with pytest.raises(InputError, match="two is there already: add --replace"):
        stocked.store.add(stocked.own, "two", nothing, nothing)
    with pytest.raises(InputError, match="one is active or was before"):
        stocked.store.add(stocked.own, "one", nothing, nothing, replaces=True)
    stocked.store.add(stocked.own, "two", nothing, nothing, replaces=True)
    assert stocked.store.read("two").product == "own"


def test_a_fifo_or_a_device_is_not_waited_for(bench: Bench) -> None:
    os.mkfifo(bench.folder / "pipe.recipe")
    for source in (bench.folder / "pipe.recipe", Path("/dev/zero"), bench.folder):
        with pytest.raises(InputError, match=r"not a regular file|Is a directory"):
            bench.store.add(source, "x", nothing, nothing)


def test_a_staging_folder_that_leads_elsewhere_is_not_used(bench: Bench) -> None:
    (bench.folder / "store").mkdir()
    (bench.folder / "elsewhere").mkdir()
    (bench.folder / "store" / STAGING).symlink_to(bench.folder / "elsewhere")
    with pytest.raises(StorageError, match="not a folder of our own"):
        bench.store.add(bench.own, "x", nothing, nothing)
    assert list((bench.folder / "elsewhere").iterdir()) == []


def test_what_a_killed_add_left_is_cleared_away(bench: Bench) -> None:
    (bench.folder / "store" / STAGING).mkdir(parents=True)
    (bench.folder / "store" / STAGING / "incoming.recipe").write_bytes(b"half")
    bench.add("one", revision=1)
    assert list((bench.folder / "store" / STAGING).iterdir()) == []


def test_any_damage_to_the_choice_is_seen(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    path = stocked.folder / "store" / ACTIVE_FILE
    data = path.read_bytes()
    for place in range(0, len(data) - 1, 7):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"active\.json is damaged"):
            stocked.reopened().current()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match=r"move it away and activate a recipe anew"):
        stocked.reopened().current()


def test_a_disk_that_fails_leaves_the_old_choice(stocked: Bench, monkeypatch) -> None:
    stocked.store.activate("one", nothing, nothing)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device: nothing was changed"):
            stocked.store.activate("two", nothing, nothing)
    assert stocked.active() == "one"
    assert [path.name for path in (stocked.folder / "store").glob(".active*")] == []


def test_changes_from_several_sides_come_one_after_the_other(stocked: Bench) -> None:
    stocked.add("gear", revision=1, product="gear")

    def change(name: str) -> None:
        for _ in range(10):
            stocked.reopened().activate(name, nothing, nothing)

    threads = [threading.Thread(target=change, args=(name,)) for name in ("two", "gear")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = stocked.store.state()
    assert {state.active.name, state.previous.name} == {"two", "gear"}
    assert {product: facts[0] for product, facts in state.revisions.items()} == {"flange": 20, "gear": 1}


def test_unsigned_recipes_run_where_the_station_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path, unsigned=True)
    bench.add("plain", revision=None)
    assert bench.store.activate("plain", nothing, nothing)[1].signer is None
    with pytest.raises(RecipeError, match="not signed"):
        RecipeStore(tmp_path / "store", Trust(bench.trust.keys), bench.own).current()


def test_a_commanded_recipe_is_the_active_one(stocked: Bench) -> None:
    settings = ChangeoverSettings(
        stocked.own,
        EngineSettings("onnxruntime", threads=1),
        Photometric(),
        stocked.folder / "store",
        stocked.trust,
    )
    changeover = Changeover(settings)
    assert changeover.first().recipe.product == "own"
    changeover.remember_recipe("two", changeover.to("two"))
    assert stocked.active() == "two"
    with pytest.raises(RecipeError, match="revision 10 of flange found, 20 was active here"):
        changeover.to("one")
    stocked.store.roll_back(nothing, nothing)
    assert Changeover(settings).first().recipe.product == "own"


THRESHOLD = ChosenThreshold("d" * 64, 0.125)


def beside(change):
    """Return a self-test during which another thread makes a change and must have made it when the test ends."""

    def prove(_: object) -> None:
        thread = threading.Thread(target=change, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive(), "the change waits for the self-test"

    return prove


def test_nobody_waits_for_the_self_test_of_a_recipe_that_comes_in(bench: Bench) -> None:
    prove = beside(lambda: bench.reopened().choose_threshold(THRESHOLD))
    bench.store.add(bench.own, "one", prove, nothing)
    assert (bench.store.names(), bench.store.state().threshold) == (["one"], THRESHOLD)


def test_nobody_waits_for_the_self_test_of_a_rollback(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    stocked.store.activate("two", nothing, nothing)
    changed = []

    def change() -> None:
        stocked.reopened().choose_threshold(THRESHOLD)
        changed.append(stocked.active())

    stocked.store.roll_back(beside(change), nothing)
    assert (changed, stocked.active()) == (["two"], "one")


def test_a_rollback_during_which_somebody_activated_another_recipe_changes_nothing(stocked: Bench) -> None:
    stocked.add("gear", revision=1, product="gear")
    stocked.store.activate("one", nothing, nothing)
    stocked.store.activate("two", nothing, nothing)
    prove = beside(lambda: stocked.reopened().activate("gear", nothing, nothing))
    with pytest.raises(RecipeError, match="another recipe was activated meanwhile"):
        stocked.store.roll_back(prove, nothing)
    assert (stocked.active(), stocked.store.state().previous.name) == ("gear", "two")


def test_a_recipe_that_was_activated_during_the_self_test_of_its_successor_is_not_replaced(stocked: Bench) -> None:
    prove = beside(lambda: stocked.reopened().activate("two", nothing, nothing))
    with pytest.raises(InputError, match="two is active or was before"):
        stocked.store.add(stocked.own, "two", prove, nothing, replaces=True)
    assert (stocked.active(), stocked.store.read("two").product) == ("two", "flange")


def test_a_recipe_that_comes_in_beside_another_waits_for_it(bench: Bench) -> None:
    other = bench.recipe("other", revision=1)
    second = threading.Thread(target=lambda: bench.reopened().add(other, "other", nothing, nothing))
    bench.store.add(bench.own, "one", lambda _: second.start(), nothing)
    second.join(30)
    assert bench.store.names() == ["one", "other"]
    assert (bench.store.read("one").product, bench.store.read("other").product) == ("own", "flange")


def test_a_choice_is_taken_back_as_if_it_had_never_been_made(stocked: Bench) -> None:
    path = stocked.folder / "store" / ACTIVE_FILE
    stocked.store.choose("one", stocked.store.read("one")).take_back()
    assert not path.exists()
    stocked.store.activate("one", nothing, nothing)
    stocked.store.choose_threshold(THRESHOLD)
    before = path.read_bytes()
    stocked.store.choose("two", stocked.store.read("two")).take_back()
    assert path.read_bytes() == before
    stocked.store.choose_threshold(None)()
    assert path.read_bytes() == before


def test_a_choice_that_somebody_has_replaced_since_is_not_taken_back(stocked: Bench) -> None:
    take_back = stocked.store.choose_threshold(THRESHOLD)
    stocked.reopened().activate("one", nothing, nothing)
    take_back()
    assert stocked.active() == "one"


def test_a_chosen_threshold_is_there_after_a_restart_and_goes_with_none(stocked: Bench) -> None:
    assert stocked.reopened().state().threshold is None
    stocked.store.choose_threshold(THRESHOLD)
    assert stocked.reopened().state().threshold == THRESHOLD
    assert stocked.active() == ""
    stocked.store.choose_threshold(None)
    assert stocked.reopened().state().threshold is None


def test_a_chosen_threshold_changes_nothing_else_that_was_chosen(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    stocked.store.activate("two", nothing, nothing)
    before = stocked.store.state()
    stocked.store.choose_threshold(THRESHOLD)
    after = stocked.reopened().state()
    assert (after.active, after.previous, after.revisions) == (before.active, before.previous, before.revisions)
    assert stocked.active() == "two"


def test_a_chosen_threshold_stays_when_the_running_recipes_revision_is_noted(bench: Bench) -> None:
    bench.store.choose_threshold(THRESHOLD)
    bench.store.note_running(bench.store.current()[1])
    assert bench.reopened().state().threshold == THRESHOLD


def test_a_chosen_threshold_ends_with_every_choice_of_a_recipe(stocked: Bench) -> None:
    stocked.store.choose_threshold(THRESHOLD)
    stocked.store.activate("one", nothing, nothing)
    assert stocked.store.state().threshold is None
    stocked.store.choose_threshold(THRESHOLD)
    stocked.store.roll_back(nothing, nothing)
    assert stocked.store.state().threshold is None
    stocked.store.choose_threshold(THRESHOLD)
    assert stocked.reopened(stocked.recipe("other", product="other", revision=1)).state().threshold is None


def test_a_choice_of_before_without_a_threshold_is_read(stocked: Bench) -> None:
    stocked.store.activate("one", nothing, nothing)
    path = stocked.folder / "store" / ACTIVE_FILE
    fields = json.loads(path.read_text())
    del fields["threshold"], fields["sha256"]
    path.write_bytes(canonical({**fields, "sha256": sha256(canonical(fields))}))
    assert stocked.active() == "one"
    assert stocked.store.state().threshold is None


def test_a_threshold_that_cannot_be_written_is_not_chosen(stocked: Bench, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="nothing was changed"):
            stocked.store.choose_threshold(THRESHOLD)
    assert stocked.reopened().state().threshold is None


STATION = """
station: cell7
recipe: own.recipe
recipes: {keys: [release.key.pub]}
takt_ms: 20
camera: {kind: simulated, width_px: 64, height_px: 64}
engine: {kind: onnxruntime, threads: 1}
"""


def typed(*words: object):
    return CliRunner().invoke(commands, [str(word) for word in words], catch_exceptions=True)


def test_the_commands_bring_in_activate_and_go_back_and_leave_a_trail(bench: Bench) -> None:
    station = bench.folder / "station.yaml"
    station.write_text(STATION)
    bench.recipe("one", revision=10)
    bench.recipe("two", revision=20, level=0.4)
    for name in ("one", "two"):
        assert typed("recipes", "add", station, bench.folder / f"{name}.recipe").exit_code == 0
        assert typed("recipes", "activate", station, name).exit_code == 0
    listed = typed("recipes", "list", station).output
    assert [line.split("│")[1:3] for line in listed.splitlines() if "flange" in line] == [
        [" one    ", " previous "],
        [" two    ", " active   "],
    ]
    assert isinstance(typed("recipes", "activate", station, "one").exception, RecipeError)
    assert typed("recipes", "rollback", station).exit_code == 0
    assert typed("recipes", "verify", station).output.count("ok   ") == 3
    trail = AuditLog(bench.folder / "outbox" / "cell7")
    assert [fields["what"] for fields in trail.lines()] == [
        "recipe add", "recipe activate", "recipe add", "recipe activate", "recipe activate failed", "recipe rollback",
    ]  # fmt: skip
    assert [fields["new"]["name"] for fields in trail.lines()] == ["one", "one", "two", "two", "one", "one"]
    assert "an unbroken chain" in typed("audit", station, "--verify").output
    shown = typed("audit", station, "--last", "1").output
    assert "recipe rollback: name one, product flange" in shown
    assert "; before: name two, product flange" in shown
    (bench.folder / "recipes" / "cell7" / "two.recipe").write_bytes(b"\0" * 2000)
    assert isinstance(typed("recipes", "verify", station).exception, RecipeError)
    assert "refused" in typed("recipes", "list", station).output


def test_a_list_says_what_judges_where_nothing_was_added(bench: Bench) -> None:
    station = bench.folder / "station.yaml"
    station.write_text(STATION)
    listed = typed("recipes", "list", station).output
    assert "recipes/cell7: nothing was added" in " ".join(listed.split())
    assert f"as station.yaml says: own, revision 1, signed by {bench.key.public.key_id}, digest " in listed
    bench.own.write_bytes(b"\0" * 2000)
    assert "as station.yaml says: refused: " in typed("recipes", "list", station).output


def test_a_choice_that_is_not_used_is_told_of_by_list_and_by_the_start(bench: Bench, caplog) -> None:
    bench.add("one", revision=10)
    bench.store.activate("one", nothing, nothing)
    other = bench.recipe("other", product="own", revision=2)
    told = f"not used: recipe one, chosen in place of {bench.own}; station.yaml names {other}"
    station = bench.folder / "station.yaml"
    text = STATION.replace("own.recipe", other.name).replace("pub]", f"pub], folder: {bench.store.folder}")
    station.write_text(text)
    listed = " ".join(typed("recipes", "list", station).output.split())
    assert told in listed
    assert "active: " + str(other) in listed
    engine = EngineSettings("onnxruntime", threads=1)
    Changeover(ChangeoverSettings(other, engine, Photometric(), bench.store.folder, bench.trust)).first()
    assert told in caplog.messages


def ran(bench: Bench) -> subprocess.CompletedProcess[str]:
    """Return what two parts on the station came to."""
    view = View(SIDE, SIDE, colour=False, reference_size=(64, 64))
    write_tiny_recipe(bench.own, view=view, product="own")
    sign_recipe(bench.own, bench.key, 2)
    station = bench.folder / "station.yaml"
    station.write_text(STATION)
    arguments = [sys.executable, "-m", "agent", "run", str(station), "--count", "2"]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)


def test_a_run_says_in_the_trail_by_which_recipe_and_which_settings(bench: Bench) -> None:
    done = ran(bench)
    assert done.returncode == 0, done.stderr
    start, stop = AuditLog(bench.folder / "outbox" / "cell7").lines()
    digest = bench.store.current()[1].digest
    facts = {key: start["new"][key] for key in ("recipe", "digest", "signer", "revision")}
    assert facts == {"recipe": "own", "digest": digest, "signer": bench.key.public.key_id, "revision": 2}
    assert len(start["new"]["station_yaml"]) == 64
    assert (start["what"], stop["what"], stop["new"]["digest"]) == ("agent start", "agent stop", digest)
    assert json.loads((bench.folder / "recipes" / "cell7" / ACTIVE_FILE).read_text())["revisions"]["own"][0] == 2


def test_a_station_whose_audit_trail_cannot_be_written_does_not_start(bench: Bench) -> None:
    trail = bench.folder / "outbox" / "cell7" / "audit.jsonl"
    trail.mkdir(parents=True)
    done = ran(bench)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert f"{trail}: Is a directory: the agent's user must be able to write there" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
