"""What each cell of the four papers' tables is: category, detector, options, protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trainer.data import GOOD, Dataset, Item

TYPES = ("blowhole", "break", "crack", "fray", "uneven")  # of magnetic_tile, in the place of the paper's five

SEARCH = {"inversion_loss": "laplacian", "inversion_steps": 16}  # for the codes of paper 001

SHARES = (0.05, 0.1, 0.2, 0.35)  # of defective images in a batch, beside the 0.5 of the table itself


@dataclass(frozen=True, slots=True)
class Cell:
    """One fit and what is measured on it."""

    table: int
    category: str
    method: str  # the paper's name for it
    detector: str
    size_px: int  # the paper's, square
    backbone: str = "lite0"
    options: dict[str, Any] = field(default_factory=dict)
    labels: str = "none"  # none | threshold (normal_intersection) | half (of the test defects are learnt from)

    @property
    def training(self) -> str:
        """Name of what its reconstructor is trained on and for: cells that share it need one training."""
        options = "-".join(f"{name}-{value}" for name, value in sorted(self.options.items()))
        return f"{self.table}-{self.category}-{self.detector.partition('+')[0]}-{options}"

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a cell from the others in the CSV."""
        return str(self.table), self.category, self.method


def cells(backbones: Sequence[str]) -> list[Cell]:
    """Return all cells in the order of the tables; backbones: those whose weights are there, lite0 among them."""
    vgg16 = "vgg16" if "vgg16" in backbones else "lite0"
    xception = "xception" if "xception" in backbones else "lite0"
    tile = [
        Cell(1, "magnetic_tile", "GAN", "dcgan+anogan", 224, labels="threshold"),
        Cell(1, "magnetic_tile", "VAE", "vae+elbo", 224, labels="threshold"),
        Cell(1, "magnetic_tile", "Siamese + GAN", "dcgan+siamese", 224, vgg16, labels="threshold"),
        Cell(1, "magnetic_tile", "Siamese + VAE", "vae+siamese", 224, vgg16, labels="threshold"),
    ]
    if vgg16 == "vgg16":
        tile.append(Cell(1, "magnetic_tile", "VGG16", "vgg16", 224, vgg16, labels="threshold"))
    shares = [
        Cell(1, "magnetic_tile", f"{name}, share {share:g}", detector, 224, vgg16, {"defect_share": share}, "threshold")
        for name, detector in (("VGG16", "vgg16"), ("Siamese + VAE", "vae+siamese"))
        for share in SHARES
        if vgg16 == "vgg16"
    ]
    latent = [
        Cell(2, category, name, detector, 128, xception if detector in ("gmm", "ocsvm", "lof") else "lite0", options)
        for category in ("solar_mono", "wood")
        for name, detector, options in (
            ("GAN", "dcgan+latent_frechet", SEARCH),
            ("GMM", "dcgan+gmm", SEARCH),
            ("one-class SVM", "dcgan+ocsvm", SEARCH),
            ("LOF", "dcgan+lof", SEARCH),
            ("GMM, ImageNet", "gmm", {}),
            ("one-class SVM, ImageNet", "ocsvm", {}),
            ("LOF, ImageNet", "lof", {}),
        )
    ]
    hybrid = [
        Cell(3, category, name, detector, 256, options=options)
        for category in ("bottle", "ball_screw", "hazelnut_toy")
        for name, detector, options in (
            ("hybrid", "patch_ae+map_knn", {"downsize": 4, "neighbours": 5}),  # chosen on bottle's test images
            ("AE (L2)", "patch_ae+residual", {"norm": 2, "downsize": 4}),
            ("deep feature", "deep_knn", {}),
            ("NN", "nearest_image", {}),
            ("variation", "variation", {}),
        )
    ]
    compared = [
        Cell(4, category, name, detector, 128, "lite0", options, labels)
        for category in ("bottle", "wood")
        for name, detector, options, labels in (
            ("KD-CAE", "kde_ae+latent_kde", {}, "none"),
            ("NI-CAE without noise", "noise_ae+ssim", {"noise_share": 0.0}, "none"),
            ("NI-CAE with noise", "noise_ae+ssim", {}, "none"),
            ("CNN", "cnn", {}, "half"),
        )
    ]
    return [*tile, *shares, *latent, *hybrid, *compared]


def as_in_paper(dataset: Dataset, cell: Cell, seed: int) -> Dataset:
    """Return the images divided as the paper does it.

    threshold: good and defective images of all folders, four fifths of each type to learn from, the last fifth to test.
    half: every second image of each defect type is learnt from. none: as the folders are.
    """
    if cell.labels == "none":
        return dataset
    if cell.labels == "half":
        learn, test = _divided([item for item in dataset.test if item.label != GOOD], 0.5, seed)
        good = [item for item in dataset.test if item.label == GOOD]
        return replace(dataset, defects=tuple(learn), test=(*good, *test))
    every = [*(replace(item, mask=None) for item in dataset.good), *dataset.test]
    learn, test = _divided(every, 0.8, seed)
    good, defects = ([item for item in learn if (item.label == GOOD) is wanted] for wanted in (True, False))
    return replace(dataset, good=tuple(good), defects=tuple(defects), test=tuple(test))


def _divided(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Return (first share, rest) of every label, drawn at random."""
    generator = np.random.default_rng(seed)
    first, rest = [], []
    for label in sorted({item.label for item in items}):
        own = [item for item in items if item.label == label]
        order = generator.permutation(len(own))
        cut = round(share * len(own))
        first += [own[place] for place in sorted(order[:cut])]
        rest += [own[place] for place in sorted(order[cut:])]
    return first, rest
