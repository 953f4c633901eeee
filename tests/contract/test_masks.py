"""A ground-truth mask that lies elsewhere than its image is told, and costs no training."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from calibration.errors import InputError
from calibration.recipe import read_recipe
from trainer import session
from trainer.fit import FitRequest
from trainer.learning import Options

SIDE = 64


def test_a_mask_of_another_size_than_its_image_does_not_cost_the_training(tmp_path: Path, capsys) -> None:
    root, generator = tmp_path / "flange", np.random.default_rng(0)
    for folder, count in (("train/good", 12), ("test/good", 2), ("test/crack", 1)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(generator.normal(90, 4, (SIDE, SIDE)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(root / folder / f"{number}.png"), pixels)
    (root / "ground_truth" / "crack").mkdir(parents=True)
    mask = root / "ground_truth" / "crack" / "0_mask.png"
    cv2.imwrite(str(mask), np.full((SIDE // 2, SIDE), 255, np.uint8))
    recipe, options = tmp_path / "a.recipe", Options(memory_entries=60)
    request = FitRequest(recipe, detector="patch_memory", height=SIDE, width=SIDE, registration="off", options=options)
    with pytest.raises(InputError, match=r"crack.0_mask\.png: the mask is 64x32 px, its image 64x64"):
        session.learn(root, request, part_pattern=None, bit_depth=None, product=None)
    assert read_recipe(recipe).metrics["evaluation"] is None
    assert "is written, without figures of the test images" in " ".join("".join(capsys.readouterr()).split())
    cv2.imwrite(str(mask), np.full((SIDE, SIDE), 255, np.uint8))
    session.measure(recipe, root, json_file=None, report=None, bit_depth=None)
