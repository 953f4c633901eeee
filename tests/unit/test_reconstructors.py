"""The reconstructors: what they are made of, that they learn, stop, go on, and say what they cannot do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibration.errors import InputError
from trainer.catalogue import RECONSTRUCTORS, method
from trainer.errors import TrainingError
from trainer.learning import Material, Options
from trainer.reconstructors import gan_training, noise_ae
from trainer.reconstructors.dcgan import Dcgan
from trainer.reconstructors.gan_training import Adversaries
from trainer.reconstructors.kde_ae import KdeAutoencoder
from trainer.reconstructors.noise_ae import NoiseAutoencoder
from trainer.reconstructors.patch_ae import Layout, PatchAutoencoder
from trainer.training import Stage, batches, checkpoint_of, enough, falling, forget, train

SIDE = 32
OPTIONS = Options(epochs=2, latent=4, patch=16)
LEARN, VALIDATE = torch.arange(4, 20), torch.arange(4)


def silent(what: str, done: int, total: int) -> None:
    pass


def parts(count: int = 20, side: int = SIDE) -> Tensor:
    """Return (count, 1, side, side): a disc whose brightness varies."""
    generator = torch.Generator().manual_seed(0)
    line = torch.arange(side) - side / 2
    disc = ((line**2 + line[:, None] ** 2) < (side / 3) ** 2).float()
    bright = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    return (0.1 + bright * disc + 0.02 * torch.randn(count, 1, side, side, generator=generator)).clamp(0.0, 1.0)


def material(folder: Path, images: Tensor | None = None, *, resume: bool = False) -> Material:
    images = parts() if images is None else images
    return Material(images, torch.ones(images.shape[2:]), np.arange(len(images)) % 5, folder / "checkpoint", resume)


class Recorded(Options):
    """Options that know which of them were read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> object:
        Recorded.read.add(name)
        return super().__getattribute__(name)


def fitted(name: str, folder: Path, options: Options = OPTIONS, *, resume: bool = False) -> nn.Module:
    return RECONSTRUCTORS[name](material(folder, resume=resume), LEARN, VALIDATE, options, silent)


@pytest.mark.parametrize("name", RECONSTRUCTORS)
def test_every_reconstructor_returns_an_image_and_one_code(name: str, tmp_path: Path) -> None:
    network = fitted(name, tmp_path)
    with torch.inference_mode():
        reconstruction, latent = network(parts(2))
        alone = network(parts(2)[:1])
    assert reconstruction.shape == (2, 1, SIDE, SIDE)
    assert latent.ndim == 2
    torch.testing.assert_close(alone[0], reconstruction[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[1], latent[:1], rtol=1e-4, atol=1e-4)
    assert not any(weight.requires_grad for weight in network.parameters())


@pytest.mark.parametrize("name", RECONSTRUCTORS)
def test_a_checkpoint_knows_every_option_that_its_training_reads(name: str, tmp_path: Path) -> None:
    Recorded.read.clear()
    fitted(name, tmp_path, Recorded(epochs=1, latent=4, patch=16))
    stages = torch.load(tmp_path / "checkpoint", weights_only=True)
    known = {option for stage in stages.values() if isinstance(stage, dict) for option in stage["asked"]}
    of_the_search = {"inversion_steps", "inversion_rate", "inversion_loss", "masked_share"}
    assert Recorded.read - {"epochs", "patience", "device"} - of_the_search <= known


@pytest.mark.parametrize("name", RECONSTRUCTORS)
def test_a_training_that_was_cut_off_goes_on_to_the_same_network(name: str, tmp_path: Path) -> None:
    whole = fitted(name, tmp_path)
    for cut in (1, 3, 4) if name == "dcgan" else (1,):  # in the first stage, between the two, in the second
        interrupted(name, tmp_path, after=cut)
        again = fitted(name, tmp_path, resume=True)
        for (key, value), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
            torch.testing.assert_close(other, value, msg=f"{name} {cut} {key}")


def interrupted(name: str, folder: Path, *, after: int) -> None:
    (folder / "checkpoint").unlink(missing_ok=True)
    seen = []

    def stop(what: str, done: int, total: int) -> None:
        seen.append(what)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RECONSTRUCTORS[name](material(folder), LEARN, VALIDATE, OPTIONS, stop)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    fitted("vae", tmp_path)
    for name, options in (("kde_ae", OPTIONS), ("vae", replace(OPTIONS, latent=5))):
        with pytest.raises(TrainingError, match="of another training"):
            fitted(name, tmp_path, options, resume=True)
    with pytest.raises(TrainingError, match=r"of another training \(vae, not kde_ae\): ask for the same"):
        fitted("kde_ae", tmp_path, resume=True)
    (tmp_path / "checkpoint").write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="no checkpoint: start without --resume"):
        fitted("vae", tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("noise_ae", {"with --noise-share 0.1": {"noise_share": 1.0}}),
        ("vae", {"with --seed 0": {"seed": 1}, "with --samples 0": {"samples": 2}}),
        ("patch_ae", {"with --sparsity 0.001": {"sparsity": 1.0}, "with --downsize 2": {"downsize": 1}}),
        (
            "dcgan",
            {
                "with --flip": {"flip": False},
                "without --wasserstein": {"wasserstein": True},
                "with --feature-weight 0.1": {"feature_weight": 0.5},  # read by the second stage alone
            },
        ),
    ],
)
def test_a_checkpoint_of_other_options_is_refused_by_the_name_of_the_first(
    name: str, others: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    fitted(name, tmp_path, replace(OPTIONS, epochs=1))
    for said, changed in others.items():
        options = replace(OPTIONS, epochs=1, **changed)
        with pytest.raises(TrainingError, match=rf"of another training, {said}: ask for the same, or start without"):
            fitted(name, tmp_path, options, resume=True)


def test_a_training_goes_on_with_more_epochs_and_with_options_that_only_scores_depend_on(tmp_path: Path) -> None:
    fitted("kde_ae", tmp_path, replace(OPTIONS, epochs=1))
    more = fitted("kde_ae", tmp_path, replace(OPTIONS, patience=9, norm=2, neighbours=3), resume=True)
    whole = fitted("kde_ae", tmp_path)
    for value, other in zip(whole.state_dict().values(), more.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value)


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    fitted("vae", tmp_path, replace(OPTIONS, epochs=1))
    shown = material(tmp_path, resume=True)
    shown.keep[:8] = 0.0
    with pytest.raises(TrainingError, match="with another --ignore or --zones: ask for the same"):
        RECONSTRUCTORS["vae"](shown, LEARN, VALIDATE, OPTIONS, silent)


def test_a_checkpoint_knows_a_weights_file_by_its_contents(tmp_path: Path) -> None:
    network = nn.Linear(1, 1)
    stage = Stage("x", network, (), lambda epoch: None, lambda: 1.0, reads=("weights",))
    file = tmp_path / "weights.pth"
    file.write_bytes(b"one")
    train(stage, material(tmp_path), replace(OPTIONS, weights=file), silent)
    file.rename(tmp_path / "moved.pth")
    again = material(tmp_path, resume=True)
    train(stage, again, replace(OPTIONS, weights=tmp_path / "moved.pth"), silent)
    (tmp_path / "moved.pth").write_bytes(b"other")
    with pytest.raises(TrainingError, match="with another --weights: ask for the same"):
        train(stage, again, replace(OPTIONS, weights=tmp_path / "moved.pth"), silent)
    with pytest.raises(InputError, match=r"weights\.pth: No such file or directory: give a weights file"):
        train(stage, again, replace(OPTIONS, weights=file), silent)


@pytest.mark.parametrize(
    "error", [RuntimeError("unexpected pos 778304\nat c10"), OSError(28, "No space left on device")]
)
def test_a_checkpoint_that_cannot_be_written_says_so_and_leaves_no_half_of_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(values: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"checkpoint .*: cannot be written \([^\n]*\): free space there"):
        fitted("kde_ae", tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_a_checkpoint_of_a_killed_training_is_forgotten_with_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(values: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    shown = replace(material(tmp_path), checkpoint=checkpoint_of(tmp_path / "a.recipe"))
    with pytest.raises(KeyboardInterrupt):
        RECONSTRUCTORS["kde_ae"](shown, LEARN, VALIDATE, replace(OPTIONS, epochs=1), silent)
    assert len(list(tmp_path.iterdir())) == 1
    forget(shown.checkpoint)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["vae", "patch_ae", "kde_ae", "noise_ae"])
def test_learning_lowers_the_error_on_parts_that_were_not_learnt_from(name: str, tmp_path: Path) -> None:
    before, after = (fitted(name, tmp_path, replace(OPTIONS, epochs=epochs, noise_share=0.0)) for epochs in (1, 12))
    unseen = parts()[VALIDATE]
    with torch.inference_mode():
        errors = [float((network(unseen)[0] - unseen).square().mean()) for network in (before, after)]
    assert errors[1] < 0.9 * errors[0]


def losses(values: list[float], patience: int, folder: Path) -> tuple[list[int], float]:
    """Return the epochs that were trained and the weight that was kept, for given validation losses."""
    network, trained = nn.Linear(1, 1), []

    def train_epoch(epoch: int) -> None:
        trained.append(epoch)
        with torch.no_grad():
            network.weight.fill_(float(epoch))

    optimiser = torch.optim.Adam(network.parameters())
    remaining = iter(values)
    stage = Stage("x", network, (optimiser,), train_epoch, lambda: next(remaining), patience)
    train(stage, material(folder), replace(OPTIONS, epochs=len(values)), silent)
    return trained, float(network.weight)


def test_training_stops_when_it_gains_no_more_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    trained, kept = losses([5.0, 3.0, 4.0, 3.5, 3.0, 1.0], patience=3, folder=tmp_path)
    assert trained == [0, 1, 2, 3, 4]
    assert kept == 1.0


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 2.*nothing was exported"):
        losses([1.0, math.nan, 1.0], patience=5, folder=tmp_path)


def test_a_small_set_is_gone_through_again_and_no_batch_holds_one_image() -> None:
    sizes = [len(batch) for batch in batches(parts(17), torch.Generator().manual_seed(0), fewest=3)]
    assert sizes == [16, 16, 16]
    assert [len(batch) for batch in batches(parts(18), torch.Generator().manual_seed(0))] == [16, 2]


@pytest.mark.parametrize("images", [parts(1), torch.full((4, 1, SIDE, SIDE), math.nan)])
def test_too_few_images_and_images_without_numbers_are_refused(images: Tensor) -> None:
    with pytest.raises(TrainingError, match=r"need at least 2|NaN or infinity"):
        enough(images, "vae")


@pytest.mark.parametrize("name", RECONSTRUCTORS)
def test_no_reconstructor_learns_from_one_image_or_from_images_without_numbers(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"1 good image left .* need at least 2"):
        RECONSTRUCTORS[name](material(tmp_path), LEARN[:1], VALIDATE, OPTIONS, silent)
    broken = parts()
    broken[7, 0, 3, 3] = math.nan
    with pytest.raises(TrainingError, match="images that hold NaN"):
        RECONSTRUCTORS[name](material(tmp_path, broken), LEARN, VALIDATE, OPTIONS, silent)
    assert not (tmp_path / "checkpoint").exists()


def test_noise_falls_to_nothing_at_half_of_the_epochs() -> None:
    options = replace(OPTIONS, epochs=10)
    assert [round(falling(epoch, options), 3) for epoch in (0, 2, 5, 9)] == [1.0, 0.6, 0.0, 0.0]


def test_patches_put_together_again_are_the_image_and_lie_in_rows() -> None:
    layout = Layout(64, 128, replace(OPTIONS, downsize=2, patch=16))
    small = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    patches = layout.cut(small)
    assert patches.shape == (2 * 3 * 7, 3, 16, 16)
    torch.testing.assert_close(patches[9], small[0, :, 8:24, 16:32])  # second row, third column
    torch.testing.assert_close(patches[21 + 9], small[1, :, 8:24, 16:32])
    torch.testing.assert_close(layout.joined(patches, 2), small)
    torch.testing.assert_close(layout.condition(patches)[:21, 0], torch.arange(21) / 21)


def test_where_patches_overlap_the_image_is_their_average() -> None:
    layout = Layout(32, 48, replace(OPTIONS, downsize=1, patch=32))
    patches = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)])
    row = layout.joined(patches, 1)[0, 0, 5]
    assert row.tolist() == [0.0] * 16 + [0.5] * 16 + [1.0] * 16


@pytest.mark.parametrize("wrong", [{"patch": 20}, {"patch": 64}, {"patch": 8}, {"downsize": 3}, {"downsize": 0}])
def test_patches_that_do_not_fit_are_refused_before_training(wrong: dict[str, int]) -> None:
    with pytest.raises(TrainingError, match=r"patches of .* px of an image 64x64"):
        PatchAutoencoder(1, 64, 64, replace(OPTIONS, **wrong))


@torch.no_grad()
def test_a_patch_is_told_where_it_lies() -> None:
    torch.manual_seed(0)
    network = PatchAutoencoder(1, 64, 64, OPTIONS)
    codes = network.latents(torch.full((1, 1, 64, 64), 0.4))[0]
    assert float((codes[0] - codes[-1]).abs().max()) > 1e-3
    same = torch.ones(network.layout.count, OPTIONS.latent)
    pictures = network.decode(same)
    assert float((pictures[0] - pictures[-1]).abs().max()) > 1e-4


def test_the_autoencoders_have_the_codes_of_the_paper() -> None:
    assert KdeAutoencoder(1)(torch.zeros(1, 1, 128, 128))[1].shape == (1, 8192)
    network = NoiseAutoencoder(3, 64, 64)
    image = torch.rand(1, 3, 64, 64)
    reconstruction, code = network(image)
    assert code.shape == (1, 512)
    difference = (image - reconstruction).detach()
    torch.testing.assert_close(difference, difference.mean(1, keepdim=True).expand_as(difference))  # gray


def test_a_tenth_of_the_images_gets_noise_of_the_papers_variance() -> None:
    images = torch.full((40, 1, SIDE, SIDE), 0.5)
    noisy = noise_ae.with_noise(images, OPTIONS)
    changed = [index for index in range(40) if not torch.equal(noisy[index], images[index])]
    assert len(changed) == 4
    assert float(noisy[changed].var()) == pytest.approx(0.001, rel=0.1)


def test_several_starts_end_where_the_encoder_sees_the_image(tmp_path: Path) -> None:
    network = fitted("dcgan", tmp_path, replace(OPTIONS, inversion_steps=1))
    assert isinstance(network, Dcgan)
    with torch.inference_mode():
        wanted = network.encoder(2.0 * parts(1) - 1.0)
        start = wanted + network.around
        seen = network.encoder(2.0 * network.pictures(start) - 1.0)
        torch.testing.assert_close(network.latents(parts(1))[0], start + 0.5 * (wanted - seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", [{"wasserstein": True}, {"resize": True}, {"inversion_loss": "laplacian"}])
def test_the_dcgans_options_train_as_well(extra: dict[str, bool], tmp_path: Path) -> None:
    network = fitted("dcgan", tmp_path, replace(OPTIONS, epochs=1, **extra))
    assert isinstance(network, Dcgan)
    with torch.inference_mode():
        assert network.latents(parts(2)).shape == (2, 8, OPTIONS.latent)
        assert network.pictures(torch.zeros(1, OPTIONS.latent)).shape == (1, 1, SIDE, SIDE)
    layers = [
        type(layer).__name__ for layer in Adversaries(torch.Size((1, 32, 32)), replace(OPTIONS, **extra)).modules()
    ]
    assert ("ConvTranspose2d" in layers) != ("resize" in extra)


def test_the_discriminator_learns_from_smoothed_labels_and_the_generator_not() -> None:
    torch.manual_seed(0)
    options = replace(OPTIONS, latent=8)
    adversaries = Adversaries(torch.Size((1, 32, 32)), options)
    optimisers = tuple(torch.optim.Adam(adversaries.parameters(), lr=1e-3) for _ in range(2))
    game = gan_training._Game(adversaries, optimisers, parts(16), options)
    real, fake = parts(16), torch.rand(16, 1, 32, 32)
    for _ in range(40):
        game._judge_step(real, fake, 0.0, torch.Generator().manual_seed(0))
    believed = torch.sigmoid(adversaries.discriminate(real)).mean().detach()
    assert float(believed) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("loss", "variety", "said"),
    [(9.0, 0.1, "the discriminator wins"), (1.0, 1e-5, "one picture only"), (math.nan, 0.1, "loss became nan")],
)
def test_a_training_that_diverged_is_stopped(loss: float, variety: float, said: str) -> None:
    adversaries = Adversaries(torch.Size((1, 32, 32)), OPTIONS)
    optimiser = torch.optim.Adam(adversaries.parameters())
    game = gan_training._Game(adversaries, (optimiser, optimiser), parts(), OPTIONS)
    with pytest.raises(TrainingError, match=f"{said}.*nothing was exported"):
        for epoch in range(gan_training.PATIENCE):
            game._judged(epoch, gan_training.SETTLED + 1, loss, variety)


def test_a_game_that_is_lost_while_it_is_trained_gives_no_detector(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gan_training, "SETTLED", 0)
    monkeypatch.setattr(gan_training, "PATIENCE", 1)
    monkeypatch.setattr(gan_training, "LOST", 0.0)  # any loss is too much
    with pytest.raises(TrainingError, match=r"diverged in epoch 1: the discriminator wins.*nothing was exported"):
        method("dcgan+residual")(material(tmp_path), OPTIONS, silent)


def test_one_good_epoch_ends_the_count_of_bad_ones() -> None:
    adversaries = Adversaries(torch.Size((1, 32, 32)), OPTIONS)
    optimiser = torch.optim.Adam(adversaries.parameters())
    game = gan_training._Game(adversaries, (optimiser, optimiser), parts(), OPTIONS)
    for epoch in range(3 * gan_training.PATIENCE):
        game._judged(epoch, gan_training.SETTLED + 1, 9.0 if epoch % gan_training.PATIENCE else 1.0, 0.1)
    for epoch in range(3 * gan_training.PATIENCE):
        game._judged(epoch, gan_training.SETTLED, 9.0, 0.1)  # still at the beginning
