"""Runs inside the booted container, as root: installs a station with the commands of docs/install.md, and runs it.

Standard library only. What it finds goes to /out/facts.json; the tests outside read it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

IN, OUT, SOURCE = Path("/in"), Path("/out"), Path("/opt/source")
CLONE = Path("/run/clone")  # where the page's commands are typed
NOT_HERE = ("python3 -m venv", "/opt/taktsight/bin/pip")  # the container has no network, and its agent already
STATE = Path("/var/lib/taktsight/cell7")
UNIT, QUIET, BROKEN = (f"taktsight-agent@{name}.service" for name in ("cell7", "quiet", "broken"))
SHOWN = ("ActiveState", "SubState", "NRestarts", "MainPID", "Result", "ExecMainStatus", "StatusText")
facts: dict[str, object] = {}


def systemctl(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert not check or done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def show(unit: str) -> dict[str, str]:
    lines = systemctl("show", unit, *(f"--property={name}" for name in SHOWN)).splitlines()
    return dict(line.split("=", 1) for line in lines)


def until(holds, timeout_s: float = 30.0) -> float:
    """Wait until holds() and return when that was, time.monotonic()."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s, f"not within {timeout_s} s: {show(UNIT)}"
        time.sleep(0.02)
    return time.monotonic()


def archived() -> list[dict]:
    folder = STATE / "archive"
    files = [*sorted(folder.glob("verdicts-*.jsonl")), *folder.glob("verdicts.jsonl")]  # midnight may lie between
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def page_blocks() -> list[list[str]]:
    """Return the blocks of commands under "As a service", line by line."""
    text = (SOURCE / "docs" / "install.md").read_text().partition("## As a service")[2]
    return [block.strip().splitlines() for block in text.split("```")[1::2]]


def shell(lines: list[str]) -> None:
    subprocess.run(["sh", "-ec", "\n".join(lines)], cwd=CLONE, check=True, timeout=60)


def install() -> None:
    make, credentials, _, *_ = page_blocks()
    CLONE.mkdir()
    (CLONE / "systemd").symlink_to(SOURCE / "systemd")
    for name in ("authority.crt", "cell7.crt"):
        (CLONE / name).write_text("a certificate\n")
    (CLONE / "cell7.key").write_text("a key\n")
    (CLONE / "cell7.password").write_text("secret\n")
    shell([line for line in make if not line.startswith(NOT_HERE)])
    shell(credentials)
    etc = Path("/etc/taktsight")
    for fact, path in (("settings", etc / "cell7.yaml"), ("certificate", etc / "certificates" / "cell7.crt")):
        facts[fact] = [path.group(), oct(path.stat().st_mode & 0o777)]
    facts["folders"] = {
        path.name: [path.owner(), path.group(), oct(path.stat().st_mode & 0o777)]
        for path in (etc, *(path for path in etc.iterdir() if path.is_dir()))
    }
    for file in (IN / "etc").iterdir():
        shutil.copy(file, etc)
    shutil.copy(IN / "tiny.recipe", etc / "recipes")
    subprocess.run(["systemd-run", "--quiet", "--unit=broker", "mosquitto", "-c", "/in/mosquitto.conf"], check=True)


def start() -> None:
    lines = page_blocks()[2]
    enable = next(number for number, line in enumerate(lines) if line.startswith("systemctl enable"))
    shell(lines[:enable])
    began_s = time.monotonic()
    shell(lines[enable : enable + 1])
    facts["boot_to_ready_s"] = time.monotonic() - float((IN / "began").read_text())
    facts["start_to_ready_s"] = time.monotonic() - began_s
    facts["ready"] = show(UNIT)
    shell(lines[enable + 1 :])
    pid = int(show(UNIT)["MainPID"])
    facts["user"] = Path(f"/proc/{pid}").owner()
    limits = Path(f"/proc/{pid}/limits").read_text()
    facts["may_go_first"] = limits.partition("Max realtime priority")[2].split()[0] != "0"  # a container may refuse it
    facts["goes_first"] = os.sched_getscheduler(pid) == os.SCHED_FIFO
    credential = Path(f"/run/credentials/{UNIT}/mqtt.password")
    facts["credential_mode"] = oct(credential.stat().st_mode & 0o777)
    facts["key"] = credential.with_name("mqtt.key").read_text()
    until(lambda: "u'cell7'" in (OUT / "broker.log").read_text())  # the broker took its password
    systemctl("start", QUIET)
    facts["key_default"] = Path(f"/run/credentials/{QUIET}/mqtt.key").read_text()
    pid = int(show(QUIET)["MainPID"])
    facts["quiet_policy"] = os.sched_getscheduler(pid) == os.SCHED_FIFO
    facts["quiet_cpus"] = sorted(os.sched_getaffinity(pid))
    until(lambda: len(archived()) > 20)
    until(lambda: " 0 pass" not in show(UNIT)["StatusText"])
    facts["status"] = show(UNIT)["StatusText"]


def hang() -> None:
    pid = show(UNIT)["MainPID"]
    (STATE / "hang").touch()
    began_s, at_hang = time.monotonic(), len(archived())
    killed_s = until(lambda: not Path(f"/proc/{pid}").exists())
    at_kill = archived()
    (STATE / "hang").unlink()
    ready_s = until(lambda: show(UNIT)["ActiveState"] == "active" and show(UNIT)["MainPID"] not in ("0", pid))
    facts["hang_to_kill_s"], facts["kill_to_ready_s"] = killed_s - began_s, ready_s - killed_s
    facts["while_hung"] = [[line["outcome"], line["reason"]] for line in at_kill[at_hang:]]
    facts["after_hang"] = show(UNIT)
    until(lambda: len(archived()) > len(at_kill) + 10)


def restart_and_stop() -> None:
    systemctl("restart", UNIT)
    before = len(archived())
    until(lambda: len(archived()) > before + 10)
    began_s = time.monotonic()
    systemctl("stop", UNIT)
    facts["stop_s"] = time.monotonic() - began_s
    facts["stopped"] = show(UNIT)
    facts["archived"] = [[line[key] for key in ("run", "trigger", "epoch", "seq", "outcome")] for line in archived()]
    facts["owners"] = sorted({path.owner() for path in STATE.rglob("*")})
    export = STATE / "waiting.jsonl"
    command = ["/opt/taktsight/bin/taktsight-agent", "outbox", "/etc/taktsight/cell7.yaml", "--export", str(export)]
    subprocess.run(command, user="taktsight", group="taktsight", extra_groups=[], check=True, timeout=30)
    lines = [json.loads(line) for line in export.read_text().splitlines()]
    facts["waiting"] = [[line["epoch"], line["seq"]] for line in lines]


def others() -> None:
    facts["quiet"] = show(QUIET)
    systemctl("start", BROKEN, check=False)
    time.sleep(6)  # longer than RestartSec
    facts["broken"] = show(BROKEN)
    systemctl("stop", QUIET)
    shell([line for line in page_blocks()[-1] if " -f" not in line])


def journal(*match: str) -> list[dict]:
    command = ["journalctl", "--output=json", "--all", "--no-pager", *match]
    text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    try:
        for step in (install, start, hang, restart_and_stop, others):
            began_s = time.monotonic()
            step()
            facts[f"{step.__name__}_took_s"] = time.monotonic() - began_s
    except Exception as error:
        facts["error"] = f"{step.__name__}: {error!r}"
        raise
    finally:
        kept = ("MESSAGE", "PRIORITY", "CODE_FUNC", "LOGGER", "_SYSTEMD_UNIT", "_PID")
        facts["journal"] = [
            {name: value for name, value in entry.items() if name in kept or name.startswith("TAKTSIGHT_")}
            for entry in journal("--unit=taktsight-agent@*")
        ]
        facts["late_entries"] = len(journal("TAKTSIGHT_REASON=late", "TAKTSIGHT_STATION=cell7"))
        (OUT / "facts.json").write_text(json.dumps(facts))
        systemctl("poweroff", check=False)


if __name__ == "__main__":
    main()
