"""What is installed: Python, packages against what taktsight asks for, names that clash, engines that compute."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Machine, version_of
from agent.engines.engine import ENGINES, Engine, EngineSettings
from calibration.errors import MissingPackage, TaktsightError

OUR_NAMES = ("agent", "calibration", "trainer")
OURS = "taktsight"
NOT_AT_THE_LINE = ("dev", "demo")  # extras

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*\(?(?P<wanted>[^;)]*)\)?\s*(?:;(?P<when>.*))?")
_LIMIT = re.compile(r"(==|>=|<=|>|<)\s*([\d.]+)")
_HOLDS: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "==": lambda found, wanted: found == wanted,
    ">=": lambda found, wanted: found >= wanted,
    "<=": lambda found, wanted: found <= wanted,
    ">": lambda found, wanted: found > wanted,
    "<": lambda found, wanted: found < wanted,
}

# image (1, 1, 8, 8) -> anomaly_map = image + image, score = its mean; ONNX opset 17, see tests/unit/test_doctor.py
TINY_GRAPH = base64.b64decode(
    "CAg6xgEKIAoFaW1hZ2UKBWltYWdlEgthbm9tYWx5X21hcCIDQWRkCkIKC2Fub21hbHlfbWFwEgVzY29yZSIKUmVkdWNlTWVhbioP"
    "CgRheGVzQAFAAkADoAEHKg8KCGtlZXBkaW1zGACgAQISAWdaHwoFaW1hZ2USFgoUCAESEAoCCAEKAggBCgIICAoCCAhiJQoLYW5v"
    "bWFseV9tYXASFgoUCAESEAoCCAEKAggBCgIICAoCCAhiEwoFc2NvcmUSCgoICAESBAoCCAFCBAoAEBE="
)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One line of `Requires-Dist`."""

    name: str
    wanted: str  # ">=1.26"
    extra: str  # "" where it is always needed


@dataclass(frozen=True, slots=True)
class Installed:
    """What the package metadata of this Python says."""

    requirements: tuple[str, ...]
    version_of: Callable[[str], str | None]
    owners: Mapping[str, Sequence[str]]  # top-level package -> distributions


def installed() -> Installed:
    """Return what is installed here. Raises PackageNotFoundError where taktsight itself is not."""
    needed = tuple(importlib.metadata.requires(OURS) or ())
    return Installed(needed, version_of, importlib.metadata.packages_distributions())


def python(_: Machine) -> Iterator[Finding]:
    """Yield the version of Python, of taktsight, and the machine."""
    wanted = importlib.metadata.metadata(OURS)["Requires-Python"] or ""
    yield python_version(platform.python_version(), wanted)
    yield ok(OURS, f"{importlib.metadata.version(OURS)} in {sys.prefix}")
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield ok("platform", f"{platform.platform(terse=True)}, {os.cpu_count()} CPUs, {memory_gb:.1f} GB")


def python_version(found: str, wanted: str) -> Finding:
    """Return whether this is a Python that taktsight runs on. wanted: as in `>=3.11`."""
    if fits(found, wanted):
        return ok("python", found)
    return fail("python", found, wanted, "make a virtual environment with a newer Python: see docs/install.md")


def packages(_: Machine) -> Iterator[Finding]:
    """Yield the versions of what taktsight needs, and what does not fit."""
    yield from package_versions(installed())


def package_versions(here: Installed) -> Iterator[Finding]:
    """Yield one finding with all versions that fit, and one for each package that does not.

    What an extra asks for is only looked at where it is installed.
    """
    fitting: dict[str, str] = {}
    for requirement in map(read_requirement, here.requirements):
        if requirement.extra in NOT_AT_THE_LINE:
            continue
        found = here.version_of(requirement.name)
        name = f"package {requirement.name}"
        install = f"pip install '{requirement.name}{requirement.wanted}'"
        if found is None:
            if not requirement.extra:
                yield fail(name, "not installed", requirement.wanted or "any version", install)
        elif not fits(found, requirement.wanted):
            grade = warn if requirement.extra else fail
            whom = f" for the extra {requirement.extra}" if requirement.extra else ""
            yield grade(name, found, f"{requirement.wanted}{whom}", install)
        else:
            fitting[requirement.name] = found
    yield ok("packages", ", ".join(f"{name} {version}" for name, version in sorted(fitting.items())) or "none needed")


def read_requirement(line: str) -> Requirement:
    """Return a line of `Requires-Dist`. One with another condition than an extra counts as optional."""
    found = _REQUIREMENT.match(line)
    assert found is not None, line
    when = found["when"] or ""
    extra = re.search(r"""extra\s*==\s*["']([\w-]+)""", when)
    return Requirement(found["name"], found["wanted"].strip(), extra[1] if extra else when.strip())


def fits(found: str, wanted: str) -> bool:
    """Return whether a version is what `>=1.2,<3` asks for; by its numbers alone, `2.13.0+cpu` is 2.13.0."""
    version = _numbers(found)
    return all(_HOLDS[sign](version, _numbers(limit)) for sign, limit in _LIMIT.findall(wanted))


def names(_: Machine) -> Iterator[Finding]:
    """Yield whether another distribution has a package of our names: both would merge into one folder."""
    yield from name_clashes(installed())


def name_clashes(here: Installed) -> Iterator[Finding]:
    """Yield one finding for each of our package names that somebody else has too; one where all is well."""
    clashes = {name: sorted(set(here.owners.get(name, ())) - {OURS}) for name in OUR_NAMES}
    for name, others in clashes.items():
        if others:
            listed = " ".join(others)
            yield fail(
                f"package {name}",
                f"also provided by {', '.join(others)}",
                "a virtual environment of taktsight's own",
                f"pip uninstall {listed}, then install taktsight again",
            )
    if not any(clashes.values()):
        yield ok("names", f"{', '.join(OUR_NAMES)}: ours alone")


def engines(_: Machine) -> Iterator[Finding]:
    """Yield for each engine that is installed whether it computes."""
    yield from engine_findings(ENGINES)


def engine_findings(kinds: Mapping[str, Callable[[bytes, EngineSettings], Engine]]) -> Iterator[Finding]:
    """Yield whether each engine that is installed computes a graph of two operations; fail where there is none."""
    seen = 0
    for kind, engine in kinds.items():
        name = f"engine {kind}"
        try:
            right = _computes(engine(TINY_GRAPH, EngineSettings(kind, "f32", 1)))
        except MissingPackage:
            continue
        except (TaktsightError, ImportError, OSError, RuntimeError) as error:
            seen += 1
            yield fail(name, str(error)[:300], "an engine that computes", f"pip install --force-reinstall {kind}")
            continue
        seen += 1
        if right:
            yield ok(name, f"{version_of(kind) or 'version not told'}: computes")
        else:
            yield fail(name, "wrong numbers", "an engine that computes", f"pip install --force-reinstall {kind}")
    if not seen:
        yield fail("engines", "none installed", "openvino or onnxruntime", "pip install 'taktsight[openvino]'")


def _computes(engine: Engine) -> bool:
    image = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
    anomaly_map, score = engine.infer(image)
    return bool(np.allclose(anomaly_map, 2 * image[0, 0])) and bool(np.isclose(score, 63.0))


def _numbers(version: str) -> tuple[int, ...]:
    """Return (2, 13) of "2.13.0+cpu": zeros at the end say nothing."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
