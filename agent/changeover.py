"""Which recipe judges, and by which threshold: what station.yaml says, or what was commanded since.

A commanded choice outlives a restart. It ends when somebody writes another recipe into station.yaml, and a commanded
threshold ends with its recipe: a number that was right for one network means nothing to another.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.engine import EngineSettings, open_engine
from agent.pipeline import Pipeline
from calibration.errors import InputError, RecipeError, TaktsightError
from calibration.photometric import Photometric
from calibration.recipe import read_recipe

log = logging.getLogger(__name__)

SUFFIX = ".recipe"
RECIPE_KEY, THRESHOLD_KEY = "recipe", "threshold"
_WAY_OUT = "name another recipe in station.yaml"


class Memory(Protocol):
    """Keeps JSON values over a restart; `agent.command_log.CommandLog` is the real one."""

    def remember(self, key: str, value: Any) -> None:
        """Keep value under key; None forgets it."""

    def recall(self, key: str) -> Any:
        """Return the value, or None."""


@dataclass(frozen=True, slots=True)
class ChangeoverSettings:
    """What station.yaml says about recipes."""

    recipe: Path  # the one to begin with
    engine: EngineSettings
    photometric: Photometric
    folder: Path  # where a commanded recipe must lie
    threshold_factor: float = 2.0  # a commanded threshold lies between the recipe's own / factor and * factor


class Changeover:
    """Makes pipelines and remembers what was commanded."""

    def __init__(self, settings: ChangeoverSettings, memory: Memory | None) -> None:
        self._settings = settings
        self._memory = memory

    def first(self) -> Pipeline:
        """Return the pipeline to start with. Raises what the recipe and the engine raise."""
        path = self._commanded_recipe() or self._settings.recipe
        return self._with_commanded_threshold(self._pipeline(path))

    def to(self, name: str) -> Pipeline:
        """Return a pipeline for the recipe of that name, proven on this device; nothing is remembered yet.

        Raises InputError if there is none, RecipeError, EngineError or MissingPackage if it cannot be used.
        """
        known = {path.name.removesuffix(SUFFIX): path for path in sorted(self._settings.folder.glob(f"*{SUFFIX}"))}
        if name not in known:
            listed = ", ".join(list(known)[:20]) or "none"
            raise InputError(
                f"recipe {name!r} not found, there are: {listed}: put it into the station's recipes folder"
            )
        return self._pipeline(known[name])

    def with_threshold(self, pipeline: Pipeline, score: float | None) -> Pipeline:
        """Return the same network with another score threshold, or with the recipe's own.

        Raises InputError if the threshold is further from the recipe's own than the station allows.
        """
        own = pipeline.recipe.thresholds.score
        factor = self._settings.threshold_factor
        if score is not None and not own / factor <= score <= own * factor:
            raise InputError(
                f"threshold {score:g} found, need {own / factor:.6g} to {own * factor:.6g}: "
                f"set commands.threshold_factor in station.yaml, or fit the recipe's threshold anew"
            )
        return Pipeline(pipeline.recipe, pipeline.engine, pipeline.photometric, score_threshold=score)

    def remember_recipe(self, name: str, pipeline: Pipeline) -> None:
        """Start with this recipe from now on, with its own threshold."""
        if self._memory is not None:
            fields = {"name": name, "digest": pipeline.recipe.digest, "instead_of": str(self._settings.recipe)}
            self._memory.remember(RECIPE_KEY, fields)
            self._memory.remember(THRESHOLD_KEY, None)

    def remember_threshold(self, pipeline: Pipeline, score: float | None) -> None:
        """Judge parts by this threshold after a restart too, as long as the recipe is the same."""
        if self._memory is not None:
            fields = None if score is None else {"score": score, "digest": pipeline.recipe.digest}
            self._memory.remember(THRESHOLD_KEY, fields)

    def _pipeline(self, path: Path) -> Pipeline:
        recipe = read_recipe(path)
        return Pipeline(recipe, open_engine(recipe, self._settings.engine), self._settings.photometric)

    def _commanded_recipe(self) -> Path | None:
        choice = None if self._memory is None else self._memory.recall(RECIPE_KEY)
        if not isinstance(choice, dict) or choice.get("instead_of") != str(self._settings.recipe):
            return None
        path = self._settings.folder / f"{choice.get('name')}{SUFFIX}"
        try:
            found = read_recipe(path).digest
        except RecipeError as error:
            raise RecipeError(
                f"the recipe commanded last cannot be used: {error}: put it back, or {_WAY_OUT}"
            ) from error
        if found != choice.get("digest"):
            raise RecipeError(
                f"{path} is not the recipe that was commanded last: {found[:12]} found, "
                f"{str(choice.get('digest'))[:12]} wanted: put that one back, or {_WAY_OUT}"
            )
        log.warning("recipe %s, as commanded; station.yaml says %s", path.name, self._settings.recipe.name)
        return path

    def _with_commanded_threshold(self, pipeline: Pipeline) -> Pipeline:
        choice = None if self._memory is None else self._memory.recall(THRESHOLD_KEY)
        if not isinstance(choice, dict) or choice.get("digest") != pipeline.recipe.digest:
            return pipeline
        try:
            changed = self.with_threshold(pipeline, float(choice["score"]))
        except (TaktsightError, KeyError, TypeError, ValueError) as error:
            log.warning("the commanded threshold is not used: %s", error)
            return pipeline
        log.warning("threshold %g, as commanded", changed.score_threshold)
        return changed
