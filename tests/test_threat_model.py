"""Every test that SECURITY.md and the threat model call on is there, and every threat calls on one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PAGES = ("SECURITY.md", "docs/threat-model.md")
PROOF = re.compile(r"`(tests/[\w/]+\.py)`")


def rows(page: str) -> list[list[str]]:
    """Return the cells of every row below a heading whose last column is `proof`."""
    found, proving = [], False
    for line in (PROJECT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            proving = False
        elif cells[-1] == "proof":
            proving = True
        elif proving and not set(line) <= set("|- "):
            found.append(cells)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_proof_is_a_test_that_is_there(page):
    named = set(PROOF.findall((PROJECT / page).read_text(encoding="utf-8")))
    assert len(named) >= 7
    assert [name for name in named if "def test_" not in (PROJECT / name).read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_threat_and_promise_names_its_proof_or_that_it_is_done_by_hand(page):
    assert len(rows(page)) >= 7
    assert [cells for cells in rows(page) if not PROOF.search(cells[-1]) and "by hand" not in cells[-1]] == []
