"""TensorRT's engine over a fake GPU: right answers, memory given back, and every way to fail told."""

from __future__ import annotations

import dataclasses
import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from gpus import SHAPES, FakeDriver, FakeLibrary, FakeRuntime, fake_gpu
from recipes import tiny_answer, tiny_recipe

from agent.engines import cuda
from agent.engines import tensorrt as engine_tensorrt
from agent.engines.build import plan_for
from agent.engines.engine import EngineSettings, of_crops, open_engine
from agent.engines.tensorrt import PlanRefused, TensorRtEngine, tensorrt_engine
from agent.errors import EngineError
from calibration.preprocess import to_batch

RECIPE = tiny_recipe(graph_f16=tiny_recipe(level=0.4).graph)


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    return EngineSettings("tensorrt", "f16", cache=tmp_path / "engines")


class Device:
    """A GPU with its runtime, in the place of those that the engine would find."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers) -> None:
        self.driver = FakeDriver(fails=answers.pop("driver", {}))
        self.library = FakeLibrary(self.driver, statuses=answers.pop("library", {}))
        self.runtime = FakeRuntime(self.driver, **answers)
        self.gpu = fake_gpu(self.driver, self.library)
        monkeypatch.setattr(engine_tensorrt, "open_gpu", lambda: self.gpu)
        monkeypatch.setattr(engine_tensorrt, "load_runtime", lambda name: self.runtime)


@pytest.fixture
def device(monkeypatch) -> Device:
    return Device(monkeypatch)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (1, 1, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("library", [{}, {"cuStreamBeginCapture": 801}], ids=["graph", "no graph"])
def test_the_engine_gives_the_closed_form_answer_with_a_graph_and_without(monkeypatch, settings, library):
    device = Device(monkeypatch, library=library)
    engine = tensorrt_engine(RECIPE, settings)
    for seed in (1, 2):
        anomaly_map, score = engine.infer(picture(seed))
        expected_map, expected = tiny_answer(picture(seed))
        np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-6)
        assert score == pytest.approx(expected, rel=1e-6)
    assert device.library.launches == (0 if library else 2)


@pytest.mark.parametrize("capturable", [True, False])
def test_a_plan_that_says_that_no_graph_can_hold_it_is_launched_layer_by_layer(
    monkeypatch, settings, caplog, capturable
):
    device = Device(monkeypatch, capturable=capturable)
    engine = tensorrt_engine(RECIPE, settings)
    assert engine.infer(picture(1))[1] == pytest.approx(tiny_answer(picture(1))[1], rel=1e-6)
    assert device.library.captures == (2 if capturable else 0)  # of batches and of crops
    assert ("no CUDA graph can be made" in caplog.text) is not capturable


def test_an_answer_is_not_overwritten_by_the_next(device, settings):
    engine = tensorrt_engine(RECIPE, settings)
    first, _ = engine.infer(picture(1))
    kept = first.copy()
    engine.infer(picture(2))
    np.testing.assert_array_equal(first, kept)


def test_another_thread_than_the_one_that_opened_it_may_infer(device, settings):
    engine, found = tensorrt_engine(RECIPE, settings), []
    thread = threading.Thread(target=lambda: found.append(engine.infer(picture(1))[1]))
    thread.start()
    thread.join()
    assert found[0] == pytest.approx(tiny_answer(picture(1))[1], rel=1e-6)
    assert device.driver.depth == 0


def test_an_engine_that_is_laid_out_while_another_infers_does_not_take_up_its_work(device, settings):
    """At a change of recipe."""
    old, found = tensorrt_engine(RECIPE, settings), []
    device.library.on_capture = lambda: found.append(old.infer(picture(1))[1])
    new = tensorrt_engine(RECIPE, settings)
    expected = [tiny_answer(picture(seed))[1] for seed in (1, 2)]
    assert found == [pytest.approx(expected[0], rel=1e-6)] * 2  # batches and crops are captured one after the other
    assert new.infer(picture(2))[1] == pytest.approx(expected[1], rel=1e-6)


def test_the_label_names_runtime_precision_and_gpu(device, settings):
    assert tensorrt_engine(RECIPE, settings).label == "tensorrt f16, NVIDIA L4"


def test_memory_is_given_back_with_the_engine(device, settings):
    engine = tensorrt_engine(RECIPE, settings)
    assert device.driver.taken == 4 * (32 * 32 + 4 * 4 + 1) + 32 * 32  # image, map, score; crop
    gc.disable()  # at the line garbage is collected seldom
    try:
        del engine
        assert device.driver.taken == 0
        assert device.library.destroyed == 2
    finally:
        gc.enable()


def levels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)


@pytest.mark.parametrize("library", [{}, {"cuStreamBeginCapture": 801}], ids=["graph", "no graph"])
def test_a_crop_is_answered_as_its_batch_is_and_a_quarter_of_the_bytes_goes_up(monkeypatch, settings, library):
    device = Device(monkeypatch, library=library)
    engine = tensorrt_engine(RECIPE, settings)
    for seed in (1, 2):
        batch = to_batch(levels(seed), 8, RECIPE.view, None)
        device.driver.copied.clear()
        of_batch, of_crop = engine.infer(batch), of_crops(engine)(levels(seed))
        if library:
            assert device.driver.copied == [4 * 32 * 32, 32 * 32]
        np.testing.assert_array_equal(of_batch[0], of_crop[0])
        assert of_batch[1] == of_crop[1]
        assert engine.infer(picture(seed))[1] == pytest.approx(tiny_answer(picture(seed))[1], rel=1e-6)
    assert device.driver.depth == 0


def test_a_crop_in_colour_becomes_the_batch_that_the_host_makes_of_it(monkeypatch, settings):
    shapes = {**SHAPES, "image": (1, 3, 32, 32)}
    Device(monkeypatch, shapes=shapes)
    view = dataclasses.replace(RECIPE.view, colour=True)
    engine = tensorrt_engine(dataclasses.replace(RECIPE, view=view), settings)
    crop = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    engine.infer_crop(crop)
    image = engine._device["image"].content.view(np.float32).reshape(1, 3, 32, 32)
    np.testing.assert_array_equal(image, to_batch(crop, 8, view, None))


@pytest.mark.parametrize("answers", [{"fails": ("crop",)}, {"fails": ("crop context",)}, {"dark": 1e-4}], ids=str)
def test_an_engine_that_cannot_make_batches_of_crops_takes_batches(monkeypatch, settings, answers, caplog):
    Device(monkeypatch, **answers)
    engine = tensorrt_engine(RECIPE, settings)
    assert of_crops(engine) is None
    assert engine.infer(picture(1))[1] == pytest.approx(tiny_answer(picture(1))[1], rel=1e-6)
    assert "8-bit pixels go to the GPU as float32, which takes longer: " in caplog.text
    assert len(list(settings.cache.glob("*.plan"))) == 1  # the other is compiled anew at the next start


@pytest.mark.parametrize("view", [{"bit_depth": 10}, {"gamma": 2.0}], ids=str)
def test_a_network_that_sees_no_whole_levels_of_8_bits_takes_batches_alone(device, settings, view):
    recipe = dataclasses.replace(RECIPE, view=dataclasses.replace(RECIPE.view, **view))
    assert of_crops(tensorrt_engine(recipe, settings)) is None
    assert device.runtime.builds == 1


def test_a_cpu_engine_takes_batches_alone():
    assert of_crops(open_engine(RECIPE, EngineSettings("onnxruntime"))) is None


def test_a_crop_of_another_size_or_type_is_refused(device, settings):
    engine = tensorrt_engine(RECIPE, settings)
    for crop in (np.zeros((16, 32), np.uint8), np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint16)):
        with pytest.raises(EngineError, match=r"a crop of .* found, the plan takes \(1, 32, 32, 1\), uint8"):
            engine.infer_crop(crop)


def test_a_batch_of_another_size_is_refused(device, settings):
    with pytest.raises(EngineError, match=r"batch of shape \(1, 3, 32, 32\) found, the plan takes \(1, 1, 32, 32\)"):
        tensorrt_engine(RECIPE, settings).infer(np.zeros((1, 3, 32, 32), np.float32))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"fails": ("context",)}, r"cannot lay out the plan on NVIDIA L4 \(23034 MB\): .* end what else uses the GPU"),
        ({"driver": {"cuMemAlloc": "out of memory"}}, r"cuMemAlloc: CUDA status 2 \(out of memory\): end what else"),
        ({"driver": {"cuMemHostAlloc": "out of memory"}}, "cuMemHostAlloc: CUDA status 2"),
        ({"driver": {"cuMemcpyHtoDAsync": "an illegal memory access was encountered"}}, "CUDA status 700"),
        ({"driver": {"cuStreamSynchronize": "unspecified launch failure"}}, "CUDA status 719"),
        ({"fails": ("execute",)}, "the GPU did not take the inference"),
        ({"fails": ("address",)}, "the runtime refuses memory for image"),
        ({"fails": ("Runtime",)}, "tensorrt 10.3.0 cannot run here: check the driver with nvidia-smi"),
        ({"fails": ("deserialize",)}, r"does not load the plan for NVIDIA L4 \(compute capability 8\.9\)"),
        ({"shapes": {**SHAPES, "extra": (1,)}}, r"a plan of \['anomaly_map', 'extra', 'image', 'score'\] found, need"),
        ({"shapes": {**SHAPES, "score": (0,)}}, r"score of DataType\.FLOAT \(0,\) found, need float32 of a fixed size"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_fails_while_it_is_laid_out_is_told_and_takes_no_memory(monkeypatch, settings, answers, message):
    device = Device(monkeypatch, **answers)
    with pytest.raises(EngineError, match=message):
        tensorrt_engine(RECIPE, settings)
    gc.collect()
    assert device.driver.depth == 0
    assert device.driver.taken == 0


def test_a_gpu_that_fails_at_a_part_says_so(device, settings):
    engine = tensorrt_engine(RECIPE, settings)
    device.driver.fails["cuStreamSynchronize"] = "uncorrectable ECC error encountered"
    with pytest.raises(EngineError, match=r"CUDA status 214 .* the GPU's memory is failing"):
        engine.infer(picture(1))


def test_a_kept_plan_that_the_runtime_does_not_load_is_compiled_anew(device, settings):
    old = FakeRuntime(FakeDriver("another GPU"))
    plan_for(RECIPE, settings, old, device.gpu.facts)  # under the same key: its digest is right
    engine = tensorrt_engine(RECIPE, settings)
    assert device.runtime.builds == 2  # the network, and what makes batches of crops
    assert engine.infer(picture(1))[1] == pytest.approx(tiny_answer(picture(1))[1], rel=1e-6)


def test_a_plan_of_another_gpu_is_never_run(device, settings):
    plan = plan_for(RECIPE, settings, FakeRuntime(FakeDriver("another GPU")), device.gpu.facts)
    with pytest.raises(PlanRefused):
        TensorRtEngine(plan, device.runtime, device.gpu)


def test_a_gpu_that_answers_otherwise_does_not_pass_the_gate(monkeypatch, settings):
    Device(monkeypatch)
    assert open_engine(RECIPE, settings).label == "tensorrt f16, NVIDIA L4"
    Device(monkeypatch, wrong=0.05)  # the score is right
    with pytest.raises(EngineError, match=r"tensorrt f16, NVIDIA L4 differs .* map .* at most 0\.02 is allowed"):
        open_engine(RECIPE, settings)


def test_a_cpu_engine_stands_in_only_where_the_station_allows_it_and_its_label_says_so(monkeypatch, settings, caplog):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    cuda.open_gpu.cache_clear()
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        open_engine(RECIPE, settings)
    engine = open_engine(RECIPE, dataclasses.replace(settings, fallback=True, threads=1))
    assert engine.label.endswith("f32, 1 threads, in place of tensorrt f16")
    assert "a CPU engine stands in (engine.fallback): no NVIDIA driver" in caplog.text


def test_a_cpu_engine_that_fails_is_not_replaced(settings):
    with pytest.raises(EngineError, match="bf16"):
        open_engine(RECIPE, EngineSettings("onnxruntime", "bf16", fallback=True))
