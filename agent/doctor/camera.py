"""What a GenICam camera needs of the machine: a producer, a network card that takes its packets, memory for USB.

Facts and figures: what was measured with GigE Vision over loopback is in the camera's own page; 9000 bytes, 32 MiB and
1000 MB are what makers of cameras ask for. Where no camera of the kind is in sight, nothing is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case, Machine, text_of, version_of, whole_of

PRODUCER_PATH = "GENICAM_GENTL64_PATH"
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}

LEAST_MTU = 9000  # bytes: one packet per 8.9 kB of picture instead of per 1.4 kB
LEAST_RMEM = 33_554_432  # bytes: several frames' worth of packets while the receiver sleeps
LEAST_LINK_MBIT_S = 1000
LEAST_USBFS_MB = 1000

USB3_VISION = ("ef", "05")  # interface class and subclass
SUPERSPEED_MBIT_S = 5000


@dataclass(frozen=True, slots=True)
class Port:
    """A network card's port that has a carrier."""

    name: str
    mtu: int
    speed_mbit_s: int | None
    duplex: str | None


def producers(machine: Machine) -> Iterator[Finding]:
    """Yield which GenTL producers (.cti) are found, and what cannot be loaded here."""
    places = [Path(place) for place in machine.environment.get(PRODUCER_PATH, "").split(os.pathsep) if place]
    absent = [str(place) for place in places if not place.is_dir()]
    if absent:
        yield warn(
            "camera.producers",
            f"{PRODUCER_PATH} names {', '.join(absent)}: no folder",
            "folders that hold .cti files",
            f"install the camera maker's package anew, or mend {PRODUCER_PATH}",
        )
    files = _cti_files(places)
    for file in files:
        if (why := _not_loadable(file, machine.processor)) is not None:
            yield fail(
                f"camera.producer {file.name}",
                f"{file}: {why}",
                f"a producer for {machine.processor}",
                "install the camera maker's package for this kind of machine",
            )
    if files:
        yield ok("camera.producers", ", ".join(str(file) for file in files))
    elif not absent:
        yield ok("camera.producers", f"none: {PRODUCER_PATH} is not set")


def station_camera(case: Case) -> Iterator[Finding]:
    """Yield whether what a station's camera is reached through is installed; a simulated one needs nothing."""
    if case.station.camera.simulated:
        yield ok("camera", "simulated or replayed: none is needed")
        return
    lacking = [] if version_of("harvesters") and version_of("genicam") else ["harvesters or genicam is not installed"]
    named = getattr(case.station.camera, "producer", None)  # a file, where station.yaml names one
    if not (named is not None and Path(named).is_file()) and not _has_producer(case.machine):
        lacking.append("no producer is found")
    if lacking:
        yield fail(
            "camera",
            "; ".join(lacking),
            "a GenTL producer, and harvesters to load it",
            "install the camera maker's package, and pip install 'taktsight[genicam]'",
        )
    else:
        yield ok("camera", f"harvesters {version_of('harvesters')}, genicam {version_of('genicam')}")


def network(machine: Machine) -> Iterator[Finding]:
    """Yield how the network's ports are set, and what a GigE Vision camera would lose packets by."""
    ports = _ports(machine)
    for port in ports:
        if port.duplex == "half":
            yield warn(
                f"network {port.name}", "half duplex", "full duplex", "let both ends negotiate; change cable or switch"
            )
    told = ", ".join(f"{port.name} {port.speed_mbit_s or '?'} Mbit/s, MTU {port.mtu}" for port in ports)
    yield ok("network", told or "no port with a carrier")
    if _has_producer(machine):
        yield from _gige(machine, ports)


def usb(machine: Machine) -> Iterator[Finding]:
    """Yield whether USB3 Vision cameras, where there are any, have the speed and the memory they need."""
    cameras = _usb_cameras(machine)
    if not cameras:
        return
    slow = [camera.name for camera in cameras if (whole_of(camera / "speed") or 0) < SUPERSPEED_MBIT_S]
    listed = ", ".join(text_of(camera / "product") or camera.name for camera in cameras)
    if slow:
        yield warn(
            "camera.usb",
            f"{listed}: {', '.join(slow)} is on USB 2",
            "USB 3 (5000 Mbit/s or more)",
            "another cable, another port; no hub between",
        )
    else:
        yield ok("camera.usb", listed)
    memory_mb = machine.whole("sys/module/usbcore/parameters/usbfs_memory_mb")
    if memory_mb is None:
        return
    if 0 < memory_mb < LEAST_USBFS_MB:  # 0: no limit
        yield warn(
            "camera.usbfs_memory",
            f"{memory_mb} MB",
            f"{LEAST_USBFS_MB} MB: more frames wait than fit",
            f"add usbcore.usbfs_memory_mb={LEAST_USBFS_MB} to the kernel's command line",
        )
    else:
        yield ok("camera.usbfs_memory", f"{memory_mb} MB" if memory_mb else "no limit")


def _gige(machine: Machine, ports: list[Port]) -> Iterator[Finding]:
    """Yield what is asked for where a producer is installed; which port the camera is on, nobody says."""
    largest = max((port.mtu for port in ports), default=0)
    if largest < LEAST_MTU:
        yield warn(
            "camera.mtu",
            f"{largest} at most" if ports else "no port with a carrier",
            f"{LEAST_MTU} on the camera's port",
            f"ip link set PORT mtu {LEAST_MTU}, and the same for good in the network's settings",
        )
    else:
        yield ok("camera.mtu", str(largest))
    fastest = max((port.speed_mbit_s or 0 for port in ports), default=0)
    if 0 < fastest < LEAST_LINK_MBIT_S:
        yield warn("camera.link", f"{fastest} Mbit/s", f"{LEAST_LINK_MBIT_S} Mbit/s", "change the cable or the switch")
    rmem = machine.whole("proc/sys/net/core/rmem_max")
    if rmem is None:
        return
    if rmem < LEAST_RMEM:
        yield warn(
            "camera.rmem_max",
            f"{rmem} bytes",
            f"{LEAST_RMEM}: packets are lost while the receiver sleeps",
            f"write net.core.rmem_max={LEAST_RMEM} into /etc/sysctl.d/90-taktsight.conf, then sysctl --system",
        )
    else:
        yield ok("camera.rmem_max", f"{rmem} bytes")


def _cti_files(places: list[Path]) -> list[Path]:
    return sorted({file for place in places if place.is_dir() for file in place.glob("*.cti")})


def _not_loadable(file: Path, processor: str) -> str | None:
    """Return why a library cannot be loaded on this processor, as its first 20 bytes tell; None: they tell nothing."""
    try:
        with file.open("rb") as reader:
            head = reader.read(20)
    except OSError as error:
        return str(error.strerror)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return "no library for Linux"
    wanted = ELF_MACHINES.get(processor)
    found = int.from_bytes(head[18:20], "little")
    if wanted is None or found == wanted:
        return None
    known = {number: name for name, number in ELF_MACHINES.items()}
    return f"made for {known.get(found, f'another processor ({found})')}"


def _has_producer(machine: Machine) -> bool:
    places = [Path(place) for place in machine.environment.get(PRODUCER_PATH, "").split(os.pathsep) if place]
    return bool(_cti_files(places))


def _ports(machine: Machine) -> list[Port]:
    """Return the ports of real cards that have a carrier."""
    found = []
    for port in sorted(machine.at("sys/class/net").glob("*")):
        if not (port / "device").exists() or text_of(port / "operstate") != "up":
            continue
        speed = whole_of(port / "speed")
        known = speed if speed is not None and speed > 0 else None  # -1: the card does not say
        found.append(Port(port.name, whole_of(port / "mtu") or 0, known, text_of(port / "duplex")))
    return found


def _usb_cameras(machine: Machine) -> list[Path]:
    """Return the folders of USB devices with an interface of USB3 Vision."""
    cameras = set()
    for kind in machine.at("sys/bus/usb/devices").glob("*/bInterfaceClass"):
        if (text_of(kind), text_of(kind.with_name("bInterfaceSubClass"))) == USB3_VISION:
            interface = kind.parent  # "2-1:1.0", of the device "2-1"
            cameras.add(interface.with_name(interface.name.partition(":")[0]))
    return sorted(cameras)
