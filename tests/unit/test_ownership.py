"""Root changes what is in the agent's folders: the agent's user owns it afterwards, and gets nothing else by it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from recipes import write_tiny_recipe

from agent.audit import FILE_NAME, AuditLog
from agent.errors import StorageError
from agent.ownership import make_folder
from agent.recipes.staging import STAGING
from agent.recipes.store import ACTIVE_FILE, LOCK_FILE, ChosenThreshold, RecipeStore
from agent.recipes.trust import Trust

AGENT = 65534  # stands for the agent's user
SECRET = "root:secret\n"
CHOSEN = ChosenThreshold("d" * 64, 0.125)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="owners are given by root alone")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


@pytest.fixture
def store(tmp_path: Path) -> RecipeStore:
    """A store in a folder of the agent's user, who may lay anything there."""
    folder = tmp_path / "state" / "recipes"
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        for path in (folder.parent, folder):
            os.chown(path, AGENT, AGENT)
    return RecipeStore(folder, Trust(unsigned=True), tmp_path / "own.recipe")


def untouched(victim: Path) -> bool:
    found = victim.stat()
    return (victim.read_text(), found.st_uid, found.st_mode & 0o777) == (SECRET, os.geteuid(), 0o600)


def owners(folder: Path) -> set[int]:
    return {path.lstat().st_uid for path in folder.rglob("*")}


def test_a_choice_is_not_written_through_a_link_that_lies_in_wait(store: RecipeStore, victim: Path) -> None:
    (store.folder / f".{ACTIVE_FILE}.{os.getpid()}.tmp").symlink_to(victim)
    (store.folder / ACTIVE_FILE).symlink_to(victim.with_name("nothing"))
    store.choose_threshold(CHOSEN)
    assert untouched(victim)
    assert store.state().threshold == CHOSEN
    assert not (store.folder / ACTIVE_FILE).is_symlink()


def test_a_recipe_is_not_copied_through_a_link(store: RecipeStore, victim: Path, tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path / "one.recipe")
    (store.folder / STAGING).mkdir()
    (store.folder / STAGING / "incoming.recipe").symlink_to(victim)
    (store.folder / "one.recipe").symlink_to(victim)
    store.add(tmp_path / "one.recipe", "one", lambda _: None, lambda *_: None, replaces=True)
    assert untouched(victim)
    assert store.read("one").product == "tiny"


def test_nothing_is_deleted_where_the_staging_folder_becomes_a_link(
    store: RecipeStore, victim: Path, tmp_path: Path
) -> None:
    write_tiny_recipe(tmp_path / "one.recipe")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    victim = victim.rename(elsewhere / "incoming.recipe")

    def exchange(_: object) -> None:
        (store.folder / STAGING).rename(store.folder / "aside")
        (store.folder / STAGING).symlink_to(elsewhere)

    store.add(tmp_path / "one.recipe", "one", exchange, lambda *_: None)
    assert untouched(victim)
    assert store.read("one").product == "tiny"


@as_root
def test_what_root_makes_in_the_agents_folder_is_the_agents(store: RecipeStore, tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path / "one.recipe")
    store.add(tmp_path / "one.recipe", "one", lambda _: None, lambda *_: None)
    store.activate("one", lambda _: None, lambda *_: None)
    AuditLog(store.folder.parent / "outbox").append("recipe activate")
    assert len(list(store.folder.parent.rglob("*"))) == 8  # two folders, and in them a trail, two locks, ...
    assert owners(store.folder.parent) == {AGENT}


@as_root
@pytest.mark.parametrize("name", [LOCK_FILE, FILE_NAME])
def test_a_file_that_has_another_name_elsewhere_is_not_given_away(store: RecipeStore, victim: Path, name: str) -> None:
    (store.folder / name).hardlink_to(victim)
    with pytest.raises(StorageError, match="Too many links"):
        if name == LOCK_FILE:
            store.choose_threshold(CHOSEN)
        else:
            AuditLog(store.folder).append("recipe activate")
    assert untouched(victim)


@as_root
def test_a_new_folder_is_its_parents_owners_and_a_link_there_leads_nowhere(store: RecipeStore, tmp_path: Path) -> None:
    make_folder(store.folder / "a" / "b")
    assert owners(store.folder) == {AGENT}
    (store.folder / "link").symlink_to(tmp_path / "not there yet")
    with pytest.raises(OSError, match="File exists"):
        make_folder(store.folder / "link")
    assert not (tmp_path / "not there yet").exists()
