"""What makes the same part take longer than yesterday: clocks that were lowered, heat, swapping, no real time."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Machine, text_of, whole_of

WARN_BELOW_LIMIT_C = 10.0
LIMIT_C = 95.0  # where the machine names no limit of its own
LEAST_MEMORY_MB = 550.0  # available: inspect and publish process; benchmarks/results/deadline.csv
MOST_SWAPPED_MB = 64.0


def governor(machine: Machine) -> Iterator[Finding]:
    """Yield whether the CPUs' clocks wait for load before they rise."""
    found = {}
    for folder in _cpu_folders(machine, "cpufreq"):
        name = text_of(folder / "scaling_governor")
        preference = text_of(folder / "energy_performance_preference")
        if name is not None:
            found[folder.parent.name] = "performance" if preference == "performance" else name
    slow = sorted({name for name in found.values() if name != "performance"})
    if not found:
        yield ok("power.governor", "not told: a virtual machine, or clocks that do not change")
    elif slow:
        number = sum(name != "performance" for name in found.values())
        yield warn(
            "power.governor",
            f"{', '.join(slow)} on {number} of {len(found)} CPUs",
            "performance: else a part that comes after a pause takes longer",
            "cpupower frequency-set -g performance, and the same at every start",
        )
    else:
        yield ok("power.governor", f"performance on {len(found)} CPUs")


def temperature(machine: Machine) -> Iterator[Finding]:
    """Yield the hottest zone, against the lowest limit that it names itself."""
    zones = [
        (limit_c - found_c, found_c, limit_c, name)
        for zone in sorted(machine.at("sys/class/thermal").glob("thermal_zone*"))
        for found_c, limit_c, name in _zone(zone)
    ]
    if not zones:
        yield ok("power.temperature", "not told")
        return
    margin_c, found_c, limit_c, name = min(zones)
    text = f"{name} {found_c:.0f} °C, limit {limit_c:.0f} °C"
    action = "clean filters and fans; look at the cabinet's temperature"
    if margin_c <= 0:
        yield fail("power.temperature", text, "below the limit: the clocks are lowered now", action)
    elif margin_c <= WARN_BELOW_LIMIT_C:
        yield warn("power.temperature", text, f"{WARN_BELOW_LIMIT_C:g} °C below the limit", action)
    else:
        yield ok("power.temperature", text)


def throttled(machine: Machine) -> Iterator[Finding]:
    """Yield how often heat has lowered a CPU's clock since the machine was started; only Intel's count it."""
    counts = [
        count
        for folder in _cpu_folders(machine, "thermal_throttle")
        for name in ("core_throttle_count", "package_throttle_count")
        if (count := whole_of(folder / name)) is not None
    ]
    if counts and max(counts) > 0:
        yield warn(
            "power.throttled",
            f"{max(counts)} times since the machine was started",
            "never: while it lasts, parts are late",
            "clean filters and fans; look at the cabinet's temperature",
        )
    elif counts:
        yield ok("power.throttled", "never since the machine was started")


def jetson(machine: Machine) -> Iterator[Finding]:
    """Yield the power mode of a Jetson; nothing elsewhere."""
    release = machine.text("etc/nv_tegra_release")
    if release is None:
        return
    status = re.search(r"pmode:(\d+)", machine.text("var/lib/nvpmodel/status") or "")
    models = re.findall(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", machine.text("etc/nvpmodel.conf") or "")
    names = {int(number): name for number, name in models}
    fastest = next((number for number, name in names.items() if name.startswith("MAXN")), 0)
    if status is None:
        yield ok("power.jetson", "power mode not told")
    elif int(status[1]) != fastest:
        yield warn(
            "power.jetson",
            f"power mode {names.get(int(status[1]), status[1])}",
            f"{names.get(fastest, fastest)}, if cooling and supply allow it",
            f"nvpmodel -m {fastest}",
        )
    else:
        yield ok("power.jetson", f"power mode {names.get(fastest, fastest)}")
    yield _jetson_clocks(machine)


def _jetson_clocks(machine: Machine) -> Finding:
    """Return whether jetson_clocks has tied each CPU's lowest clock to its highest."""
    ends = [
        (whole_of(folder / "scaling_min_freq"), whole_of(folder / "scaling_max_freq"))
        for folder in _cpu_folders(machine, "cpufreq")
    ]
    if all(lowest == highest for lowest, highest in ends):
        return ok("power.jetson_clocks", "clocks at their highest")
    return warn(
        "power.jetson_clocks",
        "clocks follow the load",
        "at their highest: else a part that comes after a pause takes longer",
        "jetson_clocks, and the same at every start",
    )


def memory(machine: Machine) -> Iterator[Finding]:
    """Yield how much memory is left, and whether some of what is in use was swapped out."""
    lines = re.findall(r"^(\w+):\s+(\d+) kB", machine.text("proc/meminfo") or "", re.MULTILINE)
    mb = {name: int(kib) / 1024 for name, kib in lines}
    if "MemAvailable" not in mb:
        yield ok("memory", "not told")
        return
    swapped_mb = mb.get("SwapTotal", 0.0) - mb.get("SwapFree", 0.0)
    text = f"{mb['MemAvailable']:.0f} MB available, {swapped_mb:.0f} MB swapped out"
    if mb["MemAvailable"] < LEAST_MEMORY_MB:
        yield warn("memory", text, f"{LEAST_MEMORY_MB:g} MB available", "end what else runs here; or more memory")
    elif swapped_mb > MOST_SWAPPED_MB:
        yield warn("memory", text, "nothing swapped out: it comes back too late", "swapoff -a, or more memory")
    else:
        yield ok("memory", text)


def real_time(machine: Machine) -> Iterator[Finding]:
    """Yield what the kernel leaves to threads with real-time priority: see `realtime.priority`."""
    runtime_us = machine.whole("proc/sys/kernel/sched_rt_runtime_us")
    period_us = machine.whole("proc/sys/kernel/sched_rt_period_us")
    if runtime_us is None or not period_us:
        yield ok("real_time", "not told")
    elif runtime_us < 0:
        yield warn(
            "real_time",
            "no limit (sched_rt_runtime_us is -1)",
            "950000: else a thread that spins takes the machine with it",
            "sysctl kernel.sched_rt_runtime_us=950000",
        )
    elif runtime_us == 0:
        yield warn(
            "real_time",
            "none at all (sched_rt_runtime_us is 0)",
            "950000: else the agent cannot go before other work",
            "sysctl kernel.sched_rt_runtime_us=950000",
        )
    else:
        share = 100 * runtime_us / period_us
        yield ok("real_time", f"{share:.0f} % of each CPU at most; {_priority(machine)}")


def _priority(machine: Machine) -> str:
    most, _ = machine.limit(resource.RLIMIT_RTPRIO)
    return "this shell may not ask for it" if most == 0 else f"this shell may ask for priority {most}"


def _cpu_folders(machine: Machine, name: str) -> list[Path]:
    return sorted(machine.at("sys/devices/system/cpu").glob(f"cpu[0-9]*/{name}"))


def _zone(zone: Path) -> Iterator[tuple[float, float, str]]:
    """Yield (temperature, lowest limit, name) of a zone, °C; nothing of one that is no thermometer."""
    found = whole_of(zone / "temp")
    if found is None or not 0 < found < 150_000:
        return
    limits = [
        limit
        for kind in zone.glob("trip_point_*_type")
        if text_of(kind) in ("passive", "hot", "critical")
        and (limit := whole_of(kind.with_name(kind.name.replace("_type", "_temp")))) is not None
        and 0 < limit < 150_000
    ]
    yield found / 1000, min(limits, default=1000 * LIMIT_C) / 1000, text_of(zone / "type") or zone.name
