"""The installed service in a booted systemd of its own: READY, watchdog, credentials, state, a stop without loss.

One boot tells everything: `scenario.py` runs inside and writes down what happened. The container is this machine's own
/usr, read-only, on a volatile root (systemd-nspawn --volatile=yes); nothing outside a temporary folder is written.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from broker import mosquitto_program
from node import apt_install, lacking
from plant import ROOT
from recipes import SIDE, tiny_recipe, write_tiny_recipe

from calibration.preprocess import View

PROJECT = Path(__file__).parents[2]
SYSTEMD = PROJECT / "systemd"
TEMPLATE, UNIT = "taktsight-agent@.service", "taktsight-agent@cell7.service"
UNITS, DROP_INS = Path("/etc/systemd/system"), "/etc/systemd/system/taktsight-agent@{}.service.d"
BOOT_S = 300.0  # at most: with a dozen other jobs on 2 cores 120 was too short
WATCHDOG_S, TAKT_MS = 2.0, 50
STATION = """
station: {name}
recipe: recipes/tiny.recipe
recipes: {{unsigned: allow, folder: /var/lib/taktsight/{name}/recipes}}
takt_ms: {takt_ms}
camera: {{kind: simulated, width_px: 64, height_px: 64, seed: 1, lost: [3]}}
engine: {{kind: {engine}, threads: 1}}
outbox: {{folder: /var/lib/taktsight/{name}/outbox}}
archive: {{folder: /var/lib/taktsight/{name}/archive, pictures: none}}
"""
MQTT = f"""
mqtt:
  topic: {ROOT}
  consumers: [mes]
  username: cell7
  password_file: /run/credentials/taktsight-agent@cell7.service/mqtt.password
"""
BROKER = """
listener 1883 127.0.0.1
allow_anonymous false
password_file /in/passwords
user root
persistence false
log_dest file /out/broker.log
log_type all
"""
AGENT = """#!/bin/sh
export PYTHONPATH=/opt/source:/opt/packages LD_LIBRARY_PATH=/opt/python/lib
exec /opt/python/bin/python3 /opt/source/tests/service/hanging_agent.py "$@"
"""
SCENARIO = """
[Unit]
After=multi-user.target
[Service]
Type=oneshot
Environment=LD_LIBRARY_PATH=/opt/python/lib
ExecStart=/opt/python/bin/python3 /opt/source/tests/service/scenario.py
StandardOutput=file:/out/log
StandardError=file:/out/log
"""

pytestmark = pytest.mark.service


def prepared(folder: Path) -> list[str]:
    """Write what the container needs and return the options of systemd-nspawn that show it there."""
    given, etc = folder / "in", folder / "in" / "etc"
    etc.mkdir(parents=True)
    (folder / "out").mkdir()
    view = View(SIDE, SIDE, colour=False, reference_size=(64, 64))
    lenient = replace(tiny_recipe().thresholds, score=0.9)  # each part that is looked at passes
    write_tiny_recipe(given / "tiny.recipe", view=view, thresholds=lenient)
    (etc / "cell7.yaml").write_text(STATION.format(name="cell7", takt_ms=TAKT_MS, engine="onnxruntime") + MQTT)
    (etc / "quiet.yaml").write_text(STATION.format(name="quiet", takt_ms=600_000, engine="auto") + "deadline_ms: 500\n")
    (etc / "broken.yaml").write_text(STATION.format(name="broken", takt_ms=TAKT_MS, engine="auto") + "takt_s: 1\n")
    (given / "passwords").write_text(f"cell7:{hashed('secret')}\n")
    (given / "mosquitto.conf").write_text(BROKER)
    (given / "taktsight-agent").write_text(AGENT)
    (given / "taktsight-agent").chmod(0o755)
    (given / "scenario.service").write_text(SCENARIO)
    (given / "short.conf").write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}s\n")
    realtime = (SYSTEMD / "drop-ins" / "realtime.conf").read_text().replace("CPUAffinity=2 3", "CPUAffinity=0")
    (given / "realtime.conf").write_text(realtime)
    shown = {
        given: "/in",
        Path(sys.base_prefix): "/opt/python",
        Path(sysconfig.get_paths()["purelib"]): "/opt/packages",
        PROJECT: "/opt/source",
        given / "taktsight-agent": "/opt/taktsight/bin/taktsight-agent",
        given / "scenario.service": f"{UNITS}/scenario.service",
        given / "short.conf": f"{DROP_INS.format('')}/short.conf",
        given / "realtime.conf": f"{DROP_INS.format('quiet')}/realtime.conf",
    }
    return [f"--bind-ro={outside}:{inside}" for outside, inside in shown.items()] + [f"--bind={folder / 'out'}:/out"]


def hashed(password: str) -> str:
    """Return a password as mosquitto_passwd writes it (PBKDF2 with SHA-512, 101 rounds)."""
    salt = b"twelve bytes"
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    return "$".join(("", "7", "101", base64.b64encode(salt).decode(), base64.b64encode(digest).decode()))


def boot(folder: Path) -> dict:
    """Boot, run the scenario, and return its facts."""
    options = ["--quiet", "--directory=/", "--volatile=yes", "--register=no", "--keep-unit", "--private-network"]
    kernel = ("systemd.unit=scenario.service", "systemd.firstboot=no", "systemd.mask=systemd-firstboot.service")
    command = ["systemd-nspawn", *options, *prepared(folder), "--boot", *kernel, "systemd.show_status=0"]
    (folder / "in" / "began").write_text(str(time.monotonic()))
    with (folder / "boot.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            process.wait(BOOT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # shuts the container down
            process.wait(30)
        finally:
            process.kill()
            process.wait()
    facts = folder / "out" / "facts.json"
    if not facts.exists():
        if (folder / "out" / "log").exists():  # it was booted: not to get any further is no lack of this machine
            pytest.fail(f"booted, but no facts after {BOOT_S:g} s: {(folder / 'out' / 'log').read_text()[-2000:]}")
        printed = (folder / "boot.log").read_text(errors="replace")[-2000:]
        lacking(f"no systemd can be booted in a container here: {printed}")
    return json.loads(facts.read_text())


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("a container is booted by root alone")
    if shutil.which("systemd-nspawn") is None:
        apt_install("systemd-container")
    if shutil.which("systemd-nspawn") is None:
        lacking("systemd-nspawn is not installed: run `apt-get install systemd-container`")
    mosquitto_program()
    found = boot(tmp_path_factory.mktemp("container"))
    assert "error" not in found, (found["error"], found["journal"][-20:])
    return found


def entries(facts, name: str = "cell7", **wanted: str) -> list[dict]:
    """Return the journal entries of one station whose TAKTSIGHT_ fields are these."""
    return [
        entry
        for entry in facts["journal"]
        if entry.get("TAKTSIGHT_STATION") == name
        and all(entry.get(f"TAKTSIGHT_{key.upper()}") == value for key, value in wanted.items())
    ]


def test_it_is_ready_once_the_line_runs_and_says_how_it_goes(facts):
    assert (facts["ready"]["ActiveState"], facts["ready"]["SubState"]) == ("active", "running")
    assert facts["status"].startswith("tiny: ")
    assert "pass" in facts["status"]


def test_it_runs_as_its_own_user_in_its_own_folder(facts):
    assert facts["user"] == "taktsight"
    assert facts["owners"] == ["taktsight"]


def test_settings_are_for_its_group_and_keys_for_root_alone(facts):
    assert facts["settings"] == facts["certificate"] == ["taktsight", "0o640"]
    assert facts["folders"] == {
        "taktsight": ["root", "taktsight", "0o750"],
        "recipes": ["root", "taktsight", "0o750"],
        "certificates": ["root", "taktsight", "0o750"],
        "credentials": ["root", "root", "0o700"],
    }


def test_the_password_reaches_the_agent_as_a_credential(facts):
    assert facts["credential_mode"] in ("0o400", "0o440")  # the broker let it in, or the scenario had ended there
    assert (facts["key"], facts["key_default"]) == ("a key\n", "\n")


def test_a_hung_engine_is_ended_by_the_watchdog_and_passes_nothing_meanwhile(facts):
    assert facts["after_hang"]["NRestarts"] == "1"
    assert WATCHDOG_S * 0.7 < facts["hang_to_kill_s"] < WATCHDOG_S + 2
    hung = [reason for outcome, reason in facts["while_hung"] if outcome == "no_verdict"]
    assert len(hung) > 0.5 * WATCHDOG_S / (TAKT_MS / 1e3)
    assert {outcome for outcome, _ in facts["while_hung"][2:]} == {"no_verdict"}  # two may have been under way
    before = [outcome for run, _, _, _, outcome in facts["archived"] if run == facts["archived"][0][0]]
    assert before.count("pass") > 10
    assert {"late"} <= set(hung) <= {"late", "overrun", "crashed"}  # crashed: under way when it was ended


def test_the_journal_shows_where_it_hung(facts):
    text = "\n".join(str(entry["MESSAGE"]) for entry in facts["journal"])
    assert "Watchdog timeout" in text
    assert "Fatal Python error: Aborted" in text
    assert "in infer" in text


def test_a_line_without_parts_is_not_taken_for_a_hung_one(facts):
    assert facts["hang_took_s"] + facts["restart_and_stop_took_s"] > 3 * WATCHDOG_S
    assert (facts["quiet"]["ActiveState"], facts["quiet"]["NRestarts"]) == ("active", "0")


def test_the_engine_for_this_machine_runs_within_the_limits_of_the_unit(facts):
    assert "1 pass" in facts["quiet"]["StatusText"]
    wanted = "openvino" if importlib.util.find_spec("openvino") and platform.machine() == "x86_64" else "onnxruntime"
    assert [entry for entry in facts["journal"] if str(entry["MESSAGE"]).startswith(f"quiet: tiny on {wanted}")]
    assert not [entry for entry in facts["journal"] if "cpuinfo" in str(entry["MESSAGE"])]


def test_the_outbox_counts_on_over_kill_and_restart(facts):
    assert len({run for run, *_ in facts["archived"]}) == 3
    assert len({epoch for _, _, epoch, *_ in facts["archived"]}) == 1
    seqs = [seq for _, _, _, seq, _ in facts["archived"]]
    assert all(after > before for before, after in pairwise(seqs))


def test_sigterm_ends_it_in_time_and_loses_no_verdict(facts):
    assert (facts["stopped"]["Result"], facts["stopped"]["ExecMainStatus"]) == ("success", "0")
    assert WATCHDOG_S < facts["stop_s"] < 30  # it waited for a consumer that does not answer, unwatched
    last = facts["archived"][-1][0]
    triggers = [trigger for run, trigger, *_ in facts["archived"] if run == last]
    assert sorted(triggers) == list(range(1, len(triggers) + 1))  # the lost frame's is spoken for at its deadline
    printed = [
        entry["MESSAGE"]
        for entry in facts["journal"]
        if entry["_SYSTEMD_UNIT"] == UNIT and "triggers, " in str(entry["MESSAGE"])
    ]
    assert printed[-1].startswith(f"{len(triggers)} triggers, {len(triggers)} verdicts")
    archived = {(epoch, seq) for _, _, epoch, seq, _ in facts["archived"]}
    assert archived <= {tuple(item) for item in facts["waiting"]}


def test_settings_that_are_wrong_are_not_tried_again(facts):
    assert (facts["broken"]["ActiveState"], facts["broken"]["NRestarts"]) == ("failed", "0")
    assert facts["broken"]["ExecMainStatus"] == "4"


def test_it_goes_before_other_work_where_its_unit_could_allow_it(facts):
    assert facts["goes_first"] == facts["may_go_first"]


def test_the_realtime_drop_in_makes_it_fifo_on_its_cpus(facts):
    assert facts["quiet_policy"]
    assert facts["quiet_cpus"] == [0]


def test_the_journal_is_filtered_by_field_and_holds_no_part_that_passed(facts):
    assert facts["late_entries"] >= 1
    lost = entries(facts, verdict="no_verdict", reason="frame_lost", recipe="tiny", trigger="3")
    assert len(lost) == 3  # once per run
    assert {entry["PRIORITY"] for entry in lost} == {"4"}
    assert not entries(facts, verdict="pass")
    assert len(entries(facts, state="ready")) == 3
    assert len(entries(facts, state="stopped")) == 2  # the hung one could not say it
