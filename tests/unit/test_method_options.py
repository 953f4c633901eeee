"""Every option of a method has a flag, and the flag's default is the field's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from recipes import write_tiny_recipe

from calibration.errors import InputError
from trainer.__main__ import commands
from trainer.errors import TrainingError
from trainer.learning import Options
from trainer.method_options import METHOD_OPTIONS, with_method_options
from trainer.prepared import FEWEST_GOOD


def test_every_field_has_a_flag_with_the_same_default():
    found = {}

    @click.command()
    @with_method_options
    def command(**chosen):
        found.update(chosen)

    assert CliRunner().invoke(command, []).exit_code == 0
    assert Options(**found) == Options()
    assert {field.name for field in dataclasses.fields(Options)} == set(found)


def test_a_flag_sets_its_field():
    found = {}

    @click.command()
    @with_method_options
    def command(**chosen):
        found.update(chosen)

    given = ["--neighbours", "7", "--no-flip", "--wasserstein", "--backbone", "vgg16", "--defect-share", "0.25"]
    assert CliRunner().invoke(command, given).exit_code == 0
    options = Options(**found)
    assert (options.neighbours, options.flip, options.wasserstein, options.backbone) == (7, False, True, "vgg16")
    assert options.defect_share == 0.25


def test_a_device_that_there_is_not_is_told_before_anything_is_read(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["fit", str(tmp_path / "none"), "--recipe", str(tmp_path / "part.recipe"), "--device", "cuda"]
    with pytest.raises(TrainingError, match=r"--device cuda, but torch .* finds no CUDA device: install"):
        CliRunner().invoke(commands, given, catch_exceptions=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="none: not found"):
        CliRunner().invoke(commands, given, catch_exceptions=False)


def test_fewer_images_than_can_be_learnt_from_are_no_choice(tmp_path: Path):
    given = ["fit", str(tmp_path), "--recipe", str(tmp_path / "part.recipe"), "--most-images", str(FEWEST_GOOD - 1)]
    answer = CliRunner().invoke(commands, given)
    assert (answer.exit_code, f"not in the range x>={FEWEST_GOOD}" in answer.output) == (2, True)
    given[-1] = str(FEWEST_GOOD)
    with pytest.raises(InputError, match="no good images found"):
        CliRunner().invoke(commands, given, catch_exceptions=False)


def test_help_is_short():
    assert all(len(text) <= 90 for *_, text in METHOD_OPTIONS)


def test_a_recipe_without_a_generator_makes_no_pictures(tmp_path: Path):
    write_tiny_recipe(tmp_path / "part.recipe")
    (tmp_path / "1.png").write_bytes((Path(__file__).parents[2] / "docs/images/heatmaps.jpg").read_bytes())
    given = ["generate", str(tmp_path / "part.recipe"), str(tmp_path), "--out", str(tmp_path / "made")]
    with pytest.raises(InputError, match="holds no generator: fit one of dcgan"):
        CliRunner().invoke(commands, given, catch_exceptions=False)
    assert not (tmp_path / "made").exists()


def test_a_region_of_strange_digits_is_no_region(tmp_path: Path):
    given = ["fit", str(tmp_path), "--recipe", str(tmp_path / "part.recipe"), "--region", "0,0,²,30"]
    answer = CliRunner().invoke(commands, given)
    assert answer.exit_code == 2
    assert "'0,0,²,30' found, need X,Y,WIDTH,HEIGHT" in answer.output
