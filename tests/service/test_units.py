"""The unit and its drop-ins, as systemd itself reads and rates them; the example that is to stand beside them."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from node import QUIET, apt_install

from agent.config import read_station
from agent.errors import CameraError, EngineError, OutputError, StorageError
from calibration.errors import MissingPackage, RecipeError, SettingsError
from calibration.signing import make_key

SYSTEMD = Path(__file__).parents[2] / "systemd"
TEMPLATE, UNIT = "taktsight-agent@.service", "taktsight-agent@cell7.service"
DROP_INS = sorted((SYSTEMD / "drop-ins").glob("*.conf"))
MOST_EXPOSURE = 2.0
STATE = "/var/lib/taktsight/cell7"


@functools.cache
def analyzer():
    """Return systemd-analyze, installed on the spot where we may; else skip, or fail as root on a CI machine."""
    if shutil.which("systemd-analyze") is None:
        apt_install("systemd")
    program = shutil.which("systemd-analyze")
    if program is None and os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail("systemd-analyze is not installed: run `apt-get install systemd`")
    if program is None:
        pytest.skip("systemd-analyze is not installed: run `apt-get install systemd`")
    return program


def show_systemds_units(root):
    """Copy systemd's own units into a root folder, so that ours can name them."""
    units = next(
        (path for path in map(Path, ("/usr/lib/systemd/system", "/lib/systemd/system")) if path.exists()), None
    )
    if units is None:
        pytest.skip("systemd's own units are not installed")
    shutil.copytree(units, root / "usr/lib/systemd/system", symlinks=True)


@pytest.fixture
def root(tmp_path):
    """A root folder with systemd's own units, ours, and a program where the unit wants one."""
    show_systemds_units(tmp_path)
    ours = tmp_path / "etc/systemd/system"
    (ours / f"{TEMPLATE}.d").mkdir(parents=True)
    shutil.copy(SYSTEMD / TEMPLATE, ours)
    program = tmp_path / "opt/taktsight/bin/taktsight-agent"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def add(root, *drop_ins):
    for name in drop_ins:
        shutil.copy(SYSTEMD / "drop-ins" / f"{name}.conf", root / "etc/systemd/system" / f"{TEMPLATE}.d")


def analyze(root, verb, *options):
    command = [analyzer(), verb, *options, f"--root={root}", "--no-pager", UNIT]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def exposure(root):
    done = analyze(root, "security", "--offline=true")
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    return float(found.group(1))


@pytest.mark.parametrize("drop_ins", [(), *((path.stem,) for path in DROP_INS)], ids=" ".join)
def test_systemd_understands_every_line(root, drop_ins):
    add(root, *drop_ins)
    done = analyze(root, "verify", "--man=no")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_line_that_systemd_does_not_understand_would_be_seen(root):
    with (root / "etc/systemd/system" / TEMPLATE).open("a") as unit:
        unit.write("[Service]\nProtectEverything=yes\n")
    assert "ProtectEverything" in analyze(root, "verify", "--man=no").stderr


@pytest.mark.parametrize(
    "drop_ins", [("gige",), ("gige", "realtime"), ("usb3-vision",), ("gige", "nvidia", "realtime")], ids=" ".join
)
def test_its_exposure_stays_low(root, drop_ins):
    add(root, *drop_ins)
    assert exposure(root) <= MOST_EXPOSURE


def test_a_bare_unit_would_be_rated_worse(root):
    unit = "[Service]\nExecStart=/opt/taktsight/bin/taktsight-agent\n"
    (root / "etc/systemd/system" / TEMPLATE).write_text(unit)
    assert exposure(root) > 9


def test_what_a_person_need_not_mend_is_tried_again_without_end():
    lines = (SYSTEMD / TEMPLATE).read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert settings["Restart"] == "on-failure"
    assert settings["StartLimitIntervalSec"] == "0"  # no limit, however long a switch or a PLC takes to boot
    left_alone = set(map(int, settings["RestartPreventExitStatus"].split()))
    for error in (CameraError, OutputError, EngineError, StorageError):
        assert error.exit_code not in left_alone
    assert left_alone == {2, SettingsError.exit_code, RecipeError.exit_code, MissingPackage.exit_code}


@pytest.mark.parametrize(("program", "file"), [("systemd-sysusers", "sysusers"), ("systemd-tmpfiles", "tmpfiles")])
def test_user_and_folders_are_made(tmp_path, program, file):
    if shutil.which(program) is None or os.geteuid() != 0:
        pytest.skip(f"needs {program} and root, for its owners")
    users = [shutil.which("systemd-sysusers"), f"--root={tmp_path}", str(SYSTEMD / "taktsight.sysusers")]
    (tmp_path / "etc").mkdir()
    subprocess.run(users, check=True, timeout=30, **QUIET)
    assert "taktsight:" in (tmp_path / "etc" / "passwd").read_text()
    if file == "tmpfiles":
        folders = [shutil.which(program), "--create", f"--root={tmp_path}", str(SYSTEMD / "taktsight.tmpfiles")]
        subprocess.run(folders, check=True, timeout=30, **QUIET)
        etc, modes = tmp_path / "etc/taktsight", {"recipes": 0o750, "certificates": 0o750, "credentials": 0o700}
        assert {path.name: path.stat().st_mode & 0o777 for path in etc.iterdir()} == modes


def test_the_example_station_writes_below_its_state_folder_alone(tmp_path):
    shutil.copy(SYSTEMD / "station.example.yaml", tmp_path / "cell7.yaml")
    make_key(tmp_path / "release.key")
    station = read_station(tmp_path / "cell7.yaml")
    assert station.archive is not None
    written = (station.outbox.folder, station.archive.folder, station.commands.captures, station.recipes.folder)
    assert all(str(folder).startswith(f"{STATE}/") for folder in written)
    assert station.mqtt is not None
    assert str(station.mqtt.key_file) == f"/run/credentials/{UNIT}/mqtt.key"
    unit = (SYSTEMD / TEMPLATE).read_text()
    assert "LoadCredential=mqtt.key:/etc/taktsight/credentials/%i.key" in unit
    assert "StateDirectory=taktsight/%i" in unit
