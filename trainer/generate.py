"""New pictures of good parts from a recipe with a dcgan, and whether they are copies or garbage.

Source: paper 003, sec. 3.3.3, 4.4 (more good images for small sets); 001, sec. III-B, IV-A, fig. 6 (t-SNE in image
space without reduction before). The graph of the recipe holds the generator: from the last product with a matrix before
its first tanh.

Copies and garbage are told by the distance to the nearest good image (root of the mean squared difference), compared
with the distance of each good image to its nearest other one: a picture nearer than half the least of these is a copy,
one farther than the greatest of them is unlike any good part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.manifold import TSNE

from calibration.errors import InputError
from calibration.images import encode_png
from calibration.recipe import Recipe
from trainer.learning import Progress

COPY = 0.5  # share of the least distance between two good images
SIDE, MARGIN = 640, 24  # px of the t-SNE picture
BLUE, RED = (180, 90, 30), (40, 40, 210)  # BGR


@dataclass(frozen=True, slots=True)
class Check:
    """How generated pictures lie among good images; distances in reflectance."""

    pictures: int
    good: int
    nearest: float  # median distance of a picture to its nearest good image
    between_good: float  # median distance of a good image to its nearest other one
    copies: int  # pictures that are one of the good images
    strangers: int  # pictures farther from all good images than any good image is
    variety: float  # deviation of the pictures, pixel by pixel, as a share of that of the good images

    def __str__(self) -> str:
        return (
            f"{self.pictures} pictures: {self.copies} copies, {self.strangers} unlike any good part; nearest good "
            f"image {self.nearest:.4f} away (good images: {self.between_good:.4f}), variety {self.variety:.0%}"
        )


def generated(recipe: Recipe, count: int, seed: int, progress: Progress) -> NDArray[np.float32]:
    """Return pictures (count, C, h, w) in 0..1, as the detector sees parts.

    Raises InputError without a generator of whole views.
    """
    session = onnxruntime.InferenceSession(generator_graph(recipe), providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    chance = np.random.default_rng(seed)
    pictures = []
    for done in range(1, count + 1):
        z = chance.standard_normal(wanted.shape).astype(np.float32)
        pictures.append(0.5 * (np.asarray(session.run(None, {wanted.name: z})[0])[0] + 1.0))
        progress("generate", done, count)
    return np.stack(pictures).clip(0.0, 1.0)


def generator_graph(recipe: Recipe) -> bytes:
    """Return the part of the recipe's graph that makes a picture of z (1, latent), in -1..1.

    Raises InputError if there is none, or if it draws less than the view: that of a recipe with tiles draws one.
    """
    if recipe.detector.partition("+")[0] != "dcgan":
        raise InputError(f"{recipe.product}: a recipe of {recipe.detector} holds no generator: fit one of dcgan")
    model = onnx.load_from_string(recipe.graph)
    constants = {constant.name: constant for constant in model.graph.initializer}
    source = {output: node for node in model.graph.node for output in node.output}
    picture = next(node for node in model.graph.node if node.op_type == "Tanh")
    _check_size(recipe, model, picture.output[0])
    nodes, node = [picture], picture
    while node.op_type not in ("Gemm", "MatMul"):
        node = next(source[name] for name in node.input if name in source and source[name].op_type != "Constant")
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    nodes += [source[name] for name in used if name in source and source[name].op_type == "Constant"]
    z = next(name for name in node.input if name not in constants)
    weight = next(constants[name] for name in node.input if name in constants and len(constants[name].dims) == 2)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    graph = helper.make_graph(
        list(reversed(nodes)),
        "generator",
        [helper.make_tensor_value_info(z, TensorProto.FLOAT, [1, weight.dims[1 if transposed else 0]])],
        [helper.make_tensor_value_info(picture.output[0], TensorProto.FLOAT, None)],
        [constants[name] for name in sorted(used) if name in constants],
    )
    built = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return bytes(built.SerializeToString())


def _check_size(recipe: Recipe, model: onnx.ModelProto, name: str) -> None:
    """Raises InputError unless the pictures of this name (N, C, h, w) are as large as the recipe's view."""
    known = onnx.shape_inference.infer_shapes(model).graph.value_info
    wanted = [recipe.view.height, recipe.view.width]
    sizes = ([side.dim_value for side in value.type.tensor_type.shape.dim][2:] for value in known if value.name == name)
    found = next(sizes, wanted)
    if found != wanted:
        raise InputError(
            f"{recipe.product}: the generator draws {found[1]}x{found[0]} px, the recipe sees parts in "
            f"{wanted[1]}x{wanted[0]}: it has learnt single tiles; fit a recipe without --tiles"
        )


def checked(pictures: NDArray[np.float32], good: NDArray[np.float32]) -> Check:
    """Return how pictures (n, C, h, w) lie among good images (m, C, h, w). Raises InputError with fewer than 3 good."""
    if len(good) < 3:
        raise InputError(f"{len(good)} good images found, need at least 3 to compare the pictures with")
    to_good = distances(pictures, good).min(1)
    among = distances(good, good)
    np.fill_diagonal(among, np.inf)
    between = among.min(1)
    return Check(
        pictures=len(pictures),
        good=len(good),
        nearest=float(np.median(to_good)),
        between_good=float(np.median(between)),
        copies=int((to_good < COPY * between.min()).sum()),
        strangers=int((to_good > between.max()).sum()),
        variety=float(pictures.std(0).mean() / max(float(good.std(0).mean()), 1e-9)),
    )


def distances(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return (n, m): the root of the mean squared difference of every two images."""
    first, second = (images.reshape(len(images), -1).astype(np.float64) for images in (one, other))
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2.0 * first @ second.T
    return np.sqrt(np.maximum(squares, 0.0) / first.shape[1])


def neighbourhood(pictures: NDArray[np.float32], good: NDArray[np.float32], seed: int) -> NDArray[np.uint8]:
    """Return a t-SNE of both, (640, 640, 3) BGR: good images as blue circles, pictures as red crosses (001 fig. 6)."""
    everything = np.concatenate([good, pictures]).reshape(len(good) + len(pictures), -1)
    perplexity = min(30.0, (len(everything) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(everything)
    low, high = places.min(0), places.max(0)
    points = MARGIN + (places - low) / np.maximum(high - low, 1e-9) * (SIDE - 2 * MARGIN)
    canvas = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    for index, (x, y) in enumerate(points.round().astype(int).tolist()):
        if index < len(good):
            cv2.circle(canvas, (x, y), 5, BLUE, 1, cv2.LINE_AA)
        else:
            cv2.drawMarker(canvas, (x, y), RED, cv2.MARKER_TILTED_CROSS, 9, 1, cv2.LINE_AA)
    return canvas


def overview_of(folder: Path) -> Path:
    """Return where the picture of how the pictures lie among good images goes: beside their folder."""
    whole = folder.resolve()
    return whole.with_name(f"{whole.name}.png")


def check_new(folder: Path) -> None:
    """Raises InputError unless pictures can be written to a folder that is empty or not there yet, and their overview.

    The overview must not be there yet.
    """
    try:
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder}: not empty: give a new folder for the pictures")
        overview = overview_of(folder)
        if overview.exists():
            raise InputError(f"{overview}: is there already: take it away, or give another folder for the pictures")
        for place in (folder, overview.parent):
            with tempfile.TemporaryFile(dir=_nearest(place)):
                pass
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: give a new folder for the pictures") from error


def write_pictures(folder: Path, pictures: NDArray[np.float32]) -> Sequence[Path]:
    """Write 8-bit PNG files 000001.png, .. and return their paths.

    They appear when all are made: an interrupt before that leaves none.

    Raises InputError if the folder is a file, has files or cannot be written.
    """
    check_new(folder)
    try:
        with tempfile.TemporaryDirectory(dir=_nearest(folder), prefix=".pictures-") as beside:
            made = []
            for number, picture in enumerate((pictures * 255.0).round().astype(np.uint8), 1):
                pixels = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
                made.append(Path(beside) / f"{number:06d}.png")
                made[-1].write_bytes(encode_png(np.ascontiguousarray(pixels)))
            folder.mkdir(parents=True, exist_ok=True)
            return [file.rename(folder / file.name) for file in made]
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: give a folder that can be written") from error


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())
