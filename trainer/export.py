"""From a trained network to one ONNX graph that provably gives the same answers."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from trainer.errors import ParityError

OPSET = 18
TOLERANCE = 1e-4  # relative, of scores; the same bound holds for map peaks
INPUT, OUTPUTS = "image", ("anomaly_map", "score")


def export_graph(module: nn.Module, example: NDArray[np.float32]) -> bytes:
    """Return the ONNX graph of module: image (1, C, h, w) -> anomaly_map (1, 1, h', w'), score (1,).

    The bytes depend on the weights alone: names of files, functions and times that the exporter notes are removed.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            (torch.from_numpy(example),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.save(buffer)
    return _anonymous(buffer.getvalue())


class ReferenceRuntime:
    """The graph in ONNX Runtime, float32: what every other engine is compared with."""

    name = "onnxruntime f32"

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared image (1, C, h, w)."""
        anomaly_map, score = self._session.run(list(OUTPUTS), {INPUT: batch})
        return np.asarray(anomaly_map)[0, 0], float(np.asarray(score)[0])


Answers = list[tuple[NDArray[np.float32], float]]
"""(anomaly_map (h', w'), score) of each of several images."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How closely an exported graph follows the network."""

    images: int
    worst_score: float  # largest difference of scores, relative to max(|score|, threshold)
    worst_peak: float  # of maps, at any place: relative to max(peak, threshold)

    def __str__(self) -> str:
        return f"score {self.worst_score:.1e}, map {self.worst_peak:.1e} relative over {self.images} images"

    def within(self, tolerance: float) -> bool:
        """Return whether both differences are at most this; a NaN is not."""
        return self.worst_score <= tolerance and self.worst_peak <= tolerance


def checked_parity(
    module: nn.Module, graph: bytes, batch: NDArray[np.float32], score_scale: float, map_scale: float
) -> Parity:
    """Return how far the graph's answers are from the network's.

    batch: (n, C, h, w) images. score_scale, map_scale: the thresholds; differences count relative to them or to the
    answer itself, whichever is larger.

    Raises ParityError if any score or map differs by more than 1e-4.
    """
    runtime = ReferenceRuntime(graph)
    answers = [runtime(image[None]) for image in batch]
    parity = parity_of(answers_of(module, batch), answers, score_scale, map_scale)
    if not parity.within(TOLERANCE):
        raise ParityError(
            f"the exported graph differs from the network ({parity}), at most {TOLERANCE:g} is allowed: "
            "no recipe was written; please report this with the detector's name and the torch version"
        )
    return parity


def answers_of(module: nn.Module, batch: NDArray[np.float32]) -> Answers:
    """Return what the network itself says of each image of (n, C, h, w)."""
    answers = []
    with torch.inference_mode():
        for image in batch:
            anomaly_map, score = module(torch.from_numpy(image[None]))
            answers.append((anomaly_map.numpy()[0, 0], float(score[0])))
    return answers


def parity_of(expected: Answers, found: Answers, score_scale: float, map_scale: float) -> Parity:
    """Return how far answers to the same images are apart; the scales as in `checked_parity`."""
    scores, peaks = [0.0], [0.0]
    for (expected_map, expected_score), (anomaly_map, score) in zip(expected, found, strict=True):
        scores.append(_relative(score, expected_score, score_scale))
        difference = float(np.abs(anomaly_map - expected_map).max())
        peaks.append(difference / max(float(np.abs(expected_map).max()), abs(map_scale)))
    return Parity(len(expected), float(np.max(scores)), float(np.max(peaks)))  # np.max hands a NaN on


def _relative(found: float, expected: float, scale: float) -> float:
    return abs(found - expected) / max(abs(expected), abs(scale), 1e-12)


def _anonymous(data: bytes) -> bytes:
    model = onnx.load_from_string(data)
    model.producer_name, model.producer_version, model.doc_string = "taktsight", "", ""
    del model.metadata_props[:]
    del model.functions[:]
    graph = model.graph
    graph.name, graph.doc_string = "detector", ""
    for element in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        element.doc_string = ""
        if hasattr(element, "metadata_props"):
            del element.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))
