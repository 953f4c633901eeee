"""The publish process as the inspect process sees it."""

from __future__ import annotations

import os
import sys
import time

import pytest

from agent.between import publish_process
from agent.between.publish_process import PublishProcess
from agent.between.ring import Ring
from agent.errors import CommandError


@pytest.fixture
def one_that_runs(tmp_path, monkeypatch):
    """Return a function that makes a publish process of a shell script."""
    opened = []

    def make(script):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        ring = Ring.make(slots=2, slot_bytes=256, picture_bytes=0)
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        opened.append((ring, wake))
        return PublishProcess(tmp_path / "station.yaml", b"", ring, wake, hello=lambda _: {}, asked={}, told={})

    yield make
    for ring, wake in opened:
        os.close(wake)
        ring.close()


@pytest.mark.parametrize("code", [0, 3])
def test_one_that_ends_before_it_is_ready_is_told_with_its_code(one_that_runs, code):
    process = one_that_runs(f"exit {code}")
    before_s = time.monotonic()
    with pytest.raises(CommandError, match=f"ended with code {code} before it was ready: see the log"):
        process.start()
    assert time.monotonic() - before_s < publish_process.START_S


def test_one_that_dies_while_the_run_ends_is_started_again_before_anything_is_given_up(one_that_runs, tmp_path):
    ended = one_that_runs(f'echo started >> "{tmp_path}/starts"; exit 9').end(given_up=2)
    assert (tmp_path / "starts").read_text().split() == ["started"] * publish_process.END_STARTS
    assert ended.lost == 2
