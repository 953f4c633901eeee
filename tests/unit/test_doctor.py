"""The doctor as a whole, and what it says about software and GPUs."""

import ast
import base64
import json
import re
import time
from pathlib import Path

import jsonschema
import onnx
import pytest
from click.testing import CliRunner
from onnx import checker

import agent
from agent.doctor import command as doctor_command
from agent.doctor import doctor
from agent.doctor import gpu as doctor_gpu
from agent.doctor import software as doctor_software
from agent.doctor.command import doctor_command as command
from agent.doctor.command import in_one_line, summary
from agent.doctor.doctor import PROBES, STATION_PROBES, examine, probed
from agent.doctor.finding import Finding, Grade, fail, ok, report, warn
from agent.doctor.gpu import gpu
from agent.doctor.machine import Machine, within
from agent.doctor.software import (
    TINY_GRAPH,
    Installed,
    engine_findings,
    fits,
    name_clashes,
    package_versions,
    python_version,
    read_requirement,
)
from agent.engines.engine import ENGINES
from agent.errors import EngineError
from calibration.console import console
from calibration.errors import MissingPackage
from tests.machines import NOON, case_at, grades, machine_at, only

SCHEMA = json.loads((Path(agent.__file__).parent / "interface" / "doctor.json").read_text(encoding="utf-8"))
PAGE = (Path(agent.__file__).parents[1] / "docs" / "doctor.md").read_text(encoding="utf-8")


def raises(error):
    def probe(*_):
        yield ok("first", "seen")
        raise error

    return probe


def test_a_probe_that_raises_is_a_failure_of_its_name_and_what_it_found_before_holds():
    found = probed("broken", raises(RuntimeError("no such bus")))
    assert grades(found) == {"first": "ok", "broken": "fail"}
    assert found[1].found == "RuntimeError: no such bus"


def test_a_probe_that_hangs_is_left_behind():
    def hangs():
        yield ok("first", "seen")
        time.sleep(5)

    began = time.monotonic()
    found = probed("slow disk", hangs, timeout_s=0.1)
    assert time.monotonic() - began < 2
    assert grades(found) == {"first": "ok", "slow disk": "fail"}
    assert "no answer within 0.1 s" in found[1].found


@pytest.mark.parametrize("probe", [*PROBES, *STATION_PROBES])
def test_whatever_a_probe_raises_the_others_are_still_asked(probe, tmp_path, monkeypatch):
    for table in ("PROBES", "STATION_PROBES"):
        probes = {name: lambda *_, name=name: iter([ok(name, "seen")]) for name in getattr(doctor, table)}
        if probe in probes:
            probes[probe] = raises(MemoryError())
        monkeypatch.setattr(doctor, table, probes)
    machine = machine_at(tmp_path)
    found = list(examine(case_at(tmp_path, machine).file, machine))
    assert {finding.name for finding in found} >= {*PROBES, *STATION_PROBES, "station"}
    assert [finding.name for finding in found if finding.grade is Grade.FAIL] == [probe]


def test_a_call_that_hangs_ends_in_a_timeout_and_what_it_raises_comes_through():
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        within(0.05, lambda: time.sleep(2))
    with pytest.raises(ZeroDivisionError):
        within(1, lambda: 1 / 0)
    assert within(1, lambda: 7) == 7


@pytest.mark.parametrize(("wanted", "action"), [("", "do this"), ("that", ""), ("", "")])
def test_no_finding_leaves_a_person_alone(wanted, action):
    with pytest.raises(ValueError, match="what to do"):
        Finding("lamp", Grade.WARN, "dark", wanted, action)


def test_settings_that_cannot_be_used_fail_and_nothing_else_of_the_station_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PROBES", {})
    file = tmp_path / "station.yaml"
    file.write_text("station: cell7\ntakt_ms: fast\n")
    (found,) = examine(file, machine_at(tmp_path))
    assert (found.name, found.grade) == ("station", Grade.FAIL)
    assert "takt_ms: 'fast' found" in found.found
    (found,) = examine(tmp_path / "absent.yaml", machine_at(tmp_path))
    assert "No such file" in found.found


FINDINGS = [
    ok("lamp", "bright"),
    warn("cable", "loose [x]", "tight", "push it in"),
    fail("engine", "none", "one", "pip install 'taktsight[openvino]'"),
]


def test_the_report_is_what_its_schema_says():
    told = report(FINDINGS, version="0.1.0", station_file="a.yaml", now_utc=NOON)
    jsonschema.validate(told, SCHEMA)
    assert told["creationTime"] == "2026-11-22T12:00:00.000Z"
    assert told["counts"] == {"ok": 1, "warn": 1, "fail": 1}
    assert told["isFine"] is False
    assert report(FINDINGS[:2], version="0.1.0", station_file=None, now_utc=NOON)["isFine"] is True
    told["findings"][1]["action"] = ""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(told, SCHEMA)


@pytest.fixture
def asked(monkeypatch):
    """Returns a function that runs the command over given findings."""
    monkeypatch.setattr(doctor_command.os, "nice", lambda _: 0)

    def run(findings, *arguments):
        monkeypatch.setattr(doctor_command, "examine", lambda station: iter(findings))
        return CliRunner().invoke(command, arguments, standalone_mode=False)

    return run


def test_json_is_one_object_and_the_exit_code_tells_of_failures_alone(asked):
    done = asked(FINDINGS, "--json")
    jsonschema.validate(json.loads(done.output), SCHEMA)
    assert done.exit_code == 1
    assert asked(FINDINGS[:2], "--json").exit_code == 0
    assert asked(FINDINGS[:2]).exit_code == 0
    assert asked(FINDINGS).exit_code == 1


def test_without_a_terminal_a_finding_is_a_line_that_grep_finds(capsys):
    with console.capture() as printed:
        for finding in FINDINGS:
            doctor_command.show(finding)
    assert printed.get().splitlines() == [
        "ok    lamp: bright",
        "warn  cable: loose [x] | wanted: tight | do: push it in",
        "fail  engine: none | wanted: one | do: pip install 'taktsight[openvino]'",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_what_to_do_stands_below_and_no_line_is_wider_than_it(width, monkeypatch):
    long = warn("camera.rmem_max", "212992 bytes", "33554432: " + "packets are lost " * 8, "sysctl --system")
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", None)
    monkeypatch.setattr(console, "_width", width)
    monkeypatch.setattr(console, "_height", 25)
    with console.capture() as printed:
        doctor_command.show(long)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in printed.get().splitlines()]
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["warn", "camera.rmem_max", "212992", "bytes"]
    assert lines[1].split()[0] == "wanted"
    assert lines[-1].split() == ["do", "sysctl", "--system"]
    column = lines[0].index("212992")
    assert all(line[column] != " " and not line[column - 2 : column].strip() for line in lines)


def test_the_summary_names_what_to_see_to():
    assert summary(FINDINGS) == "1 ok, 1 warn (cable), 1 fail (engine)"
    assert in_one_line(FINDINGS[0]) == "lamp: bright"


# software


@pytest.mark.parametrize(
    ("found", "wanted", "holds"),
    [
        ("1.26.4", ">=1.26", True),
        ("1.9", ">=1.26", False),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("3.0", ">=2,<3", False),
        ("2.9.9", ">=2,<3", True),
        ("5.0.0.93", ">=4.10", True),
        ("1.0.0", "==1", True),
        ("7", "", True),
        ("3.11.2", ">3.11.2", False),
        ("3.11.2", "<=3.11.2", True),
    ],
)
def test_a_version_is_compared_by_its_numbers(found, wanted, holds):
    assert fits(found, wanted) is holds


def test_requirements_are_read_with_their_extra():
    read = read_requirement('torch==2.13.0; extra == "trainer"')
    assert (read.name, read.wanted, read.extra) == ("torch", "==2.13.0", "trainer")
    read = read_requirement("opencv-python-headless>=4.10")
    assert (read.name, read.wanted, read.extra) == ("opencv-python-headless", ">=4.10", "")
    read = read_requirement("psycopg[binary] (>=3.2) ; python_version < '4'")
    assert (read.name, read.wanted, read.extra) == ("psycopg", ">=3.2", "python_version < '4'")


def here(requirements, versions, owners=None):
    return Installed(tuple(requirements), versions.get, owners or {})


def test_a_needed_package_that_is_missing_or_old_fails_one_of_an_extra_only_warns():
    found = list(
        package_versions(
            here(
                [
                    "numpy>=1.26",
                    "rich>=13.7",
                    'genicam==1.6.0; extra == "genicam"',
                    'torch; extra == "trainer"',
                    "click",
                ],
                {"rich": "12.0", "genicam": "1.5.1", "click": "8.1"},
            )
        )
    )
    assert grades(found) == {
        "package numpy": "fail",
        "package rich": "fail",
        "package genicam": "warn",
        "packages": "ok",
    }
    assert only(found, "packages").found == "click 8.1"
    assert only(found, "package genicam").action == "pip install 'genicam==1.6.0'"


def test_a_package_of_our_name_in_another_distribution_fails():
    assert grades(name_clashes(here([], {}, {"agent": ["taktsight"]}))) == {"names": "ok"}
    (found,) = name_clashes(here([], {}, {"trainer": ["taktsight", "trainer"]}))
    assert (found.name, found.grade) == ("package trainer", Grade.FAIL)
    assert found.action.startswith("pip uninstall trainer,")


def test_python_is_held_against_what_taktsight_asks_for():
    assert python_version("3.11.2", ">=3.11").grade is Grade.OK
    assert python_version("3.10.9", ">=3.11").grade is Grade.FAIL


def test_the_tiny_graph_is_the_one_that_its_comment_describes():
    model = onnx.load_model_from_string(TINY_GRAPH)
    checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Add", "ReduceMean"]
    assert [list(node.input) for node in model.graph.node] == [["image", "image"], ["anomaly_map"]]
    assert model.opset_import[0].version == 17
    assert base64.b64encode(TINY_GRAPH)  # bytes, not text


def test_the_installed_engines_compute():
    assert set(grades(engine_findings(ENGINES)).values()) == {"ok"}


def engine_that(answer):
    class Engine:
        label = "fake"

        def infer(self, batch):
            return answer(batch)

    return lambda graph, settings: Engine()


def lacking(error):
    def open_it(graph, settings):
        raise error

    return open_it


@pytest.mark.parametrize(
    ("engine", "grade"),
    [
        (engine_that(lambda batch: (2 * batch[0, 0], 63.0)), "ok"),
        (engine_that(lambda batch: (2 * batch[0, 0], 62.0)), "fail"),
        (engine_that(lambda batch: (batch[0, 0], 63.0)), "fail"),
        (lacking(ImportError("libtbb.so.12: cannot open shared object file")), "fail"),
        (lacking(EngineError("cannot compile")), "fail"),
    ],
)
def test_an_engine_that_does_not_compute_fails(engine, grade):
    assert grades(engine_findings({"openvino": engine})) == {"engine openvino": grade}


def test_a_machine_without_any_engine_fails():
    assert grades(engine_findings({"openvino": lacking(MissingPackage("not installed"))})) == {"engines": "fail"}


def test_the_machine_itself_is_told():
    machine = Machine()
    found = [*doctor_software.python(machine), *doctor_software.packages(machine), *doctor_software.names(machine)]
    assert {"python", "taktsight", "platform", "packages", "names"} <= set(grades(found))


# GPU

MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\nGCC version: 12"
OLD_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023"
CARD = {"proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA L4\nIRQ:   16"}
ON_THE_BUS = {"sys/bus/pci/devices/0/vendor": "0x10de", "sys/bus/pci/devices/0/class": "0x030200"}


@pytest.mark.parametrize(
    ("files", "cuda", "grade", "text"),
    [
        ({}, None, "ok", "none"),
        (ON_THE_BUS, None, "warn", "without its driver"),
        ({"sys/bus/pci/devices/0/vendor": "0x10de", "sys/bus/pci/devices/0/class": "0x0403"}, None, "ok", "none"),
        ({"proc/driver/nvidia/version": MODULE}, None, "warn", "libcuda.so.1 is not found"),
        ({}, (12, 4), "warn", "kernel module is not loaded"),
        ({"proc/driver/nvidia/version": MODULE, **CARD}, (12, 6), "ok", "NVIDIA L4, driver 560.35.03, CUDA up to 12.6"),
        ({"proc/driver/nvidia/version": OLD_MODULE}, (12, 2), "ok", "an NVIDIA GPU, driver 535.54.03"),
    ],
)
def test_a_gpu_has_module_and_library_or_nothing_at_all(tmp_path, files, cuda, grade, text):
    (found,) = gpu(machine_at(tmp_path, files, cuda_driver=lambda: cuda))
    assert str(found.grade) == grade
    assert text in found.found


def test_a_station_whose_engine_needs_a_gpu_fails_without_one(tmp_path, monkeypatch):
    def station_gpu(**answers):
        machine = machine_at(tmp_path, **answers)
        return list(doctor_gpu.station_gpu(case_at(tmp_path, machine)))

    assert station_gpu() == []
    monkeypatch.setattr(doctor_gpu, "NEEDS_GPU", ("auto",))
    (found,) = station_gpu()
    assert (found.name, found.grade) == ("engine.gpu", Grade.FAIL)
    assert "no working NVIDIA driver; TensorRT and pycuda not installed" in found.found
    monkeypatch.setattr(doctor_gpu, "version_of", {"tensorrt": "10.7.0", "pycuda": "2026.1"}.get)
    (found,) = station_gpu(files={"proc/driver/nvidia/version": MODULE, **CARD}, cuda_driver=lambda: (12, 6))
    assert found.grade is Grade.OK


# the page


def names_in_the_code():
    """Yield the names of findings as the sources spell them, those with a changing end up to there."""
    for path in sorted(Path(agent.__file__).parent.glob("doctor/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "ok",
                "warn",
                "fail",
                "grade",
                "_expiry",
            ):
                name = node.args[0]
                first = name.values[0] if isinstance(name, ast.JoinedStr) else name
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield first.value.strip(" .")


def test_every_finding_is_explained_on_the_page():
    listed = {
        word for line in PAGE.splitlines() if line.startswith("| `") for word in line.split("|")[1].split("`")[1::2]
    }
    names = set(names_in_the_code()) - {"broker"} | {"broker", "broker.address", "broker.port", "broker.key_file"}
    assert len(names) > 40
    assert {name for name in names if name not in {word.split(" ")[0] for word in listed}} == set()
