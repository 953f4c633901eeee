"""Every method by its name. To add one: one file, one line here.

A reconstructor is fit(material, learn, validate, options, progress) -> a network whose forward(image) returns
(reconstruction (N, C, h, w), latent (N, d)). A scorer is fit(network, material, learn, options, progress) -> a module
whose forward(image, reconstruction, latent) returns (anomaly_map (N, 1, h', w'), score (N,)). learn, validate: (n,)
indices of good images, to learn from and to decide when to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from trainer.detectors import (
    classic,
    cnn,
    deep_knn,
    nearest_image,
    patch_gaussian,
    patch_layout,
    patch_memory,
    student,
    variation,
    vgg16,
)
from trainer.errors import TrainingError
from trainer.learning import Learned, Material, Method, Options, Progress, held_out_judged, split
from trainer.reconstructors import dcgan, kde_ae, noise_ae, patch_ae, vae
from trainer.scorers import (
    anogan,
    elbo,
    laplacian,
    latent_frechet,
    latent_kde,
    map_knn,
    one_class,
    residual,
    siamese,
    ssim,
)
from trainer.search import pick_steps

RECONSTRUCTORS: dict[str, Callable[[Material, Tensor, Tensor, Options, Progress], nn.Module]] = {
    "vae": vae.fit,
    "dcgan": dcgan.fit,
    "patch_ae": patch_ae.fit,
    "kde_ae": kde_ae.fit,
    "noise_ae": noise_ae.fit,
}
SCORERS: dict[str, Callable[[nn.Module, Material, Tensor, Options, Progress], nn.Module]] = {
    "residual": residual.fit,
    "laplacian": laplacian.fit,
    "ssim": ssim.fit,
    "elbo": elbo.fit,
    "anogan": anogan.fit,
    "latent_kde": latent_kde.fit,
    "latent_frechet": latent_frechet.fit,
    "gmm": one_class.fit_gmm,
    "ocsvm": one_class.fit_ocsvm,
    "lof": one_class.fit_lof,
    "map_knn": map_knn.fit,
    "siamese": siamese.fit,
}
NEEDS: dict[str, tuple[tuple[str, ...], str]] = {  # scorers that do not go with every reconstructor: with which, why
    "elbo": (("vae",), "a likelihood and the distribution of z"),
    "anogan": (("dcgan",), "a discriminator"),
    "latent_frechet": (("dcgan", "patch_ae", "kde_ae"), "several codes for one image"),
}
DETECTORS: dict[str, Method] = {
    "patch_layout": patch_layout.fit,
    "patch_memory": patch_memory.fit,
    "patch_gaussian": patch_gaussian.fit,
    "student": student.fit,
    "deep_knn": deep_knn.fit,
    "variation": variation.fit,
    "nearest_image": nearest_image.fit,
    "gmm": classic.fit_gmm,
    "ocsvm": classic.fit_ocsvm,
    "lof": classic.fit_lof,
    "cnn": cnn.fit,
    "vgg16": vgg16.fit,
}
DEFAULT_SCORER = "residual"


def detector_names() -> list[str]:
    """Return every name that `method` understands."""
    return [
        *DETECTORS,
        *(
            f"{reconstructor}+{scorer}"
            for reconstructor in RECONSTRUCTORS
            for scorer in SCORERS
            if scorer not in NEEDS or reconstructor in NEEDS[scorer][0]
        ),
    ]


def searches(name: str) -> bool:
    """Return whether a detector searches a picture in steps, as many as a takt allows."""
    return name.partition("+")[0] == "dcgan"


def method(name: str) -> Method:
    """Return the training of a detector, or of reconstructor+scorer. Raises TrainingError with the names there are."""
    train = _trained_by(name)

    def fit(material: Material, options: Options, progress: Progress) -> Learned:
        if bool(material.keep.all()):
            return train(material, options, progress)
        blind = Ignoring(material.keep, material.batch.mean(0))
        defects = material.defects and replace(material.defects, batch=blind(material.defects.batch))
        learned = train(replace(material, batch=blind(material.batch), defects=defects), options, progress)
        return replace(learned, module=nn.Sequential(blind, learned.module).eval())

    return fit


class Ignoring(nn.Module):
    """image -> image with the ignored places as good parts show them on average.

    Zeroing the map is not enough: a feature sees far around its place, so what happens under the mask would still move
    the score beside it.
    """

    def __init__(self, keep: Tensor, usual: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)  # (h, w)
        self.register_buffer("usual", usual * (1.0 - keep))  # (C, h, w)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        return image * self.keep + self.usual


def _trained_by(name: str) -> Method:
    if name in DETECTORS:
        return DETECTORS[name]
    reconstructor, _, scorer = name.partition("+")
    scorer = scorer or DEFAULT_SCORER
    if reconstructor not in RECONSTRUCTORS or scorer not in SCORERS:
        raise TrainingError(f"detector {name!r}: unknown; there are {', '.join(detector_names())}")
    partners, why = NEEDS.get(scorer, ((reconstructor,), ""))
    if reconstructor not in partners:
        raise TrainingError(f"detector {name!r}: {scorer} needs {why}: use it with {' or '.join(partners)}")

    def fit(material: Material, options: Options, progress: Progress) -> Learned:
        return _fit_pair(reconstructor, scorer, material, options, progress)

    return fit


class Reconstruction(nn.Module):
    """A reconstructor and a scorer as one detector: image (N, C, h, w) -> anomaly_map (N, 1, h, w), score (N,)."""

    def __init__(self, reconstructor: nn.Module, scorer: nn.Module) -> None:
        super().__init__()
        self.reconstructor = reconstructor
        self.scorer = scorer

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        reconstruction, latent = self.reconstructor(image)
        anomaly_map, score = self.scorer(image, reconstruction, latent)
        return anomaly_map, score


def _fit_pair(reconstructor: str, scorer: str, material: Material, options: Options, progress: Progress) -> Learned:
    """Train on all folds but two: one decides when to stop, one is scored unseen for the thresholds."""
    learn, validate, held_out = split(material, "a reconstructor")
    network = RECONSTRUCTORS[reconstructor](material, learn, validate, options, progress)

    def detector() -> Reconstruction:
        return Reconstruction(network, SCORERS[scorer](network, material, learn, options, progress)).eval()

    module, decided = detector(), ()
    if material.engine_ms is not None and searches(reconstructor):
        decided = (pick_steps(network, module, material.batch[validate], material.engine_ms, progress),)
        module = detector()  # what it learns of codes and pictures depends on the steps
    learnt = getattr(module.scorer, "learnt_defects", "")
    learned = held_out_judged(module, material.batch, held_out, progress, size=1, learnt_defects=learnt)
    return replace(learned, decided=decided)
