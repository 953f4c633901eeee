"""student: what it learns, where it sees a defect, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_detectors import OPTIONS, material_of, silent, textured_parts

from trainer.detectors import student
from trainer.errors import TrainingError


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return student.fit(
        material_of(textured_parts(20, 1), tmp_path_factory.mktemp("student")), replace(OPTIONS, epochs=15), silent
    )


def test_a_defect_scores_above_every_good_part_and_is_found_where_it_is(learned):
    parts = torch.from_numpy(textured_parts(6, 1, seed=9))
    damaged = parts.clone()
    damaged[:, :, 36:44, 20:28] = 0.0
    with torch.no_grad():
        _, good = learned.module(parts)
        maps, bad = learned.module(damaged)
    assert bad.min() > good.max() and bad.min() > learned.good_scores.max()
    rows, columns = np.unravel_index(maps[:, 0].flatten(1).argmax(1).numpy(), (8, 8))
    assert np.all(np.abs(rows - 5) <= 1) and np.all(np.abs(columns - 3) <= 1)  # 8 px a cell


def test_thresholds_rest_on_one_fold_that_was_neither_learnt_from_nor_decided_with(learned):
    assert learned.held_out.tolist() == [1, 6, 11, 16]
    assert learned.good_scores.shape == learned.good_peaks.shape == (4,)


def test_training_brings_the_student_nearer_to_the_teacher():
    torch.manual_seed(0)
    pair = student.Pair(4, 6, 8, 8)
    shallow, deep = torch.rand(8, 4, 16, 16), torch.rand(8, 6, 8, 8)
    optimiser = torch.optim.Adam(pair.parameters(), 1e-2)
    before = pair.loss(shallow, deep).item()
    for _ in range(30):
        optimiser.zero_grad()
        pair.loss(shallow, deep).backward()
        optimiser.step()
    assert pair.loss(shallow, deep).item() < 0.7 * before


def test_the_autoencoder_is_taught_by_the_teacher_alone():
    pair = student.Pair(4, 6, 8, 8)
    shallow, deep = torch.rand(2, 4, 16, 16), torch.rand(2, 6, 8, 8)
    told = pair.student(shallow)[:, 6:]
    torch.nn.functional.mse_loss(told, pair.autoencoder(deep).detach()).backward()
    assert all(parameter.grad is None for parameter in pair.autoencoder.parameters())
    pair.zero_grad()
    pair.loss(shallow, deep).backward()
    own = [parameter.grad.clone() for parameter in pair.autoencoder.parameters()]
    pair.zero_grad()
    torch.nn.functional.mse_loss(pair.autoencoder(deep), deep).backward()
    for one, other in zip(own, pair.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_it_is_trained_on_the_device_that_was_asked_for(tmp_path, monkeypatch):
    """Torch's device without numbers stands for a GPU; what comes after the first batch would need the numbers."""

    class Reached(Exception):
        pass

    def learnt(name, network, loss, images, options, *, patience, reads):
        where = {parameter.device.type for parameter in network.parameters()}
        raise Reached(*where, loss(torch.tensor([0, 1])).device.type)

    monkeypatch.setattr(student, "learnt", learnt)
    with pytest.raises(Reached) as caught:
        student.fit(material_of(textured_parts(10, 1), tmp_path), replace(OPTIONS, device="meta"), silent)
    assert caught.value.args == ("meta", "meta")


def test_two_parts_are_too_few(tmp_path):
    material = replace(material_of(textured_parts(2, 1), tmp_path), fold=np.array([0, 1]))
    with pytest.raises(TrainingError, match="2 good images found: the student needs 3 folds"):
        student.fit(material, OPTIONS, silent)
