"""Every detector, reconstructor and scorer of the catalogue becomes a plan of TensorRT-RTX in half precision.

TensorRT-RTX builds without a GPU or driver, with the builder and the parser of TensorRT; what a plan answers is proven
on a GPU, in tests/gpu.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
from recipes import tiny_graph, tiny_recipe
from tiny_detectors import SIDE, covering, material_of, options_for, silent, textured_parts

from agent.engines.build import Network, built, layer_counts, load_runtime, parsed
from agent.engines.crop import expansion
from agent.errors import EngineError
from trainer.catalogue import method
from trainer.export import answers_of, export_graph
from trainer.half import CUTS, folded

if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("tensorrt-rtx is not installed: pip install 'taktsight[tensorrt-rtx]'", allow_module_level=True)

WORKSPACE_MB = 256


def half_graph_of(name: str, folder: Path) -> bytes:
    """Return the detector's graph in half precision, trained on next to nothing, whatever it answers."""
    parts = textured_parts(10, 1)
    module = method(name)(material_of(parts, folder), options_for(name, folder), silent).module
    for cut in ("networks", "everything"):
        candidate = CUTS[cut](folded(copy.deepcopy(module)))
        try:
            if candidate is not None:
                answers_of(candidate.eval(), parts[:1])
                return export_graph(candidate, parts[:1])
        except RuntimeError:  # as in trainer.half: it cannot be cut here
            continue
    raise AssertionError(name)


def outputs(network: Network) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape by name, of the input too."""
    definition = network.definition
    tensors = [definition.get_input(0), *(definition.get_output(place) for place in range(definition.num_outputs))]
    return {tensor.name: (str(tensor.dtype).rpartition(".")[2], tuple(tensor.shape)) for tensor in tensors}


@pytest.mark.parametrize("name", covering())
def test_a_detector_parses_and_builds_in_half_precision(name: str, tmp_path: Path) -> None:
    network = parsed(load_runtime("tensorrt_rtx"), half_graph_of(name, tmp_path))
    found = outputs(network)
    assert found["image"] == ("FLOAT", (1, 1, SIDE, SIDE))
    assert found["score"] == ("FLOAT", (1,))
    assert found["anomaly_map"][0] == "FLOAT"
    layers = layer_counts(network)
    assert any(layer.endswith(" HALF") for layer in layers), layers
    assert not any(layer.startswith(("CONVOLUTION INT", "CONVOLUTION FP8")) for layer in layers)
    assert len(built(network, WORKSPACE_MB)) > 1000


@pytest.mark.parametrize("channels", [1, 3])
def test_what_makes_batches_of_8_bit_crops_parses_and_builds(channels: int) -> None:
    network = expansion(load_runtime("tensorrt_rtx"), (1, 24, 32, channels))
    assert outputs(network) == {"crop": ("UINT8", (1, 24, 32, channels)), "image": ("FLOAT", (1, channels, 24, 32))}
    assert list(layer_counts(network)) == ["CAST FLOAT", "CONSTANT FLOAT", "ELEMENTWISE FLOAT", "SHUFFLE FLOAT"]
    assert len(built(network, WORKSPACE_MB)) > 1000


def test_a_plan_for_turing_is_built_by_name_and_is_another_one() -> None:
    runtime = load_runtime("tensorrt_rtx")
    plans = [built(parsed(runtime, tiny_recipe().graph), WORKSPACE_MB, None, of) for of in ("8.9", "7.5")]
    assert plans[0] != plans[1]
    assert plans[0] == built(parsed(runtime, tiny_recipe().graph), WORKSPACE_MB)


def test_a_float32_graph_has_no_layer_in_half_precision() -> None:
    network = parsed(load_runtime("tensorrt_rtx"), tiny_recipe().graph)
    assert not any("HALF" in layer for layer in layer_counts(network))
    assert len(built(network, WORKSPACE_MB)) > 1000


def test_a_graph_that_is_none_is_refused_with_what_the_parser_says() -> None:
    with pytest.raises(EngineError, match=r"tensorrt_rtx [\d.]+ does not understand the graph: .+: report this"):
        parsed(load_runtime("tensorrt_rtx"), b"no graph")


def test_a_plan_of_another_graph_is_another_one() -> None:
    runtime, view = load_runtime("tensorrt_rtx"), tiny_recipe().view
    plans = [built(parsed(runtime, tiny_graph(view, level)), WORKSPACE_MB) for level in (0.2, 0.7)]
    assert plans[0] != plans[1]
