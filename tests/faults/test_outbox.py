"""Kills, full disks, damaged bytes and power cuts, each with the real thing. `--long` does ten times as many."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.errors import OutboxFull
from agent.outbox.database import FILE
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import HeatmapPayload
from tests.broker import wait_until

STATION = "cell7"
PROJECT = Path(__file__).parents[2]
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2  # linux/ext4.h: nothing in memory reaches the disk any more

NURSERY = f"""
import os, sys
from pathlib import Path
from agent.errors import StorageError
from agent.outbox.outbox import Outbox, OutboxSettings

def work(folder, report):
    os.write(report, b"pid %d\\n" % os.getpid())
    box = Outbox(OutboxSettings(Path(folder), reserve_mb=4.0), "{STATION}")
    box.set_consumers(["mes"])
    while True:
        first, count = box.last_seq + 1, 1 + box.last_seq % 4
        box.store([({{"station": "{STATION}", "heatmap": None, "trigger": first + n}}, None) for n in range(count)])
        os.write(report, b"stored %d\\n" % box.last_seq)
        if box.waiting > 300:
            upto = box.read(box.first_seq - 1, 270)[-1].seq
            os.write(report, b"acknowledging %d\\n" % upto)
            box.acknowledge("mes", upto)

for order in sys.stdin:
    folder, report = order.split()
    child = os.fork()
    if child == 0:
        try:
            work(folder, os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        except StorageError:
            os._exit(1)
    os.waitpid(child, 0)
    Path(report + "-ended").touch()
"""


@pytest.fixture
def rounds(request):
    """Returns a function that says how many rounds to go."""
    long = request.config.getoption("--long", default=False)
    return lambda usual: usual * 10 if long else usual


@pytest.fixture
def writer(tmp_path):
    """Returns a function that starts a process which stores in a loop, and gives its report's path."""
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    reports = []

    def start(folder):
        reports.append(tmp_path / f"report-{len(reports)}")
        nursery.stdin.write(f"{folder} {reports[-1]}\n")
        nursery.stdin.flush()
        wait_until(lambda: reported(reports[-1], "stored"), timeout_s=20)
        return reports[-1]

    yield start
    for report in reports[-1:]:
        kill(report)
    nursery.kill()
    nursery.wait(timeout=5)
    nursery.stdin.close()


def reported(report, word):
    """Return the last number that the process reported with this word, 0 if none."""
    lines = report.read_text().splitlines(keepends=True) if report.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(word + " ") and line.endswith("\n")]
    return int(found[-1]) if found else 0


def kill(report):
    with contextlib.suppress(ProcessLookupError):
        os.kill(reported(report, "pid"), signal.SIGKILL)
    wait_until(Path(f"{report}-ended").exists)


def verify_nothing_returned_is_missing(folder, report, epoch, stored=None):
    """Check every seq against what the process reported, and return the epoch.

    stored: the last seq that counts as reported; None: all do.
    """
    with contextlib.closing(Outbox(OutboxSettings(folder, reserve_mb=4.0), STATION)) as box:
        assert box.alarms() == []
        assert epoch in (None, box.epoch)
        assert box.last_seq >= (reported(report, "stored") if stored is None else stored)
        assert box.first_seq <= max(reported(report, "acknowledging"), box.acknowledged().get("mes", 0)) + 1
        rows = box.read(box.first_seq - 1, 10**6)
        assert [row.seq for row in rows] == list(range(box.first_seq, box.last_seq + 1))
        assert [json.loads(row.payload)["trigger"] for row in rows] == [row.seq for row in rows]
        return box.epoch


def mounted(command, place):
    """Mount as root, or skip with the reason."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk to fill or to cut off")
    place.mkdir(exist_ok=True)
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 20}
    done = subprocess.run([*command, str(place)], check=False, **quiet)
    if done.returncode != 0:
        pytest.skip(f"this machine does not mount here: {done.stderr.strip()}")
    assert place.is_mount()


def unmounted(place):
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    wait_until(lambda: subprocess.run(["umount", str(place)], check=False, **quiet).returncode == 0)


def loop_devices(image):
    """Return the loop devices that hold this file: none once every namespace has unmounted it."""
    command = ["losetup", "--noheadings", "--output", "NAME", "--associated", str(image)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return done.stdout.split()


def verdict(trigger, detail=""):
    return {"station": STATION, "trigger": trigger, "detail": detail, "heatmap": None}


def with_picture(trigger, generator):
    data = generator.randbytes(3700)
    link = {"topic": None, "sha256": hashlib.sha256(data).hexdigest()}
    payload = HeatmapPayload(data, link["sha256"], width=8, height=8, full_scale=1.0)
    return {**verdict(trigger, "x" * 700), "heatmap": link}, payload


def test_a_killed_agent_loses_no_verdict_whose_storing_had_returned(tmp_path, writer, rounds):
    generator, epoch, folder = random.Random(7), None, tmp_path / "outbox"
    for _ in range(rounds(20)):
        report = writer(folder)
        time.sleep(generator.uniform(0.0, 0.15))
        kill(report)
        epoch = verify_nothing_returned_is_missing(folder, report, epoch)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB in memory."""
    place = tmp_path / "disk"
    mounted(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs"], place)
    yield place
    unmounted(place)


def fill(disk):
    """Take all room, to the last block."""
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)


def verify_heatmaps_are_whole(folder):
    for path in (folder / "heatmaps").iterdir():
        assert path.name.endswith(f"-{hashlib.sha256(path.read_bytes()).hexdigest()}.jpg")


def rows_in_file(folder):
    with contextlib.closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT count(*) FROM waiting").fetchone()[0]


def store_until_full(box, generator):
    """Store verdicts with heatmaps until the outbox refuses; return those that it took."""
    taken = []
    with pytest.raises(OutboxFull, match="disk"):
        for trigger in range(100_000):
            taken += box.store([with_picture(trigger, generator)])
    return taken


def test_on_a_full_disk_heatmaps_go_first_verdicts_stay_and_acknowledging_still_deletes(small_disk, monkeypatch):
    monkeypatch.setattr("agent.outbox.outbox.SAVE_ROWS", 1)
    generator, folder = random.Random(7), small_disk / "outbox"
    settings = OutboxSettings(folder, heatmap_mb=1.0, reserve_mb=1.0)
    with contextlib.closing(Outbox(settings, STATION)) as box:
        box.set_consumers(["mes"])
        first = box.store([with_picture(trigger, generator) for trigger in range(100)])
        assert first[-1]["heatmap"] is not None
        fill(small_disk)
        taken = first + store_until_full(box, generator)
        assert len(taken) > 500
        assert taken[-1]["heatmap"] is None
        assert box.next_heatmap(10**6) is None
        assert [alarm.code for alarm in box.alarms()] == ["storage_full", "storage_low"]
        verify_heatmaps_are_whole(folder)
        fill(small_disk)

        rows = box.read(0, 10**6)
        assert [json.loads(row.payload) for row in rows] == taken
        assert box.acknowledge("mes", rows[99].seq)
        assert rows_in_file(folder) == len(rows) - 99  # the last one that all have stays
        assert box.acknowledge("mes", rows[-1].seq)
        assert rows_in_file(folder) == 1
        fill(small_disk)
        assert box.store([with_picture(1, generator)])[0]["seq"] == len(taken) + 1

        (small_disk / "ballast").unlink()
        assert box.store([with_picture(2, generator)])[0]["heatmap"] is not None
        assert box.alarms() == []
        verify_heatmaps_are_whole(folder)
    with contextlib.closing(Outbox(settings, STATION)) as box:
        assert (box.first_seq, box.last_seq) == (len(taken) + 1, len(taken) + 2)


def test_an_agent_that_is_killed_on_a_full_disk_starts_again_there(small_disk, tmp_path):
    generator, folder = random.Random(8), small_disk / "outbox"
    settings = OutboxSettings(folder, heatmap_mb=1.0, reserve_mb=1.0)
    with contextlib.closing(Outbox(settings, STATION)) as box:
        box.set_consumers(["mes"])
        fill(small_disk)
        taken = store_until_full(box, generator)
        shutil.copytree(folder, tmp_path / "crashed")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "crashed", folder)
    fill(small_disk)
    with contextlib.closing(Outbox(settings, STATION)) as box:
        rows = box.read(0, 10**6)
        assert [json.loads(row.payload) for row in rows] == taken
        assert box.acknowledge("mes", rows[-1].seq)
        assert "database_damaged" not in [alarm.code for alarm in box.alarms()]


def spoilt(path, generator):
    """Write 2 KB of noise somewhere into the file."""
    with path.open("r+b", buffering=0) as file:
        file.seek(generator.randrange(max(1, path.stat().st_size - 2048)))
        file.write(generator.randbytes(2048))


def life(box, generator):
    """Store, acknowledge and quarantine a few hundred rows; return all payloads by (epoch, seq)."""
    written = {}
    box.set_consumers(["mes"])
    for trigger in range(60):
        size = generator.randrange(1, 9)
        batch = [(verdict(trigger, "x" * generator.randrange(2000)), None) for _ in range(size)]
        written |= {(message["epoch"], message["seq"]): message for message in box.store(batch)}
    box.read(0, 10**6)
    box.acknowledge("mes", generator.randrange(100))
    box.quarantine(150, "refused")
    return written


def verify_no_wrong_payload(box, written):
    """Read everything; a row is what was written, or missing, and no seq is left out."""
    for _ in range(3):  # damage that is met on the way begins a new epoch: read that
        epoch = box.epoch
        rows = box.read(box.first_seq - 1, 10**6)
        if epoch == box.epoch:
            break
    assert [row.seq for row in rows] == list(range(box.first_seq, box.last_seq + 1))
    for row in rows:
        message = json.loads(row.payload)
        assert (message["epoch"], message["seq"]) == (box.epoch, row.seq)
        assert row.topic == "missing" or message == written[box.epoch, row.seq]


@pytest.mark.parametrize("when", ["stopped", "killed", "running"])
def test_random_damage_to_the_file_never_gives_a_wrong_verdict_and_the_outbox_goes_on(tmp_path, rounds, when):
    generator = random.Random(when)
    noticed = 0
    for number in range(rounds(10)):
        folder = tmp_path / f"outbox-{number}"
        box = Outbox(OutboxSettings(folder, reserve_mb=0), STATION)
        written = life(box, generator)
        if when == "killed":
            folder = shutil.copytree(folder, tmp_path / f"killed-{number}")
        if when != "running":
            box.close()
        spoilt(generator.choice([path for path in folder.glob(f"{FILE}*") if path.suffix != ".db-shm"]), generator)
        if when != "running":
            box = Outbox(OutboxSettings(folder, reserve_mb=0), STATION)
        with contextlib.closing(box):
            box.set_consumers(["mes"])
            verify_no_wrong_payload(box, written)
            (message,) = box.store([(verdict(10**6), None)])
            assert (message["epoch"], message["seq"]) not in written
            written[message["epoch"], message["seq"]] = message
            verify_no_wrong_payload(box, written)
            noticed += bool({alarm.code for alarm in box.alarms()} - {"verdicts_quarantined"})
    assert noticed > 0 or when == "running"


@pytest.fixture
def cut_off_disk(tmp_path):
    """A disk with ext4 on a loop device; gives (place, mount, cut the power and mount again)."""
    place, image = tmp_path / "disk", tmp_path / "image"
    if shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip("mkfs.ext4 is not installed")
    with image.open("wb") as file:
        file.truncate(64 * 2**20)
    make = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    subprocess.run([make, "-q", "-F", str(image)], check=True, stdin=subprocess.DEVNULL, capture_output=True)
    mount = ["mount", "-o", "loop", str(image)]
    mounted(mount, place)

    def cut():
        assert place.is_mount()
        assert place.stat().st_dev != tmp_path.stat().st_dev
        descriptor = os.open(place, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        except OSError as error:
            pytest.skip(f"this kernel cuts no disk off: {error.strerror}")
        finally:
            os.close(descriptor)

    def again():
        unmounted(place)
        deadline_s = time.monotonic() + 5
        while loop_devices(image):
            if time.monotonic() > deadline_s:
                pytest.skip("another mount namespace holds the disk: what it would write back is no power cut")
            time.sleep(0.05)
        mounted(mount, place)

    yield place, cut, again
    if place.is_mount():
        unmounted(place)


def test_a_power_cut_loses_no_verdict_whose_storing_had_returned(cut_off_disk, writer, rounds):
    generator = random.Random(7)
    place, cut, again = cut_off_disk
    for number in range(rounds(6)):
        folder, epoch = place / f"outbox-{number // 2}", None  # each lives through two cuts
        shutil.rmtree(place / f"outbox-{number // 2 - 1}", ignore_errors=True)
        report = writer(folder)
        time.sleep(generator.uniform(0.0, 0.3))
        stored = reported(report, "stored")  # before the cut: a real one lets no store return after it
        cut()
        kill(report)
        again()
        verify_nothing_returned_is_missing(folder, report, epoch, stored)
