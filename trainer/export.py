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


@dataclass(frozen=True, slots=True)
class Parity:
    """How closely the exported graph follows the network."""

    images: int
    worst_score: float  # largest difference of scores, relative to max(|score|, threshold)
    worst_peak: float  # the same for map peaks

    def __str__(self) -> str:
        return f"score {self.worst_score:.1e}, map {self.worst_peak:.1e} relative over {self.images} images"


def checked_parity(
    module: nn.Module, graph: bytes, batch: NDArray[np.float32], score_scale: float, map_scale: float
) -> Parity:
    """Return how far the graph's answers are from the network's.

    batch: (n, C, h, w) images. score_scale, map_scale: the thresholds; differences count relative to them or to the
    answer itself, whichever is larger.

    Raises ParityError if any score or map peak differs by more than 1e-4.
    """
    runtime = ReferenceRuntime(graph)
    scores, peaks = [0.0], [0.0]
    for image in batch:
        with torch.inference_mode():
            expected_map, expected_score = module(torch.from_numpy(image[None]))
        anomaly_map, score = runtime(image[None])
        scores.append(_relative(score, float(expected_score[0]), score_scale))
        difference = float(np.abs(anomaly_map - expected_map.numpy()[0, 0]).max())
        peaks.append(difference / max(float(expected_map.abs().max()), abs(map_scale)))
    parity = Parity(len(batch), float(np.max(scores)), float(np.max(peaks)))  # np.max hands a NaN on
    if not (parity.worst_score <= TOLERANCE and parity.worst_peak <= TOLERANCE):  # `not <=`: a NaN must fail too
        raise ParityError(
            f"the exported graph differs from the network ({parity}), at most {TOLERANCE:g} is allowed: "
            "no recipe was written; please report this with the detector's name and the torch version"
        )
    return parity


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
