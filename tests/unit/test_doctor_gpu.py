"""What the doctor says of a station whose engine runs on a GPU."""

from __future__ import annotations

import pytest
from gpus import FakeRuntime, fake_gpu
from machines import AGENT, ROOT, case_at, grades, machine_at
from recipes import tiny_recipe

from agent.doctor import gpu as doctor_gpu
from agent.doctor.finding import Grade
from agent.doctor.recipe import engine_findings
from agent.engines import cuda
from agent.engines import tensorrt as engine_tensorrt
from agent.engines.build import plan_for

GPU = {
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 2024",
    "proc/driver/nvidia/gpus/0/information": "Model: \t\t NVIDIA L4",
}
ALL = {"tensorrt": "10.7.0", "tensorrt_rtx": "1.7.1", "pycuda": "2026.1"}


def found(tmp_path, monkeypatch, engine: str, *, gpu: bool = True, installed: dict[str, str] | None = None):
    monkeypatch.setattr(doctor_gpu, "version_of", (ALL if installed is None else installed).get)
    machine = machine_at(tmp_path, GPU if gpu else {}, cuda_driver=lambda: (12, 6) if gpu else None)
    return list(doctor_gpu.station_gpu(case_at(tmp_path, machine, f"engine: {{{engine}}}")))


def test_a_station_on_the_cpu_needs_none(tmp_path, monkeypatch):
    assert found(tmp_path, monkeypatch, "kind: auto", gpu=False) == []


def test_a_station_with_all_that_it_needs_is_fine(tmp_path, monkeypatch):
    (finding,) = found(tmp_path, monkeypatch, "kind: tensorrt")
    assert (finding.name, finding.grade, finding.found) == ("engine.gpu", Grade.OK, "NVIDIA L4 for tensorrt")


@pytest.mark.parametrize(
    ("engine", "gpu", "installed", "told"),
    [
        ("kind: tensorrt", False, ALL, "no working NVIDIA driver"),
        ("kind: tensorrt", True, {"pycuda": "2026.1"}, "TensorRT not installed"),
        (
            "kind: tensorrt, runtime: tensorrt_rtx",
            True,
            {"tensorrt": "10.7.0"},
            "TensorRT-RTX and pycuda not installed",
        ),
        ("kind: tensorrt", False, {}, "no working NVIDIA driver; TensorRT and pycuda not installed"),
    ],
)
def test_what_lacks_is_named(tmp_path, monkeypatch, engine, gpu, installed, told):  # noqa: PLR0917
    (finding,) = found(tmp_path, monkeypatch, engine, gpu=gpu, installed=installed)
    assert (finding.grade, finding.found) == (Grade.FAIL, told)


def test_where_a_cpu_engine_may_stand_in_it_is_a_warning(tmp_path, monkeypatch):
    (finding,) = found(tmp_path, monkeypatch, "kind: tensorrt, fallback: allow", gpu=False)
    assert (finding.grade, finding.found) == (Grade.WARN, "no working NVIDIA driver; a CPU engine stands in")


RECIPE = tiny_recipe(graph_f16=tiny_recipe(level=0.4).graph)


@pytest.fixture
def runtime(monkeypatch) -> FakeRuntime:
    """A machine with a GPU."""
    found = fake_gpu()
    runtime = FakeRuntime(found._driver)
    monkeypatch.setattr(engine_tensorrt, "open_gpu", lambda: found)
    monkeypatch.setattr(engine_tensorrt, "load_runtime", lambda name: runtime)
    return runtime


def asked(tmp_path, user, settings: str = ""):
    machine = machine_at(tmp_path / "root", user=user)
    return case_at(tmp_path, machine, f"engine: {{kind: tensorrt, cache: {tmp_path / 'plans'}{settings}}}")


@pytest.mark.parametrize("settings", ["", ", fallback: allow"])
def test_root_runs_no_plan_of_the_agents_user_and_is_told_how_to_ask(tmp_path, runtime, settings):
    case = asked(tmp_path, ROOT, settings)
    (finding,) = engine_findings(case, RECIPE)
    assert (finding.name, finding.grade) == ("engine", Grade.WARN)
    assert (
        finding.found == f"not looked at: the plans in {tmp_path / 'plans'} are taktsight's, and root runs none of them"
    )
    assert finding.action == f"sudo -u taktsight taktsight-agent selftest {case.file}"
    assert runtime.builds == 0
    assert not (tmp_path / "plans").exists()


def test_what_is_not_compiled_yet_is_a_warning_and_stays_so(tmp_path, runtime):
    (finding,) = engine_findings(asked(tmp_path, AGENT), RECIPE)
    assert finding.grade is Grade.WARN
    assert finding.found.startswith("not compiled for this device yet")
    assert runtime.builds == 0


def test_a_plan_that_lies_ready_is_proven(tmp_path, runtime):
    case = asked(tmp_path, AGENT)
    plan_for(RECIPE, case.station.engine, runtime, fake_gpu().facts)
    assert grades(engine_findings(case, RECIPE)) == {"engine": "ok", "engine.time": "ok", "recipe.thresholds": "ok"}


def test_without_a_gpu_the_engine_fails_or_another_stands_in(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    cuda.open_gpu.cache_clear()
    (finding,) = engine_findings(asked(tmp_path, AGENT), RECIPE)
    assert (finding.grade, "no NVIDIA driver" in finding.found) == (Grade.FAIL, True)
    assert next(engine_findings(asked(tmp_path, AGENT, ", fallback: allow"), RECIPE)).grade is Grade.OK
