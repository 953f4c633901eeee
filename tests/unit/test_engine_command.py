"""`taktsight-agent compile` and `selftest`, as they are typed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from gpus import FakeRuntime, fake_gpu
from recipes import tiny_recipe, write_tiny_recipe

from agent.__main__ import commands
from agent.engines import command as engine_command
from agent.engines import cuda
from agent.engines import tensorrt as engine_tensorrt
from agent.engines.engine import EngineSettings
from agent.engines.tensorrt import tensorrt_engine
from agent.errors import EngineError

STATION = """
station: cell1
recipe: tiny.recipe
recipes: {unsigned: allow}
takt_ms: 500
camera: {kind: simulated}
"""
F16 = tiny_recipe(level=0.4).graph


def typed(*words: object) -> Result:
    return CliRunner().invoke(commands, [str(word) for word in words])


def station(folder: Path, lines: str = "") -> Path:
    (folder / "station.yaml").write_text(STATION + lines)
    return folder / "station.yaml"


@pytest.fixture
def gpu(monkeypatch) -> FakeRuntime:
    """A machine with a GPU."""
    found = fake_gpu()
    runtime = FakeRuntime(found._driver)
    for module in (engine_command, engine_tensorrt):
        monkeypatch.setattr(module, "open_gpu", lambda: found)
        monkeypatch.setattr(module, "load_runtime", lambda name: runtime)
    return runtime


def test_selftest_shows_every_part_and_says_that_the_engine_passes(tmp_path: Path):
    write_tiny_recipe(tmp_path / "tiny.recipe")
    for source in (station(tmp_path, "engine: {kind: onnxruntime}"), tmp_path / "tiny.recipe"):
        done = typed("selftest", source, "--engine", "onnxruntime")
        assert done.exit_code == 0, done.output
        assert "onnxruntime f32, 2 threads: threshold 0.1" in done.output
        assert "part 1" in done.output
        assert "part 2" in done.output
        assert "passes: within" in done.output


def test_selftest_shows_what_is_wrong_before_it_refuses(tmp_path: Path):
    right = tiny_recipe().selftest
    write_tiny_recipe(tmp_path / "x.recipe", selftest=dataclasses.replace(right, scores=(right.scores[0], 0.3)))
    done = typed("selftest", tmp_path / "x.recipe", "--engine", "onnxruntime")
    assert isinstance(done.exception, EngineError)
    assert "pass, not reject" in done.output
    assert "on part 2, another verdict" in str(done.exception)


def images(folder: Path) -> Path:
    for label, level in (("good", 128), ("hole", 20)):
        (folder / label).mkdir(parents=True)
        for number in range(2):
            picture = np.full((32, 32), level + 5 * number, np.uint8)
            cv2.imwrite(str(folder / label / f"{number}.png"), picture)
    return folder


def test_selftest_on_images_compares_with_a_cpu_engine_folder_by_folder(tmp_path: Path, gpu):
    write_tiny_recipe(tmp_path / "x.recipe", graph_f16=F16)
    words = ["selftest", tmp_path / "x.recipe", "--engine", "tensorrt", "--cache", tmp_path / "c"]
    done = typed(*words, "--images", images(tmp_path / "images"))
    assert done.exit_code == 0, done.output
    assert "good" in done.output
    assert "hole" in done.output
    assert "tensorrt f16, NVIDIA L4 passes" in done.output
    gpu.wrong = 0.003  # 1.5 % of the map threshold
    done = typed(*words, "--images", tmp_path / "images")
    assert "tensorrt f16, NVIDIA L4 passes" in done.output
    gpu.wrong = 0.01
    assert "at most 0.02" in str(typed(*words, "--images", tmp_path / "images").exception)


def test_compile_compiles_once_for_a_recipe_and_for_a_station(tmp_path: Path, gpu):
    write_tiny_recipe(tmp_path / "tiny.recipe", graph_f16=F16)
    settings = f"engine: {{kind: tensorrt, cache: {tmp_path / 'plans'}}}"
    done = typed("compile", station(tmp_path, settings))
    assert "tiny: compiled in " in done.output
    assert "f16 on NVIDIA L4" in done.output
    assert "1 CONVOLUTION HALF" in done.output
    done = typed("compile", tmp_path / "tiny.recipe", "--cache", tmp_path / "plans")
    assert "tiny: was compiled before" in done.output
    assert gpu.builds == 2  # the network, and what makes batches of crops
    tensorrt_engine(tiny_recipe(graph_f16=F16), EngineSettings("tensorrt", "f16", cache=tmp_path / "plans"))
    assert gpu.builds == 2  # all that a start needs


def test_compile_has_nothing_to_do_for_a_station_without_a_gpu_engine(tmp_path: Path):
    write_tiny_recipe(tmp_path / "tiny.recipe")
    done = typed("compile", station(tmp_path))
    assert done.exit_code == 0
    assert "engine.kind is auto: nothing to compile" in done.output


def test_compile_without_a_driver_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    cuda.open_gpu.cache_clear()
    write_tiny_recipe(tmp_path / "tiny.recipe")
    assert "no NVIDIA driver" in str(typed("compile", tmp_path / "tiny.recipe").exception)


def test_the_trainers_command_hands_its_words_to_the_agents_and_needs_no_torch(tmp_path: Path):
    program = (
        "import sys\n"
        "import subprocess\n"
        "from types import SimpleNamespace\n"
        "from trainer.compile import compile_command\n"
        "subprocess.run = lambda words, check: print(*words[1:]) or SimpleNamespace(returncode=9)\n"
        "try:\n"
        "    compile_command(['x.recipe', '--device-cache', 'plans', '--precision', 'f16'])\n"
        "finally:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert done.stdout.splitlines() == [
        "-m agent compile x.recipe --cache plans --runtime tensorrt --precision f16",
        "False",
    ]


def test_a_source_that_is_not_there_is_named(tmp_path: Path):
    for command in ("compile", "selftest"):
        done = typed(command, tmp_path / "none.yaml")
        assert "none.yaml: not found: give a station's .yaml file or a recipe" in str(done.exception)
