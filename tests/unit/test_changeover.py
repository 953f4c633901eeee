"""Which recipe judges after a command, and after a restart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from recipes import write_tiny_recipe

from agent.engines.engine import EngineSettings
from agent.recipes.changeover import Changeover, ChangeoverSettings
from agent.recipes.trust import Trust
from calibration.errors import InputError, RecipeError
from calibration.photometric import Photometric


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "recipes").mkdir()
    write_tiny_recipe(tmp_path / "first.recipe")
    write_tiny_recipe(tmp_path / "recipes" / "second.recipe", product="second")
    return ChangeoverSettings(
        tmp_path / "first.recipe",
        EngineSettings("onnxruntime", threads=1),
        Photometric(),
        tmp_path / "recipes",
        Trust(unsigned=True),
    )


def test_a_station_begins_with_the_recipe_of_its_settings(settings):
    assert Changeover(settings).first().recipe.product == "tiny"


def test_a_commanded_recipe_outlives_a_restart(settings):
    changeover = Changeover(settings)
    changeover.remember_recipe("second", changeover.to("second"))
    assert Changeover(settings).first().recipe.product == "second"


def test_another_recipe_in_the_settings_ends_what_was_commanded(settings, tmp_path):
    changeover = Changeover(settings)
    changeover.remember_recipe("second", changeover.to("second"))
    write_tiny_recipe(tmp_path / "third.recipe", product="third")
    assert Changeover(replace(settings, recipe=tmp_path / "third.recipe")).first().recipe.product == "third"


@pytest.mark.parametrize("name", ["absent", "../first", "/etc/passwd", "", ".", "second.recipe", "SECOND"])
def test_only_a_recipe_of_the_folder_can_be_commanded(settings, name):
    with pytest.raises(InputError, match="not found, there are: second"):
        Changeover(settings).to(name)


def test_a_commanded_recipe_that_is_gone_or_another_one_stops_the_start(settings):
    changeover = Changeover(settings)
    changeover.remember_recipe("second", changeover.to("second"))
    path = settings.folder / "second.recipe"
    write_tiny_recipe(path, product="second", level=0.4)
    with pytest.raises(RecipeError, match="is not the recipe that was commanded last"):
        Changeover(settings).first()
    path.unlink()
    with pytest.raises(RecipeError, match="the recipe commanded last cannot be used"):
        Changeover(settings).first()


def test_a_commanded_threshold_outlives_a_restart_and_ends_with_its_recipe(settings):
    changeover = Changeover(settings)
    changed = changeover.with_threshold(changeover.first(), 0.15)
    assert changed.score_threshold == 0.15
    changeover.remember_threshold(changed, 0.15)
    assert Changeover(settings).first().score_threshold == 0.15
    changeover.remember_recipe("second", changeover.to("second"))
    assert Changeover(settings).first().score_threshold == 0.1


def test_the_recipes_own_threshold_comes_back_with_none(settings):
    changeover = Changeover(settings)
    changed = changeover.with_threshold(changeover.first(), 0.15)
    changeover.remember_threshold(changed, 0.15)
    back = changeover.with_threshold(changed, None)
    assert back.score_threshold == 0.1
    changeover.remember_threshold(back, None)
    assert Changeover(settings).first().score_threshold == 0.1


@pytest.mark.parametrize("score", [0.0499, 0.201, 1e308, 1e-300, float("inf"), float("nan")])
def test_a_threshold_far_from_the_recipes_own_is_refused(settings, score):
    changeover = Changeover(settings)
    with pytest.raises(InputError, match=r"need 0\.05 to 0\.2"):
        changeover.with_threshold(changeover.first(), score)


def test_a_commanded_threshold_that_the_station_allows_no_more_is_not_used(settings, caplog):
    changeover = Changeover(settings)
    changeover.remember_threshold(changeover.first(), 0.15)
    assert Changeover(replace(settings, threshold_factor=1.2)).first().score_threshold == 0.1
    assert "the commanded threshold is not used" in caplog.text


def test_a_commanded_threshold_ends_when_the_settings_name_another_recipe(settings, tmp_path):
    changeover = Changeover(settings)
    changeover.remember_threshold(changeover.first(), 0.15)
    write_tiny_recipe(tmp_path / "third.recipe", product="third")
    assert Changeover(replace(settings, recipe=tmp_path / "third.recipe")).first().score_threshold == 0.1


def test_a_commanded_threshold_ends_when_the_recipes_file_is_another_one(settings):
    changeover = Changeover(settings)
    changeover.remember_threshold(changeover.first(), 0.15)
    write_tiny_recipe(settings.recipe, level=0.4)
    assert Changeover(settings).first().score_threshold == 0.1
