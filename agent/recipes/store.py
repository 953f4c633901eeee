"""The recipes of one station: a folder of files that were checked when they came in, and which one is active.

    NAME.recipe     added by `taktsight-agent recipes add`; what judges is checked again whenever it is loaded
    active.json     what was activated or commanded, what was active before, the last revision of each product, and a
                    commanded threshold
    .staging/       a recipe on its way in
    .lock, .adding  held while one of these changes, and by who brings a recipe in for as long as its self-test takes

The choice holds until somebody writes another recipe into station.yaml. Every change is one rename of a file that is on
the disk: a power cut leaves the old choice or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import StorageError
from agent.ownership import make_folder, open_in, opened_folder, put
from agent.recipes.staging import staged
from agent.recipes.trust import Trust, outdated
from calibration.errors import InputError, RecipeError
from calibration.recipe import Recipe
from calibration.recipe_file import canonical, open_file, sha256, strict_json

SUFFIX = ".recipe"
ACTIVE_FILE, LOCK_FILE, ADDING_FILE = "active.json", ".lock", ".adding"
FORMAT = 1
MAX_CHOICE_BYTES = 1024**2
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # as interface/command.schema.json has it

Prove = Callable[[Recipe], object]
"""Runs a recipe's self-test on this device; raises EngineError."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One recipe that was chosen."""

    name: str  # file stem in the store; "": the recipe of station.yaml
    product: str
    digest: str
    signer: str | None  # key id; None: unsigned
    revision: int | None
    since_utc: str


@dataclass(frozen=True, slots=True)
class ChosenThreshold:
    """A score threshold in place of a recipe's own."""

    digest: str  # of the recipe that it was chosen for
    score: float  # its units


Record = Callable[[Choice | None, Choice | None], object]
"""Is told (old, new) just before a change; what it raises keeps the change from happening."""

TakeBack = Callable[[], None]
"""Puts back what was chosen before, unless somebody has chosen anew since. Raises StorageError."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice that was made."""

    old: Choice | None
    new: Choice
    take_back: TakeBack


@dataclass(frozen=True, slots=True)
class State:
    """What active.json says."""

    instead_of: str = ""  # the recipe of station.yaml that `active` stands in for
    active: Choice | None = None  # None: the recipe of station.yaml
    previous: Choice | None = None
    revisions: dict[str, list[Any]] = field(default_factory=dict)  # product -> [revision, digest] last active
    threshold: ChosenThreshold | None = None  # ends with the choice of a recipe


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of the store."""

    name: str
    recipe: Recipe | None
    trouble: str  # why it cannot run here; empty if it can


class RecipeStore:
    """The folder. Processes and threads may share it; changes are made one after the other."""

    def __init__(self, folder: Path, trust: Trust, station_recipe: Path) -> None:
        """station_recipe: what station.yaml says; in charge while nothing else was activated."""
        self.folder = folder
        self._trust = trust
        self._station_recipe = _placed(station_recipe)

    def names(self) -> list[str]:
        """Return the file stems of the recipes, sorted."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"[!.]*{SUFFIX}"))

    def path(self, name: str) -> Path:
        """Return the file of a recipe. Raises InputError if there is none."""
        if name not in self.names():
            listed = ", ".join(self.names()[:20]) or "none"
            raise InputError(
                f"recipe {name!r} not found, there are: {listed}: bring it in with taktsight-agent recipes add"
            )
        return self.folder / f"{name}{SUFFIX}"

    def read(self, name: str) -> Recipe:
        """Return a recipe that may follow the active one. Raises InputError if there is none, RecipeError."""
        recipe = self._trust.read(self.path(name))
        self._check_age(recipe, self.state())
        return recipe

    def current(self) -> tuple[str, Recipe]:
        """Return (name or "", recipe) of what is to judge. Raises RecipeError if it is not what was chosen."""
        state = self.state()
        if state.active is None:
            recipe = self._trust.read(self._station_recipe)
            self._check_age(recipe, state)
            return "", recipe
        path = self.folder / f"{state.active.name}{SUFFIX}"
        way_out = f"put it back into {self.folder}, or name another recipe in station.yaml"
        try:
            recipe = self._trust.read(path)
        except RecipeError as error:
            raise RecipeError(f"the recipe commanded last cannot be used: {error}: {way_out}") from error
        if recipe.digest != state.active.digest:
            raise RecipeError(
                f"{path} is not the recipe that was commanded last: {recipe.digest[:12]} found, "
                f"{state.active.digest[:12]} wanted: {way_out}"
            )
        self._check_age(recipe, state)
        return state.active.name, recipe

    def note_running(self, recipe: Recipe) -> None:
        """Keep the revision of what judges now: older ones of its product are refused from now on."""
        signature = recipe.signature
        if signature is None or self.state().revisions.get(recipe.product) == [signature.revision, recipe.digest]:
            return
        with self._locked():
            state = self.state()
            self._check_age(recipe, state)
            self._write(replace(state, revisions=_with_revision(state, recipe)))

    def add(self, source: Path, name: str, prove: Prove, record: Record, *, replaces: bool = False) -> Choice:
        """Take a recipe in under this name, after every check there is, and return what was added.

        replaces: an older file of the same name may go, if it is neither active nor the one before.

        Raises InputError, RecipeError, EngineError; then the store is as it was.
        """
        if NAME.fullmatch(name) is None:
            raise InputError(f"recipe name {name!r} found, need letters, digits and ._- (100 at most): add --name NAME")
        with self._locked(ADDING_FILE), staged(self.folder, source) as copy:
            recipe = self._trust.read(copy.path)
            self._check_name(name, replaces=replaces)
            prove(recipe)
            choice = _choice(name, recipe)
            with self._locked():
                self._check_name(name, replaces=replaces)  # somebody may have activated it meanwhile
                record(None, choice)
                copy.take_in(f"{name}{SUFFIX}")
        return choice

    def activate(self, name: str, prove: Prove, record: Record) -> tuple[Choice | None, Choice]:
        """Let this recipe judge from the next start, and keep the one before; return (old, new).

        Raises InputError, RecipeError, EngineError; then the old one stays.
        """
        recipe = self.read(name)
        prove(recipe)
        chosen = self.choose(name, recipe, record)
        return chosen.old, chosen.new

    def choose(self, name: str, recipe: Recipe, record: Record | None = None) -> Chosen:
        """Make a recipe that was read and proven the active one."""
        new = _choice(name, recipe)
        with self._locked():
            state = self.state()
            self._check_age(recipe, state)
            old = state.active or self._station_choice()
            if record is not None:
                record(old, new)
            is_same = state.active is not None and (state.active.name, state.active.digest) == (name, new.digest)
            previous = state.previous if is_same else old
            revisions = _with_revision(state, recipe)
            return Chosen(old, new, self._write(State(str(self._station_recipe), new, previous, revisions)))

    def choose_threshold(self, threshold: ChosenThreshold | None) -> TakeBack:
        """Judge by this score threshold from the next start too, or by the recipe's own."""
        with self._locked():
            return self._write(replace(self.state(), instead_of=str(self._station_recipe), threshold=threshold))

    def roll_back(self, prove: Prove, record: Record) -> tuple[Choice | None, Choice]:
        """Let the recipe judge that did before the active one, which may be older; return (old, new).

        Raises RecipeError if there was none, or it is not the same any more; EngineError.
        """
        previous = self.state().previous
        if previous is None:
            raise RecipeError("no recipe was active before this one: activate one of taktsight-agent recipes list")
        name = previous.name
        recipe = self._trust.read(self.path(name) if name else self._station_recipe)
        if recipe.digest != previous.digest:
            raise RecipeError(
                f"{name or self._station_recipe}: {recipe.digest[:12]} found, {previous.digest[:12]} was active "
                "before: put that one back, or activate another"
            )
        prove(recipe)
        with self._locked():
            state = self.state()
            if state.previous != previous:
                raise RecipeError(
                    "another recipe was activated meanwhile: see taktsight-agent recipes list, then roll back again"
                )
            new, old = _choice(name, recipe), state.active or self._station_choice()
            record(old, new)
            active = new if name else None
            self._write(State(str(self._station_recipe), active, old, _with_revision(state, recipe)))
        return old, new

    def listed(self) -> list[Listed]:
        """Return every file of the store, readable or not."""
        found = []
        for name in self.names():
            try:
                found.append(Listed(name, self._trust.read(self.path(name)), ""))
            except (RecipeError, InputError) as error:
                found.append(Listed(name, None, str(error)))
        return found

    def state(self) -> State:
        """Return what was chosen for the recipe that station.yaml names now. Raises StorageError if it is damaged."""
        state = self._stored()
        return state if self._is_ours(state) else State(revisions=state.revisions)

    def ended(self) -> str:
        """Return what was chosen in place of a recipe that station.yaml does not name now, in words; "": nothing.

        Raises StorageError if active.json is damaged.
        """
        state = self._stored()
        chosen = [f"recipe {state.active.name}"] if state.active is not None else []
        if state.threshold is not None:
            chosen.append(f"threshold {state.threshold.score:g}")
        if not chosen or self._is_ours(state):
            return ""
        return (
            f"not used: {' and '.join(chosen)}, chosen in place of {state.instead_of}; "
            f"station.yaml names {self._station_recipe}"
        )

    def _is_ours(self, state: State) -> bool:
        """Return whether a choice stands in for the recipe that station.yaml names now."""
        return state.instead_of != "" and _placed(Path(state.instead_of)) == self._station_recipe

    def _stored(self) -> State:
        path = self.folder / ACTIVE_FILE
        try:
            with open_file(path) as file:
                data = file.read(MAX_CHOICE_BYTES)
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}: let the agent's user read it") from error
        try:
            return _state(strict_json(data))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{path} is damaged ({str(error)[:100]}): move it away and activate a recipe anew; which revisions ran "
                "here is forgotten with it"
            ) from error

    def _check_age(self, recipe: Recipe, state: State) -> None:
        revision, digest = state.revisions.get(recipe.product, (0, ""))
        error = outdated(recipe, revision, digest)
        if error is not None:
            raise error

    def _check_name(self, name: str, *, replaces: bool) -> None:
        state = self.state()
        in_use = {choice.name for choice in (state.active, state.previous) if choice is not None}
        if name in in_use:
            raise InputError(f"recipe {name} is active or was before: add --name with another name")
        if name in self.names() and not replaces:
            raise InputError(f"recipe {name} is there already: add --replace, or --name with another name")

    def _station_choice(self) -> Choice | None:
        """Return the recipe of station.yaml, None if it cannot be read: then there is nothing to go back to."""
        try:
            return _choice("", self._trust.read(self._station_recipe))
        except RecipeError:
            return None

    @contextmanager
    def _locked(self, name: str = LOCK_FILE) -> Iterator[None]:
        try:
            make_folder(self.folder)
            with opened_folder(self.folder) as folder:
                handle = open_in(folder, name, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise StorageError(f"{self.folder}: {error.strerror}: let the agent's user write there") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        except OSError as error:
            raise StorageError(f"{self.folder}: {error.strerror}: nothing was changed") from error
        finally:
            os.close(handle)

    def _write(self, state: State) -> TakeBack:
        fields = json.loads(canonical({"format": FORMAT, **asdict(state)}))
        data = canonical({**fields, "sha256": sha256(canonical(fields))}) + b"\n"
        path = self.folder / ACTIVE_FILE
        before = path.read_bytes() if path.exists() else None
        with opened_folder(self.folder) as folder:
            put(folder, ACTIVE_FILE, data)

        def take_back() -> None:
            with self._locked(), opened_folder(self.folder) as folder:
                if path.read_bytes() != data:
                    return
                if before is not None:
                    put(folder, ACTIVE_FILE, before)
                else:
                    os.unlink(ACTIVE_FILE, dir_fd=folder)
                    os.fsync(folder)

        return take_back


def _placed(recipe: Path) -> Path:
    """Return the one path of a file, whatever the folder and the links that it was named through.

    The file itself may be a link: the same station.yaml names it, wherever it leads.
    """
    return Path(os.path.realpath(recipe.parent), recipe.name)


def _choice(name: str, recipe: Recipe) -> Choice:
    signature, now = recipe.signature, datetime.now(UTC).isoformat(timespec="seconds")
    if signature is None:
        return Choice(name, recipe.product, recipe.digest, None, None, now)
    return Choice(name, recipe.product, recipe.digest, signature.key, signature.revision, now)


def _with_revision(state: State, recipe: Recipe) -> dict[str, list[Any]]:
    if recipe.signature is None:
        return state.revisions
    return {**state.revisions, recipe.product: [recipe.signature.revision, recipe.digest]}


def _state(fields: dict[str, Any]) -> State:
    """Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    told = fields.pop("sha256")
    if fields.pop("format") != FORMAT or told != sha256(canonical({"format": FORMAT, **fields})):
        raise ValueError("its checksum does not fit")
    choices = {key: None if fields[key] is None else Choice(**fields[key]) for key in ("active", "previous")}
    chosen = fields.get("threshold")
    threshold = None if chosen is None else ChosenThreshold(str(chosen["digest"]), float(chosen["score"]))
    return State(
        str(fields["instead_of"]), choices["active"], choices["previous"], dict(fields["revisions"]), threshold
    )
