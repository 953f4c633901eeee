"""Who runs the agent and when it is: the clock, the user, the systemd unit with its watchdog."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Iterator
from datetime import UTC, datetime

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case, Machine
from agent.line.realtime import RealtimeSettings

WRITTEN_UTC = datetime(2026, 1, 1, tzinfo=UTC)  # no clock that is right shows an earlier day

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(us|ms|s|min|h|d|w)\b")
_SPAN_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def clock(machine: Machine) -> Iterator[Finding]:
    """Yield whether the wall clock can be right, and whether a time server keeps it so."""
    now, says = machine.now_utc(), machine.is_synchronized()
    told = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < WRITTEN_UTC:
        yield fail(
            "clock",
            told,
            f"{WRITTEN_UTC:%Y} or later: no certificate is valid on such a day",
            "set the clock (timedatectl set-time), then look at the time server and the mainboard's battery",
        )
    elif says:
        yield ok("clock", f"{told}, kept by a time server")
    else:
        why = "the kernel does not say whether a time server keeps it" if says is None else "no time server keeps it"
        yield warn("clock", f"{told}, {why}", "a clock that is kept: it stands in every verdict", _ask(machine))


def user(case: Case) -> Iterator[Finding]:
    """Yield as whom the agent runs."""
    ours, account = case.machine.user, case.account()
    if account.uid == 0:
        yield warn("user", "root", "a user that can do less", "run it as a service: see docs/install.md")
    elif account.name != ours.name:
        yield ok("user", f"{account.name}; asked as {ours.name}")
    else:
        yield ok("user", account.name)


def unit(case: Case) -> Iterator[Finding]:
    """Yield the state of the unit that runs this station, and whether its watchdog waits long enough."""
    facts = case.unit_facts()
    if not facts:
        told = "no unit runs this file" if case.unit is None else f"{case.unit} is not loaded"
        yield ok("service", f"{told}: the agent is started by hand")
        return
    yield _state(case.unit or "", facts)
    yield from _watchdog(case, facts.get("WatchdogUSec", ""))


def granted(case: Case) -> Iterator[Finding]:
    """Yield whether the agent gets what `realtime` in station.yaml asks for; nothing where it asks for nothing."""
    asked, facts = case.station.realtime, case.unit_facts()
    if asked == RealtimeSettings():
        return
    refused = []
    if asked.priority and asked.priority > (most := _limit(case, facts, "LimitRTPRIO", resource.RLIMIT_RTPRIO)):
        refused.append(f"priority {asked.priority}, {most:g} allowed")
    if asked.priority and facts.get("RestrictRealtime") == "yes":
        refused.append("RestrictRealtime=yes")
    if asked.lock_memory and (most := _limit(case, facts, "LimitMEMLOCK", resource.RLIMIT_MEMLOCK)) < math.inf:
        refused.append(f"lock_memory, {most / 1e6:.0f} MB allowed")
    absent = [cpu for cpu in asked.cpus if not case.machine.at(f"sys/devices/system/cpu/cpu{cpu}").is_dir()]
    if absent:
        refused.append(f"CPUs {absent} are not there")
    if refused:
        yield warn(
            "service.real_time",
            "; ".join(refused),
            "what realtime in station.yaml asks for",
            "mend the unit's drop-ins (systemd/drop-ins/realtime.conf is one), or ask for less",
        )
    else:
        yield ok(
            "service.real_time", f"priority {asked.priority or 'as allowed'}, CPUs {list(asked.cpus) or 'all'}: granted"
        )


def span_s(text: str) -> float | None:
    """Return the seconds of systemd's "1min 30s"; None where it is no span, as "infinity"."""
    parts = _SPAN.findall(text)
    return sum(float(number) * _SPAN_S[kind] for number, kind in parts) if parts else None


def _state(unit: str, facts: dict[str, str]) -> Finding:
    state, below = facts.get("ActiveState", "?"), facts.get("SubState", "?")
    restarts, result = facts.get("NRestarts", "0"), facts.get("Result", "?")
    told = f"{unit}: {state} ({below}), started anew {restarts} times"
    journal = f"journalctl -u {unit} -n 50"
    if state == "failed":
        action = f"{journal}: mend what it names, nobody tries again before; then systemctl start {unit}"
        return fail("service", f"{told}, result {result}", "active", action)
    if below == "auto-restart":
        return fail("service", f"{told}, result {result}", "one start that lasts", journal)
    if state not in ("active", "activating", "reloading"):
        return warn("service", told, "active", f"systemctl start {unit}")
    if restarts not in ("0", ""):
        return warn("service", told, "one start that lasts", journal)
    if facts.get("UnitFileState") == "disabled":
        return warn("service", f"{told}, disabled", "enabled: else it is not there after a power cut",
                    f"systemctl enable {unit}")  # fmt: skip
    return ok("service", told)


def _watchdog(case: Case, text: str) -> Iterator[Finding]:
    """Yield whether an inspection that takes as long as it may is taken for one that hangs."""
    watchdog_s, wanted_s = span_s(text), 2 * case.station.beat.deadline_ms / 1e3
    if not watchdog_s:
        yield warn(
            "service.watchdog",
            f"off ({text or 'not told'})",
            f"{wanted_s:g} s or more: nobody ends an agent that hangs",
            "set WatchdogSec= in a drop-in, or take the one away that switches it off",
        )
    elif watchdog_s < wanted_s:
        yield warn(
            "service.watchdog",
            f"{watchdog_s:g} s",
            f"{wanted_s:g} s or more, twice deadline_ms",
            f"WatchdogSec={wanted_s:g} in a drop-in, then systemctl daemon-reload and restart",
        )
    else:
        yield ok("service.watchdog", f"{watchdog_s:g} s, the deadline is {case.station.beat.deadline_ms:g} ms")


def _limit(case: Case, facts: dict[str, str], name: str, number: int) -> float:
    """Return what the agent's unit is allowed, else what this shell is; infinity for root's own shell."""
    if facts:
        text = facts.get(name, "0")
        return float(text) if text.isdecimal() else math.inf
    most, _ = case.machine.limit(number)
    return math.inf if most == resource.RLIM_INFINITY or case.machine.user.uid == 0 else float(most)


def _ask(machine: Machine) -> str:
    """Return how to see after the time server with what is installed here."""
    if machine.at("run/chrony").is_dir():
        return "chronyc sources: is a server reachable? servers stand in /etc/chrony/chrony.conf"
    if machine.at("run/systemd/timesync").is_dir():
        return "timedatectl timesync-status: is a server reachable? servers stand in /etc/systemd/timesyncd.conf"
    return "install chrony and give it the plant's time server"
