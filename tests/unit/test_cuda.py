"""What the driver says reaches people with what to do about it, and the GPU is never left current."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gpus import FakeDriver, FakeError, FakeLibrary, fake_gpu

from agent.engines import cuda
from agent.engines.cuda import ADVICE, NON_BLOCKING, PycudaGpu, open_gpu, probe_driver, told, told_by_pycuda
from agent.errors import EngineError

MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 21:39:15 UTC 2024\n"


def library(**facts) -> FakeLibrary:
    return FakeLibrary(FakeDriver(), **facts)


def test_a_machine_without_a_driver_is_told_what_to_install():
    def absent(name: str):
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(EngineError, match=r"no NVIDIA driver: libcuda\.so\.1 cannot be loaded: install the driver, or"):
        probe_driver(absent)


def test_a_driver_says_how_many_gpus_there_are():
    assert probe_driver(lambda _: library(gpus=2)) == 2


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (
            {"gpus": 0},
            r"cuDeviceGetCount: CUDA status 100 \(no CUDA-capable .*\): no GPU is visible: check nvidia-smi",
        ),
        ({"statuses": {"cuInit": 803}}, r"cuInit: CUDA status 803 \(system has unsupported .*\): restart the machine"),
        ({"statuses": {"cuInit": 100}}, "cuInit: CUDA status 100"),
        ({"statuses": {"cuDeviceGetCount": 3}}, "cuDeviceGetCount: CUDA status 3"),
    ],
)
def test_a_driver_that_cannot_be_used_is_told_with_the_way_out(facts, message):
    with pytest.raises(EngineError, match=message):
        probe_driver(lambda _: library(**facts))


def test_every_status_is_told_with_its_number_and_an_advice():
    for status, (name, advice) in ADVICE.items():
        assert told("cuCall", status) == f"cuCall: CUDA status {status} ({name}): {advice}"
    assert "CUDA status 12345" in told("cuCall", 12345)


def test_what_pycuda_says_in_words_finds_its_status():
    found = told_by_pycuda(FakeError("cuMemAlloc failed: out of memory"))
    assert found.startswith("cuMemAlloc: CUDA status 2 (out of memory): end what else uses the GPU")
    for status, (name, _) in ADVICE.items():
        assert told_by_pycuda(FakeError(f"cuCall failed: {name}")) == told("cuCall", status)
    assert told_by_pycuda(FakeError("cuFoo failed: something new")) == "cuFoo failed: something new: restart the agent"


@pytest.mark.parametrize(("module", "driver"), [(MODULE, "560.35.03, CUDA 12.6"), (None, "CUDA 12.6")])
def test_a_gpu_tells_what_plans_depend_on(tmp_path: Path, module, driver):
    if module is not None:
        (tmp_path / "version").write_text(module)
    fake = FakeDriver()
    facts = PycudaGpu(fake, FakeLibrary(fake), tmp_path / "version").facts
    assert (facts.name, facts.compute_capability, facts.driver) == ("NVIDIA L4", "8.9", driver)
    assert facts.memory_mb == 23034


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuCtxPushCurrent", "cuStreamCreate"])
def test_a_gpu_that_cannot_be_opened_is_told(call):
    busy = "CUDA-capable device(s) is/are busy or unavailable"
    with pytest.raises(EngineError, match=rf"{call}: CUDA status 46 \(.*\): another process has the GPU for itself"):
        fake_gpu(FakeDriver(fails={call: busy}))


def test_the_gpu_is_current_for_a_moment_only():
    driver = FakeDriver()
    gpu = fake_gpu(driver)
    with gpu.current():
        assert driver.depth == 1
    with pytest.raises(KeyError), gpu.current():
        raise KeyError
    driver.fails["cuMemAlloc"] = "out of memory"
    with pytest.raises(EngineError, match="out of memory"), gpu.current():
        gpu.memory(4)
    assert driver.depth == 0


def test_another_engine_has_a_stream_of_its_own_on_the_same_gpu():
    driver = FakeDriver()
    gpu = fake_gpu(driver)
    other = gpu.beside()
    assert (gpu.stream, other.stream) == (77, 78)
    assert other.facts == gpu.facts
    assert driver.depth == 0


def test_no_stream_waits_for_what_others_do_on_the_default_one():
    driver = FakeDriver()
    fake_gpu(driver).beside()
    assert driver.flags == [NON_BLOCKING] * 2


def test_pycuda_of_another_cuda_is_told_and_what_to_do(monkeypatch):
    def broken(name: str):
        raise ImportError("_driver.so: undefined symbol: cuCtxCreate_v4")

    open_gpu.cache_clear()
    monkeypatch.setattr(cuda, "probe_driver", lambda: 1)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cuda.importlib, "import_module", broken)
    with pytest.raises(EngineError, match=r"pycuda cannot be loaded: .*cuCtxCreate_v4: build it anew on this machine"):
        open_gpu()


def test_what_goes_up_comes_down():
    gpu = fake_gpu()
    with gpu.current():
        up, down, memory = gpu.page_locked((2, 3)), gpu.page_locked((2, 3)), gpu.memory(24)
        assert not up.any()
        up[:] = np.arange(6).reshape(2, 3)
        gpu.upload(memory, up)
        gpu.download(down, memory)
        gpu.wait()
    np.testing.assert_array_equal(down, up)


def captured(library: FakeLibrary, driver: FakeDriver, work) -> tuple:
    gpu = fake_gpu(driver, library)
    with gpu.current():
        return gpu.captured(work), gpu


def test_a_captured_graph_does_its_work_when_it_is_launched_and_not_before():
    driver, done = FakeDriver(), []
    library = FakeLibrary(driver)
    replay, _ = captured(library, driver, lambda: driver.put(77, lambda: done.append(1)))
    assert done == []
    replay()
    replay()
    assert done == [1, 1]
    del replay
    assert library.destroyed == 1


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_driver_that_refuses_graphs_does_without(call):
    driver = FakeDriver()
    replay, _ = captured(FakeLibrary(driver, statuses={call: 900}), driver, lambda: None)
    assert replay is None
    assert driver.waiting == {}


def test_a_driver_of_before_graphs_does_without():
    driver = FakeDriver()

    class Old(FakeLibrary):
        @property
        def cuGraphInstantiateWithFlags(self):  # noqa: N802
            raise AttributeError

    assert captured(Old(driver), driver, lambda: None)[0] is None
    assert driver.waiting == {}


@pytest.mark.parametrize("error", [EngineError("refused"), FakeError("cuMemcpy failed: stream capture unsupported")])
def test_work_that_cannot_be_captured_ends_the_capture(error):
    def work():
        raise error

    driver = FakeDriver()
    assert captured(FakeLibrary(driver), driver, work)[0] is None
    assert driver.waiting == {}


def test_a_launch_that_fails_says_so():
    driver = FakeDriver()
    replay, _ = captured(FakeLibrary(driver, statuses={"cuGraphLaunch": 719}), driver, lambda: None)
    with pytest.raises(EngineError, match=r"cuGraphLaunch: CUDA status 719 \(.*\): restart the agent"):
        replay()
