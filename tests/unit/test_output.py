"""What the gate would have been told, in a file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.errors import OutputError
from agent.output import FileOutput


def test_each_part_is_a_line_that_is_there_at_once_and_a_run_appends(tmp_path):
    path = tmp_path / "gate"
    path.write_text("1 accept 2.000\n")
    output = FileOutput(path)
    output.act(2, "divert", time.monotonic_ns() - 5_000_000)
    before, line = path.read_text().splitlines()
    assert before == "1 accept 2.000"
    trigger, action, after_ms = line.split()
    assert (trigger, action) == ("2", "divert")
    assert float(after_ms) >= 5.0
    output.close()


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"Is a directory: give output.file a path it can write"):
        FileOutput(tmp_path)


def test_a_full_disk_is_told_and_the_end_raises_nothing():
    output = FileOutput(Path("/dev/full"))
    with pytest.raises(OutputError, match="No space left on device: free the disk"):
        output.act(1, "accept", 0)
    output.close()
