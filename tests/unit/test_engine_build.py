"""A plan is compiled once, found again while all that it depends on is the same, and never used when it was changed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpus import FakeDriver, FakeRuntime, fake_gpu
from recipes import tiny_recipe

from agent.engines import build as engine_build
from agent.engines.build import KEPT_PLANS, discard, graph_of, is_compiled, load_runtime, parsed, plan_for
from agent.engines.engine import EngineSettings
from agent.errors import EngineError
from calibration.errors import MissingPackage

FACTS = fake_gpu().facts


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    return EngineSettings("tensorrt", "f16", cache=tmp_path / "engines")


@pytest.fixture
def recipe():
    return tiny_recipe(graph_f16=tiny_recipe(level=0.4).graph, digest="d" * 64)


def files(settings: EngineSettings) -> dict[str, Path]:
    return {path.suffix: path for path in settings.cache.iterdir()}


def test_a_plan_is_compiled_once(recipe, settings):
    runtime = FakeRuntime()
    first, second = (plan_for(recipe, settings, runtime, FACTS) for _ in range(2))
    assert (first.is_new, second.is_new, runtime.builds) == (True, False, 1)
    assert (first.data, first.key, first.facts) == (second.data, second.key, second.facts)


def test_whether_a_plan_lies_ready_is_told_without_building_or_writing_one(recipe, settings):
    runtime = FakeRuntime()
    assert not is_compiled(recipe, settings, runtime, FACTS)
    assert not settings.cache.exists()
    assert runtime.builds == 0
    plan_for(recipe, settings, runtime, FACTS)
    before = {path: path.stat().st_mtime_ns for path in settings.cache.iterdir()}
    assert is_compiled(recipe, settings, runtime, FACTS)
    assert not is_compiled(recipe, settings, FakeRuntime(version="10.9.0"), FACTS)
    assert {path: path.stat().st_mtime_ns for path in settings.cache.iterdir()} == before
    settings.cache.chmod(0o777)
    with pytest.raises(EngineError, match="others may write there"):
        is_compiled(recipe, settings, runtime, FACTS)


def test_what_was_compiled_is_told_beside_it(recipe, settings):
    plan_for(recipe, settings, FakeRuntime(), FACTS)
    told = json.loads(files(settings)[".json"].read_text())
    assert told["key"]["runtime"] == "tensorrt 10.3.0"
    assert told["key"]["driver"] == FACTS.driver
    assert told["facts"]["recipe"] == recipe.digest
    assert told["facts"]["layers"] == {"CONVOLUTION HALF": 1}
    assert settings.cache.stat().st_mode & 0o777 == 0o700


def test_networks_are_strongly_typed_and_float32_stays_float32(recipe, settings):
    runtime = FakeRuntime()
    plan_for(recipe, settings, runtime, FACTS)
    assert runtime.asked["flags"] == 1 << 3
    assert runtime.asked["cleared"] == "TF32"
    assert runtime.asked["workspace"] == 1024 * 2**20


def test_tensorrt_rtx_is_asked_for_plans_that_a_graph_can_hold_and_for_turing_by_name(recipe, settings):
    class Rtx(FakeRuntime):
        BuilderFlag = SimpleNamespace(TF32="TF32", REQUIRE_USER_ALLOCATION="REQUIRE_USER_ALLOCATION")
        ComputeCapability = SimpleNamespace(SM75="SM75")

    runtime = Rtx()
    plan_for(recipe, settings, runtime, FACTS)
    assert runtime.asked["set"] == "REQUIRE_USER_ALLOCATION"
    assert "capabilities" not in runtime.asked
    plan_for(recipe, settings, runtime, dataclasses.replace(FACTS, compute_capability="7.5"))
    assert (runtime.asked["capabilities"], runtime.asked["config"].num_compute_capabilities) == ([("SM75", 0)], 1)


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": {"name": "NVIDIA L40S"}},
        {"gpu": {"compute_capability": "9.0"}},
        {"gpu": {"driver": "570.1, CUDA 12.8"}},
        {"version": "10.9.0"},
        {"settings": {"precision": "f32"}},
        {"settings": {"workspace_mb": 64}},
        {"recipe": {"graph_f16": tiny_recipe(level=0.3).graph}},
    ],
    ids=str,
)
def test_what_a_plan_depends_on_compiles_anew_when_it_changes(recipe, settings, change):
    plan_for(recipe, settings, FakeRuntime(), FACTS)
    recipe = dataclasses.replace(recipe, **change.get("recipe", {}))
    settings = dataclasses.replace(settings, **change.get("settings", {}))
    facts = dataclasses.replace(FACTS, **change.get("gpu", {}))
    plan = plan_for(recipe, settings, FakeRuntime(version=change.get("version", "10.3.0")), facts)
    assert plan.is_new


def test_a_plan_that_the_builder_was_asked_for_otherwise_is_made_anew(recipe, settings, monkeypatch):
    plan_for(recipe, settings, FakeRuntime(), FACTS)
    monkeypatch.setattr(engine_build, "ASKED", engine_build.ASKED + 1)
    assert plan_for(recipe, settings, FakeRuntime(), FACTS).is_new


def test_another_threshold_compiles_nothing(recipe, settings):
    plan_for(recipe, settings, FakeRuntime(), FACTS)
    limits = dataclasses.replace(recipe.thresholds, score=0.5)
    assert not plan_for(
        dataclasses.replace(recipe, thresholds=limits, digest=""), settings, FakeRuntime(), FACTS
    ).is_new


@pytest.mark.parametrize("suffix", [".plan", ".json"])
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-5], lambda data: b"", lambda data: data[:20] + b"x" + data[21:], lambda data: b"[]"],
    ids=["truncated", "empty", "tampered", "foreign"],
)
def test_a_damaged_plan_is_compiled_anew_and_never_returned(recipe, settings, suffix, damage, caplog):
    good = plan_for(recipe, settings, FakeRuntime(), FACTS)
    path = files(settings)[suffix]
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = plan_for(recipe, settings, FakeRuntime(), FACTS)
    assert found.is_new
    assert found.data == good.data
    assert "compiled anew" in caplog.text
    assert not plan_for(recipe, settings, FakeRuntime(), FACTS).is_new


def test_a_plan_of_another_key_under_this_name_is_not_used(recipe, settings):
    plan_for(recipe, settings, FakeRuntime(), FACTS)
    path = files(settings)[".json"]
    told = json.loads(path.read_text())
    told["key"]["gpu"] = "another"
    path.write_text(json.dumps(told))
    assert plan_for(recipe, settings, FakeRuntime(), FACTS).is_new


def test_a_discarded_plan_is_gone(recipe, settings):
    plan = plan_for(recipe, settings, FakeRuntime(), FACTS)
    discard(settings.cache, plan.key)
    assert not any(path.suffix in (".plan", ".json") for path in settings.cache.iterdir())


def test_a_folder_in_which_others_may_write_is_refused(recipe, settings):
    settings.cache.mkdir(mode=0o777)
    settings.cache.chmod(0o777)
    with pytest.raises(EngineError, match="others may write there, and a plan is as good as a program: chmod 700"):
        plan_for(recipe, settings, FakeRuntime(), FACTS)


def test_a_folder_of_another_user_is_refused_by_root_too(recipe, settings):
    if os.geteuid() != 0:
        pytest.skip("giving a folder away needs root")
    settings.cache.mkdir(mode=0o700)
    os.chown(settings.cache, 12345, 12345)
    with pytest.raises(EngineError, match=r"belongs to uid 12345, .*: run this as that user \(sudo -u taktsight"):
        plan_for(recipe, settings, FakeRuntime(), FACTS)


def test_a_folder_that_cannot_be_made_is_told(recipe, settings, tmp_path: Path):
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(EngineError, match=r"engines: File exists: set engine\.cache to a folder"):
        plan_for(recipe, settings, FakeRuntime(), FACTS)


def test_a_full_disk_leaves_no_half_plan(recipe, settings, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EngineError, match=r"No space left on device: free the disk, or set engine\.cache"):
        plan_for(recipe, settings, FakeRuntime(), FACTS)
    assert list(settings.cache.iterdir()) == []


def test_a_few_plans_are_kept_and_those_used_last_stay(recipe, settings):
    for number in range(KEPT_PLANS + 2):
        graph = tiny_recipe(level=0.1 + number / 100).graph
        plan_for(dataclasses.replace(recipe, graph_f16=graph), settings, FakeRuntime(), FACTS)
        oldest = dataclasses.replace(recipe, graph_f16=tiny_recipe(level=0.1).graph)
        assert number == 0 or not plan_for(oldest, settings, FakeRuntime(), FACTS).is_new
    assert len(list(settings.cache.glob("*.plan"))) == len(list(settings.cache.glob("*.json"))) == KEPT_PLANS


def test_the_second_build_on_a_gpu_begins_with_the_timings_of_the_first(recipe, settings):
    runtime = FakeRuntime()
    plan_for(recipe, settings, runtime, FACTS)
    assert runtime.asked["known"] == b""
    plan_for(recipe, dataclasses.replace(settings, precision="f32"), runtime, FACTS)
    assert runtime.asked["cache"] == b"timings"


@pytest.mark.parametrize("timings", [b"garbage", b"another GPU's"])
def test_timings_that_cannot_be_used_are_left_aside(recipe, settings, timings):
    runtime = FakeRuntime()
    plan_for(recipe, settings, runtime, FACTS)
    (path,) = settings.cache.glob("*.timing")
    path.write_bytes(timings)
    plan_for(recipe, dataclasses.replace(settings, precision="f32"), runtime, FACTS)
    assert runtime.asked["cache"] == b""
    assert path.read_bytes() == b"timings"


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("parse", "tensorrt 10.3.0 does not understand the graph: no importer for Foo: report this"),
        ("build", r"tensorrt 10.3.0 could not build the plan: .* raise engine\.workspace_mb"),
        ("Builder", "tensorrt 10.3.0 cannot build here: check the driver with nvidia-smi"),
    ],
)
def test_what_the_runtime_refuses_is_told(recipe, settings, fails, message):
    with pytest.raises(EngineError, match=message):
        plan_for(recipe, settings, FakeRuntime(fails=(fails,)), FACTS)
    assert not list(settings.cache.glob("*.plan"))


def test_a_graph_of_open_size_is_refused():
    with pytest.raises(EngineError, match="leaves the size of image open"):
        parsed(FakeRuntime(shapes={"image": (-1, 1, 32, 32)}), b"graph")


def test_a_recipe_without_a_graph_in_half_precision_says_why():
    with pytest.raises(EngineError, match=r"no graph in half precision \(it was trained before there were any\)"):
        graph_of(tiny_recipe(), "f16")
    told = tiny_recipe(training={"half_precision": {"chosen": "", "tried": {}}})
    with pytest.raises(
        EngineError, match=r"\(none was close enough to float32\): set engine\.precision: f32, or train"
    ):
        graph_of(told, "f16")
    assert graph_of(told, "f32") == told.graph
    with pytest.raises(EngineError, match="tensorrt runs f16 and f32, bf16 found"):
        graph_of(told, "bf16")


def test_a_runtime_that_is_not_installed_names_the_extra_and_a_broken_one_says_so(monkeypatch):
    def absent():
        raise ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")

    def broken():
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setitem(engine_build.IMPORTS, "tensorrt", absent)
    with pytest.raises(MissingPackage, match=r"tensorrt is not installed: pip install 'taktsight\[tensorrt\]'"):
        load_runtime("tensorrt")
    monkeypatch.setitem(engine_build.IMPORTS, "tensorrt", broken)
    with pytest.raises(EngineError, match=r"tensorrt cannot be loaded: libnvinfer\.so\.10"):
        load_runtime("tensorrt")


def test_a_driver_of_another_name_is_another_gpu(recipe, settings):
    """What is compiled says for which GPU it is, so the key must keep two apart."""
    plans = [
        plan_for(recipe, settings, FakeRuntime(FakeDriver(name)), dataclasses.replace(FACTS, name=name))
        for name in ("NVIDIA L4", "Orin")
    ]
    assert plans[0].data != plans[1].data
