"""Which recipe judges, and by which threshold: what station.yaml says, or what was activated or commanded since.

A choice outlives a restart, in the store (`agent.recipes.store`), whoever made it. It ends when somebody writes another
recipe into station.yaml, and a commanded threshold ends with its recipe: a number that was right for one network means
nothing to another.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from agent.recipes.store import ChosenThreshold, RecipeStore, TakeBack
from agent.recipes.trust import Trust
from calibration.errors import InputError
from calibration.photometric import Photometric
from calibration.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChangeoverSettings:
    """What station.yaml says about recipes."""

    recipe: Path  # the one to begin with
    engine: EngineSettings
    photometric: Photometric
    folder: Path  # of the station's recipe store
    trust: Trust
    threshold_factor: float = 2.0  # a commanded threshold lies between the recipe's own / factor and * factor


class Changeover:
    """Makes pipelines and remembers what was commanded."""

    def __init__(self, settings: ChangeoverSettings) -> None:
        self._settings = settings
        self._store = RecipeStore(settings.folder, settings.trust, settings.recipe)

    def first(self) -> Pipeline:
        """Return the pipeline to start with. Raises what the store, the recipe and the engine raise."""
        if ended := self._store.ended():
            log.warning("%s", ended)
        name, recipe = self._store.current()
        if name:
            log.warning("recipe %s, as activated or commanded; station.yaml says %s", name, self._settings.recipe.name)
        pipeline = self._with_commanded_threshold(self._pipeline(recipe))
        self._store.note_running(recipe)
        return pipeline

    def to(self, name: str) -> Pipeline:
        """Return a pipeline for the recipe of that name, proven on this device; nothing is remembered yet.

        Raises InputError if there is none, RecipeError, EngineError or MissingPackage if it cannot be used.
        """
        return self._pipeline(self._store.read(name))

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

    def remember_recipe(self, name: str, pipeline: Pipeline) -> TakeBack:
        """Start with this recipe from now on, with its own threshold; return what forgets it again."""
        return self._store.choose(name, pipeline.recipe).take_back

    def remember_threshold(self, pipeline: Pipeline, score: float | None) -> TakeBack:
        """Judge parts by this threshold after a restart too, as long as the recipe is the same; return as above."""
        return self._store.choose_threshold(None if score is None else ChosenThreshold(pipeline.recipe.digest, score))

    def _pipeline(self, recipe: Recipe) -> Pipeline:
        return Pipeline(recipe, open_engine(recipe, self._settings.engine), self._settings.photometric)

    def _with_commanded_threshold(self, pipeline: Pipeline) -> Pipeline:
        choice = self._store.state().threshold
        if choice is None or choice.digest != pipeline.recipe.digest:
            return pipeline
        try:
            changed = self.with_threshold(pipeline, choice.score)
        except InputError as error:
            log.warning("the commanded threshold is not used: %s", error)
            return pipeline
        log.warning("threshold %g, as commanded", changed.score_threshold)
        return changed
