"""The fences between the three packages, and the sizes and habits of docs/style, checked over the sources."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"calibration": set(), "agent": {"calibration"}, "trainer": {"calibration"}}
PACKAGES = tuple(MAY_IMPORT)
SOURCES = sorted(path for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))
SUBSCRIBER = sorted((PROJECT / "subscriber").glob("taktsight_subscribe/**/*.py"))
ALL_SOURCES = SOURCES + SUBSCRIBER
MOST_FUNCTION_LINES, MOST_FILE_LINES = 80, 400
OPTIONAL = ("openvino", "onnxruntime", "harvesters", "genicam", "tensorrt", "pycuda", "amqtt", "torch")
FORBIDDEN_CALLS = ("eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "os.system")
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|mnt|Users|tmp)/|\b[A-Z]:\\\\")


def named(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(package: str) -> list[str]:
    return [module_name(path) for path in SOURCES if module_name(path).split(".")[0] == package]


def imported(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import, those inside functions too, and of importlib calls with a literal."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "__import__"):
            yield node.lineno, str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else "*"


def dotted(node: ast.expr) -> str:
    """Return the name that a call is made by, such as np.load; what is no plain name counts as empty."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(module: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def says(call: ast.Call, keyword: str, value: bool) -> bool:
    return any(
        given.arg == keyword and isinstance(given.value, ast.Constant) and given.value.value is value
        for given in call.keywords
    )


def test_there_are_sources_to_check():
    assert {path.relative_to(PROJECT).parts[0] for path in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize(
    ("package", "kept_out"), [("agent", ("torch", "trainer")), ("calibration", ("torch", "trainer", "agent"))]
)
def test_importing_every_module_brings_in_nothing_from_beyond_the_fence(package, kept_out):
    program = f"""
import importlib, sys
for name in {modules_of(package)!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in {OPTIONAL!r}:
            raise
strangers = sorted(name for name in sys.modules if name.split(".")[0] in {kept_out!r})
sys.exit(f"imported: {{strangers[:5]}}" if strangers else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nobody_imports_across_the_fences():
    across = [
        f"{named(path)}:{line}: {name}"
        for path in SOURCES
        for line, name in imported(tree(path))
        if name.split(".")[0] in PACKAGES
        and name.split(".")[0]
        not in MAY_IMPORT[path.relative_to(PROJECT).parts[0]] | {path.relative_to(PROJECT).parts[0]}
    ]
    assert across == []


def test_the_subscriber_stands_alone():
    assert SUBSCRIBER
    found = [
        f"{named(path)}:{line}: {name}"
        for path in SUBSCRIBER
        for line, name in imported(tree(path))
        if name.split(".")[0] in PACKAGES
    ]
    assert found == []


def test_torch_is_imported_by_the_trainer_alone():
    found = [
        f"{named(path)}:{line}"
        for path in ALL_SOURCES
        for line, name in imported(tree(path))
        if name.split(".")[0] in ("torch", "torchvision") and path.relative_to(PROJECT).parts[0] != "trainer"
    ]
    assert found == []


def test_imports_are_absolute_and_written_out():
    found = [
        f"{named(path)}:{line}: {name}"
        for path in ALL_SOURCES
        for line, name in imported(tree(path))
        if name.startswith((".", "*"))
    ]
    assert found == []


def test_no_other_distribution_brings_packages_of_our_names():
    others = {
        package: [name for name in distributions if name != "taktsight"]
        for package, distributions in importlib.metadata.packages_distributions().items()
        if package in PACKAGES
    }
    assert not any(others.values()), f"two packages would merge into one folder: {others}"


def test_init_files_hold_a_docstring_and_nothing_else():
    for path in SOURCES:
        if path.name == "__init__.py":
            body = tree(path).body
            assert len(body) == 1, named(path)
            assert ast.get_docstring(tree(path)), named(path)


def test_no_function_is_longer_than_80_lines():
    long = [
        f"{named(path)}:{node.lineno}: {node.name} has {length} lines"
        for path in ALL_SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_FUNCTION_LINES
    ]
    assert long == []


def test_no_file_is_longer_than_400_lines():
    lengths = {named(path): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_SOURCES}
    assert {name: length for name, length in lengths.items() if length > MOST_FILE_LINES} == {}


def test_tests_are_no_package():
    """A tests/agent/__init__.py would make `import agent` resolve to the tests."""
    assert [named(path) for path in (PROJECT / "tests").rglob("__init__.py")] == []
    assert [name for name in PACKAGES if (PROJECT / "tests" / name).exists()] == []


def test_every_package_folder_is_listed_in_pyproject():
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"\[tool\.setuptools\]\npackages = \[(.*?)\]", text, re.DOTALL)
    assert listed is not None
    folders = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert set(re.findall(r'"([\w.]+)"', listed.group(1))) == folders


def test_nothing_that_is_read_from_a_file_is_executed():
    found = [
        f"{named(path)}:{call.lineno}: {name}"
        for path in ALL_SOURCES
        for call, name in calls(tree(path))
        if name in FORBIDDEN_CALLS
        or says(call, "shell", True)
        or says(call, "allow_pickle", True)
        or (name == "torch.load" and not says(call, "weights_only", True))
        or (name == "yaml.load" and not any(given.arg == "Loader" for given in call.keywords))
    ]
    found += [
        f"{named(path)}:{line}: {name}"
        for path in ALL_SOURCES
        for line, name in imported(tree(path))
        if name.split(".")[0] in FORBIDDEN_IMPORTS
    ]
    assert found == []


def test_no_path_of_a_developers_machine_is_left_in_the_sources():
    found = [
        f"{named(path)}:{number}: {line.strip()}"
        for path in ALL_SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("import torch.nn", ["torch.nn"]),
        ("def f():\n    from trainer.fit import fit", ["trainer.fit"]),
        ("import importlib\nimportlib.import_module('agent.line.loop')", ["importlib", "agent.line.loop"]),
        ("from . import x", ["."]),
    ],
)
def test_the_search_for_imports_finds_those_inside_functions_and_calls_too(source, kinds):
    assert [name for _, name in imported(ast.parse(source))] == kinds
