"""A view cut into tiles is judged by one detector of a tile's size, and joined without a seam."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer.catalogue import method
from trainer.errors import TrainingError
from trainer.export import checked_parity, export_graph
from trainer.learning import Defects, Learned, Material, Options
from trainer.tiling import OVERLAP, Tiles, cut, join, tiled, tiles_for

TILES = Tiles(columns=3, rows=2, height=96, width=128)
HEIGHT, WIDTH = TILES.view


def silent(what: str, done: int, total: int) -> None:
    pass


class Difference(nn.Module):
    """The map is the picture in blocks, the score the mean of its three highest cells."""

    def __init__(self, block: int = 8) -> None:
        super().__init__()
        self.block = block

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        cells = nn.functional.avg_pool2d(image.mean(1, keepdim=True), self.block)
        return cells, cells.flatten(1).topk(3, dim=1).values.mean(1)


def train(material: Material, options: Options, progress: object) -> Learned:
    """Learn nothing; judge the images of all folds but the last."""
    held_out = np.flatnonzero(material.fold < 4)
    with torch.inference_mode():
        maps, scores = Difference()(material.batch[held_out])
    peaks = maps.flatten(1).amax(1).double().numpy()
    return Learned(Difference(), held_out, scores.double().numpy(), peaks, maps[:, 0].numpy())


def parts(count: int, seed: int = 0) -> np.ndarray:
    """Return (count, 1, H, W): noise of a tenth, five times as loud in the tile at the top left."""
    generator = np.random.default_rng(seed)
    noise = generator.uniform(0.0, 0.1, (count, 1, HEIGHT // 8, WIDTH // 8))
    noise[:, :, :10, :14] *= 5.0
    return noise.repeat(8, axis=2).repeat(8, axis=3).astype(np.float32)


def material(batch: np.ndarray, keep: np.ndarray | None = None) -> Material:
    seen = np.ones((HEIGHT, WIDTH), np.float32) if keep is None else keep
    return Material(torch.from_numpy(batch), torch.from_numpy(seen), np.arange(len(batch)) % 5, Path("none"))


def answer(module: nn.Module, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        maps, scores = module(torch.from_numpy(batch))
    return maps[:, 0].numpy(), scores.numpy()


@pytest.mark.parametrize("block", [8, 16, 32])
def test_tiles_joined_again_are_the_map_of_the_whole(block: int) -> None:
    batch = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    maps, _ = Difference(block)(cut(batch, TILES))
    torch.testing.assert_close(join(maps.split(2), TILES), Difference(block)(batch)[0])


def test_cells_that_do_not_divide_the_overlap_are_repeated() -> None:
    maps, _ = Difference(block=48)(cut(torch.ones(1, 1, HEIGHT, WIDTH), Tiles(3, 2, 96, 128)))
    assert join(maps.split(1), TILES).shape == (1, 1, HEIGHT // 8, WIDTH // 8)


def test_a_place_is_judged_by_what_good_parts_show_there() -> None:
    learned = tiled(train, TILES)(material(parts(100)), Options(), silent)
    strange = parts(2, seed=1)
    strange[0, 0, 120:128, 200:208] = 0.2  # twice what a calm place ever shows, less than half of a loud one
    maps, scores = answer(learned.module, strange)
    assert scores[0] > learned.good_scores.max() > scores[1]
    row, column = np.unravel_index(maps[0].argmax(), maps[0].shape)
    assert (row, column) == (120 // 8, 200 // 8)


def test_good_parts_are_those_of_which_every_tile_was_scored_unseen() -> None:
    learned = tiled(train, TILES)(material(parts(50)), Options(), silent)
    np.testing.assert_array_equal(learned.held_out, np.flatnonzero(np.arange(50) % 5 < 4))
    assert learned.good_maps.shape == (40, HEIGHT // 8, WIDTH // 8)
    np.testing.assert_allclose(learned.good_peaks, learned.good_maps.max(axis=(1, 2)), rtol=1e-6)
    assert "judged in 3x2 tiles of 128x96 px" in learned.decided


def test_held_out_scores_are_of_the_size_of_fresh_good_ones() -> None:
    learned = tiled(train, TILES)(material(parts(100)), Options(), silent)
    _, fresh = answer(learned.module, parts(100, seed=7))
    assert float(np.median(learned.good_scores)) == pytest.approx(float(np.median(fresh)), rel=0.05)


def test_the_graph_is_static_and_answers_as_the_network() -> None:
    learned = tiled(train, TILES)(material(parts(20)), Options(), silent)
    batch = parts(3, seed=2)
    assert checked_parity(learned.module, export_graph(learned.module, batch[:1]), batch, 1.0, 1.0).images == 3


def test_nothing_under_the_ignore_mask_moves_the_score() -> None:
    keep = np.ones((HEIGHT, WIDTH), np.float32)
    keep[:, : WIDTH // 2] = 0.0
    learned = tiled(train, TILES)(material(parts(30), keep), Options(), silent)
    batch = parts(1, seed=3)
    before = answer(learned.module, batch)
    batch[:, :, 30:60, 20:90] = 1.0
    after = answer(learned.module, batch)
    assert after[1][0] == before[1][0]
    assert not after[0][:, :, : WIDTH // 16 - 1].any()


@pytest.mark.parametrize("labels", [(), ("dent",) * 4])
def test_a_method_that_learns_from_labels_is_told_that_tiles_have_none(labels: tuple[str, ...]) -> None:
    names = tuple(map(str, range(len(labels))))
    defects = Defects(torch.zeros(len(labels), 1, HEIGHT, WIDTH), labels, names, np.arange(len(labels)) % 5)
    shown = replace(material(parts(10)), defects=defects if labels else None)
    with pytest.raises(TrainingError, match=r"cnn learns from labelled defects, but a label says nothing of a single "):
        tiled(method("cnn"), TILES)(shown, Options(), silent)


@pytest.mark.parametrize(("whole_ms", "tile_ms"), [(30.0, 5.0), (None, None)])
def test_the_engine_has_a_share_of_its_time_for_each_tile(whole_ms: float | None, tile_ms: float | None) -> None:
    asked = []

    def noted(of_tiles: Material, options: Options, progress: object) -> Learned:
        asked.append(of_tiles.engine_ms)
        return train(of_tiles, options, progress)

    tiled(noted, TILES)(replace(material(parts(20)), engine_ms=whole_ms), Options(), silent)
    assert asked == [tile_ms]


@pytest.mark.parametrize(("count", "name"), [(5, "noise_ae"), (6, "noise_ae"), (5, "student")])
def test_one_good_part_alone_cannot_be_scored_unseen_in_tiles(count: int, name: str, tmp_path: Path) -> None:
    """Refused before the training: where one fold is held out, it holds a second part from 7 on."""
    few = replace(material(parts(count)), checkpoint=tmp_path / "checkpoint")
    with pytest.raises(TrainingError, match=rf"^{count} good images found: in tiles .* needs at least 7"):
        tiled(method(name), TILES)(few, Options(epochs=1), never)


def never(what: str, done: int, total: int) -> None:
    raise AssertionError(f"{what} was begun")


def test_seven_good_parts_are_enough_in_tiles(tmp_path: Path) -> None:
    enough = replace(material(parts(7)), checkpoint=tmp_path / "checkpoint")
    learned = tiled(method("noise_ae"), TILES)(enough, Options(epochs=1), silent)
    assert len(learned.good_scores) == 2
    assert np.isfinite(learned.good_scores).all()


def test_few_held_out_parts_are_judged_alike_everywhere() -> None:
    learned = tiled(train, TILES)(material(parts(6)), Options(), silent)
    assert np.isfinite(learned.good_scores).all()
    assert answer(learned.module, parts(2, seed=4))[1] == pytest.approx(learned.good_scores.mean(), rel=1.0)


@pytest.mark.parametrize(
    ("text", "smallest_px", "wanted"),
    [
        ("off", None, None),
        ("1x1", None, None),
        ("4x3", None, (4, 3)),
        ("auto", 10.0, (5, 4)),  # 1600x1200 at 0.6: 960x720
        ("auto", 6.0, (7, 6)),
        ("auto", 2.0, (7, 6)),  # nothing is enlarged
        ("auto", 60.0, None),
    ],
)
def test_tiles_follow_the_smallest_defect(text: str, smallest_px: float | None, wanted: tuple[int, int] | None) -> None:
    found = tiles_for(text, (256, 256), (1200, 1600), smallest_px)
    assert (found and (found.columns, found.rows)) == wanted
    if found:
        assert found.view == (found.rows * (256 - OVERLAP) + OVERLAP, found.columns * (256 - OVERLAP) + OVERLAP)


def test_whole_tiles_may_enlarge_a_small_image() -> None:
    """docs/train.md says so."""
    assert tiles_for("auto", (256, 256), (300, 300), 6.0).view == (480, 480)


@pytest.mark.parametrize(
    ("text", "size", "smallest_px", "named"),
    [
        ("4", (256, 256), None, "COLUMNSxROWS"),
        ("0x3", (256, 256), None, "COLUMNSxROWS"),
        ("²x3", (256, 256), None, "COLUMNSxROWS"),
        ("auto", (256, 256), None, "--smallest-defect"),
        ("off", (256, 256), 10.0, "it is for `--tiles auto`"),
        ("3x1", (256, 256), 10.0, "it is for `--tiles auto`"),
        ("9x8", (256, 256), None, "at most 64"),
        ("2x2", (64, 256), None, "need more than 64"),
    ],
)
def test_tiles_that_cannot_be_are_refused(
    text: str, size: tuple[int, int], smallest_px: float | None, named: str
) -> None:
    with pytest.raises(TrainingError, match=named):
        tiles_for(text, size, (1200, 1600), smallest_px)
