"""What fakes cannot prove, on a real GPU: answers, graphs, memory, threads, plans. Skipped where there is none.

    pytest tests/gpu -v

What may end the process, a runtime on a GPU that it does not know or a plan that is none, is tried in one of its own.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recipes import tiny_answer, tiny_recipe

from agent.engines.build import built, load_runtime, plan_for
from agent.engines.crop import expansion, sample
from agent.engines.cuda import Gpu, open_gpu, probe_driver
from agent.engines.engine import CROP, INPUT, RUNTIMES, EngineSettings, of_crops, open_engine
from agent.engines.tensorrt import TensorRtEngine, tensorrt_engine
from agent.errors import EngineError
from calibration.preprocess import to_batch

RTX_SERVES = ("7.5", "8.6", "8.9", "12.0", "12.1")  # compute capabilities that TensorRT-RTX 1.7 names
INSTALLED = [name for name in RUNTIMES if importlib.util.find_spec(name) is not None]
ROUNDS = 20
TESTS = Path(__file__).resolve().parents[1]
RUN_S = 120  # of a process; a small network takes seconds
BEGIN = """
import dataclasses, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from recipes import tiny_recipe
from agent.engines.build import load_runtime, plan_for
from agent.engines.cuda import open_gpu
from agent.engines.engine import EngineSettings
from agent.engines.tensorrt import TensorRtEngine, tensorrt_engine
from agent.errors import EngineError
settings = EngineSettings("tensorrt", "f32", runtime={runtime!r}, cache=Path({cache!r}))
"""
OPEN = """
tensorrt_engine(tiny_recipe(), settings)
print("opened", flush=True)
"""
DAMAGED = """
runtime, gpu = load_runtime(settings.runtime), open_gpu()
with gpu.current():
    plan = plan_for(tiny_recipe(), settings, runtime, gpu.facts)
for data in (b"no plan", plan.data[: len(plan.data) // 2]):
    try:
        TensorRtEngine(dataclasses.replace(plan, data=data), runtime, gpu)
    except EngineError as error:
        print(error, flush=True)
"""


def in_a_process(program: str, runtime: str, cache: Path) -> tuple[int | None, str]:
    """Return the exit code of a program, None if it did not end, and what it printed."""
    begin = BEGIN.format(tests=str(TESTS), root=str(TESTS.parent), runtime=runtime, cache=str(cache))
    command, both = [sys.executable, "-c", begin + program], subprocess.STDOUT
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=both, timeout=RUN_S, check=False)
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout.decode(errors="replace")


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    try:
        probe_driver()
    except EngineError as error:
        pytest.skip(str(error))
    if importlib.util.find_spec("pycuda") is None or not INSTALLED:
        pytest.skip("pycuda or TensorRT is not installed: see docs/engines.md")
    return open_gpu()


@pytest.fixture(scope="module")
def tried(gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[int | None, str]]:
    """Return what comes of opening an engine of a runtime, once."""
    return functools.cache(lambda runtime: in_a_process(OPEN, runtime, tmp_path_factory.mktemp(runtime) / "engines"))


@pytest.fixture(params=INSTALLED or ["tensorrt"])
def settings(
    request: pytest.FixtureRequest, gpu: Gpu, tried: Callable[[str], tuple[int | None, str]], tmp_path: Path
) -> EngineSettings:
    code, printed = tried(request.param)
    if "opened" not in printed:
        told = f"{request.param} on {gpu.facts.name}, exit code {code}: {printed}"
        if request.param == "tensorrt_rtx" and gpu.facts.compute_capability not in RTX_SERVES:
            pytest.skip(told)
        pytest.fail(told)
    return EngineSettings("tensorrt", "f32", runtime=request.param, cache=tmp_path / "engines")


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (1, 1, 32, 32)).astype(np.float32)


def free_mb(gpu: Gpu) -> float:
    import pycuda.driver

    with gpu.current():
        return pycuda.driver.mem_get_info()[0] / 2**20


def test_it_passes_the_gate_and_gives_the_closed_form_answer(settings: EngineSettings) -> None:
    engine = open_engine(tiny_recipe(), settings)
    for seed in range(5):
        anomaly_map, score = engine.infer(picture(seed))
        expected_map, expected = tiny_answer(picture(seed))
        np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-4)
        assert score == pytest.approx(expected, rel=1e-4)


def test_a_graph_answers_as_launches_one_by_one_do(settings: EngineSettings) -> None:
    engine = tensorrt_engine(tiny_recipe(), settings)
    assert engine._replay is not None
    with_graph = engine.infer(picture(1))
    engine._replay = None
    without = engine.infer(picture(1))
    np.testing.assert_array_equal(with_graph[0], without[0])
    assert with_graph[1] == without[1]


@pytest.mark.parametrize("is_captured", [True, False])
def test_an_8_bit_crop_is_answered_as_its_batch_is(settings: EngineSettings, is_captured: bool) -> None:
    recipe = tiny_recipe()
    engine = tensorrt_engine(recipe, settings)
    infer_crop = of_crops(engine)
    assert infer_crop is not None, "what makes batches of crops was not taken: see the log"
    if not is_captured:
        engine._replay = engine._replay_crop = None
    for seed in range(5):
        crop = np.random.default_rng(seed).integers(0, 256, (32, 32), np.uint8)
        expected_map, expected = engine.infer(to_batch(crop, 8, recipe.view, None))
        anomaly_map, score = infer_crop(crop)
        np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-6, atol=1e-7)
        assert score == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_level_of_a_crop_becomes_its_reflectance(settings: EngineSettings, gpu: Gpu, channels: int) -> None:
    runtime, shape = load_runtime(settings.runtime), (1, 64, 96, channels)
    with gpu.current():
        data = built(expansion(runtime, shape), settings.workspace_mb)
        engine = runtime.Runtime(runtime.Logger(runtime.Logger.ERROR)).deserialize_cuda_engine(data)
        context, (crop, batch) = engine.create_execution_context(), sample(shape)
        host, found = gpu.page_locked(crop.shape, np.uint8), gpu.page_locked(batch.shape)
        host[:] = crop
        memory = {CROP: gpu.memory(crop.nbytes), INPUT: gpu.memory(batch.nbytes)}
        for name, place in memory.items():
            assert context.set_tensor_address(name, int(place))
        gpu.upload(memory[CROP], host)
        assert context.execute_async_v3(gpu.stream)
        gpu.download(found, memory[INPUT])
        gpu.wait()
        np.testing.assert_allclose(found, batch, atol=1e-7)
        del context, engine, memory, host


def test_a_plan_is_found_again_and_a_damaged_one_is_compiled_anew(settings: EngineSettings, gpu: Gpu) -> None:
    runtime = load_runtime(settings.runtime)
    with gpu.current():
        plan = plan_for(tiny_recipe(), settings, runtime, gpu.facts)
        assert not plan_for(tiny_recipe(), settings, runtime, gpu.facts).is_new
        (path,) = settings.cache.glob("*.plan")
        path.write_bytes(path.read_bytes()[:-100])
        assert plan_for(tiny_recipe(), settings, runtime, gpu.facts).is_new
    assert TensorRtEngine(plan, runtime, gpu).infer(picture(1))[1] == pytest.approx(
        tiny_answer(picture(1))[1], rel=1e-4
    )


def test_bytes_that_are_no_plan_are_refused_and_the_process_lives(settings: EngineSettings) -> None:
    code, printed = in_a_process(DAMAGED, settings.runtime, settings.cache)
    assert (code, printed.count("does not load the plan")) == (0, 2), printed


def test_any_thread_may_infer(settings: EngineSettings) -> None:
    engine, found = tensorrt_engine(tiny_recipe(), settings), []
    threads = [threading.Thread(target=lambda: found.append(engine.infer(picture(1))[1])) for _ in range(3)]
    for thread in threads:  # one at a time
        thread.start()
        thread.join()
    assert found == [pytest.approx(tiny_answer(picture(1))[1], rel=1e-4)] * 3


def test_memory_comes_back_with_every_engine_that_goes(settings: EngineSettings, gpu: Gpu) -> None:
    for _ in range(3):
        tensorrt_engine(tiny_recipe(), settings)
    before = free_mb(gpu)
    for _ in range(ROUNDS):
        tensorrt_engine(tiny_recipe(), settings).infer(picture(1))
    assert free_mb(gpu) > before - 16
