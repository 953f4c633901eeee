"""`make audit` says what is known, and fails where it could not ask."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "packaging"


@pytest.fixture
def audit(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("audit_of_locks", FOLDER / "audit.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def program(printed: str, complaint: str = "", code: int = 0) -> list[str]:
    """Return a command that says what pip-audit would."""
    script = f"import sys; print({printed!r}); print({complaint!r}, file=sys.stderr); sys.exit({code})"
    return [sys.executable, "-c", script]


def report(*packages: dict) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


WELL = {"name": "numpy", "version": "2.4.6", "vulns": []}
ILL = {"name": "rich", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": []}]}
UNKNOWN = {"name": "attrs", "skip_reason": "Dependency not found on PyPI and could not be audited: attrs (26.1.0)"}


def test_a_known_vulnerability_is_named_with_what_mends_it(audit) -> None:
    answer = audit.asked(program(report(WELL, ILL), code=1))
    assert audit.told("locks/x.txt", answer) == [
        "locks/x.txt: 2 of 2 packages looked up, 1 known vulnerabilities",
        "  rich 1.0: PYSEC-1, mended in 1.1",
    ]


def test_a_package_that_the_database_does_not_know_is_no_clean_package(audit) -> None:
    answer = audit.asked(program(report(WELL, UNKNOWN)))
    assert (answer.not_asked, answer.known) == (("attrs",), ())
    assert audit.told("locks/x.txt", answer) == [
        "locks/x.txt: 1 of 2 packages looked up, 0 known vulnerabilities",
        "  FAILED: the database does not know attrs",
    ]


@pytest.mark.parametrize("printed", ["", "No known vulnerabilities found", "[]", "{}"])
def test_no_report_is_no_clean_report(audit, printed: str) -> None:
    answer = audit.asked(program(printed, "Traceback\nConnectionError: Failed to resolve 'pypi.org'", 1))
    assert audit.told("locks/x.txt", answer) == [
        "locks/x.txt: FAILED: the database cannot be asked: ConnectionError: Failed to resolve 'pypi.org'"
    ]


@pytest.mark.parametrize(
    ("printed", "code"), [(report(WELL), 0), (report(WELL, ILL), 1), (report(WELL, UNKNOWN), 2), ("", 2)]
)
def test_the_exit_code_tells_known_from_not_asked(audit, monkeypatch, capsys, printed: str, code: int) -> None:
    monkeypatch.setattr(audit.sys, "argv", ["audit.py"])
    answer = audit.asked(program(printed))
    monkeypatch.setattr(audit, "asked", lambda _command: answer)
    assert audit.main() == code
    assert ("nothing is proven" in capsys.readouterr().err) == (code == 2)
