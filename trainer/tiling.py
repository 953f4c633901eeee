"""Small faults on large parts: one detector judges overlapping tiles of the view, in one graph.

The view is as large as all tiles together. To the detector each tile is an image of its own, and it learns from the
tiles of all places alike: its memory and its recipe stay those of a small image, and every method of the catalogue can
be tiled. What is usual at a place is learnt afterwards, from held-out good parts: each cell of the joined map and each
tile's score are brought to the mean and deviation that good parts have there. The part is as strange as its strangest
tile or its strangest cell, in deviations of good parts, whichever is more. Measured in docs/detectors.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.catalogue import Ignoring
from trainer.detectors.patch_memory import moments
from trainer.errors import TrainingError
from trainer.learning import Defects, Learned, Material, Method, Options, Progress, at_map_size

OVERLAP = 32  # px of the detector's input that neighbours share: what a tile's edge sees badly, another sees whole
SEEN = 6.0  # px of the detector's input that the smallest defect should cover (docs/detectors.md)
MOST_TILES = 64
LEARNT_FROM = 4000  # tiles, at most: they and their features are in memory together
FEWEST_PARTS = 20  # which are learnt from, however many tiles they have
FEWEST_PLACED = 10  # held-out good parts; with fewer all places are judged alike


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a view is cut: columns x rows tiles of the detector's own size."""

    columns: int
    rows: int
    height: int  # of a tile, px
    width: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.columns * self.rows

    @property
    def most_parts(self) -> int:
        """How many good parts are learnt from at most."""
        return max(FEWEST_PARTS, LEARNT_FROM // self.count)

    @property
    def view(self) -> tuple[int, int]:
        """(height, width) of what they cover together, px."""
        return (
            self.rows * (self.height - OVERLAP) + OVERLAP,
            self.columns * (self.width - OVERLAP) + OVERLAP,
        )

    def corners(self) -> list[tuple[int, int]]:
        """Return (top, left) of each tile, row by row."""
        return [
            (row * (self.height - OVERLAP), column * (self.width - OVERLAP))
            for row in range(self.rows)
            for column in range(self.columns)
        ]


def tiles_for(text: str, size: tuple[int, int], shown_px: tuple[int, int], smallest_px: float | None) -> Tiles | None:
    """Return how to cut, or None for one tile alone.

    text: off | auto | COLUMNSxROWS. size: (height, width) of a tile. shown_px: (height, width) of what the view shows,
    reference px. smallest_px: diameter of the smallest defect, reference px, for auto: it then covers 6 px at least,
    or its own where these are fewer.

    Raises TrainingError on anything else, and if there would be more than 64 tiles.
    """
    columns, rows = _asked(text, size, shown_px, smallest_px)
    if columns * rows > MOST_TILES:
        raise TrainingError(
            f"{columns}x{rows} tiles found, at most {MOST_TILES} are cut: give a larger --size, a smaller --region, or "
            "a larger --smallest-defect"
        )
    if columns * rows == 1:
        return None
    if min(size) <= 2 * OVERLAP:
        raise TrainingError(
            f"tiles of {size[1]}x{size[0]} px found, need more than {2 * OVERLAP}: give a larger --size"
        )
    return Tiles(columns, rows, *size)


def _asked(text: str, size: tuple[int, int], shown_px: tuple[int, int], smallest_px: float | None) -> tuple[int, int]:
    if smallest_px is not None and text != "auto":
        raise TrainingError(f"--smallest-defect with tiles {text!r} found: it is for `--tiles auto`, give that")
    if text == "off":
        return 1, 1
    if text == "auto":
        if smallest_px is None or not smallest_px > 0.0:
            raise TrainingError("tiles auto need to know what to see: give --smallest-defect in px of the image")
        scale = min(1.0, SEEN / smallest_px)  # enlarging shows nothing new
        rows, columns = (
            max(1, math.ceil((shown * scale - OVERLAP) / (side - OVERLAP)))
            for shown, side in zip(shown_px, size, strict=True)
        )
        return columns, rows
    before, _, after = text.lower().partition("x")
    if not (before.isdecimal() and after.isdecimal() and int(before) >= 1 and int(after) >= 1):
        raise TrainingError(f"tiles {text!r} found, need off, auto or COLUMNSxROWS such as 4x3")
    return int(before), int(after)


def tiled(train: Method, tiles: Tiles) -> Method:
    """Return the method for whole views: it trains on their tiles and judges all of them."""

    def fit(material: Material, options: Options, progress: Progress) -> Learned:
        blind = None if bool(material.keep.all()) else Ignoring(material.keep, material.batch.mean(0))
        batch = material.batch if blind is None else blind(material.batch)
        learned = train(_cut_material(material, batch, tiles), options, progress)
        maps, scores, held_out = _by_part(learned, tiles, len(material))
        keep = at_map_size(material.keep, *maps.shape[2:])
        fold = _standardising_folds(material.fold[held_out])
        places, maps = _places(maps), _standardised_maps(maps, fold) * keep
        peaks = maps.flatten(1).amax(1)
        module = Tiled(learned.module, tiles, places, _units(scores, peaks), keep)
        found = nn.Sequential(blind, module) if blind is not None else module
        return Learned(
            module=found.eval(),
            held_out=held_out,
            good_scores=_part_scores(scores, peaks, fold).double().numpy(),
            good_peaks=peaks.double().numpy(),
            good_maps=maps[:, 0].numpy(),
            decided=(
                *learned.decided,
                f"judged in {tiles.columns}x{tiles.rows} tiles of {tiles.width}x{tiles.height} px",
            ),
            learnt_defects=learned.learnt_defects,
        )

    return fit


class Tiled(nn.Module):
    """image (N, C, H, W) -> anomaly_map (N, 1, H', W') in deviations above good parts there, score (N,)."""

    def __init__(
        self,
        detector: nn.Module,
        tiles: Tiles,
        places: tuple[Tensor, Tensor],  # usual and spread of the joined map, each (1, 1, H', W')
        units: Units,
        keep: Tensor,  # (1, 1, H', W')
    ) -> None:
        super().__init__()
        self.detector = detector
        self.tiles = tiles
        self.units = units
        self.register_buffer("usual", places[0])
        self.register_buffer("spread", places[1])
        self.register_buffer("keep", keep)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        maps, scores = self.detector(cut(image, self.tiles))
        joined = join(maps.split(image.shape[0]), self.tiles)
        anomaly_map = (joined - self.usual) / self.spread * self.keep
        return anomaly_map, self.units(scores.reshape(self.tiles.count, -1), anomaly_map.flatten(1).amax(1))


class Units(nn.Module):
    """Scores of the tiles (T, N) and the joined map's peaks (N,) -> score (N,) about the unit of the detector's own."""

    def __init__(self, tile: tuple[Tensor, Tensor], part: Tensor, unit: tuple[Tensor, Tensor]) -> None:
        """tile: centre and scale, each (T, 1). part: (4,) those of the strangest tile, then of the peak."""
        super().__init__()
        self.register_buffer("centre", tile[0])
        self.register_buffer("scale", tile[1])
        self.register_buffer("part", part)
        self.register_buffer("start", unit[0])
        self.register_buffer("step", unit[1])

    def forward(self, scores: Tensor, peaks: Tensor) -> Tensor:
        """Return one score per part."""
        tile, tile_scale, peak, peak_scale = self.part
        strangest = ((scores - self.centre) / self.scale).amax(0)
        return self.start + self.step * torch.maximum((strangest - tile) / tile_scale, (peaks - peak) / peak_scale)


def cut(images: Tensor, tiles: Tiles) -> Tensor:
    """Return all tiles of images (N, C, H, W), (T N, C, h, w): the first tile of every image, then the second."""
    return torch.cat(
        [images[:, :, top : top + tiles.height, left : left + tiles.width] for top, left in tiles.corners()]
    )


def join(maps: Sequence[Tensor], tiles: Tiles) -> Tensor:
    """Return one map (N, C, H', W') of T maps (N, C, h', w'): an overlap is shared half and half.

    Cells that do not divide the overlap are repeated until they do.
    """
    height, width = (
        _cells(side, shown) for side, shown in zip((tiles.height, tiles.width), maps[0].shape[2:], strict=True)
    )
    if (height, width) != tuple(maps[0].shape[2:]):
        maps = [F.interpolate(each, size=(height, width), mode="nearest") for each in maps]
    down, across = OVERLAP * height // tiles.height, OVERLAP * width // tiles.width
    rows = []
    for row in range(tiles.rows):
        several = maps[row * tiles.columns : (row + 1) * tiles.columns]
        top, low = _inner(row, tiles.rows, height, down)
        inner = [
            each[:, :, top:low, slice(*_inner(column, tiles.columns, width, across))]
            for column, each in enumerate(several)
        ]
        rows.append(torch.cat(inner, dim=3))
    return torch.cat(rows, dim=2)


def _cells(side: int, shown: int) -> int:
    """Return how many cells a tile's side gets: the detector's own if they divide the overlap, else 8 px each."""
    return shown if OVERLAP * shown % side == 0 else side // 8


def _inner(number: int, count: int, cells: int, shared: int) -> tuple[int, int]:
    """Return the range of a tile's cells that the joined map takes from it."""
    first, last = number == 0, number == count - 1
    return 0 if first else shared // 2, cells if last else cells - (shared - shared // 2)


def _cut_material(material: Material, batch: Tensor, tiles: Tiles) -> Material:
    """Return the tiles as images: those of one part share its fold. Labels say nothing of a single tile: none is left.

    An empty set of defects tells methods that need some why there is none.
    """
    height, width = tiles.view
    return replace(
        material,
        batch=cut(batch, tiles),
        keep=torch.ones(tiles.height, tiles.width),
        fold=np.tile(material.fold, tiles.count),
        aspect=material.aspect * (tiles.width / tiles.height) * (height / width),
        engine_ms=None if material.engine_ms is None else material.engine_ms / tiles.count,
        defects=Defects(batch[:0], (), (), np.zeros(0, dtype=np.int64)),
        tiles=tiles.count,
    )


def _by_part(learned: Learned, tiles: Tiles, parts: int) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Return (joined maps (m, 1, H', W'), scores (T, m), the m parts) that were scored unseen with all their tiles."""
    place = np.full(tiles.count * parts, -1)
    place[learned.held_out] = np.arange(len(learned.held_out))
    of_part = place.reshape(tiles.count, parts)
    held_out = np.flatnonzero((of_part >= 0).all(axis=0))
    order = of_part[:, held_out]  # (T, m)
    maps = torch.from_numpy(learned.good_maps)[:, None]
    joined = join([maps[chosen] for chosen in torch.from_numpy(order)], tiles)
    return joined, torch.from_numpy(learned.good_scores[order]).float(), held_out


def _standardising_folds(fold: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the folds of held-out parts; where they are all of one, five of neighbours, which may show one part."""
    if len(np.unique(fold)) > 1:
        return fold
    return np.arange(len(fold)) * 5 // max(1, len(fold))


def _places(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return (usual, spread) of the joined map at each place."""
    return moments(maps, alike=len(maps) < FEWEST_PLACED)


def _standardised_maps(maps: Tensor, fold: NDArray[np.int64]) -> Tensor:
    """Return maps (m, 1, H', W'), each fold standardised by what the others show."""
    found = torch.empty_like(maps)
    for k in np.unique(fold):
        own, others = (torch.from_numpy(chosen) for chosen in (fold == k, fold != k))
        usual, spread = _places(maps[others])
        found[own] = (maps[own] - usual) / spread
    return found


def _units(scores: Tensor, peaks: Tensor) -> Units:
    """Return what scores (T, m) of good tiles and peaks (m,) teach; a tile's deviation is at least 0.3 of the mean."""
    alike = scores.shape[1] < FEWEST_PLACED
    shown = scores.reshape(1, -1).expand(len(scores), -1) if alike else scores
    centre, scale = shown.mean(1, keepdim=True), shown.std(1, keepdim=True, correction=0)
    start, step = scores.mean(), scale.mean() + 1e-6
    scale = scale + 0.3 * step
    strangest = ((scores - centre) / scale).amax(0)
    part = [moment for values in (strangest, peaks) for moment in _centre_and_scale(values)]
    return Units((centre, scale), torch.stack(part), (start, step))


def _centre_and_scale(values: Tensor) -> tuple[Tensor, Tensor]:
    centre = values.mean()
    return centre, torch.maximum(values.std(correction=0), 0.01 * centre.abs() + 1e-6)


def _part_scores(scores: Tensor, peaks: Tensor, fold: NDArray[np.int64]) -> Tensor:
    """Return (m,) scores of parts, each fold judged by what the others show, in the unit of all."""
    unit = _units(scores, peaks)
    found = torch.empty(scores.shape[1])
    for k in np.unique(fold):
        own, others = (torch.from_numpy(chosen) for chosen in (fold == k, fold != k))
        learnt = _units(scores[:, others], peaks[others])
        learnt.start, learnt.step = unit.start, unit.step
        found[own] = learnt(scores[:, own], peaks[own])
    return found
