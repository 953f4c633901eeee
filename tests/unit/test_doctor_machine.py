"""What the doctor reads of /sys and /proc, each made ok, warn and fail by a folder in the place of `/`."""

import re
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.doctor import camera as doctor_camera
from agent.doctor.camera import LEAST_RMEM, PRODUCER_PATH, network, producers, usb
from agent.doctor.finding import Grade
from agent.doctor.machine import Account, Machine, may, program_output
from agent.doctor.power import governor, jetson, memory, real_time, temperature, throttled
from agent.doctor.service import clock, granted, span_s, unit, user
from tests.machines import AGENT, NOON, ROOT, case_at, grades, machine_at, only

CPU = "sys/devices/system/cpu"
RMEM = "proc/sys/net/core/rmem_max"
SYSTEMD = Path(__file__).parents[2] / "systemd"


def library(path, machine=62):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, machine) + bytes(40))
    return path


# cameras


def test_no_producer_is_no_fault_and_those_found_are_told(tmp_path):
    assert grades(producers(machine_at(tmp_path))) == {"camera.producers": "ok"}
    first, second = library(tmp_path / "a/one.cti"), library(tmp_path / "b/two.cti")
    places = {PRODUCER_PATH: f"{first.parent}:{second.parent}"}
    (found,) = producers(machine_at(tmp_path, environment=places))
    assert (found.grade, found.found) == (Grade.OK, f"{first}, {second}")


def test_a_producer_folder_that_is_not_there_warns(tmp_path):
    (found,) = producers(machine_at(tmp_path, environment={PRODUCER_PATH: f"{tmp_path}/gone"}))
    assert (found.name, found.grade) == ("camera.producers", Grade.WARN)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"", "no library"), (b"MZ" + bytes(60), "no library"), (None, "made for aarch64")],
)
def test_a_producer_that_cannot_be_loaded_here_fails(tmp_path, content, text):
    file = library(tmp_path / "one.cti", machine=183)
    if content is not None:
        file.write_bytes(content)
    found = list(producers(machine_at(tmp_path, environment={PRODUCER_PATH: str(tmp_path)})))
    assert grades(found)["camera.producer one.cti"] == "fail"
    assert text in found[0].found


def test_a_station_with_a_real_camera_needs_harvesters_and_a_producer(tmp_path, monkeypatch):
    def found(versions, **environment):
        monkeypatch.setattr(doctor_camera, "version_of", versions.get)
        (finding,) = doctor_camera.station_camera(case_at(tmp_path, machine_at(tmp_path, environment=environment)))
        return str(finding.grade), finding.found

    both = {"harvesters": "1.4.3", "genicam": "1.6.0"}
    library(tmp_path / "gentl/gev.cti")
    assert found({}) == ("ok", "simulated or replayed: none is needed")
    monkeypatch.setattr("agent.cameras.settings.CameraSettings.simulated", property(lambda _: False))
    assert found({}) == ("fail", "harvesters or genicam is not installed; no producer is found")
    assert found(both) == ("fail", "no producer is found")
    assert found(both, GENICAM_GENTL64_PATH=f"{tmp_path}/gentl") == ("ok", "harvesters 1.4.3, genicam 1.6.0")


def port(name, *, mtu=1500, speed=1000, duplex="full", state="up"):
    folder = f"sys/class/net/{name}"
    return {
        f"{folder}/device/uevent": "",
        f"{folder}/mtu": mtu,
        f"{folder}/speed": speed,
        f"{folder}/duplex": duplex,
        f"{folder}/operstate": state,
    }


def with_gige(tmp_path, files):
    library(tmp_path / "gentl/gev.cti")
    return machine_at(tmp_path, files, environment={PRODUCER_PATH: f"{tmp_path}/gentl"})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({**port("eth1", mtu=9000), RMEM: LEAST_RMEM}, {"camera.mtu": "ok", "camera.rmem_max": "ok"}),
        ({**port("eth1", mtu=9000), **port("eth0"), RMEM: LEAST_RMEM}, {"camera.mtu": "ok", "camera.rmem_max": "ok"}),
        ({**port("eth1", mtu=8999), RMEM: LEAST_RMEM - 1}, {"camera.mtu": "warn", "camera.rmem_max": "warn"}),
        ({**port("eth1", mtu=9000, state="down")}, {"camera.mtu": "warn"}),
        ({**port("eth1", mtu=9000, speed=100)}, {"camera.mtu": "ok", "camera.link": "warn"}),
        ({**port("eth1", mtu=9000, speed=-1)}, {"camera.mtu": "ok"}),
        ({"sys/class/net/lo/mtu": 65536, "sys/class/net/lo/operstate": "up"}, {"camera.mtu": "warn"}),
    ],
)
def test_where_a_producer_is_installed_the_network_must_take_large_packets(tmp_path, files, expected):
    assert grades(network(with_gige(tmp_path, files))) == {"network": "ok", **expected}


def test_where_none_is_installed_an_ordinary_network_is_fine_but_half_duplex_never(tmp_path):
    files = {**port("eth0"), **port("eth1", duplex="half"), RMEM: 212992}
    found = list(network(machine_at(tmp_path, files)))
    assert grades(found) == {"network": "ok", "network eth1": "warn"}
    assert only(found, "network").found == "eth0 1000 Mbit/s, MTU 1500, eth1 1000 Mbit/s, MTU 1500"


def usb_camera(speed, *, kind="ef", below="05"):
    devices = "sys/bus/usb/devices"
    return {
        f"{devices}/2-1/speed": speed,
        f"{devices}/2-1/product": "acA1920",
        f"{devices}/2-1:1.0/bInterfaceClass": kind,
        f"{devices}/2-1:1.0/bInterfaceSubClass": below,
    }


USBFS = "sys/module/usbcore/parameters/usbfs_memory_mb"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        (usb_camera(5000, kind="03"), {}),
        (usb_camera(5000, below="02"), {}),
        ({**usb_camera(5000), USBFS: 1000}, {"camera.usb": "ok", "camera.usbfs_memory": "ok"}),
        ({**usb_camera(10000), USBFS: 0}, {"camera.usb": "ok", "camera.usbfs_memory": "ok"}),
        ({**usb_camera(480), USBFS: 16}, {"camera.usb": "warn", "camera.usbfs_memory": "warn"}),
        (usb_camera(5000), {"camera.usb": "ok"}),
    ],
)
def test_a_usb3_vision_camera_wants_speed_and_memory(tmp_path, files, expected):
    assert grades(usb(machine_at(tmp_path, files))) == expected


# power and heat


@pytest.mark.parametrize(
    ("files", "grade", "text"),
    [
        ({}, "ok", "not told"),
        ({f"{CPU}/cpu{n}/cpufreq/scaling_governor": "performance" for n in range(4)}, "ok", "on 4 CPUs"),
        (
            {
                f"{CPU}/cpu0/cpufreq/scaling_governor": "performance",
                f"{CPU}/cpu1/cpufreq/scaling_governor": "powersave",
            },
            "warn",
            "powersave on 1 of 2 CPUs",
        ),
        (
            {
                f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave",
                f"{CPU}/cpu0/cpufreq/energy_performance_preference": "performance",
            },
            "ok",
            "on 1 CPUs",
        ),
    ],
)
def test_the_governor_must_not_wait_for_load(tmp_path, files, grade, text):
    (found,) = governor(machine_at(tmp_path, files))
    assert str(found.grade) == grade
    assert text in found.found


def zone(number, temp, **trips):
    folder = f"sys/class/thermal/thermal_zone{number}"
    files = {f"{folder}/temp": temp, f"{folder}/type": f"zone-{number}"}
    for place, (kind, limit) in enumerate(trips.items()):
        files |= {f"{folder}/trip_point_{place}_type": kind, f"{folder}/trip_point_{place}_temp": limit}
    return files


@pytest.mark.parametrize(
    ("files", "grade", "text"),
    [
        ({}, "ok", "not told"),
        (zone(0, 45000, passive=90000, critical=100000), "ok", "zone-0 45 °C, limit 90 °C"),
        (zone(0, 80000, passive=90000, critical=100000), "warn", "limit 90 °C"),
        (zone(0, 79000, passive=90000), "ok", "79 °C"),
        (zone(0, 90000, passive=90000), "fail", "90 °C"),
        (zone(0, 85000), "warn", "limit 95 °C"),
        (zone(0, 45000, active=40000), "ok", "limit 95 °C"),
        (zone(0, 45000, critical=-274000), "ok", "limit 95 °C"),
        (zone(0, -273200, critical=100000), "ok", "not told"),
        ({**zone(0, 50000, hot=100000), **zone(1, 92000, hot=100000)}, "warn", "zone-1"),
    ],
)
def test_the_zone_nearest_to_its_own_limit_is_told(tmp_path, files, grade, text):
    (found,) = temperature(machine_at(tmp_path, files))
    assert str(found.grade) == grade
    assert text in found.found


def test_clocks_that_heat_has_lowered_warn_where_they_are_counted(tmp_path):
    assert list(throttled(machine_at(tmp_path / "amd"))) == []
    counter = f"{CPU}/cpu1/thermal_throttle/package_throttle_count"
    assert grades(throttled(machine_at(tmp_path, {counter: 0}))) == {"power.throttled": "ok"}
    assert grades(throttled(machine_at(tmp_path, {counter: 3}))) == {"power.throttled": "warn"}


JETSON = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
}


def clocks(lowest, highest):
    folder = f"{CPU}/cpu0/cpufreq"
    return {f"{folder}/scaling_min_freq": lowest, f"{folder}/scaling_max_freq": highest}


@pytest.mark.parametrize(
    ("files", "expected", "text"),
    [
        ({"var/lib/nvpmodel/status": "pmode:0002", **clocks(9, 9)}, ("ok", "ok"), "MAXN_SUPER"),
        ({"var/lib/nvpmodel/status": "pmode:0000", **clocks(1, 9)}, ("warn", "warn"), "15W"),
        ({}, ("ok", "ok"), "not told"),
    ],
)
def test_a_jetson_runs_in_its_fastest_mode(tmp_path, files, expected, text):
    found = list(jetson(machine_at(tmp_path, {**JETSON, **files})))
    assert tuple(grades(found).values()) == expected
    assert text in found[0].found


def test_elsewhere_nothing_is_said_of_jetsons(tmp_path):
    assert list(jetson(machine_at(tmp_path))) == []


def meminfo(available_mb, swapped_mb=0):
    lines = {"MemTotal": 8192, "MemAvailable": available_mb, "SwapTotal": 2048, "SwapFree": 2048 - swapped_mb}
    return {"proc/meminfo": "\n".join(f"{name}:   {mb * 1024} kB" for name, mb in lines.items())}


@pytest.mark.parametrize(
    ("files", "grade"),
    [
        ({}, "ok"),
        (meminfo(4000), "ok"),
        (meminfo(550), "ok"),
        (meminfo(549), "warn"),
        (meminfo(4000, swapped_mb=64), "ok"),
        (meminfo(4000, swapped_mb=65), "warn"),
    ],
)
def test_little_memory_and_swapping_warn(tmp_path, files, grade):
    assert grades(memory(machine_at(tmp_path, files))) == {"memory": grade}


@pytest.mark.parametrize(
    ("runtime_us", "grade", "text"),
    [(950000, "ok", "95 %"), (-1, "warn", "no limit"), (0, "warn", "none at all"), (None, "ok", "not told")],
)
def test_real_time_is_neither_endless_nor_forbidden(tmp_path, runtime_us, grade, text):
    files = {} if runtime_us is None else {"proc/sys/kernel/sched_rt_runtime_us": runtime_us}
    files["proc/sys/kernel/sched_rt_period_us"] = 1_000_000
    (found,) = real_time(machine_at(tmp_path, files))
    assert str(found.grade) == grade
    assert text in found.found


def test_the_priority_that_a_user_may_ask_for_is_told(tmp_path):
    files = {"proc/sys/kernel/sched_rt_runtime_us": 950000, "proc/sys/kernel/sched_rt_period_us": 1_000_000}
    (found,) = real_time(machine_at(tmp_path, files, limit=lambda number: (30, 30)))
    assert found.found.endswith("this shell may ask for priority 30")


# clock


@pytest.mark.parametrize(
    ("says", "now", "grade", "text"),
    [
        (True, NOON, "ok", "kept by a time server"),
        (False, NOON, "warn", "no time server keeps it"),
        (None, NOON, "warn", "does not say"),
        (True, datetime(1970, 1, 1, tzinfo=UTC), "fail", "1970"),
    ],
)
def test_the_clock_is_kept_by_a_time_server(tmp_path, says, now, grade, text):
    machine = machine_at(tmp_path, is_synchronized=lambda: says, now_utc=lambda: now)
    (found,) = clock(machine)
    assert str(found.grade) == grade
    assert text in found.found


@pytest.mark.parametrize(
    ("folder", "action"),
    [("run/chrony", "chronyc"), ("run/systemd/timesync", "timedatectl"), ("run", "install chrony")],
)
def test_whoever_keeps_the_time_here_is_named(tmp_path, folder, action):
    (tmp_path / folder).mkdir(parents=True)
    (found,) = clock(machine_at(tmp_path, is_synchronized=lambda: False))
    assert found.action.startswith(action)


# user and unit

HEALTHY = {
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "Result": "success",
    "NRestarts": "0",
    "UnitFileState": "enabled",
    "WatchdogUSec": "10s",
    "User": "taktsight",
}


def served(tmp_path, facts, settings="", **answers):
    """A station below /etc/taktsight, on a machine whose systemd says these facts."""
    asked = []

    def run(command):
        asked.append(command)
        return "\n".join(f"{key}={value}" for key, value in facts.items())

    (tmp_path / "run/systemd/system").mkdir(parents=True, exist_ok=True)
    machine = machine_at(tmp_path, run=run, **answers)
    case = case_at(tmp_path, machine, settings, file=tmp_path / "etc/taktsight/cell7.yaml")
    assert case.unit == "taktsight-agent@cell7.service"
    found = list(unit(case))
    assert asked[0][:3] == ["systemctl", "show", "taktsight-agent@cell7.service"]
    return found


@pytest.mark.parametrize(
    ("facts", "grade", "text"),
    [
        ({}, "ok", "active (running)"),
        ({"ActiveState": "failed", "SubState": "failed", "Result": "watchdog"}, "fail", "result watchdog"),
        ({"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code"}, "fail", "exit-code"),
        ({"ActiveState": "activating", "SubState": "start"}, "ok", "activating"),
        ({"ActiveState": "inactive", "SubState": "dead"}, "warn", "inactive"),
        ({"NRestarts": "4"}, "warn", "started anew 4 times"),
        ({"UnitFileState": "disabled"}, "warn", "disabled"),
    ],
)
def test_the_unit_runs_and_goes_on_running(tmp_path, facts, grade, text):
    found = only(served(tmp_path, {**HEALTHY, **facts}), "service")
    assert str(found.grade) == grade
    assert text in found.found


def test_a_unit_that_is_left_for_a_person_is_mended_and_started(tmp_path):
    """It fails for good where another attempt changes nothing; no limit of starts has to be lifted."""
    found = only(served(tmp_path, {**HEALTHY, "ActiveState": "failed", "SubState": "failed"}), "service")
    name = "taktsight-agent@cell7.service"
    assert found.action.startswith(f"journalctl -u {name} -n 50: mend what it names")
    assert found.action.endswith(f"systemctl start {name}") and "reset-failed" not in found.action
    assert "\nStartLimitIntervalSec=0\n" in (SYSTEMD / "taktsight-agent@.service").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("watchdog", "grade"),
    [("10s", "ok"), ("1min 30s", "ok"), ("180ms", "ok"), ("179ms", "warn"), ("0", "warn"), ("infinity", "warn")],
)
def test_the_watchdog_waits_for_twice_the_deadline(tmp_path, watchdog, grade):
    found = served(tmp_path, {**HEALTHY, "WatchdogUSec": watchdog}, "deadline_ms: 90")
    assert str(only(found, "service.watchdog").grade) == grade


def test_a_file_that_no_unit_runs_is_started_by_hand(tmp_path):
    machine = machine_at(tmp_path, run=lambda command: pytest.fail("systemd was asked"))
    assert grades(unit(case_at(tmp_path, machine))) == {"service": "ok"}
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert grades(served(tmp_path, {"LoadState": "not-found"})) == {"service": "ok"}


@pytest.mark.parametrize(
    ("asked", "facts", "grade", "text"),
    [
        ("{priority: 20}", {"LimitRTPRIO": "20", "RestrictRealtime": "no"}, "ok", "priority 20"),
        ("{priority: 20}", {"LimitRTPRIO": "19", "RestrictRealtime": "no"}, "warn", "priority 20, 19 allowed"),
        ("{priority: 20}", {"LimitRTPRIO": "infinity", "RestrictRealtime": "yes"}, "warn", "RestrictRealtime=yes"),
        ("{lock_memory: true}", {"LimitMEMLOCK": "8388608"}, "warn", "8 MB allowed"),
        ("{lock_memory: true}", {"LimitMEMLOCK": "infinity"}, "ok", "granted"),
        ("{cpus: [0]}", {}, "ok", "CPUs [0]"),
        ("{cpus: [0, 7]}", {}, "warn", "CPUs [7] are not there"),
    ],
)
def test_what_realtime_asks_for_must_be_granted_by_the_unit(tmp_path, *, asked, facts, grade, text):
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    (tmp_path / CPU / "cpu0").mkdir(parents=True)
    said = "\n".join(f"{key}={value}" for key, value in {**HEALTHY, **facts}.items())
    machine = machine_at(tmp_path, run=lambda command: said)
    (found,) = granted(case_at(tmp_path, machine, f"realtime: {asked}", file=tmp_path / "etc/taktsight/cell7.yaml"))
    assert str(found.grade) == grade
    assert text in found.found


def test_without_a_unit_the_limits_of_the_shell_count_and_root_has_none(tmp_path):
    def grade(**answers):
        case = case_at(tmp_path, machine_at(tmp_path, **answers), "realtime: {priority: 20}")
        return list(grades(granted(case)).values())

    assert grade() == ["warn"]
    assert grade(limit=lambda number: (30, 30)) == ["ok"]
    assert grade(user=ROOT) == ["ok"]
    assert list(granted(case_at(tmp_path, machine_at(tmp_path)))) == []


def test_spans_are_read_as_systemd_writes_them():
    assert span_s("1min 30s") == 90
    assert span_s("2d 1h 500ms") == 2 * 86400 + 3600 + 0.5
    assert span_s("infinity") is None
    written = re.search(r"WatchdogSec=(\w+)", (SYSTEMD / "taktsight-agent@.service").read_text(encoding="utf-8"))
    assert span_s(written[1]) == 10


def test_the_agent_should_not_be_root(tmp_path):
    machine = machine_at(tmp_path, user=ROOT, account_named=lambda name: None)
    assert grades(user(case_at(tmp_path, machine))) == {"user": "warn"}
    assert grades(user(case_at(tmp_path, machine_at(tmp_path)))) == {"user": "ok"}
    (found,) = user(case_at(tmp_path, machine_at(tmp_path, user=ROOT)))
    assert (found.grade, found.found) == (Grade.OK, "taktsight; asked as root")


def test_whose_rights_count_is_said_by_the_unit_then_by_who_asks(tmp_path):
    line, bob = Account("line", 991, 991), Account("bob", 1000, 1000)
    known = {"taktsight": AGENT, "line": line}.get

    def account(user, facts):
        machine = machine_at(
            tmp_path,
            user=user,
            account_named=known,
            run=lambda command: "\n".join(f"{key}={value}" for key, value in facts.items()),
        )
        (tmp_path / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        case = case_at(tmp_path, machine, file=tmp_path / "etc/taktsight/cell7.yaml")
        return case.account().name, case.can_ask_for(case.account())

    assert account(ROOT, {**HEALTHY, "User": "line"}) == ("line", True)
    assert account(ROOT, {}) == ("taktsight", True)
    assert account(bob, {}) == ("bob", True)
    assert account(bob, HEALTHY) == ("taktsight", False)
    assert account(AGENT, HEALTHY) == ("taktsight", True)


# the real machine


def test_the_real_machine_answers_every_probe():
    machine = Machine()
    for probe in (producers, network, usb, governor, temperature, throttled, jetson, memory, real_time, clock):
        list(probe(machine))
    assert machine.now_utc() - datetime.now(UTC) < timedelta(seconds=1)


def test_rights_are_asked_of_the_kernel(tmp_path):
    nobody = Account("nobody", 65534, 65534, ())
    me = Machine().user
    (tmp_path / "file").write_text("x")
    assert may(me, tmp_path / "file", "r")
    assert not may(me, tmp_path / "absent", "r")
    if me.uid == 0:
        (tmp_path / "file").chmod(0o600)
        assert not may(nobody, tmp_path / "file", "r")
        assert may(nobody, Path("/"), "x")


def test_a_program_that_fails_or_is_absent_says_nothing():
    assert program_output(["no-such-program-at-all"]) is None
    assert program_output(["false"]) is None
    assert program_output(["echo", "hello"]) == "hello\n"
