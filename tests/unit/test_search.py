"""The coarse search finds the turn and place of a contour, whether it looks at all turns closely or at the best few."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from calibration.alignment import Contour, Freedom, Poses, agreement, contour, edge_points, refine
from calibration.pyramid import Level, slopes
from calibration.search import FEWEST_PAIRS, Templates, search, templates

SIDE = 80
SIZE = (96, 96)
CENTRE = complex(40, 38)
TURNS = np.exp(2j * np.pi * np.arange(60) / 60)
BRACKET = np.array([[-20, -17], [20, -17], [20, -8], [-8, -8], [-8, 18], [-20, 18]], float)


def picture(turn: complex = 1.0, position: complex = CENTRE, noise: float = 2.0, seed: int = 0) -> Level:
    """Return a bright bracket on a dark ground, turned, its centre at position."""
    place = turn * (BRACKET[:, 0] + 1j * BRACKET[:, 1]) + position
    corners = np.round(np.stack([place.real, place.imag], axis=1) * 16).astype(np.int32)
    drawn = np.full((SIDE, SIDE), 40, np.uint8)
    cv2.fillPoly(drawn, [corners], 180, lineType=cv2.LINE_AA, shift=4)
    smooth = cv2.GaussianBlur(drawn.astype(np.float32), (0, 0), 1.0)
    return smooth + np.random.default_rng(seed).normal(0, noise, smooth.shape).astype(np.float32)


@pytest.fixture(scope="module")
def shape() -> Contour:
    level = picture(noise=0)
    weight = np.ones_like(level)
    assert edge_points(level, weight, 300)[0].size > 100
    return contour(level, weight, CENTRE, 300)


@pytest.fixture(scope="module")
def turned(shape: Contour) -> Templates:
    return templates(shape, TURNS, SIZE)


def found(score: NDArray, poses: Poses) -> tuple[complex, complex]:
    best = int(np.argmax(score))
    return complex(poses.turn[best]), complex(poses.position[best])


@pytest.mark.parametrize("number", [0, 7, 22, 45, 59])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_part_is_found_at_its_turn_and_place(turned, number, share):
    turn, position = found(*search(slopes(picture(TURNS[number], 36 + 43j)), turned, np.inf, 0j, share))
    assert turn == pytest.approx(TURNS[number])
    assert abs(position - (36 + 43j)) <= 1.5


def test_the_best_turns_score_the_same_whether_all_are_looked_at_closely_or_few(turned):
    level = slopes(picture(TURNS[13], 42 + 37j, noise=8))
    every, places = search(level, turned, np.inf, 0j)
    few, same_places = search(level, turned, np.inf, 0j, 0.3)
    assert np.isfinite(every).all()
    assert np.isfinite(few).sum() == 2 * round(0.3 * TURNS.size / 2)
    best = np.argsort(every)[-6:]
    np.testing.assert_array_equal(few[best], every[best])
    np.testing.assert_array_equal(same_places.position[best], places.position[best])


def test_few_turns_are_all_looked_at_closely(shape):
    few = templates(shape, TURNS[: 2 * FEWEST_PAIRS], SIZE)
    score, _ = search(slopes(picture()), few, np.inf, 0j, 0.1)
    assert np.isfinite(score).all()


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_part_too_far_from_home_is_not_looked_for_there(turned, share):
    faint = 40 + 0.15 * (picture(TURNS[20], 22 + 24j) - 40)
    others = (picture(TURNS[number], place) for number, place in ((41, 56 + 56j), (5, 62 + 18j)))
    level = slopes(np.maximum.reduce([faint, *others]))
    for turn, position in ((TURNS[20], 22 + 24j), (TURNS[41], 56 + 56j)):
        near = search(level, turned, 8.0, position, share)
        assert found(*near)[0] == pytest.approx(turn)
        assert np.abs(near[1].position - position)[np.isfinite(near[0])].max() <= 8.0


def test_refinement_ends_once_nothing_moves(shape):
    level = picture(np.exp(0.04j), CENTRE + 0.8 - 0.6j)
    start, free = Poses(np.array([1.0 + 0j]), np.array([CENTRE])), Freedom(angle=True, scale=False)
    short, long = (refine(level, start, shape, count, free, settled_px=0.0)[0] for count in (1, 30))
    settled = refine(level, start, shape, 30, free)[0]
    assert abs(short.position[0] - long.position[0]) > 0.01
    assert abs(settled.position[0] - long.position[0]) < 0.001
    assert abs(settled.turn[0] - long.turn[0]) * shape.radius_px < 0.001
    once = refine(level, start, shape, 30, free, settled_px=100.0)[0]
    assert once.position[0] == short.position[0]


def test_points_beyond_the_picture_are_not_seen_whatever_its_last_pixels_show(shape):
    leaving = CENTRE + 34
    level = picture(position=leaving)  # its long edges end at the rim, where pixels are repeated outwards
    both = Poses(np.ones(2, complex), np.array([leaving, CENTRE]))
    beyond = (shape.offset + leaving).real > SIDE - 1
    assert 0.1 < beyond.mean() < 0.6
    _, shift = refine(level, both, shape, 1, Freedom(angle=True, scale=False))
    assert np.isnan(shift[0][beyond]).all()
    assert np.isfinite(shift[0][~beyond]).mean() > 0.9
    assert agreement(level, both, shape).in_view == pytest.approx([1 - beyond.mean(), 1.0])
