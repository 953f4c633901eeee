"""The search in latent space: all its steps in one graph, as recipes have it, against one step that a host loops.

    python benchmarks/unrolled.py --out benchmarks/results/unrolled.csv

dcgan with weights that were never trained: they change no cost. Per number of steps K: nodes and size of the float32
graph, seconds until OpenVINO and ONNX Runtime have loaded it, seconds until TensorRT-RTX has built its plan and the
plan's size, and the median time of one image in OpenVINO with 2 threads. The looped graph is called K times; what goes
in and out of it at each call lies in host memory, as on a CPU it must.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from machine import describe
from tables import write_rows
from torch import nn

from agent.engines.build import built, load_runtime, parsed
from trainer.export import OPSET
from trainer.inversion import MOMENTUM, SPREAD, Step
from trainer.learning import Options
from trainer.reconstructors.dcgan import Dcgan
from trainer.reconstructors.gan_training import Adversaries, down

COLUMNS = (
    "graph", "size", "steps", "nodes", "graph_mb", "export_s", "openvino_s", "onnxruntime_s", "tensorrt_rtx_s",
    "plan_mb", "openvino_ms",
)  # fmt: skip
WARM_UP, WORKSPACE_MB = 2, 1024


Run = Callable[[list[np.ndarray]], list[np.ndarray]]
"""A compiled graph: inputs -> outputs, in their order."""


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX graph, and how its answer to one image comes about."""

    data: bytes
    export_s: float
    answer: Callable[[Run], object]


def main() -> int:
    arguments = parsed_arguments()
    print(describe())
    rows: list[dict[str, Any]] = []
    for steps in arguments.steps:
        network, image = searching(arguments.size, steps), np.full((1, 1, *[arguments.size] * 2), 0.5, np.float32)
        for name, graph in (("unrolled", unrolled(network, image)), ("looped", looped(network, image, steps))):
            rows.append({"graph": name, "size": arguments.size, "steps": steps, **costs(graph, arguments.count)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if arguments.out is not None:
                write_rows(arguments.out, COLUMNS, rows)
    return 0


def searching(size: int, steps: int) -> Dcgan:
    """Return dcgan for gray images of size x size px."""
    torch.manual_seed(0)
    options, shape = replace(Options(), inversion_steps=steps), torch.Size((1, size, size))
    network = Dcgan(Adversaries(shape, options), down(shape, options.latent, normalise=True), shape, options)
    return network.eval().requires_grad_(False)


def unrolled(network: Dcgan, image: np.ndarray) -> Graph:
    """Return the whole search as one graph: image -> picture, z."""
    data, export_s = exported(network, {"image": image})
    return Graph(data, export_s, lambda run: run([image]))


def looped(network: Dcgan, image: np.ndarray, steps: int) -> Graph:
    """Return one step of it as a graph, (z, m, v, c1, c2, x) -> (z', m', v'), which is called as often."""
    z = np.zeros((1, network.around.shape[1]), np.float32)
    start = {"z": z, "m": z.copy(), "v": z.copy(), "c1": np.ones(1, np.float32), "c2": np.ones(1, np.float32)}
    data, export_s = exported(Step(network.inversion), {**start, "x": 2.0 * image - 1.0})

    def answer(run: Run) -> None:
        state = [start[name] for name in "zmv"]
        for step in range(1, steps + 1):
            corrections = [np.array([1.0 - decay**step], np.float32) for decay in (MOMENTUM, SPREAD)]
            state = run([*state, *corrections, 2.0 * image - 1.0])

    return Graph(data, export_s, answer)


def exported(module: nn.Module, inputs: dict[str, np.ndarray]) -> tuple[bytes, float]:
    """Return the ONNX graph and the seconds that it took."""
    buffer, began_s = io.BytesIO(), time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notes to its own developers
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        examples = tuple(torch.from_numpy(value.copy()) for value in inputs.values())
        program = torch.onnx.export(
            module, examples, dynamo=True, opset_version=OPSET, input_names=list(inputs), external_data=False,
            verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(buffer)
    return buffer.getvalue(), time.monotonic() - began_s


def costs(graph: Graph, count: int) -> dict[str, Any]:
    """Return what loading, building and running a graph costs."""
    row: dict[str, Any] = {
        "nodes": len(onnx.load_from_string(graph.data).graph.node),
        "graph_mb": round(len(graph.data) / 1e6, 2),
        "export_s": round(graph.export_s, 1),
    }
    threads = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
    began_s, core = time.monotonic(), openvino.Core()
    request = core.compile_model(core.read_model(io.BytesIO(graph.data)), "CPU", threads).create_infer_request()
    row["openvino_s"] = round(time.monotonic() - began_s, 2)
    began_s = time.monotonic()
    onnxruntime.InferenceSession(graph.data, providers=["CPUExecutionProvider"])
    row["onnxruntime_s"] = round(time.monotonic() - began_s, 2)
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        began_s = time.monotonic()
        plan = built(parsed(load_runtime("tensorrt_rtx"), graph.data), WORKSPACE_MB)
        row |= {"tensorrt_rtx_s": round(time.monotonic() - began_s, 1), "plan_mb": round(len(plan) / 1e6, 2)}

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        request.infer(inputs)
        return [request.get_output_tensor(place).data.copy() for place in range(len(request.output_tensors))]

    took_ms = []
    for _ in range(WARM_UP + count):
        began_ns = time.perf_counter_ns()
        graph.answer(run)
        took_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return {**row, "openvino_ms": round(float(np.median(took_ms[WARM_UP:])), 1)}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--count", type=int, default=15)
    parser.add_argument("--out", type=Path, help="CSV to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
