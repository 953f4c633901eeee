"""Zones in the graph: one threshold, whose promise is the part's, and a limit for each zone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration.preprocess import Rectangle, View
from calibration.thresholds import reject_threshold
from calibration.zones import DrawnZone
from trainer.errors import TrainingError
from trainer.export import checked_parity, export_graph
from trainer.learning import Learned, Material, Options
from trainer.zoning import cells_of, zone_gains, zoned, zones_of

SIDE, CELLS = 64, 8
VIEW = View(SIDE, SIDE, colour=False, reference_size=(SIDE, SIDE))
LEFT = np.tile(np.arange(SIDE) < SIDE // 2, (SIDE, 1))  # half of the view


def silent(what: str, done: int, total: int) -> None:
    pass


class Difference(nn.Module):
    """The map is the picture in 8 x 8 px blocks, the score the mean of its four highest cells."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        cells = nn.functional.avg_pool2d(image, 8)
        return cells, cells.flatten(1).topk(4, dim=1).values.mean(1)


def train(material: Material, options: Options, progress: object) -> Learned:
    with torch.inference_mode():
        maps, scores = Difference()(material.batch)
    peaks = maps.flatten(1).amax(1).double().numpy()
    return Learned(Difference(), np.arange(len(maps)), scores.double().numpy(), peaks, maps[:, 0].numpy())


def pictures(count: int, seed: int = 0, *, left: float = 1.0) -> np.ndarray:
    """Return (count, 1, 64, 64): blocks of noise with a long tail, `left` times as strong in the left half."""
    generator = np.random.default_rng(seed)
    noise = generator.gamma(4.0, 0.05, (count, 1, CELLS, CELLS)).repeat(8, axis=2).repeat(8, axis=3)
    noise[:, :, :, : SIDE // 2] *= left
    return noise.astype(np.float32)


def material(batch: np.ndarray) -> Material:
    return Material(torch.from_numpy(batch), torch.ones(SIDE, SIDE), np.arange(len(batch)) % 5, Path("none"))


def learnt(*zones: DrawnZone, count: int = 400, left: float = 1.0) -> Learned:
    return zoned(train, zones, VIEW)(material(pictures(count, left=left)), Options(), silent)


def score_of(learned: Learned, batch: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return learned.module(torch.from_numpy(batch))[1].double().numpy()


def test_the_score_is_above_the_threshold_exactly_where_a_zone_or_the_part_is() -> None:
    learned = learnt(DrawnZone("left", LEFT), left=3.0)
    zones = zones_of(learned.module)
    fresh = pictures(300, seed=1, left=3.0)
    limit = reject_threshold(learned.good_scores, 0.1)
    scores = score_of(learned, fresh)
    with torch.inference_mode():
        maps = learned.module(torch.from_numpy(fresh))[0][:, 0].numpy()
    highest = np.array([max(zones.scores(anomaly_map).values()) for anomaly_map in maps])
    assert (scores >= highest - 1e-5).all()
    by_zone = highest > limit
    assert 0 < by_zone.sum() < len(fresh)
    assert (scores[by_zone] > limit - 1e-5).all()


def test_a_calm_zone_gets_a_limit_of_its_own() -> None:
    """A place that is twice as bright as ever in the calm half is nothing beside the loud half."""
    strange = pictures(1, seed=5, left=4.0)
    strange[0, 0, 16:24, 48:56] = 1.2
    plain = train(material(pictures(400, left=4.0)), Options(), silent)
    learned = learnt(DrawnZone("left", LEFT), left=4.0)
    assert score_of(plain, strange)[0] < reject_threshold(plain.good_scores, 0.02)
    limit = reject_threshold(learned.good_scores, 0.02)
    assert score_of(learned, strange)[0] > limit
    with torch.inference_mode():
        anomaly_map = learned.module(torch.from_numpy(strange))[0][0, 0].numpy()
    scores = zones_of(learned.module).scores(anomaly_map)
    assert scores["elsewhere"] > limit > scores["left"]


def test_a_factor_is_what_the_map_is_divided_by_and_the_score_follows_it() -> None:
    lenient, plain = (learnt(DrawnZone("left", LEFT, factor)) for factor in (2.0, 1.0))
    strange = pictures(1, seed=5)
    strange[0, 0, 16:24, 8:16] = 1.0
    with torch.inference_mode():
        maps = [each.module(torch.from_numpy(strange))[0][0, 0].numpy() for each in (lenient, plain)]
    np.testing.assert_allclose(maps[0][:, :4] * 2.0, maps[1][:, :4], rtol=1e-6)
    np.testing.assert_array_equal(maps[0][:, 4:], maps[1][:, 4:])
    above = [score_of(each, strange)[0] - reject_threshold(each.good_scores, 0.02) for each in (lenient, plain)]
    assert above[0] < 0.5 * above[1]


@pytest.mark.parametrize(("column", "deviations"), [(1, 5.0), (6, 10.0)])
def test_the_score_is_as_lenient_as_the_zone_in_which_the_part_is_strangest(column: int, deviations: float) -> None:
    module = learnt(DrawnZone("left", LEFT, 2.0)).module
    centre, scale = (float(value) for value in module.usual[:2])
    anomaly_map = torch.zeros(1, 1, CELLS, CELLS)
    anomaly_map[0, 0, 2, column] = 0.1
    _, score = module.judged(anomaly_map, torch.tensor([centre + 10.0 * scale]))
    assert float(score[0]) == pytest.approx(centre + deviations * scale, rel=1e-4)


def learned_of(maps: np.ndarray) -> Learned:
    """Return what a detector says that gives maps (n, 8, 8) and the mean of their four highest cells."""
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    scores = flat[:, -4:].mean(axis=1).astype(np.float64)
    return Learned(Difference(), np.arange(len(maps)), scores, flat[:, -1].astype(np.float64), maps)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_promise_about_good_parts_is_that_of_the_part_over_all_zones(factor: float) -> None:
    """30 calibrations of 99 parts at 5 %: 1000 fresh good parts each, five zones with quite different noise."""
    zones = [DrawnZone(f"zone {k}", (np.arange(SIDE) // 16 == k)[:, None] & ~LEFT, factor) for k in range(4)]
    loudness = np.where(np.arange(CELLS) < 4, 5.0, 1.0) * np.arange(1, 9)[:, None]
    rates = []
    for seed in range(30):
        maps = (np.random.default_rng(seed).gamma(4.0, 0.05, (1099, CELLS, CELLS)) * loudness).astype(np.float32)
        learned = zoned(lambda *_, seen=maps[:99]: learned_of(seen), zones, VIEW)(None, Options(), silent)
        fresh = learned_of(maps[99:])
        scores = learned.module.judged(
            torch.from_numpy(maps[99:])[:, None], torch.from_numpy(fresh.good_scores).float()
        )
        rates.append(float((scores[1].numpy() > reject_threshold(learned.good_scores, 0.05)).mean()))
    assert np.mean(rates) == pytest.approx(0.05, abs=3 * np.std(rates) / np.sqrt(len(rates)) + 0.003)


def test_good_scores_are_what_the_module_says_of_these_parts() -> None:
    learned = learnt(DrawnZone("left", LEFT, 0.5), count=50)
    np.testing.assert_allclose(learned.good_scores, score_of(learned, pictures(50)), rtol=1e-5)
    np.testing.assert_allclose(learned.good_peaks, learned.good_maps.max(axis=(1, 2)))


def test_the_graph_answers_as_the_network() -> None:
    learned = learnt(DrawnZone("left", LEFT, 0.5), count=50, left=3.0)
    batch = pictures(6, seed=3, left=3.0)
    parity = checked_parity(learned.module, export_graph(learned.module, batch[:1]), batch, 1.0, 1.0)
    assert parity.images == 6


def test_a_zone_covers_the_cells_of_which_it_has_half_or_the_one_it_covers_most() -> None:
    small, later = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    small[20:22, 20:22] = True  # in cell (2, 2)
    later[:, 60:] = True  # half of the last column
    cells = cells_of([DrawnZone("left", LEFT), DrawnZone("small", small), DrawnZone("later", later)], VIEW, (8, 8))
    wanted = np.zeros((8, 8), np.uint8)
    wanted[:, :4], wanted[2, 2], wanted[:, 7] = 1, 2, 3
    np.testing.assert_array_equal(cells, wanted)


def test_a_zone_that_is_covered_or_out_of_view_is_refused() -> None:
    with pytest.raises(TrainingError, match="zone a: covered by the zones after it"):
        cells_of([DrawnZone("a", LEFT), DrawnZone("b", LEFT)], VIEW, (8, 8))
    beside = dataclasses.replace(VIEW, region=Rectangle(40, 0, 24, 64))
    with pytest.raises(TrainingError, match="zone a: outside what the detector sees"):
        cells_of([DrawnZone("a", LEFT)], beside, (8, 8))
    with pytest.raises(TrainingError, match="zone a: outside what the detector sees"):
        zoned(train, [DrawnZone("a", LEFT)], beside)  # before anything is trained


def test_zones_over_the_whole_view_need_no_elsewhere() -> None:
    learned = learnt(DrawnZone("left", LEFT), DrawnZone("right", ~LEFT, 2.0), count=50)
    zones = zones_of(learned.module)
    assert set(zones.scores(learned.good_maps[0])) == {"left", "right"}


def test_maps_without_any_height_are_refused() -> None:
    with pytest.raises(TrainingError, match="need more than 0"):
        zone_gains(np.full((9, 4, 4), -1.0, np.float32), np.zeros((4, 4), np.uint8), np.ones(1))
