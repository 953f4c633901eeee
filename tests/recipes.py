"""Recipes without training, for tests: the graph compares the picture with an even gray and averages over blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, checker, helper

from calibration.preprocess import View
from calibration.recipe import Recipe, SelfTest, write_recipe
from calibration.registration import Reference, RegistrationSettings
from calibration.thresholds import Thresholds

SIDE = 32  # of the picture, px
BLOCK = 8  # px of the picture that become one place of the anomaly map
LEVEL = 0.5  # reflectance of a perfect part
OPSET, IR_VERSION = 17, 8  # old enough for every engine
STATION = """
station: cell7
recipe: tiny.recipe
recipes: {unsigned: allow}
takt_ms: 10
camera: {kind: simulated}
"""


def tiny_recipe(*, level: float = LEVEL, colour: bool = False, **overrides: Any) -> Recipe:
    """Return a recipe whose map is |picture - level| averaged over 8 x 8 px, and whose score is the map's mean.

    Frames are 32 x 32 px and not registered. overrides: fields of `Recipe`; graph and self-test follow `view`, which
    follows `reference`.
    """
    reference = overrides.get("reference")
    seen = (SIDE, SIDE) if reference is None else reference.image.shape
    view = overrides.pop("view", View(SIDE, SIDE, colour=colour, reference_size=seen))
    fields: dict[str, Any] = {
        "product": "tiny",
        "detector": "difference",
        "graph": tiny_graph(view, level),
        "view": view,
        "reference": None,
        "thresholds": Thresholds(
            score=0.1, map=0.2, false_reject_rate=0.01, rate_upper_bound=0.03, n_good=99, fitted_on="torch f32"
        ),
        "selftest": tiny_selftest(view, level),
        "training": {"seed": 0},
        "metrics": {"auroc": 0.5},
        "report": "<h1>tiny</h1>",
    }
    return Recipe(**{**fields, **overrides})


def write_tiny_recipe(path: Path, **overrides: Any) -> Recipe:
    """Write a tiny recipe to path and return it with its digest; arguments as `tiny_recipe`."""
    recipe = tiny_recipe(**overrides)
    return tiny_recipe(**{**overrides, "digest": write_recipe(path, recipe)})


def write_tiny_station(folder: Path, more: str) -> Path:
    """Write tiny.recipe and a station.yaml that judges with it, and return the latter's path; more: its other lines."""
    write_tiny_recipe(folder / "tiny.recipe")
    (folder / "station.yaml").write_text(STATION + more + "\n")
    return folder / "station.yaml"


def tiny_answer(batch: NDArray[np.float32], level: float = LEVEL) -> tuple[NDArray[np.float32], float]:
    """Return (anomaly_map (h', w'), score) of one batch (1, C, h, w), worked out in numpy: what an engine must say."""
    difference = np.abs(batch[0].astype(np.float64) - level).mean(axis=0)  # (h, w)
    height, width = difference.shape[0] // BLOCK, difference.shape[1] // BLOCK
    blocks = difference.reshape(height, BLOCK, width, BLOCK).mean(axis=(1, 3))
    return blocks.astype(np.float32), float(blocks.mean())


def tiny_selftest(view: View, level: float = LEVEL, count: int = 2) -> SelfTest:
    """Return a self-test of seeded noise round the level with its true answers."""
    noise = np.random.default_rng(7).uniform(-0.2, 0.2, (count, view.channels, view.height, view.width))
    batches = (level + noise).astype(np.float32)
    answers = [tiny_answer(batch[None], level) for batch in batches]
    return SelfTest(
        batches=batches,
        scores=tuple(score for _, score in answers),
        map_peaks=tuple(float(anomaly_map.max()) for anomaly_map, _ in answers),
    )


def tiny_graph(view: View, level: float = LEVEL) -> bytes:
    """Return the graph as ONNX: image (1, C, h, w) -> anomaly_map (1, 1, h / 8, w / 8), score (1,)."""
    shape = [1, view.channels, view.height, view.width]
    map_shape = [1, 1, view.height // BLOCK, view.width // BLOCK]
    nodes = [
        helper.make_node("Sub", ["image", "level"], ["difference"]),
        helper.make_node("Abs", ["difference"], ["distance"]),
        helper.make_node("ReduceMean", ["distance"], ["gray"], axes=[1], keepdims=1),
        helper.make_node("AveragePool", ["gray"], ["anomaly_map"], kernel_shape=[BLOCK, BLOCK], strides=[BLOCK, BLOCK]),
        helper.make_node("ReduceMean", ["anomaly_map"], ["score"], axes=[1, 2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, map_shape),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, [1]),
        ],
        initializer=[helper.make_tensor("level", TensorProto.FLOAT, [], [level])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def tiny_reference(size: tuple[int, int] = (120, 160)) -> Reference:
    """Return the reference of a drawn bracket that looks different at every angle. size: (height, width), px."""
    image = bracket(size)
    weight = np.full(size, 255, np.uint8)
    return Reference(image, weight, RegistrationSettings(), min_similarity=0.6, max_residual_px=2.0)


def bracket(size: tuple[int, int] = (120, 160)) -> NDArray[np.uint8]:
    """Return the picture (H, W) of a bright L-shaped bracket with one hole on dark ground."""
    height, width = size
    image = np.full(size, 40, np.uint8)
    corners = np.array([(0.25, 0.2), (0.45, 0.2), (0.45, 0.55), (0.8, 0.55), (0.8, 0.8), (0.25, 0.8)])
    cv2.fillPoly(image, [(corners * (width, height)).round().astype(np.int32)], 190)
    cv2.circle(image, (round(0.35 * width), round(0.33 * height)), round(0.06 * height), 40, -1)
    return np.asarray(cv2.GaussianBlur(image, (3, 3), 0.8), np.uint8)
