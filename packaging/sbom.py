"""The bill of materials of an agent with one engine: CycloneDX 1.6, from a fresh environment as its lock has it.

python packaging/sbom.py --engine openvino, with the packages of locks/tools.txt, writes dist/*.cdx.json. The packages
of one engine are the same on every machine (tests/test_locks.py); where their files come from is in the lock file.
"""

from __future__ import annotations

import argparse
import sys
import venv
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from release import BUILD, DIST, ENGINES, PROJECT, lock_of, our_wheel, run, stem


def main() -> None:
    """Build the environment, describe it, and prove that the description is valid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=list(ENGINES), required=True)
    engine = parser.parse_args().engine
    bill = DIST / f"{stem(engine)}.cdx.json"
    DIST.mkdir(exist_ok=True)
    python = environment(engine)
    options = ("--pyproject", "pyproject.toml", "--mc-type", "application", "--sv", "1.6", "--output-reproducible")
    run(sys.executable, "-m", "cyclonedx_py", "environment", *options, "--output-file", bill, python)
    trouble = JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill.read_text(encoding="utf-8"))
    if trouble is not None:
        sys.exit(f"{bill}: not valid CycloneDX 1.6: {trouble}")
    print(f"bill of materials: {bill.relative_to(PROJECT)}")


def environment(engine: str) -> Path:
    """Return the interpreter of a fresh environment with the agent in it, and nothing else: neither pip nor tools."""
    folder, python = BUILD / f"agent-{engine}", BUILD / f"agent-{engine}" / "bin" / "python"
    venv.create(folder, clear=True)
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--require-hashes", "-r", lock_of(engine))
    run(*pip, "--no-deps", our_wheel(BUILD / "wheel"))
    return python


if __name__ == "__main__":
    main()
