"""`taktsight-agent doctor`: everything that keeps a station from its work, found before the first part does.

    Machine, Case            doctor_machine   what is looked at
    Finding                  doctor_finding   what is said about it
    probe(Machine | Case)    doctor_*         one topic each; yields findings, changes nothing

No probe can hold up or break another: each runs within a time-out, and what it raises is a finding of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from agent.config import read_station, read_stations
from agent.doctor.broker import broker
from agent.doctor.camera import network, producers, station_camera, usb
from agent.doctor.finding import Finding, Grade, fail, ok
from agent.doctor.folders import folders, readable_files
from agent.doctor.gpu import gpu, station_gpu
from agent.doctor.machine import Case, Machine
from agent.doctor.outbox import audit_trail, outbox
from agent.doctor.output import output
from agent.doctor.power import governor, jetson, memory, real_time, temperature, throttled
from agent.doctor.recipe import judging, stored_recipes, trust
from agent.doctor.service import clock, granted, unit, user
from agent.doctor.software import engines, names, packages, python
from agent.doctor.trigger import trigger
from calibration.errors import SettingsError

PROBE_TIMEOUT_S = 30.0  # the slowest one loads and proves an engine; the network's own time-outs are shorter

PROBES: Mapping[str, Callable[[Machine], Iterator[Finding]]] = {
    "python": python,
    "packages": packages,
    "names": names,
    "engines": engines,
    "gpu": gpu,
    "camera.producers": producers,
    "camera.network": network,
    "camera.usb": usb,
    "power.governor": governor,
    "power.temperature": temperature,
    "power.throttled": throttled,
    "power.jetson": jetson,
    "memory": memory,
    "real_time": real_time,
    "clock": clock,
}

STATION_PROBES: Mapping[str, Callable[[Case], Iterator[Finding]]] = {
    "user": user,
    "service": unit,
    "service.real_time": granted,
    "files": readable_files,
    "recipe.trust": trust,
    "recipe": judging,
    "recipe.folder": stored_recipes,
    "camera": station_camera,
    "gpu.station": station_gpu,
    "output": output,
    "trigger": trigger,
    "folders": folders,
    "outbox": outbox,
    "audit": audit_trail,
    "broker": broker,
}


def examine(station_file: Path | None, machine: Machine | None = None) -> Iterator[Finding]:
    """Yield findings about this machine and, where a file is given, about its station. Never raises."""
    machine = machine or Machine()
    for name, probe in PROBES.items():
        yield from probed(name, partial(probe, machine))
    if station_file is None:
        return
    cases: list[Case] = []
    yield from probed("station", partial(_settings, station_file, machine, cases))
    for case in cases:
        for name, station_probe in STATION_PROBES.items():
            yield from probed(name, partial(station_probe, case))


def probed(name: str, probe: Callable[[], Iterator[Finding]], timeout_s: float = PROBE_TIMEOUT_S) -> list[Finding]:
    """Return what a probe found. What it raises, and that it hangs, is a finding named after it."""
    found: list[Finding] = []

    def run() -> None:
        try:
            for finding in probe():
                found.append(finding)  # at once: what was found before it fails counts
        except Exception as error:  # noqa: BLE001 a doctor does not fall ill of what it finds
            found.append(_broken(name, f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, name=f"taktsight-doctor-{name}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return [*found, _broken(name, f"no answer within {timeout_s:g} s: a disk or a driver hangs")]
    return found


def _settings(file: Path, machine: Machine, cases: list[Case]) -> Iterator[Finding]:
    """Yield whether the settings can be used; where they can, a case is added for each of the file's cameras."""
    try:
        stations = {file / name: station for name, station in read_stations(file).items()} or {file: read_station(file)}
    except SettingsError as error:
        yield fail("station", str(error), "settings that the agent takes", f"mend {file.name} as it says")
        return
    for path, station in stations.items():
        cases.append(Case(machine, station, path))
        beat = station.beat
        yield ok("station", f"{station.name}: takt {beat.takt_ms:g} ms, deadline {beat.deadline_ms:g} ms")


def _broken(name: str, why: str) -> Finding:
    return Finding(name, Grade.FAIL, why[:1000], "an answer", "send this report to support: the rest of it holds")
