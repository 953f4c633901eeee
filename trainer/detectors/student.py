"""student: what a small network that knows good parts only expects of the backbone, against what the backbone sees.

Source: EfficientAD (Batzner et al. 2023, arXiv:2303.14535), sec. 3.2, 3.3: a student learns a pretrained teacher's
features on good images, with a loss on the features it knows least; an autoencoder learns them through a narrow code,
and a second output of the student learns the autoencoder. Where the student misses the teacher, a patch is strange;
where it misses the autoencoder, patches are put together in a strange way.

Differences, made for training on two CPU cores: the teacher is EfficientNet-Lite0 itself (strides 8 and 16, as in
patch_memory) instead of a network distilled from a larger one; student and autoencoder start from the backbone's
features at strides 4 and 16, which are there anyway, instead of from pixels; no foreign images in the loss; each map is
standardised at its place by good parts that were not learnt from, as in patch_memory, instead of by two quantiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.backbones import lite0
from trainer.detectors.patch_memory import moments, top_count, top_mean
from trainer.learning import Learned, Material, Options, Progress, at_map_size, held_out_judged, in_chunks, split
from trainer.training import learnt, train

STAGES = (1, 2, 4)  # of Lite0: 24 channels at stride 4, 40 at stride 8, 112 at stride 16
WIDTH = 96  # channels inside the student
CODE = 64  # numbers that the autoencoder keeps of a picture
HARD = 0.01  # share of the features, those known least, that make half of the student's loss
PATIENCE = 10  # epochs
SMOOTHING = (0.06136, 0.24477, 0.38774, 0.24477, 0.06136)  # Gaussian, sigma = 1 cell


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector of the best epoch; one fold decides when to stop, another is scored unseen for thresholds.

    Raises TrainingError if there are fewer than three folds, so fewer than three parts.
    """
    learn, validate, held_out = split(material, "the student")
    features = Features(options)
    shallow, deep = in_chunks(features, material.batch, progress, "features")
    features.learn_scale(deep[learn])
    deep = features.scaled(deep)
    keep = at_map_size(material.keep, *deep.shape[2:])
    torch.manual_seed(options.seed)
    pair = Pair(shallow.shape[1], deep.shape[1], *deep.shape[2:]).to(options.device)
    shallow, deep = shallow.to(options.device), deep.to(options.device)

    def loss(some: Tensor) -> Tensor:
        return pair.loss(shallow[some], deep[some])

    stage = learnt("student", pair, loss, (learn, validate), options, patience=PATIENCE, reads=("weights",))
    train(stage, material, options, progress)
    module = Student(features, pair, keep)
    module.learn_usual(in_chunks(module.differences, material.batch[validate], progress, "places")[0])
    return held_out_judged(module, material.batch, held_out, progress)


class Student(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/8, w/8) in deviations above a good part, score (N,)."""

    def __init__(self, features: Features, pair: Pair, keep: Tensor) -> None:
        super().__init__()
        self.features = features
        self.pair = pair
        self.register_buffer("keep", keep)
        self.register_buffer("usual", torch.zeros(1, 2, *keep.shape[2:]))
        self.register_buffer("spread", torch.ones(1, 2, *keep.shape[2:]))
        self.top_count = top_count(keep)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        standardised = (self.differences(image)[0] - self.usual) / self.spread
        anomaly_map = smoothed(standardised.mean(1, keepdim=True)) * self.keep
        return anomaly_map, top_mean(anomaly_map, self.top_count)

    def differences(self, image: Tensor) -> list[Tensor]:
        """Return [(N, 2, h/8, w/8)]: how far the student is from the teacher and from the autoencoder."""
        shallow, deep = self.features(image)
        teacher = self.features.scaled(deep)
        expected, told = self.pair.student(shallow).chunk(2, dim=1)
        known = self.pair.autoencoder(teacher)
        pairs = ((expected, teacher), (told, known))
        apart = [((one - other) ** 2).mean(1, keepdim=True).sqrt() for one, other in pairs]
        return [torch.cat(apart, dim=1)]

    def learn_usual(self, differences: Tensor) -> None:
        """Note what good parts that were not learnt from show at each place, (n, 2, h/8, w/8)."""
        for kind in (0, 1):
            usual, spread = moments(differences[:, kind : kind + 1])
            self.usual[:, kind], self.spread[:, kind] = usual[:, 0], spread[:, 0]


class Features(nn.Module):
    """(N, C, h, w) -> [(N, 24, h/4, w/4), (N, 152, h/8, w/8)]: what the student sees, and what it is to expect."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.backbone = lite0(STAGES, options.weights, options.weights_sha256)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return both."""
        shallow, fine, coarse = self.backbone(image)
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return [shallow, torch.cat([fine, coarse], dim=1)]

    def learn_scale(self, deep: Tensor) -> None:
        """Bring every channel to mean 0 and deviation 1 over these features (n, D, h/8, w/8)."""
        self.mean = deep.mean(dim=(0, 2, 3))[:, None, None]
        self.scale = 1.0 / (deep.std(dim=(0, 2, 3))[:, None, None] + 1e-3)

    def scaled(self, deep: Tensor) -> Tensor:
        """Return the features in deviations of good parts."""
        return (deep - self.mean) * self.scale


class Pair(nn.Module):
    """The student, whose two outputs learn the teacher and the autoencoder; and the autoencoder."""

    def __init__(self, shallow: int, deep: int, height: int, width: int) -> None:
        super().__init__()
        self.student = nn.Sequential(
            nn.Conv2d(shallow, WIDTH, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * deep, 1),
        )
        low = (WIDTH, height // 8, width // 8)
        self.autoencoder = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(deep, WIDTH, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(low[0] * low[1] * low[2], CODE),
            nn.Linear(CODE, low[0] * low[1] * low[2]),
            nn.ReLU(),
            nn.Unflatten(1, low),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False),
            nn.Conv2d(WIDTH, deep, 1),
        )

    def loss(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return the sum of three losses of a batch: student and teacher, autoencoder and teacher, student and it."""
        expected, told = self.student(shallow).chunk(2, dim=1)
        known = self.autoencoder(deep)
        squared = ((expected - deep) ** 2).flatten()
        hard = squared.topk(max(1, round(HARD * len(squared)))).values.mean()
        return squared.mean() + 0.1 * hard + F.mse_loss(known, deep) + F.mse_loss(told, known.detach())


def smoothed(maps: Tensor) -> Tensor:
    """Return maps (N, 1, h, w) under a Gaussian of one cell, edges replicated."""
    kernel = torch.tensor(SMOOTHING, dtype=maps.dtype, device=maps.device)
    padded = F.pad(maps, (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(padded, kernel.reshape(1, 1, 1, 5))
    return F.conv2d(rows, kernel.reshape(1, 1, 5, 1))
