"""patch_memory: how far is each patch of the part from every patch seen on good parts?

A memory of mid-level features with a greedy coreset, as in PatchCore (Roth et al. 2022, arXiv:2106.08265), with three
differences that were measured (docs/detectors.md):

* features at strides 8 and 16, each channel brought to mean 0 and deviation 1 over the good patches; of these 152 the
  64 strongest principal directions: distances hardly change, and cost two fifths;
* each place of the map is standardised by the mean and deviation that held-out good parts have there, without the
  strangest 5 %, because edges and highlights vary more than plain surfaces, and border cells differ by their padding;
* the score is the mean of the highest 0.3 % of the map: steadier than its maximum. The map is not blurred: features
  have been averaged already, and faults keep their outlines.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.backbones import lite0
from trainer.learning import Learned, Material, Options, Progress, at_map_size, in_chunks

STAGES = (2, 4)  # of Lite0: 40 channels at stride 8, 112 at stride 16
TOP_SHARE = 0.003  # of the map's cells, for the score: 3 of 32 x 32
FLOOR = 0.3  # share of the mean deviation added to every place's own
DIRECTIONS = 64  # of the features, that distances are taken in
SAMPLE = 60_000  # patches that the directions are learnt from
CANDIDATES = 30_000  # patches that the coreset is chosen from
SKETCH = 64  # dimensions of the random projection that the coreset is chosen in
ODD = 0.05  # share of the held-out images that a place's moments leave out: the strangest there
NEAREST = 1.0  # distances below it count as this: |x - m|^2 as x^2 + m^2 - 2xm is rounding noise there, and no defect


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return a detector whose thresholds rest on k-fold held-out maps: every good image is scored unseen once.

    A fold's images are scored with a memory of the other folds' patches and standardised by the other folds' held-out
    maps, so neither has seen them.
    """
    features = Features(options)
    embedded = in_chunks(features, material.batch, progress, "features")[0]  # (n, D, h', w')
    keep = at_map_size(material.keep, *embedded.shape[2:])
    module, maps = learned_memory(embedded, material, keep, options, progress, copies=embedded[:0])
    module.features = features
    return Learned(
        module=module.eval(),
        held_out=np.arange(len(maps)),
        good_scores=top_mean(maps, top_count(keep)).double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
    )


def learned_memory(
    embedded: Tensor, material: Material, keep: Tensor, options: Options, progress: Progress, *, copies: Tensor
) -> tuple[PatchMemory, Tensor]:
    """Return (detector without a backbone, held-out maps (n, 1, h', w')) of features (n, D, h', w').

    copies: features of turned copies to remember too, (0, D, h', w') where parts lie still; with them all places are
    judged alike.
    """
    alike = len(copies) > 0
    mean, directions, _ = principal(embedded, keep, options.seed, DIRECTIONS)
    embedded, copies = (F.conv2d(seen - mean[:, None, None], directions) for seen in (embedded, copies))
    distances = held_out_distances(embedded, material, keep, options, progress, copies=copies)  # (n, 1, h', w')
    found = torch.cat([patches(seen, keep) for seen in (embedded, copies)])
    memory = coreset(found, options.memory_entries, options.seed, progress)
    module = PatchMemory((mean, directions), memory, moments(distances, alike=alike), keep)
    return module, standardised_folds(distances, material.fold, alike=alike) * keep


class PatchMemory(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/8, w/8) in deviations above a good part, score (N,)."""

    def __init__(
        self,
        projection: tuple[Tensor, Tensor],  # mean (D,), directions (d, D, 1, 1)
        memory: Tensor,  # (entries, d)
        moments: tuple[Tensor, Tensor],  # usual and spread, each (1, 1, h', w')
        keep: Tensor,  # (1, 1, h', w')
    ) -> None:
        super().__init__()
        usual, spread = moments
        self.features: nn.Module = nn.Identity()
        self.register_buffer("mean", projection[0][:, None, None])
        self.register_buffer("directions", projection[1])
        self.register_buffer("memory", memory.T.contiguous())  # (d, entries)
        self.register_buffer("memory_squared", (memory * memory).sum(1))  # (entries,)
        self.register_buffer("usual", usual)  # (1, 1, h', w') distance of good parts here
        self.register_buffer("spread", spread)
        self.register_buffer("keep", keep)
        self.top_count = top_count(keep)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        return self.judged(self.features(image)[0])

    def judged(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score) of features (N, D, h', w') as `features` gives them."""
        reduced = F.conv2d(embedded - self.mean, self.directions)
        distance = nearest_distance(reduced, self.memory, self.memory_squared)
        anomaly_map = (distance - self.usual) / self.spread * self.keep
        return anomaly_map, top_mean(anomaly_map, self.top_count)


class Features(nn.Module):
    """(N, C, h, w) -> [(N, 152, h/8, w/8)]: both strides, averaged over 3x3 neighbours, at the finer grid."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.backbone = lite0(STAGES, options.weights, options.weights_sha256)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return a list of one tensor, as a backbone does."""
        fine, coarse = (F.avg_pool2d(level, 3, stride=1, padding=1) for level in self.backbone(image))
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return [torch.cat([fine, coarse], dim=1)]


def principal(embedded: Tensor, keep: Tensor, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mean (D,), directions (count, D, 1, 1), variances (count,)) of the kept places of (n, D, h', w').

    Channels are brought to mean 0 and deviation 1; the directions are the strongest principal ones, at most D, and
    orthonormal behind that. Variances are float64, of what the directions give.
    """
    found = patches(embedded, keep)
    generator = torch.Generator().manual_seed(seed)
    found = found[torch.randperm(len(found), generator=generator)[:SAMPLE].sort().values]
    mean, scale = found.mean(0), 1.0 / (found.std(0) + 1e-3)
    scaled = ((found - mean) * scale).double()
    variances, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))  # ascending
    directions = vectors.flip(1)[:, :count] * scale.double()[:, None]
    return mean, directions.T.float()[:, :, None, None].contiguous(), variances.flip(0)[:count]


def nearest_distance(embedded: Tensor, memory: Tensor, memory_squared: Tensor) -> Tensor:
    """Return each place's distance to its nearest memory entry, (N, 1, h', w').

    embedded: (N, D, h', w'). memory: (D, entries). memory_squared: (entries,).
    """
    places = embedded.flatten(2).transpose(1, 2)  # (N, h'w', D)
    squared = (places * places).sum(2) + (memory_squared - 2.0 * (places @ memory)).amin(2)
    return squared.clamp(min=NEAREST**2).sqrt().reshape(embedded.shape[0], 1, *embedded.shape[2:])


def top_mean(maps: Tensor, count: int) -> Tensor:
    """Return (N,): the mean of the `count` highest cells of maps (N, 1, h, w)."""
    return maps.flatten(1).topk(count, dim=1).values.mean(1)


def coreset(found: Tensor, entries: int, seed: int, progress: Progress, *, candidates: int = CANDIDATES) -> Tensor:
    """Return at most `entries` patches that cover all of them: greedily, always the one farthest from those chosen.

    found: (n, D) patches. Chosen in a random projection where D is above 64, from at most `candidates` drawn at random.
    Source: PatchCore, sec. 3.2 (minimax facility location; Johnson-Lindenstrauss projection).
    """
    generator = torch.Generator().manual_seed(seed)
    if len(found) > candidates:
        found = found[torch.randperm(len(found), generator=generator)[:candidates].sort().values]
    entries = min(entries, len(found))
    sketch = found
    if found.shape[1] > SKETCH:
        sketch = found @ (torch.randn(found.shape[1], SKETCH, generator=generator) / math.sqrt(SKETCH))
    squared = (sketch * sketch).sum(1)
    distance = torch.full((len(sketch),), torch.inf)
    chosen = [int(torch.randint(len(sketch), (1,), generator=generator))]
    for count in range(1, entries):
        last = chosen[-1]
        torch.minimum(distance, squared - 2.0 * (sketch @ sketch[last]) + squared[last], out=distance)
        distance[last] = -torch.inf
        chosen.append(int(distance.argmax()))
        if count % 200 == 0:
            progress("memory", count, entries)
    progress("memory", entries, entries)
    return found[chosen]


def held_out_distances(
    embedded: Tensor, material: Material, keep: Tensor, options: Options, progress: Progress, *, copies: Tensor
) -> Tensor:
    """Return (n, 1, h', w'): each image's distances to a memory of the other folds' patches, turned ones among them."""
    copies_fold = np.tile(material.fold, len(copies) // len(embedded))
    distances = torch.empty(len(embedded), 1, *embedded.shape[2:])
    fold_count = int(material.fold.max()) + 1
    for k in range(fold_count):
        held_out = np.flatnonzero(material.fold == k)
        others = [patches(embedded[material.fold != k], keep), patches(copies[copies_fold != k], keep)]
        memory = coreset(torch.cat(others), options.memory_entries, options.seed, _silent)
        squared = (memory * memory).sum(1)
        for index in held_out:
            distances[index] = nearest_distance(embedded[index : index + 1], memory.T, squared)[0]
        progress("held-out scores", k + 1, fold_count)
    return distances


def standardised_folds(distances: Tensor, fold: NDArray[np.int64], *, alike: bool = False) -> Tensor:
    """Return maps (n, 1, h', w') in the order of distances: each fold standardised by the others."""
    maps = torch.empty_like(distances)
    for k in range(int(fold.max()) + 1):
        usual, spread = moments(distances[fold != k], alike=alike)
        maps[fold == k] = (distances[fold == k] - usual) / spread
    return maps


def moments(distances: Tensor, odd: float = ODD, *, alike: bool = False) -> tuple[Tensor, Tensor]:
    """Return (usual, spread), each (1, 1, h', w'): mean and deviation over images, shared among 5x5 neighbours.

    At each place the highest share `odd` of the images is left out, rounded up, but never all: a defective part among
    the good ones, or a single odd one, would otherwise widen what passes there. alike: all places share one mean and
    deviation, as suits parts at any angle.
    """
    kept = max(1, len(distances) - math.ceil(odd * len(distances)))
    usually = distances.sort(0).values[:kept]
    if alike:
        shape = distances[:1]
        return torch.full_like(shape, float(usually.mean())), torch.full_like(shape, float(usually.std()) + 1e-6)
    usual = _shared(usually.mean(0, keepdim=True))
    spread = _shared(usually.var(0, correction=0, keepdim=True)).sqrt()
    return usual, spread + FLOOR * spread.mean() + 1e-6


def _shared(maps: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(maps, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def top_count(keep: Tensor) -> int:
    """Return how many cells make the score: 0.3 % of the kept ones, at least one."""
    return max(1, round(TOP_SHARE * float(keep.sum())))


def patches(embedded: Tensor, keep: Tensor) -> Tensor:
    """Return (n, D): the kept places of (N, D, h', w')."""
    return embedded.permute(0, 2, 3, 1)[:, keep[0, 0] > 0].reshape(-1, embedded.shape[1])


def _silent(what: str, done: int, total: int) -> None:
    """Report no progress."""
