"""Pictures from a recipe's own graph, and the check that tells copies and garbage from new parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.errors import InputError, NotRegistered
from calibration.images import encode_png, read_image
from calibration.preprocess import View
from trainer import generate, generate_session
from trainer.catalogue import Ignoring, Reconstruction
from trainer.data import read_dataset
from trainer.export import export_graph
from trainer.generate import check_new, checked, distances, generated, neighbourhood, write_pictures
from trainer.learning import Options
from trainer.prepared import prepared_item
from trainer.reconstructors.dcgan import Dcgan
from trainer.reconstructors.gan_training import Adversaries, down
from trainer.scorers.residual import Residual
from trainer.tiling import Tiled, Tiles, Units

SIZE = torch.Size((3, 32, 32))
CHANCE = np.random.default_rng(0)
SEEN = View(32, 32, colour=True, reference_size=(32, 32))
VIEW = View(8, 8, colour=False, reference_size=(8, 8), bit_depth=12)


@dataclass(frozen=True)
class Part:
    """What `generated` reads of a recipe."""

    graph: bytes
    detector: str = "dcgan+residual"
    product: str = "flange"
    view: View = SEEN


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("resize", [False, True])
def test_the_pictures_are_the_generators(resize: bool) -> None:
    torch.manual_seed(0)
    options = Options(latent=4, inversion_steps=1, resize=resize)
    encoder = down(SIZE, 4, normalise=True)
    network = Dcgan(Adversaries(SIZE, options).eval(), encoder, SIZE, options).eval().requires_grad_(False)
    keep = torch.ones(32, 32)
    keep[:8] = 0.0
    detector = Reconstruction(network, Residual(keep))
    module = nn.Sequential(Ignoring(keep, torch.full(SIZE, 0.5)), detector).eval()
    part = Part(export_graph(module, np.zeros((1, *SIZE), np.float32)))
    pictures = generated(part, 3, seed=7, progress=silent)
    chance = np.random.default_rng(7)
    for picture in pictures:
        z = torch.from_numpy(chance.standard_normal((1, 4)).astype(np.float32))
        np.testing.assert_allclose(picture, network.pictures(z)[0].numpy(), atol=1e-5)


def test_a_generator_of_single_tiles_is_refused() -> None:
    options = Options(latent=4, inversion_steps=1)
    size = torch.Size((3, 64, 64))
    encoder = down(size, 4, normalise=True)
    network = Dcgan(Adversaries(size, options).eval(), encoder, size, options).eval().requires_grad_(False)
    tiles = Tiles(2, 1, 64, 64)
    detector = Reconstruction(network, Residual(torch.ones(64, 64))).eval()
    one, places = torch.ones(1), (torch.zeros(1, 1, 64, 96), torch.ones(1, 1, 64, 96))
    units = Units((torch.zeros(2, 1), torch.ones(2, 1)), torch.tensor([0.0, 1.0, 0.0, 1.0]), (one, one))
    module = Tiled(detector, tiles, places, units, torch.ones(1, 1, 64, 96)).eval()
    graph = export_graph(module, np.zeros((1, 3, 64, 96), np.float32))
    part = Part(graph, view=View(64, 96, colour=True, reference_size=(64, 96)))
    with pytest.raises(InputError, match=r"flange: the generator draws 64x64 px, the recipe sees parts in 96x64: .*"):
        generated(part, 3, seed=7, progress=silent)


def test_a_recipe_without_a_generator_is_refused() -> None:
    with pytest.raises(InputError, match="of vae holds no generator"):
        generated(Part(b"", "vae"), 3, seed=0, progress=silent)


def good_images() -> np.ndarray:
    return (0.5 + 0.1 * CHANCE.standard_normal((20, 1, 8, 8))).astype(np.float32)


def test_copies_and_strangers_are_counted() -> None:
    good = good_images()
    pictures = np.concatenate([good[:3] + 1e-4, good_images()[:4], np.ones((2, 1, 8, 8), np.float32)])
    found = checked(pictures, good)
    assert (found.copies, found.strangers) == (3, 2)
    assert "3 copies, 2 unlike any good part" in str(found)


def test_distances_are_root_mean_squares() -> None:
    one, other = good_images()[:4], good_images()[:5]
    expected = np.sqrt(((one[:, None] - other[None]) ** 2).mean((2, 3, 4)))
    np.testing.assert_allclose(distances(one, other), expected, rtol=1e-5)


def test_too_few_good_images_to_compare_with_are_refused() -> None:
    with pytest.raises(InputError, match="need at least 3"):
        checked(good_images(), good_images()[:2])


@dataclass(frozen=True)
class Trained:
    """What `generate` reads of a recipe beside its graph."""

    product: str = "flange"
    reference: None = None
    view: View = VIEW


def good_folder(folder: Path, count: int = 20) -> Path:
    """Write pictures of a 12-bit camera."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(1000, 2000, (8, 8), np.uint16)
        (folder / f"{number}.png").write_bytes(encode_png(pixels))
    return folder


def refusing(*names: str):
    def prepare(item, pictures, view, reference):
        if item.name in names:
            raise NotRegistered("the field is blank", cause="blank")
        return prepared_item(item, pictures, view, reference)

    return prepare


def test_the_good_images_are_read_in_the_depth_of_the_recipe_and_two_blank_ones_are_told(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    seen = []
    monkeypatch.setattr(generate_session, "read_recipe", lambda path: Trained())
    monkeypatch.setattr(generate_session, "generated", lambda recipe, count, seed, progress: good_images()[:count])
    monkeypatch.setattr(generate_session, "prepared_item", refusing("3.png", "7.png"))
    monkeypatch.setattr(generate_session, "checked", lambda made, good: seen.append(good) or "compared")
    data = good_folder(tmp_path / "good")
    generate_session.generate(tmp_path / "part.recipe", data, tmp_path / "made", count=4, seed=0)
    assert seen[0].shape == (18, 1, 8, 8)
    assert 1000 / 4095 - 1e-6 <= seen[0].min() < seen[0].max() <= 2000 / 4095
    told = capsys.readouterr().out
    assert "2 of 20 good images cannot be registered and are left out: 3.png (the field is blank)" in told


def test_images_that_are_of_another_product_are_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    dataset = read_dataset(good_folder(tmp_path / "good"), bit_depth=12)
    monkeypatch.setattr(generate_session, "prepared_item", refusing("3.png", "7.png", "9.png"))
    with pytest.raises(
        InputError, match=r"3 of 20 good images cannot be registered, first 3\.png \(the field is blank"
    ):
        generate_session.prepared_good(Trained(), dataset, silent)
    (tmp_path / "good" / "5.png").write_bytes(encode_png(np.full((9, 8), 1000, np.uint16)))
    with pytest.raises(InputError, match=r"good/5\.png: the frame is 8x9 px, the recipe was trained on 8x8"):
        generate_session.prepared_good(Trained(), dataset, silent)


def test_the_neighbourhood_shows_good_images_in_blue_and_pictures_in_red() -> None:
    canvas = neighbourhood(good_images()[:6], good_images()[:6], seed=0).astype(int)
    bluish, reddish = canvas[..., 0] - canvas[..., 2], canvas[..., 2] - canvas[..., 0]
    assert (bluish > 80).sum() > 20
    assert (reddish > 80).sum() > 20


def test_pictures_are_written_as_images_and_nothing_is_overwritten(tmp_path: Path) -> None:
    pictures = CHANCE.random((2, 3, 8, 8)).astype(np.float32)
    paths = write_pictures(tmp_path / "new", pictures)
    np.testing.assert_allclose(read_image(paths[1]) / 255.0, pictures[1].transpose(1, 2, 0), atol=0.5 / 255 + 1e-6)
    with pytest.raises(InputError, match="not empty"):
        write_pictures(tmp_path / "new", pictures)


def test_a_place_that_holds_no_new_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "made"):
        with pytest.raises(InputError, match=f"{folder}: Not a directory: give a new folder for the pictures"):
            check_new(folder)
        with pytest.raises(InputError, match=f"{folder}: Not a directory"):
            write_pictures(folder, np.zeros((2, 1, 8, 8), np.float32))
    check_new(tmp_path / "new" / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link: File exists: give a folder that can be written"):
        write_pictures(tmp_path / "link", np.zeros((2, 1, 8, 8), np.float32))


def test_an_interrupt_leaves_no_half_of_a_set(tmp_path: Path, monkeypatch) -> None:
    written = []

    def interrupting(pixels: np.ndarray) -> bytes:
        written.append(pixels)
        if len(written) == 3:
            raise KeyboardInterrupt
        return encode_png(pixels)

    monkeypatch.setattr(generate, "encode_png", interrupting)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "made", tmp_path / "empty"):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            write_pictures(folder, np.zeros((5, 1, 8, 8), np.float32))
        assert len(written) == 3
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the pictures from a generator of chance in place of a recipe's."""
    monkeypatch.setattr(generate_session, "read_recipe", lambda path: Trained())
    monkeypatch.setattr(generate_session, "generated", lambda recipe, count, seed, progress: good_images()[:count])


@pytest.mark.usefixtures("seeded")
def test_the_folder_where_the_user_stands_is_filled_and_the_overview_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = good_folder(tmp_path / "good")
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    generate_session.generate(tmp_path / "part.recipe", data, Path(), count=4, seed=0)
    assert sorted(path.name for path in Path().iterdir()) == [f"{number:06d}.png" for number in (1, 2, 3, 4)]
    assert read_image(tmp_path / "made.png").shape == (640, 640, 3)


@pytest.mark.usefixtures("seeded")
def test_a_picture_in_the_place_of_the_overview_is_not_overwritten(tmp_path: Path) -> None:
    data = good_folder(tmp_path / "good")
    (tmp_path / "made.png").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"made\.png: is there already: take it away, or give another folder"):
        generate_session.generate(tmp_path / "part.recipe", data, tmp_path / "made", count=4, seed=0)
    assert (tmp_path / "made.png").read_bytes() == b"mine"
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_not_new_is_refused_before_the_work(tmp_path: Path, monkeypatch) -> None:
    def works(*_: object) -> None:
        raise AssertionError("pictures were made")

    monkeypatch.setattr(generate_session, "read_recipe", lambda path: Trained())
    monkeypatch.setattr(generate_session, "generated", works)
    data = good_folder(tmp_path / "good")
    with pytest.raises(InputError, match="good: not empty: give a new folder"):
        generate_session.generate(tmp_path / "part.recipe", data, data, count=4, seed=0)
    with pytest.raises(InputError, match=r"3\.png: Not a directory"):
        generate_session.generate(tmp_path / "part.recipe", data, data / "3.png", count=4, seed=0)
