"""Which locked packages have known vulnerabilities, after the database of PyPI, or with --service osv that of OSV.

python packaging/audit.py, with the packages of locks/tools.txt. A package of which the database says nothing counts as
a failure, and so does a database that cannot be asked: exit code 1 where something is known, 2 where not all was asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from release import LOCKS, PROJECT

NAMES = ("agent-openvino", "agent-onnxruntime", "agent-genicam", "trainer", "tools")
MOST_NAMED = 5  # packages that nothing is known of; more of them are counted


@dataclass(frozen=True)
class Answer:
    """What the database says of one lock file."""

    packages: int
    known: tuple[str, ...]  # vulnerabilities, one line each
    not_asked: tuple[str, ...]  # packages that it does not know; with trouble: none could be asked
    trouble: str = ""  # why the database could not be asked


def main() -> int:
    """Ask for every lock file, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi")
    service = parser.parse_args().service
    answers = []
    for name in NAMES:
        lock = LOCKS / f"{name}.txt"
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--vulnerability-service",
            service,
            "--disable-pip",
            "--require-hashes",
        ]
        answers.append(asked([*command, "--progress-spinner", "off", "--format", "json", "--requirement", str(lock)]))
        print("\n".join(told(str(lock.relative_to(PROJECT)), answers[-1])), flush=True)
    if any(answer.trouble or answer.not_asked for answer in answers):
        print(
            f"FAILED: not every package could be looked up at {service}, so nothing is proven: let this machine reach "
            "pypi.org, or api.osv.dev with --service osv; a mirror of packages alone does not do",
            file=sys.stderr,
        )
        return 2
    return 1 if any(answer.known for answer in answers) else 0


def asked(command: Sequence[str]) -> Answer:
    """Return what pip-audit's report says, or why there is none."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
        known = [known_of(one, found) for one in packages for found in one.get("vulns", ())]
        return Answer(len(packages), tuple(known), tuple(one["name"] for one in packages if "skip_reason" in one))
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines() or [f"no report, exit code {done.returncode}"]
        return Answer(0, (), (), said[-1][:200])


def known_of(package: dict[str, Any], found: dict[str, Any]) -> str:
    """Return one vulnerability in one line."""
    mended = ", ".join(found["fix_versions"]) or "no version yet"
    return f"{package['name']} {package['version']}: {found['id']}, mended in {mended}"


def told(lock: str, answer: Answer) -> list[str]:
    """Return what a person is told of one lock file."""
    if answer.trouble:
        return [f"{lock}: FAILED: the database cannot be asked: {answer.trouble}"]
    looked_up = answer.packages - len(answer.not_asked)
    lines = [f"{lock}: {looked_up} of {answer.packages} packages looked up, {len(answer.known)} known vulnerabilities"]
    lines += [f"  {line}" for line in answer.known]
    if answer.not_asked:
        more = len(answer.not_asked) - MOST_NAMED
        named = ", ".join(answer.not_asked[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        lines.append(f"  FAILED: the database does not know {named}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
