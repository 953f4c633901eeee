"""The loop that every network is trained in: a checkpoint after each epoch, resumed, stopped when it gains no more."""

from __future__ import annotations

import glob
import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration.errors import InputError
from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress

BATCH = 16
PATIENCE = 20
LEARNING_RATE = 1e-3
IMAGES = "images"  # in the checkpoint, beside the stages: what is learnt from
DIGESTS = {"weights": "--weights", "mask": "--ignore or --zones"}  # what a checkpoint knows by its digest


@dataclass(frozen=True, slots=True)
class Stage:
    """One training, or one of several that follow each other."""

    name: str  # in the checkpoint, and what the user sees
    network: nn.Module
    optimisers: tuple[torch.optim.Optimizer, ...]
    train_epoch: Callable[[int], None]  # called with 0, 1, ..; may raise TrainingError
    loss: Callable[[], float] | None  # on images that are not learnt from; None: the last epoch is the best
    patience: int = PATIENCE
    after: tuple[str, ...] = ()  # stages before this one, which stay in the checkpoint
    reads: tuple[str, ...] = ()  # options that make another network, beside the seed


@dataclass(slots=True)
class _State:
    """Where a training stands, so that it can stop early or go on after a crash."""

    epoch: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0


def train(stage: Stage, material: Material, options: Options, progress: Progress) -> None:
    """Leave stage.network as it was in the epoch with the least loss, without gradients, on the CPU.

    Leaves a checkpoint after every epoch and goes on from it when material.resume is set.
    Raises TrainingError if the loss is not finite, or if the checkpoint is of another training, with other options or
    of other images; InputError if it cannot be written.
    """
    state, best, others = _State(), _copied(stage.network), _others(stage, material)
    others[IMAGES] = _fingerprint(material)
    asked = _asked(stage, material, options)
    if material.resume:
        best = _resumed(stage, material, state, asked) or best
    patience = options.patience or stage.patience
    while state.epoch < options.epochs and (stage.loss is None or state.epoch - state.best_epoch < patience):
        stage.network.train()
        stage.train_epoch(state.epoch)
        state.epoch += 1
        if stage.loss is not None:
            best = _judged(stage, stage.loss, state, best)
        _save(material.checkpoint, {**others, stage.name: {"asked": asked, **_standing(stage, state, best)}})
        progress(_told(stage, state), state.epoch, options.epochs)
    progress(_told(stage, state), options.epochs, options.epochs)
    if stage.loss is not None:
        stage.network.load_state_dict(best)
    stage.network.cpu().eval().requires_grad_(False)


def checkpoint_of(recipe: Path) -> Path:
    """Return where a training for this recipe leaves its state."""
    return recipe.with_name(f"{recipe.name}.checkpoint")


def forget(checkpoint: Path) -> None:
    """Delete a checkpoint and those whose names go on where its own ends."""
    for file in checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}*"):
        file.unlink()


def digest_of(weights: Path | None) -> str | None:
    """Return the sha256 of a weights file, None without one. Raises InputError if it cannot be read."""
    if weights is None:
        return None
    try:
        with weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{weights}: {error.strerror}: give a weights file that can be read") from error


def learnt(
    name: str,
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    images: tuple[Tensor, Tensor],
    options: Options,
    *,
    patience: int = PATIENCE,
    reads: tuple[str, ...] = (),
) -> Stage:
    """Return the stage of a network whose mean loss(batch) Adam lowers. images: to learn from, to decide with."""
    learn, unseen = images
    enough(learn, name)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def train_epoch(epoch: int) -> None:
        for batch in batches(learn, seeded(options, epoch)):
            value = loss(batch)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()

    return Stage(
        name=name,
        network=network,
        optimisers=(optimiser,),
        train_epoch=train_epoch,
        loss=lambda: mean_loss(loss, network, unseen),
        patience=patience,
        reads=reads,
    )


def seeded(options: Options, epoch: int) -> torch.Generator:
    """Return an epoch's own source of chance; networks that draw by themselves get the same from torch."""
    torch.manual_seed(options.seed * 100_003 + epoch)
    return torch.Generator().manual_seed(options.seed * 100_003 + epoch)


def batches(images: Tensor, generator: torch.Generator, fewest: int = 1) -> Iterator[Tensor]:
    """Yield images (n, ..) in random order, 16 at a time; a last one alone is left for the next epoch.

    fewest: the images are gone through again until there are that many batches.
    """
    count = 0
    while count < fewest:
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(chosen) > 1:  # batch normalisation needs two
                count += 1
                yield images[chosen.to(images.device)]


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal noise of a tensor's shape, the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def falling(epoch: int, options: Options) -> float:
    """Return 1 at the first epoch, falling to 0 at half of all epochs and staying there."""
    return max(0.0, 1.0 - 2.0 * epoch / options.epochs)


def mean_loss(loss: Callable[[Tensor], Tensor], network: nn.Module, images: Tensor) -> float:
    """Return the mean of loss(batch) over the images, the network as it will run, the same chance every time."""
    network.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return sum(float(loss(part)) * len(part) for part in images.split(BATCH)) / len(images)


def enough(images: Tensor, what: str) -> None:
    """Raise TrainingError if there are too few images for one batch, or if one of them holds no number."""
    if len(images) < 2:
        raise TrainingError(
            f"{len(images)} good image left for the {what} to learn from, need at least 2, better 50: capture more"
        )
    if not bool(torch.isfinite(images).all()):
        raise TrainingError(f"the {what} was given images that hold NaN or infinity: see which with --registration off")


def _judged(stage: Stage, measure: Callable[[], float], state: _State, best: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = measure()
    if not math.isfinite(loss):
        raise TrainingError(
            f"{stage.name}: the loss became {loss} in epoch {state.epoch}: check the images, nothing was exported"
        )
    if loss >= state.best_loss:
        return best
    state.best_loss, state.best_epoch = loss, state.epoch
    return _copied(stage.network)


def _told(stage: Stage, state: _State) -> str:
    return stage.name if stage.loss is None else f"{stage.name}, loss {state.best_loss:.4g}"


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _standing(stage: Stage, state: _State, best: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "network": stage.network.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in stage.optimisers],
        "best": best if stage.loss is not None else {},
        "state": (state.epoch, state.best_loss, state.best_epoch),
    }


def _save(checkpoint: Path, values: dict[str, Any]) -> None:
    """Write the checkpoint in one step, so that an interrupt leaves the last whole one."""
    temporary = checkpoint.with_name(f"{checkpoint.name}.tmp")
    try:
        torch.save(values, temporary)
        temporary.replace(checkpoint)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = (error.strerror if isinstance(error, OSError) else None) or str(error).partition("\n")[0]
        raise InputError(
            f"checkpoint {checkpoint}: cannot be written ({why}): free space there, or give the recipe another folder"
        ) from error


def _fingerprint(material: Material) -> str:
    """Return what tells these images, and which of them are learnt from, from others."""
    digest = hashlib.sha256()
    for part in (material, material.defects):
        if part is not None:
            digest.update(part.fold.tobytes())
            digest.update(np.ascontiguousarray(part.batch.numpy()))
    if material.defects is not None:
        digest.update(repr(material.defects.labels).encode())
    return digest.hexdigest()


def _stored(material: Material) -> dict[str, Any]:
    if not material.checkpoint.is_file():
        return {}
    if not zipfile.is_zipfile(material.checkpoint):
        raise TrainingError(f"{material.checkpoint}: no checkpoint: start without --resume")
    try:
        stored: dict[str, Any] = torch.load(material.checkpoint, weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(f"{material.checkpoint}: unreadable ({error}): start without --resume") from error
    return stored


def _others(stage: Stage, material: Material) -> dict[str, Any]:
    """Return what the stages before this one left."""
    if not stage.after:
        return {}
    stored = _stored(material)
    return {name: stored[name] for name in stage.after if name in stored}


def _asked(stage: Stage, material: Material, options: Options) -> dict[str, Any]:
    """Return what else the stage's network depends on; epochs, patience and device may change on the way."""
    asked = {name: getattr(options, name) for name in ("seed", *stage.reads)}
    if "weights" in asked:
        asked["weights"] = digest_of(options.weights)
    return {**asked, "mask": hashlib.sha256(material.keep.numpy().tobytes()).hexdigest()}


def _flag(name: str, value: Any) -> str:
    """Return how a user says that."""
    flag = DIGESTS.get(name) or f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"without {flag}"
    if name in DIGESTS:
        return f"with another {flag}"
    return f"with {flag}" if value is True else f"with {flag} {value}"


def _check(stage: Stage, material: Material, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise TrainingError unless the checkpoint is of the training that is asked for, on the same images."""
    instead = "ask for the same, or start without --resume"
    if stage.name not in stored:
        found = ", ".join(name for name in stored if name != IMAGES)
        raise TrainingError(f"{material.checkpoint}: of another training ({found}, not {stage.name}): {instead}")
    before = stored[stage.name]["asked"]
    for name, value in asked.items():
        if before[name] != value:
            raise TrainingError(f"{material.checkpoint}: of another training, {_flag(name, before[name])}: {instead}")
    if stored.get(IMAGES) != _fingerprint(material):
        raise TrainingError(f"{material.checkpoint}: learnt from other images: start without --resume")


def _resumed(stage: Stage, material: Material, state: _State, asked: dict[str, Any]) -> dict[str, Tensor] | None:
    """Bring everything to where the checkpoint stands and return the best weights so far; None without a checkpoint."""
    stored = _stored(material)
    if not stored or (stage.after and stage.name not in stored):
        return None
    try:
        _check(stage, material, stored, asked)
        own = stored[stage.name]
        stage.network.load_state_dict(own["network"])
        for optimiser, values in zip(stage.optimisers, own["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        state.epoch, state.best_loss, state.best_epoch = own["state"]
        best: dict[str, Tensor] = own["best"]
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(f"{material.checkpoint}: of another training ({error}): start without --resume") from error
    return best
