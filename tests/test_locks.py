"""The lock files and pyproject.toml agree: all that is needed is pinned, fits, and carries hashes of wheels."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parents[1]
LOCKS = PROJECT / "locks"
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BESIDE_THE_LINE = ("genicam", "modbus", "gpio")  # cameras and gates: a trainer has none
EXTRAS = {
    "agent-openvino": ("openvino", *BESIDE_THE_LINE),
    "agent-onnxruntime": ("onnxruntime", *BESIDE_THE_LINE),
    "agent-genicam": ("genicam",),
    "trainer": ("trainer", "openvino"),
    "trainer-cpu": ("trainer", "openvino"),
}
FROM_PYTORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # the CPU's torch is not on PyPI: installed by hand, first
PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # PYTHONS in the Makefile
MACHINES = ("x86_64", "aarch64")


def blocks(text: str) -> list[tuple[Requirement, list[str]]]:
    """Return each requirement of a lock file with its hashes."""
    found: list[tuple[Requirement, list[str]]] = []
    for line in text.splitlines():
        content = line.split(" #")[0].strip().removesuffix("\\").strip()
        if content.startswith("--hash="):
            found[-1][1].append(content.removeprefix("--hash="))
        elif content and not content.startswith("#"):
            found.append((Requirement(content), []))
    return found


def lock(name: str) -> list[tuple[Requirement, list[str]]]:
    return blocks((LOCKS / f"{name}.txt").read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    """Return versions by name, and fail where one is not pinned exactly, or two are given."""
    found: dict[str, str] = {}
    for requirement, _ in lock(name):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", str(requirement)
        assert "*" not in specifier.version, str(requirement)
        assert requirement.name not in found, str(requirement)
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def wanted(name: str) -> list[Requirement]:
    texts = list(PYPROJECT["dependencies"])
    for extra in EXTRAS[name]:
        texts += PYPROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def installed_on(name: str, python: str, machine: str) -> set[str]:
    """Return what pip would install from a lock file on a machine with Linux."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    environment |= {"platform_machine": machine, "sys_platform": "linux", "implementation_name": "cpython"}
    environment["platform_python_implementation"] = "CPython"
    return {
        canonicalize_name(requirement.name)
        for requirement, _ in lock(name)
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


@pytest.mark.parametrize("name", EXTRAS)
def test_what_pyproject_asks_for_is_locked_at_a_version_that_fits(name):
    locked = pins(name)
    for requirement in wanted(name):
        package = canonicalize_name(requirement.name)
        if name == "trainer-cpu" and FROM_PYTORCH.fullmatch(package):
            assert package not in locked
            continue
        assert package in locked, f"{package}: not in {name}.txt: run `make lock`"
        assert Version(locked[package]) in requirement.specifier, f"{package} {locked[package]}: run `make lock`"


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("python", PYTHONS)
def test_it_is_installed_on_every_python_that_we_name(name, python):
    there = installed_on(name, python, "x86_64")
    expected = {canonicalize_name(requirement.name) for requirement in wanted(name)}
    missing = expected - there
    assert not [package for package in missing if name != "trainer-cpu" or not FROM_PYTORCH.fullmatch(package)]


@pytest.mark.parametrize("name", [*EXTRAS, "tools"])
def test_every_pin_has_hashes(name):
    found = lock(name)
    assert len(found) >= 15
    assert [str(requirement) for requirement, hashes in found if not hashes] == []
    bad = [one for _, hashes in found for one in hashes if not re.fullmatch(r"sha256:[0-9a-f]{64}", one)]
    assert bad == []


@pytest.mark.parametrize("name", [*EXTRAS, "tools"])
def test_no_lock_names_a_place_where_packages_come_from(name):
    text = (LOCKS / f"{name}.txt").read_text(encoding="utf-8")
    assert re.findall(r"https?://\S+|file:\S+|--(?:extra-)?index\S*|--find-links\S*| @ \S+", text) == []
    assert [requirement.url for requirement, _ in lock(name) if requirement.url] == []


def test_one_package_has_one_version_in_all_locks():
    """A recipe is trained and judged with the same numpy, OpenCV and ONNX Runtime."""
    whole, lineside = pins("trainer"), pins("agent-openvino")
    for name in ("trainer-cpu", "agent-openvino", "agent-onnxruntime", "agent-genicam"):
        others = pins(name)
        for every in (whole, lineside):
            assert {package: pin for package, pin in others.items() if every.get(package, pin) != pin} == {}
        assert set(others) - set(whole) <= {"genicam", "harvesters", "pymodbus", "gpiod"}


def test_a_trainer_for_the_cpu_lacks_what_comes_from_pytorch_and_nothing_else():
    whole, lean = pins("trainer"), pins("trainer-cpu")
    missing = set(whole) - set(lean)
    assert "torch" in missing
    assert [package for package in missing if not FROM_PYTORCH.fullmatch(package)] == []
    assert [package for package in lean if FROM_PYTORCH.fullmatch(package)] == []


@pytest.mark.parametrize("name", ["agent-openvino", "agent-onnxruntime", "agent-genicam"])
def test_an_agent_has_neither_torch_nor_tools_and_is_the_same_everywhere(name):
    sets = {python: [installed_on(name, python, machine) for machine in MACHINES] for python in PYTHONS}
    assert all(one == other for one, other in sets.values())  # one bill of materials for both machines
    for one, _ in sets.values():
        assert one & {"torch", "pip", "setuptools", "scikit-learn", "jinja2", "onnx"} == set()


def test_the_makefile_builds_for_the_pythons_that_are_tested():
    (line,) = re.findall(r"^PYTHONS \?= (.*)$", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert tuple(line.split()) == PYTHONS
