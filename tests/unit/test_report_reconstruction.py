"""What the report shows of a detector's inside: strips, fitted normals, embeddings, interpolation."""

from __future__ import annotations

import base64
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from pages import Page
from torch import Tensor, nn

from calibration.zones import Zones
from trainer.catalogue import Ignoring, Reconstruction
from trainer.label_limits import normal_intersection
from trainer.metrics import ScoredImage, evaluate
from trainer.report import ReportFacts, render_report
from trainer.report_reconstruction import MOST_EMBEDDED, blend, insight, map_scatters, normals_chart, scatter, shown
from trainer.tiling import Tiled, Tiles
from trainer.zoning import Zoned

SIDE = 32


class Flat(nn.Module):
    """A reconstructor that answers every part with mid gray; its latent is the mean of each quarter."""

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(image, 0.5), nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)

    def pictures(self, latent: Tensor) -> Tensor:
        return nn.functional.interpolate(latent.reshape(-1, 1, 2, 2), (self.side, self.side), mode="nearest")


class Difference(nn.Module):
    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        difference = (image - reconstruction).abs()
        return difference, difference.flatten(1).mean(1)

    def embedded(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        return (image - reconstruction).flatten(1)[:, :16]


def part(
    label: str, number: int, score: float, value: float = 0.5, shape: tuple[int, int] = (SIDE, SIDE)
) -> ScoredImage:
    view = np.full(shape, value, np.float32)
    view[: shape[0] // 2] += 0.01 * number
    return ScoredImage(f"{label}/{number}", label, score, picture=view)


def line(shape: tuple[int, int] = (SIDE, SIDE)) -> list[ScoredImage]:
    good = [part("good", n, 1.0 + 0.1 * n, shape=shape) for n in range(10)]
    cracks = [part("crack", n, 4.0 + 0.3 * n, 0.2, shape) for n in range(6)]
    return [*good, *cracks, part("stain", 0, 3.0, 0.8, shape)]


def decoded(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]


def test_red_is_where_the_reconstruction_is_brighter_and_blue_where_it_is_darker():
    photo, rebuilt = torch.full((1, 1, SIDE, SIDE), 0.5), torch.full((1, 1, SIDE, SIDE), 0.5)
    rebuilt[..., :8] = 0.8
    rebuilt[..., -8:] = 0.2
    mixed = blend(photo, rebuilt)
    height, width = mixed.shape[:2]
    left, middle, right = (mixed[height // 2, column].astype(int) for column in (4, width // 2, width - 5))
    assert left[0] > 200 and left[2] < 60
    assert right[2] > 200 and right[0] < 60
    assert np.ptp(middle) <= 2


def test_strips_show_each_defect_type_and_a_few_good_parts():
    chosen = [image.name for image in shown(line())]
    assert chosen == ["crack/5", "crack/4", "stain/0", "good/9", "good/8", "good/7"]
    assert [image.name for image in shown(line()[:10])][:2] == ["good/9", "good/8"]


@pytest.mark.parametrize("ignoring", [False, True])
def test_the_reconstruction_is_that_of_the_network(ignoring: bool):
    module: nn.Module = Reconstruction(Flat(), Difference())
    if ignoring:
        module = nn.Sequential(Ignoring(torch.ones(SIDE, SIDE), torch.zeros(1, SIDE, SIDE)), module)
    found = insight(module, line(), 2.5)
    strip = found.strips[0]
    assert decoded(strip.reconstruction).mean() == pytest.approx(127.5, abs=2)
    assert decoded(strip.photo).mean() == pytest.approx(0.2 * 255 + 0.025 * 255 / 2 * 2, abs=6)
    assert [one.title for one in found.scatters] == [
        "latent vectors of the reconstructor",
        "vectors that the score rests on",
    ]
    between = decoded(found.interpolation)
    assert between.shape[1] / between.shape[0] == pytest.approx(4.0)  # two rows of eight
    made = decoded(found.generated)
    assert made.shape == between.shape
    assert made.std() > 20  # sixteen latents, none like the other


def in_tiles(module: nn.Module) -> nn.Module:
    """Two tiles of 96 px side by side that share 32 px."""
    cells = torch.zeros(1, 1, 12, 20)
    return Tiled(module, Tiles(2, 1, 96, 96), (cells, cells + 1.0), nn.Identity(), cells + 1.0)


def under_zones(module: nn.Module) -> nn.Module:
    everywhere = np.zeros((12, 20), np.uint8)
    ones = torch.ones(1, 1, 12, 20)
    return Zoned(module, Zones(("elsewhere",), everywhere, 1.0, 0.0), ones, ones, torch.ones(4))


def test_tiles_are_rebuilt_one_by_one_and_shown_as_one_part_also_under_zones_and_an_ignore_mask():
    blind = Ignoring(torch.ones(96, 160), torch.zeros(1, 96, 160))
    module = under_zones(nn.Sequential(blind, in_tiles(Reconstruction(Flat(96), Difference()))))
    found = insight(module, line((96, 160)), 2.5)
    for panel in (found.strips[0].photo, found.strips[0].reconstruction, found.strips[0].blend):
        height, width = decoded(panel).shape[:2]
        assert width / height == pytest.approx(160 / 96, rel=0.02)
    assert decoded(found.strips[0].reconstruction).mean() == pytest.approx(127.5, abs=2)
    assert decoded(found.strips[0].photo).mean() == pytest.approx(0.225 * 255, abs=4)  # a crack of 0.2 and 0.25
    assert [one.title for one in found.scatters] == [
        "latent vectors of the reconstructor",
        "vectors that the score rests on",
    ]
    assert decoded(found.interpolation).shape[1] / decoded(found.interpolation).shape[0] == pytest.approx(
        8 * 160 / (2 * 96), rel=0.05
    )
    assert decoded(found.generated).shape[1] == 8 * 112  # tiles: latents of several would not fit together


def test_a_detector_without_a_reconstructor_has_neither_strips_nor_interpolation():
    found = insight(nn.Conv2d(1, 1, 1), line(), 2.5)
    assert (found.strips, found.scatters, found.interpolation, found.generated) == ((), (), "", "")
    assert found.normals is not None
    assert insight(None, line(), 2.5).strips == ()


def test_without_vectors_the_maps_are_embedded():
    generator = np.random.default_rng(0)
    images = [replace(one, anomaly_map=generator.random((20, 24), np.float32)) for one in line()]
    for image in images[10:]:
        image.anomaly_map[:10] += 4.0
    for module in (None, nn.Conv2d(1, 1, 1)):
        (found,) = insight(module, images, 2.5).scatters
        assert found.title == "anomaly maps"
        assert [(label, len(spots)) for label, spots in found.groups] == [("good", 10), ("crack", 6), ("stain", 1)]
        good, crack = (np.array(spots) for _, spots in found.groups[:2])
        assert np.linalg.norm(good.mean(0) - crack.mean(0)) > 2 * max(good.std(0).max(), crack.std(0).max())
    assert insight(None, images[:5], 2.5).scatters == ()


@pytest.mark.parametrize(("count", "wanted"), [(300, 300), (301, 300), (599, 300), (600, 300)])
def test_at_most_300_parts_are_embedded_evenly_spaced(monkeypatch, count: int, wanted: int):
    seen = []
    monkeypatch.setattr("trainer.report_reconstruction.scatter", lambda *given: seen.append(given))
    images = [replace(part("good", n, 1.0), anomaly_map=np.full((16, 16), n, np.float32)) for n in range(count)]
    map_scatters(images)
    ((_, maps, labels),) = seen
    assert len(maps) == len(labels) == wanted <= MOST_EMBEDDED
    assert maps[0, 0] == 0 and count - 2 <= maps[-1, 0] <= count - 1
    assert set(np.diff(maps[:, 0])) <= {1.0, 2.0}


def test_the_normals_cross_where_the_threshold_of_labels_lies():
    images = line()
    chart = normals_chart(images, 2.5)
    good, bad = (np.array([i.score for i in images if i.defective is wanted]) for wanted in (False, True))
    crossing = normal_intersection(good, bad)
    assert float(chart.crossing_text) == pytest.approx(crossing, rel=1e-3)
    scores = np.concatenate([good, bad])
    low, high = scores.min() - 0.03 * np.ptp(scores), scores.max() + 0.03 * np.ptp(scores)
    assert chart.crossing == pytest.approx(100 * (crossing - low) / (high - low), abs=0.02)
    assert [(curve.label, curve.n) for curve in chart.curves] == [("good", 10), ("defective", 7)]


def test_too_few_scores_draw_no_normals():
    assert normals_chart(line()[:10], 2.5) is None
    assert normals_chart([part("good", 0, 1.0), part("good", 1, 1.0), part("crack", 0, 2.0)], 1.5) is None


def test_embedded_parts_keep_their_labels_and_two_clusters_stay_apart():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(24, 6)).astype(np.float32)
    vectors[12:] += 8.0
    found = scatter("parts", vectors, ["good"] * 12 + ["crack"] * 12)
    assert [(label, len(points)) for label, points in found.groups] == [("good", 12), ("crack", 12)]
    good, crack = (np.array(points) for _, points in found.groups)
    apart = np.linalg.norm(good.mean(0) - crack.mean(0))
    assert apart > 2 * max(good.std(0).max(), crack.std(0).max())
    assert found == scatter("parts", vectors, ["good"] * 12 + ["crack"] * 12)


def test_the_page_holds_all_of_it_and_is_whole():
    images = line()
    inside = insight(Reconstruction(Flat(), Difference()), images, 2.5)
    facts = ReportFacts("nut", "vae+residual", {})
    page = render_report(
        facts,
        evaluate(images, 2.5),
        images,
        threshold=2.5,
        map_threshold=1.0,
        good_scores=np.array([1.0, 1.2]),
        inside=inside,
    )
    text = Page(page).text
    for title in (
        "Good and defective scores as normals",
        "What a good part would look like there",
        "Parts as the detector sees them",
        "Between two parts",
        "Pictures that the network makes by itself",
        "Where defects are rare",
    ):
        assert title in text
    assert len(re.findall(r"<circle ", page)) == 2 * len(images)
    assert page.count('alt="reconstruction"') == len(inside.strips)
