"""cnn, vgg16 and the Siamese scorer: what is cached is what runs, maps add up to logits, the recipe names defects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.backbones import lite0
from trainer.catalogue import method
from trainer.classifier import UNDECIDED, Examples, _batches, evidence
from trainer.detectors.cnn import Cnn, _shares
from trainer.detectors.vgg16 import Activation, cached_features
from trainer.labels import defect_folds
from trainer.learning import Defects, Material, Options
from trainer.scorers.siamese import Siamese, pair_features
from trainer.trunks import trunk, usual_channels

SIDE = 64


def silent(what: str, done: int, total: int) -> None:
    pass


def images(n: int, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def material(folder: Path, labels: tuple[str, ...] = ()) -> Material:
    parts = tuple(map(str, range(len(labels))))
    fold = defect_folds(labels, parts, 5, 0)
    defects = Defects(images(len(labels), seed=9), labels, parts, fold) if labels else None
    return Material(images(15), torch.ones(SIDE, SIDE), np.arange(15) % 5, folder / "checkpoint", defects=defects)


class Darker(nn.Module):
    """A reconstructor that answers with a darker picture."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return 0.8 * image, image.flatten(1)[:, :3]


def test_a_trunk_is_the_backbone_cut_in_two():
    body = trunk("lite0", Options())
    whole = lite0((4,))
    with torch.inference_mode():
        torch.testing.assert_close(body(images(2, 3)), whole(images(2, 3))[0])
    assert body.channels == 112
    assert all(parameter.requires_grad for parameter in body.last.parameters())
    assert not any(parameter.requires_grad for parameter in body.frozen.parameters())


def test_training_leaves_the_published_moments_of_batch_normalisation_alone():
    body = trunk("lite0", Options()).train()
    before = {name: value.clone() for name, value in body.named_buffers()}
    body(images(4))
    assert all(torch.equal(value, before[name]) for name, value in body.named_buffers())


def test_what_the_siamese_network_learns_from_is_what_it_sees_beside_the_line():
    body = trunk("lite0", Options())
    cached = pair_features(Darker(), body, images(3), silent)
    keep = torch.ones(1, 1, 4, 4)
    keep[..., :2] = 0.0
    network = Siamese(body, usual_channels(body, cached[:, 0]), keep, "labels").eval()
    with torch.inference_mode():
        anomaly_map, score = network(images(3), *Darker()(images(3)))
        torch.testing.assert_close(score, evidence(network.logit(cached)))
        weighed = network.embedded(images(3), 0.8 * images(3)) @ network.weigh.weight.flatten() + network.weigh.bias
        torch.testing.assert_close(evidence(weighed), score, rtol=1e-4, atol=1e-4)
    assert not anomaly_map[..., :2].any()


def test_the_activation_map_averages_to_the_logit():
    body = trunk("lite0", Options())
    cached = cached_features(body.frozen, images(2), silent)
    network = Activation(body, usual_channels(body, cached), torch.ones(1, 1, 4, 4)).eval()
    with torch.inference_mode():
        anomaly_map, score = network(images(2))
        weighed = network.embedded(images(2)) @ network.weigh.weight.flatten() + network.weigh.bias
        torch.testing.assert_close(evidence(weighed), score, rtol=1e-4, atol=1e-4)
        local = torch.log(torch.expm1(anomaly_map.double())) - UNDECIDED  # the inverse of `evidence`
        torch.testing.assert_close(evidence(local.mean(dim=(1, 2, 3))).float(), score, rtol=1e-4, atol=1e-4)


def test_the_maps_of_the_cnn_are_gradient_times_features():
    torch.manual_seed(0)
    network = Cnn(1, torch.ones(SIDE, SIDE))
    x = images(2)
    for layer in network.layers[:-1]:
        x = F.max_pool2d(F.relu(layer(x)), 2)
    last = F.relu(network.layers[-1](x)).detach().requires_grad_(True)
    network.out(F.relu(network.hidden(F.max_pool2d(last, 2).flatten(1)))).sum().backward()
    expected = (last.grad * last).sum(1, keepdim=True).detach()
    with torch.inference_mode():
        found, _, gradient = network._passed(images(2))
        torch.testing.assert_close(_shares(found, gradient), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("share", "rare"), [(0.5, 8), (0.25, 4), (0.01, 1)])
def test_every_batch_holds_the_wanted_share_of_defects_however_rare_they_are(share: float, rare: int):
    good, defective = torch.arange(100.0), -1.0 - torch.arange(3.0)
    drawn = _batches(Examples(good, defective), share, torch.Generator().manual_seed(0))
    assert {(len(a), len(b)) for a, b in drawn} == {(16 - rare, rare)}
    seen = torch.cat([a for a, _ in drawn])
    assert len(seen[:100].unique()) == 100  # all good images before any comes again
    assert set(torch.cat([b for _, b in drawn]).tolist()) == {-1.0, -2.0, -3.0}


def test_a_score_says_twenty_where_both_are_equally_likely():
    assert float(evidence(torch.tensor(0.0))) == pytest.approx(20.0, abs=1e-6)
    assert float(evidence(torch.tensor(-1e3))) == 0.0


@pytest.mark.parametrize(("labels", "learnt"), [((), "synthetic"), (("dent",) * 4, "labels")])
def test_the_training_says_which_defects_were_learnt_from(tmp_path: Path, labels: tuple[str, ...], learnt: str):
    found = method("vae+siamese")(material(tmp_path, labels), Options(epochs=1, latent=4), silent)
    assert found.learnt_defects == learnt
    assert not (tmp_path / "checkpoint.siamese").exists()
    assert method("variation")(material(tmp_path, labels), Options(), silent).learnt_defects == ""


def test_an_interrupted_training_goes_on(tmp_path: Path):
    class Interrupt(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("cnn") and done == 1:
            raise Interrupt

    options, shown = Options(epochs=3), material(tmp_path, ("dent",) * 6)
    whole = method("cnn")(shown, options, silent)
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(Interrupt):
        method("cnn")(shown, options, stop)
    again = method("cnn")(replace(shown, resume=True), options, silent)
    np.testing.assert_allclose(again.good_scores, whole.good_scores, rtol=1e-5)


def test_what_lies_under_the_ignore_mask_of_labelled_defects_teaches_nothing(tmp_path: Path):
    shown = material(tmp_path, ("dent",) * 4)
    keep = torch.ones(SIDE, SIDE)
    keep[:, :32] = 0.0
    changed = shown.defects.batch.clone()
    changed[..., :32] = 0.0
    scores = [
        method("cnn")(
            replace(shown, keep=keep, defects=replace(shown.defects, batch=batch)), Options(epochs=1), silent
        ).good_scores
        for batch in (shown.defects.batch, changed)
    ]
    np.testing.assert_array_equal(*scores)
