"""What the report shows of the inside of a detector: reconstructions, fitted normals, embeddings, the latent space.

Pictures are those of the papers: strips of image, reconstruction and blend (000, fig. 13, 15), normals fitted to the
scores and where they cross (000, fig. 17), t-SNE of embeddings (001, fig. 6; 002, fig. 6), generated pictures (001,
fig. 5), interpolation between latents (001, fig. 7, 8). The network is torch's, from the training; an exported graph
gives maps and scores only, so the t-SNE is then that of the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from torch import Tensor, nn

from calibration.chart import number, round_numbers
from trainer.catalogue import Ignoring
from trainer.errors import TrainingError
from trainer.figures import Bar, Tick, jpeg_uri
from trainer.label_limits import fitted_normal, normal_intersection
from trainer.metrics import GOOD, ScoredImage
from trainer.report_shares import ShareCurve, share_curves
from trainer.tiling import Tiled, Tiles, cut, join
from trainer.zoning import Zoned

MOST_STRIPS, MOST_OF_A_TYPE, MOST_GOOD = 10, 2, 3
PANEL_PX = 224
FULL_BLEND = 0.25  # reflectance: a difference of so much is shown in full colour
BRIGHTER, DARKER = (220, 30, 30), (30, 80, 230)  # RGB: the reconstruction is brighter, or darker, than the part
MOST_EMBEDDED = 300  # parts in the t-SNE
FEWEST_EMBEDDED = 12
NORMAL_BINS, NORMAL_POINTS = 40, 120
GRID = 8  # interpolated or generated pictures in a row
ROWS = 2
SMALL_PX = 112  # longer side of each
MAP_CELLS = 16  # a map is brought to so many cells a side before its t-SNE


@dataclass(frozen=True, slots=True)
class ReconstructionStrip:
    """One part, what a good part would look like there, and both blended, as data URIs."""

    name: str
    label: str
    photo: str
    reconstruction: str
    blend: str


@dataclass(frozen=True, slots=True)
class NormalCurve:
    """The scores of one kind of parts and the normal fitted to them; heights are densities, per cent of the highest."""

    label: str
    n: int
    bars: tuple[Bar, ...]
    path: str  # SVG path in a unit square of 100 x 100; y counts downwards


@dataclass(frozen=True, slots=True)
class NormalsChart:
    """Good and defective scores over one axis."""

    curves: tuple[NormalCurve, ...]
    ticks: tuple[Tick, ...]
    crossing: float | None  # place; None where the normals do not cross between their means
    crossing_text: str
    threshold: float | None  # place of the recipe's, None where it lies outside


@dataclass(frozen=True, slots=True)
class Scatter:
    """Embedded parts in two dimensions: places are per cent, from the left and from the top."""

    title: str
    groups: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]  # (label, points), good first


@dataclass(frozen=True, slots=True)
class Insight:
    """Everything of this file that a report has; empty parts are left out of the page."""

    strips: tuple[ReconstructionStrip, ...] = ()
    normals: NormalsChart | None = None
    scatters: tuple[Scatter, ...] = ()
    interpolation: str = ""  # data URI
    generated: str = ""  # data URI
    shares: tuple[ShareCurve, ...] = ()


def insight(module: nn.Module | None, images: Sequence[ScoredImage], threshold: float) -> Insight:
    """Return what can be shown. module: as trained; None where only the exported graph is there."""
    normals, shares = normals_chart(images, threshold), share_curves(images, threshold)
    if module is None:
        return Insight(normals=normals, scatters=map_scatters(images), shares=shares)
    with torch.inference_mode():
        network = _Opened(module)
        return Insight(
            strips=network.strips(images),
            normals=normals,
            scatters=network.scatters(images) or map_scatters(images),
            interpolation=network.interpolation(images),
            generated=network.generated(images),
            shares=shares,
        )


class _Opened:
    """A trained detector, looked into: under zones, behind an ignore mask, in tiles, with a reconstructor or not."""

    def __init__(self, module: nn.Module) -> None:
        self.before: nn.Module = nn.Identity()
        self.tiles: Tiles | None = None
        self.inner = module
        while (opened := self._next(self.inner)) is not None:
            self.inner = opened
        self.reconstructor = getattr(self.inner, "reconstructor", None)

    def _next(self, module: nn.Module) -> nn.Module | None:
        """Return what is inside of a module, None for the detector itself; note what stands before it."""
        if isinstance(module, Zoned):
            return module.detector
        if isinstance(module, Tiled):
            self.tiles = module.tiles
            return module.detector
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], Ignoring):
            self.before = module[0]
            return module[1]
        return None

    def strips(self, images: Sequence[ScoredImage]) -> tuple[ReconstructionStrip, ...]:
        if self.reconstructor is None:
            return ()
        return tuple(self._strip(image) for image in shown(images))

    def scatters(self, images: Sequence[ScoredImage]) -> tuple[Scatter, ...]:
        chosen = _thinned([image for image in images if image.view is not None])
        if len(chosen) < FEWEST_EMBEDDED:
            return ()
        found: dict[str, list[Tensor]] = {}
        for image in chosen:
            for title, vector in self._vectors(image).items():
                found.setdefault(title, []).append(vector.reshape(1, -1))
        labels = [image.label for image in chosen]
        return tuple(scatter(title, torch.cat(vectors).numpy(), labels) for title, vectors in found.items())

    def interpolation(self, images: Sequence[ScoredImage]) -> str:
        """Return pictures between the latents of two good parts, and between a defective and a good one."""
        good = [image for image in images if not image.defective and image.view is not None]
        defective = [image for image in images if image.defective and image.view is not None]
        if self.reconstructor is None or len(good) < 2 or not (_decoder(self.reconstructor)):
            return ""
        pairs = [(good[0], good[-1])] + ([(defective[0], good[0])] if defective else [])
        return jpeg_uri(np.concatenate([self._between(*pair) for pair in pairs[:ROWS]]))

    def generated(self, images: Sequence[ScoredImage]) -> str:
        """Return pictures of random latents, as a data URI; empty where the latent has no distribution of its own."""
        seen = next((image for image in images if image.view is not None), None)
        decode = None if self.reconstructor is None else _decoder(self.reconstructor)
        if seen is None or decode is None:
            return ""
        assert self.reconstructor is not None
        latent = self._rebuilt(self._photo(seen))[1]  # of one tile, where there are several
        chance = torch.Generator().manual_seed(0)
        drawn = torch.randn(ROWS, GRID, 1, latent.shape[1], generator=chance)
        rows = [np.concatenate([_picture(decode(z), SMALL_PX) for z in row], axis=1) for row in drawn]
        return jpeg_uri(np.concatenate(rows))

    def _strip(self, image: ScoredImage) -> ReconstructionStrip:
        photo = self._photo(image)
        rebuilt = self._whole(self._rebuilt(photo)[0].expand_as(photo))
        photo = self._whole(photo)
        panels = (_picture(photo), _picture(rebuilt), blend(photo, rebuilt))
        return ReconstructionStrip(image.name, image.label, *(jpeg_uri(panel) for panel in panels))

    def _photo(self, image: ScoredImage) -> Tensor:
        """Return one part as the detector sees it: (1, C, h, w), or its tiles (T, C, h, w)."""
        photo: Tensor = self.before(batch_of(image))
        return photo if self.tiles is None else cut(photo, self.tiles)

    def _whole(self, pictures: Tensor) -> Tensor:
        """Return the picture of a part (1, C, H, W) of that of its tiles."""
        return pictures if self.tiles is None else join(pictures.split(1), self.tiles)

    def _rebuilt(self, photo: Tensor) -> tuple[Tensor, Tensor]:
        assert self.reconstructor is not None
        rebuilt, latent = self.reconstructor(photo)
        return rebuilt, latent

    def _vectors(self, image: ScoredImage) -> dict[str, Tensor]:
        """Return the vectors of one part by what they are; those of its tiles are one vector."""
        photo = self._photo(image)
        if self.reconstructor is not None:
            rebuilt, latent = self._rebuilt(photo)
            vectors = {"latent vectors of the reconstructor": latent}
            if hasattr(self.inner.scorer, "embedded"):
                vectors["vectors that the score rests on"] = self.inner.scorer.embedded(photo, rebuilt)
            return vectors
        if hasattr(self.inner, "embedded"):
            return {"vectors that the score rests on": self.inner.embedded(photo)}
        return {}

    def _between(self, first: ScoredImage, last: ScoredImage) -> NDArray[np.uint8]:
        assert self.reconstructor is not None
        decode = _decoder(self.reconstructor)
        assert decode is not None
        start, end = (self._rebuilt(self._photo(image))[1] for image in (first, last))
        steps = torch.linspace(0.0, 1.0, GRID)
        pictures = (self._whole(decode(start * (1 - t) + end * t)) for t in steps)
        return np.concatenate([_picture(picture, SMALL_PX) for picture in pictures], axis=1)


def _decoder(network: nn.Module):
    """Return latents (1, d) -> pictures (1, C, h, w) in 0..1, None for networks whose latent alone gives no picture."""
    if hasattr(network, "pictures"):
        return network.pictures
    if hasattr(network, "decode") and hasattr(network, "log_variance"):  # the vae gives logits
        return lambda latent: torch.sigmoid(network.decode(latent))
    return None


def shown(images: Sequence[ScoredImage]) -> list[ScoredImage]:
    """Return a few parts of each defect type, from the highest scores down, and the good parts with the highest."""
    ordered = sorted(
        (image for image in images if image.view is not None and image.score is not None),
        key=lambda image: (-float(image.score or 0.0), image.name),
    )
    chosen: list[ScoredImage] = []
    for label in sorted({image.label for image in ordered} - {GOOD}):
        chosen += [image for image in ordered if image.label == label][:MOST_OF_A_TYPE]
    good = [image for image in ordered if image.label == GOOD]
    return [*chosen[: MOST_STRIPS - MOST_GOOD], *good[: MOST_GOOD if chosen else MOST_STRIPS]]


def batch_of(image: ScoredImage) -> Tensor:
    """Return (1, C, h, w) of a part's view."""
    assert image.view is not None
    view = image.view[None] if image.view.ndim == 2 else image.view.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(view[None], dtype=np.float32))


def blend(photo: Tensor, rebuilt: Tensor) -> NDArray[np.uint8]:
    """Return the part in gray, red where the reconstruction is brighter, blue where it is darker: (h, w, 3)."""
    gray = _sized(photo).mean(1)[0].numpy() * 255.0
    difference = _sized(rebuilt - photo).mean(1)[0].numpy()
    strength = np.clip(np.abs(difference) / FULL_BLEND, 0.0, 1.0)[:, :, None]
    colour = np.where(difference[:, :, None] > 0, np.array(BRIGHTER), np.array(DARKER))
    return np.rint(gray[:, :, None] * (1 - strength) + colour * strength).clip(0, 255).astype(np.uint8)


def normals_chart(images: Sequence[ScoredImage], threshold: float) -> NormalsChart | None:
    """Return the scores of good and of defective parts with their normals; None where there are too few of either."""
    groups = {
        kind: np.array([i.score for i in images if i.score is not None and i.defective is wanted], dtype=np.float64)
        for kind, wanted in (("good", False), ("defective", True))
    }
    try:
        fits = {kind: fitted_normal(scores, kind) for kind, scores in groups.items()}
    except TrainingError:  # too few, or all equal: nothing to draw
        return None
    every = np.concatenate(list(groups.values()))
    low, high = float(every.min()), float(every.max())
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    axis = np.linspace(low, high, NORMAL_POINTS)
    edges = np.linspace(low, high, NORMAL_BINS + 1)
    densities = {kind: _density(axis, *fits[kind]) for kind in groups}
    counts = {
        kind: np.histogram(scores, edges)[0] / len(scores) / (edges[1] - edges[0]) for kind, scores in groups.items()
    }
    curves = []
    for kind, scores in groups.items():
        top = max(float(densities[kind].max()), float(counts[kind].max()), 1e-12)
        bars = tuple(
            Bar(round(100 * i / NORMAL_BINS, 2), round(100 / NORMAL_BINS, 2), round(100 * float(c) / top, 1))
            for i, c in enumerate(counts[kind])
            if c > 0
        )
        places = (
            f"{100 * (x - low) / (high - low):.4g} {100 - 100 * y / top:.4g}"
            for x, y in zip(axis, densities[kind], strict=True)
        )
        curves.append(NormalCurve(kind, len(scores), bars, "M" + "L".join(places)))
    try:
        crossing: float | None = normal_intersection(groups["good"], groups["defective"])
    except TrainingError:
        crossing = None
    place = lambda score: round(100 * (score - low) / (high - low), 2)  # noqa: E731
    return NormalsChart(
        curves=tuple(curves),
        ticks=tuple(Tick(place(value), f"{value:.10g}") for value in round_numbers(low, high)),
        crossing=None if crossing is None or not low <= crossing <= high else place(crossing),
        crossing_text="" if crossing is None else number(crossing, threshold),
        threshold=place(threshold) if low <= threshold <= high else None,
    )


def map_scatters(images: Sequence[ScoredImage]) -> tuple[Scatter, ...]:
    """Return the anomaly maps in two dimensions, each in small; nothing where there are too few."""
    chosen = _thinned([image for image in images if image.anomaly_map is not None])
    if len(chosen) < FEWEST_EMBEDDED:
        return ()
    cells = (MAP_CELLS, MAP_CELLS)
    maps = [cv2.resize(np.float32(i.anomaly_map), cells, interpolation=cv2.INTER_AREA).ravel() for i in chosen]
    return (scatter("anomaly maps", np.stack(maps), [image.label for image in chosen]),)


def _thinned(images: list[ScoredImage]) -> list[ScoredImage]:
    """Return the images, at most 300 of them, evenly spaced."""
    kept = min(len(images), MOST_EMBEDDED)
    return [images[number * len(images) // kept] for number in range(kept)]


def scatter(title: str, vectors: NDArray[np.float32], labels: Sequence[str]) -> Scatter:
    """Return vectors (n, d) in two dimensions by t-SNE, always the same for the same vectors.

    Source: van der Maaten and Hinton 2008, JMLR 9, 2579-2605.
    """
    scaled = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)
    perplexity = min(30.0, (len(scaled) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(scaled)
    low, high = points.min(0), points.max(0)
    places = 3.0 + 94.0 * (points - low) / np.maximum(high - low, 1e-9)
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in (GOOD, *sorted(set(labels) - {GOOD}))}
    for (x, y), label in zip(places, labels, strict=True):
        found[label].append((round(float(x), 1), round(float(y), 1)))
    return Scatter(title, tuple((kind, tuple(spots)) for kind, spots in found.items() if spots))


def _density(axis: NDArray[np.float64], mean: float, deviation: float) -> NDArray[np.float64]:
    heights: NDArray[np.float64] = np.exp(-0.5 * ((axis - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
    return heights


def _picture(batch: Tensor, longest_px: int = PANEL_PX) -> NDArray[np.uint8]:
    """Return (1, C, h, w) in 0..1 as (h, w, 3)."""
    sized = _sized(batch.clamp(0.0, 1.0), longest_px)[0]
    return np.rint(sized.expand(3, -1, -1).permute(1, 2, 0).numpy() * 255).clip(0, 255).astype(np.uint8)


def _sized(batch: Tensor, longest_px: int = PANEL_PX) -> Tensor:
    height, width = batch.shape[2:]
    ratio = longest_px / max(height, width)
    size = max(1, round(height * ratio)), max(1, round(width * ratio))
    return nn.functional.interpolate(batch, size, mode="bilinear", align_corners=False, antialias=ratio < 1)
