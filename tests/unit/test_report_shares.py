"""F1 against the share of defective parts."""

from __future__ import annotations

import re

import numpy as np
import pytest

from trainer.metrics import ScoredImage, evaluate
from trainer.report_shares import f1_at, share_curves


def line() -> list[ScoredImage]:
    scores = {"good": [0.1, 0.2, 0.3, 0.9], "crack": [0.2, 0.8], "stain": [0.8, 0.9], "crack+stain": [0.7]}
    return [ScoredImage(f"{kind}/{n}", kind, s) for kind, found in scores.items() for n, s in enumerate(found)]


def points(path: str) -> np.ndarray:
    return np.array([[float(a) for a in pair.split()] for pair in re.split("[ML]", path) if pair])


def test_at_the_tested_share_f1_is_that_of_the_evaluation():
    found = evaluate(line(), 0.5)
    share = found.n_defective / (found.n_good + found.n_defective)
    assert f1_at(share, found.recall, found.overkill) == pytest.approx(found.f1)


def test_every_type_has_a_curve_and_a_part_with_two_defects_counts_for_both():
    curves = share_curves(line(), 0.5)
    assert [(curve.label, curve.n) for curve in curves] == [("all defects", 5), ("crack", 3), ("stain", 3)]
    x, y = points(curves[1].path).T
    assert x[-1] == 100.0  # half of the parts are defective
    assert 1 - y[-1] / 100 == pytest.approx(f1_at(0.5, 2 / 3, 0.25), abs=1e-3)
    assert 1 - y[0] / 100 == pytest.approx(f1_at(0.005, 2 / 3, 0.25), abs=1e-3)


def test_rarer_defects_lower_f1_unless_no_good_part_is_rejected():
    assert f1_at(0.01, 0.9, 0.05) < f1_at(0.1, 0.9, 0.05) < f1_at(0.5, 0.9, 0.05)
    assert f1_at(0.01, 0.9, 0.0) == pytest.approx(f1_at(0.5, 0.9, 0.0))


def test_one_type_needs_no_curve_of_its_own_and_one_class_none_at_all():
    images = line()
    assert [curve.label for curve in share_curves([i for i in images if "stain" not in i.label], 0.5)] == [
        "all defects"
    ]
    assert share_curves(images[:4], 0.5) == ()
    assert share_curves(images[4:], 0.5) == ()
