"""The unit that compiles a station's engine ahead of its agent, as systemd itself reads and rates it."""

import re
import shutil
import subprocess

import pytest

from tests.service.test_units import SYSTEMD, analyzer, show_systemds_units

TEMPLATE, UNIT = "taktsight-compile@.service", "taktsight-compile@cell7.service"
AGENT = (SYSTEMD / "taktsight-agent@.service").read_text()
OURS = (SYSTEMD / TEMPLATE).read_text()


@pytest.fixture
def root(tmp_path):
    """A root folder with systemd's own units, ours, and a program where the units want one."""
    show_systemds_units(tmp_path)
    ours, program = tmp_path / "etc/systemd/system", tmp_path / "opt/taktsight/bin/taktsight-agent"
    ours.mkdir(parents=True)
    for template in (TEMPLATE, "taktsight-agent@.service"):
        shutil.copy(SYSTEMD / template, ours)
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def analyze(root, verb, *options):
    command = [analyzer(), verb, *options, f"--root={root}", "--no-pager", UNIT]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_systemd_understands_every_line(root):
    done = analyze(root, "verify", "--man=no")
    assert (done.returncode, done.stderr) == (0, "")


def test_its_exposure_stays_low(root):
    done = analyze(root, "security", "--offline=true")
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1]) <= 1.0


@pytest.mark.parametrize("key", ["User", "Group", "CacheDirectory", "StateDirectory", "UMask", "LoadCredential"])
def test_it_is_the_same_user_with_the_same_folders_as_the_agent(key):
    """A plan is taken from nobody else's folder."""
    lines = [re.findall(rf"^{key}=.*$", text, re.M) for text in (AGENT, OURS)]
    assert lines[0] == lines[1] != []


def test_it_ends_before_the_agent_begins():
    assert "Before=taktsight-agent@%i.service" in OURS
    assert "Type=oneshot" in OURS
    assert "ExecStart=/opt/taktsight/bin/taktsight-agent compile /etc/taktsight/%i.yaml" in OURS
