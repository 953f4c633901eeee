"""Learning to tell good from defective, shared by cnn, vgg16 and the Siamese scorer.

A logit l is shown as softplus(l + 20): 20 where both are equally likely (probability 0.5), nearly l + 20 above 2, and
never below 0. So scores of sure cases do not pile up at 0 and 1, as probabilities do, and thresholds keep their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.labels import labelled
from trainer.learning import Material, Options, Progress
from trainer.training import Stage, enough, seeded, train

UNDECIDED = 20.0  # score where good and defective are equally likely
BATCH = 16
LEAST_BATCHES = 20  # in an epoch: a few images are drawn again and again
PATIENCE = 10


class Classifier(Protocol):
    """A network that gives a logit, above 0 where a part is rather defective."""

    def logit(self, cached: Tensor) -> Tensor:
        """(N, ..) what is learnt from -> (N,)."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What is learnt from or validated on: images, or what a frozen trunk makes of them."""

    good: Tensor  # (n, ..)
    defective: Tensor  # (m, ..)


def evidence(logit: Tensor) -> Tensor:
    """Return the score of a logit."""
    return F.softplus(logit + UNDECIDED)


def labelled_split(material: Material, method: str) -> tuple[Tensor, Tensor]:
    """Return the labelled defects to learn from and to validate on, (m, C, h, w) each; those of fold 1 are left out."""
    defects = labelled(material, method)
    enough(material.batch, method)
    return defects.batch[defects.fold >= 2], defects.batch[defects.fold == 0]


def train_classifier(
    stage_name: str,
    network: nn.Module,
    examples: tuple[Examples, Examples],
    optimiser: torch.optim.Optimizer,
    rest: tuple[Material, Options, Progress],
    *,
    reads: tuple[str, ...] = (),
) -> None:
    """Train until the validation loss gains no more; leaves the best network, frozen.

    examples: to learn from and to validate on. Batches hold options.defect_share of defective images, drawn again where
    they are rare (over-sampling), and as many good ones as are then left (under-sampling), as in paper 000, sec. 4.2.
    reads: options that make another network, beside the seed and that share.
    Raises TrainingError if there is nothing to learn from or the loss is not finite.
    """
    material, options, progress = rest
    learn, validate = (Examples(*(part.to(options.device) for part in (one.good, one.defective))) for one in examples)
    network.to(options.device)  # in place: the optimiser's parameters go with it
    if len(learn.good) == 0 or len(learn.defective) == 0:
        raise TrainingError(
            f"{stage_name}: {len(learn.good)} good and {len(learn.defective)} defective images to learn from, need "
            "some of both: add images"
        )
    if not 0.0 < options.defect_share <= 0.5:
        raise TrainingError(f"defect share {options.defect_share:g} found, need above 0 and at most 0.5")

    def train_epoch(epoch: int) -> None:
        generator = seeded(options, epoch)
        for good, defective in _batches(learn, options.defect_share, generator):
            loss = _loss(network, good, defective)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def validation_loss() -> float:
        network.eval()
        with torch.no_grad():
            return float(_balanced_loss(network, validate if len(validate.defective) else learn))

    reads = ("defect_share", *reads)
    stage = Stage(stage_name, network, (optimiser,), train_epoch, validation_loss, PATIENCE, reads=reads)
    train(stage, material, options, progress)


def _batches(examples: Examples, share: float, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    total = len(examples.good) + len(examples.defective)
    rare = max(1, round(share * BATCH))
    count = max(LEAST_BATCHES, math.ceil(total / BATCH))
    good = _drawn(len(examples.good), count * (BATCH - rare), generator).split(BATCH - rare)
    defective = _drawn(len(examples.defective), count * rare, generator).split(rare)
    return [(examples.good[a], examples.defective[b]) for a, b in zip(good, defective, strict=True)]


def _drawn(n: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Return indices 0..n-1 in random order, all before any is drawn again."""
    rounds = [torch.randperm(n, generator=generator) for _ in range(math.ceil(wanted / n))]
    return torch.cat(rounds)[:wanted]


def _loss(network: nn.Module, good: Tensor, defective: Tensor) -> Tensor:
    logits = network.logit(torch.cat([good, defective]))
    truth = torch.cat([torch.zeros(len(good)), torch.ones(len(defective))])
    return F.binary_cross_entropy_with_logits(logits, truth.to(logits.device))


def _balanced_loss(network: nn.Module, examples: Examples) -> Tensor:
    """Return the mean of both classes' losses, in chunks."""
    losses = []
    for images, truth in ((examples.good, 0.0), (examples.defective, 1.0)):
        parts = [network.logit(part) for part in images.split(BATCH)]
        logits = torch.cat(parts)
        losses.append(F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth)))
    return (losses[0] + losses[1]) / 2
