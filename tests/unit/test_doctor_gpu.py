"""What the doctor says of a station whose engine runs on a GPU."""

from __future__ import annotations

import pytest
from machines import case_at, machine_at

from agent.doctor import gpu as doctor_gpu
from agent.doctor.finding import Grade

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
