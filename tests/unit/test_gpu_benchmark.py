"""What benchmarks/gpu.py does when a GPU is there, and when one of its engines is not: on a fake one."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from gpus import FakeDriver, FakeRuntime, fake_gpu
from recipes import tiny_answer, tiny_recipe, write_tiny_recipe

from agent.engines import tensorrt as engine_tensorrt
from calibration.frame import Frame

FIGURES = ("build_s", "p50_ms", "worst", "crop_p50_ms", "whole_p50_ms")  # in the order in which they are measured
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("gpu")
    monkeypatch.setattr(found, "WARM_UP", 2)
    monkeypatch.setattr(found, "WARM_UP_S", 0.0)
    monkeypatch.setattr(found, "free_mb", lambda: 100.0)
    frames = [Frame(np.full((32, 32), level, np.uint8), 1, 1, 0, 0) for level in (100, 120)]
    monkeypatch.setattr(found, "parts", lambda *_, colour: frames)
    return found


@pytest.fixture
def recipe(tmp_path) -> Path:
    write_tiny_recipe(tmp_path / "flange.recipe", graph_f16=tiny_recipe(level=0.4).graph)
    return tmp_path / "flange.recipe"


def on_a_gpu(monkeypatch, bench: ModuleType, **answers) -> None:
    driver = FakeDriver()
    gpu, runtime = fake_gpu(driver), FakeRuntime(driver, **answers)
    for module in (importlib.import_module("gpu_engines"), engine_tensorrt):
        monkeypatch.setattr(module, "open_gpu", lambda: gpu)
        monkeypatch.setattr(module, "load_runtime", lambda name: runtime)


def test_an_engine_is_measured_on_batches_on_pixels_and_on_the_whole_path(monkeypatch, bench, recipe):
    on_a_gpu(monkeypatch, bench)
    row = bench.measured("tensorrt f16", recipe, 8)
    assert (row["engine"], row["passed"], row["n"], row["gpu_mb"]) == ("tensorrt f16, NVIDIA L4", True, 8, 0)
    for name in ("build_s", "again_s", "p50_ms", "p99_ms", "max_ms", "crop_p50_ms", "whole_p50_ms", "whole_p99_ms"):
        assert row[name] >= 0.0
    assert "note" not in row
    assert set(row) < set(bench.COLUMNS)


def test_a_plan_that_the_runtime_refuses_is_a_note_that_says_so(monkeypatch, bench, recipe):
    """As TensorRT-RTX may on a GPU that it does not name."""
    on_a_gpu(monkeypatch, bench, fails=("deserialize",))
    row = bench.measured("tensorrt_rtx f16", recipe, 8)
    assert row["note"].startswith("tensorrt 10.3.0 does not load the plan for NVIDIA L4 (compute capability 8.9)")


def test_what_was_measured_before_a_failure_stays_in_the_row(monkeypatch, bench, recipe):
    on_a_gpu(monkeypatch, bench)

    def broken(*_: object) -> None:
        raise ValueError("something that nobody thought of")

    monkeypatch.setattr(bench, "on_the_path", broken)
    row = bench.measured("tensorrt f16", recipe, 8)
    assert min(row["p50_ms"], row["crop_p50_ms"]) >= 0.0
    assert row["passed"]
    assert row["note"] == "something that nobody thought of"


def test_a_row_is_told_as_far_as_it_has_come_for_a_process_may_end_at_any_step(monkeypatch, bench, recipe):
    on_a_gpu(monkeypatch, bench)
    told: list[dict] = []
    row = bench.measured("tensorrt f16", recipe, 8, tell=lambda row: told.append(dict(row)))
    firsts = [next(n for n, so_far in enumerate(told) if name in so_far) for name in FIGURES]
    assert firsts == [0, 1, 2, 3, 4]
    assert told[-1] == row


def test_a_slow_engine_gets_fewer_calls(monkeypatch, bench):
    now_s = [0.0]

    def slow(number: int) -> None:
        now_s[0] += 1.0

    monkeypatch.setattr(bench.time, "monotonic", lambda: now_s[0])
    assert len(bench.timed(slow, 1000)) == bench.SERIES_S - 2  # two went into the warm-up
    monkeypatch.setattr(bench, "SERIES_S", 0.5)
    assert len(bench.timed(slow, 1000)) == 1


def test_a_gpu_that_has_rested_is_warmed_up_for_a_while(monkeypatch, bench):
    now_s, numbers = [0.0], []

    def quick(number: int) -> None:
        numbers.append(number)
        now_s[0] += 0.0625

    monkeypatch.setattr(bench.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(bench, "WARM_UP_S", 0.5)
    assert len(bench.timed(quick, 5)) == 5
    assert numbers == list(range(8 + 5))


def test_a_network_in_torch_is_measured_no_longer_than_there_is_time(monkeypatch, bench, recipe):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "LEAST_S", 0.0)

    class Slow:
        label = "torch f32, slow"

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
            time.sleep(0.02)
            return tiny_answer(batch)

    monkeypatch.setattr(importlib.import_module("gpu_engines"), "Torch", Slow)
    row = bench.here("torch f32", (recipe, torch.nn.Identity()), 10_000, time.monotonic() + 0.5)
    assert row["note"].startswith("not ready within 0 s")
    assert bench.here("torch f32", (recipe, torch.nn.Identity()), 1, time.monotonic() - 1)["note"].startswith(
        "not begun"
    )


ONE = b'[TRT] [E] no kernel for SM 9.0\nrow {"engine": "x", "p50_ms": 1.0}\n'
TWO = b'row {"engine": "x"}\nrow {"engine": "x", "p50_ms": 1.0}\n[TRT] [W] late words\nrow {"engine": "x", "p50'


@pytest.mark.parametrize(
    ("done", "told"),
    [
        (SimpleNamespace(returncode=-11, stdout=b""), "its process ended with -11"),
        (SimpleNamespace(returncode=-11, stdout=ONE), "its process ended with -11"),
        (subprocess.TimeoutExpired("python", 9), "not ready within"),
        (subprocess.TimeoutExpired("python", 9, output=TWO), "not ready within"),
        (SimpleNamespace(returncode=0, stdout=ONE), None),
        (SimpleNamespace(returncode=0, stdout=TWO), None),
    ],
    ids=["crashed", "crashed late", "hangs", "hangs late", "fine", "cut off"],
)
def test_an_engine_that_ends_its_process_costs_no_more_than_it_had_not_measured(monkeypatch, bench, capsys, done, told):
    def run(command, **_):
        assert command[:2] == [sys.executable, bench.__file__]
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(subprocess, "run", run)
    row = bench.in_a_process("tensorrt_rtx f16", Path("x.recipe"), 5, time.monotonic() + 60)
    output = done.stdout or b""
    assert row.get("p50_ms") == (1.0 if output else None)
    assert row.get("note", "").startswith(told or "")
    assert ("note" in row) == (told is not None)
    assert row["engine"] == ("x" if output else "tensorrt_rtx f16")
    assert ("| [TRT] [E] no kernel for SM 9.0" in capsys.readouterr().out) == (output == ONE)


def test_a_run_writes_every_row_and_goes_on_where_a_size_is_not_learnt(monkeypatch, bench, tmp_path, capsys):
    def learnt(path: Path, size: int) -> torch.nn.Module:
        if size == 512:
            raise MemoryError("512 px")
        path.parent.mkdir()
        write_tiny_recipe(path)
        return torch.nn.Identity()

    def in_a_process(name: str, *_: object) -> dict:
        whole = {} if name == "tensorrt f32" else {"whole_p50_ms": 1.9}  # it ended before
        return {"engine": name, "p50_ms": 1.5, "passed": True, **whole}

    monkeypatch.setattr(bench, "learnt", learnt)
    monkeypatch.setattr(bench, "in_a_process", in_a_process)
    out = tmp_path / "not" / "there" / "gpu.csv"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--sizes", "512", "256", "--out", str(out)])
    assert bench.main() == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert (rows[0]["size"], rows[0]["note"]) == ("512", "not learnt: 512 px")
    assert [row["engine"] for row in rows[1:]] == [
        *bench.ON_THE_GPU, *bench.EAGER, *bench.ON_THE_CPU, *bench.COMPILED
    ]  # fmt: skip
    assert rows[-1]["note"] == "torch sees no GPU"
    assert "256 px: 1.5 ms, wanted 1.0 (missed); host to verdict 1.9 ms, wanted 2.0 (met)" in capsys.readouterr().out


def test_a_run_that_hangs_ends_with_its_time():
    program = (
        f"import sys, time; sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]\n"
        "import gpu\n"
        "gpu.run = lambda arguments: time.sleep(600)\n"
        "sys.argv = ['gpu.py', '--minutes', '0.002']\n"
        "gpu.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_one_engine_alone_prints_its_row(monkeypatch, bench, recipe, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--engine", "onnxruntime", "--recipe", str(recipe), "--count", "4"])
    assert bench.main() == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix(bench.ROW))
    assert (row["engine"], row["passed"]) == ("onnxruntime f32, 2 threads", True)
