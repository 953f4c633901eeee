"""A cable between agent and camera, and what happens when it is pulled: a pair of virtual network ports. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
from gentl import linecam_program, producer, write_picture

from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import GenicamSettings
from agent.line.beat import Beat
from agent.line.loop import Line
from agent.verdict import Outcome, Reason, Verdict

pytest.importorskip("harvesters", reason="harvesters is not installed: pip install 'taktsight[genicam]'")
if os.geteuid() != 0 or shutil.which("ip") is None:
    pytest.skip("network namespaces need root and iproute2", allow_module_level=True)

SIDE = 64
OURS, THEIRS = "10.213.77.1", "10.213.77.2"
SERIAL = "CABLE1"


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


@pytest.fixture
def cable(tmp_path):
    """Lay a cable to a camera in a network of its own, and return the name of our end."""
    place, near, far = f"ts{os.getpid()}", f"tsa{os.getpid() % 10**6}", f"tsb{os.getpid() % 10**6}"
    write_picture(tmp_path / "0.pgm", np.full((SIDE, SIDE), 100, np.uint8))
    try:
        ip(f"netns add {place}")
        ip(f"link add {near} type veth peer name {far}")
    except subprocess.CalledProcessError as error:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip(f"netns del {place}")
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    camera = None
    try:
        ip(f"link set {far} netns {place}")
        ip(f"addr add {OURS}/24 dev {near}")
        ip(f"link set {near} mtu 9000 up")
        for words in (f"addr add {THEIRS}/24 dev {far}", f"link set {far} mtu 9000 up", "link set lo up"):
            ip(f"netns exec {place} ip {words}")
        options = ("--interface", THEIRS, "--images", str(tmp_path), "--serial", SERIAL, "--command-port", "-1")
        camera = subprocess.Popen(
            ["ip", "netns", "exec", place, str(linecam_program()), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(0.5)
        yield near
    finally:
        if camera is not None:
            camera.kill()
            camera.wait(5)
        for words in (f"link del {near}", f"netns del {place}"):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(words)


class Passing:
    def inspect(self, frame, deadline_ns=None):
        return Verdict(frame.trigger_id, Outcome.PASS, Reason.SCORE, score=0.0, threshold=1.0)


@pytest.mark.parametrize("out_s", [0.7, 6.0], ids=["for a moment", "for long"])
def test_a_cable_that_is_pulled_costs_the_parts_that_went_by_and_nothing_else(cable, out_s):
    camera = GenicamCamera(GenicamSettings(producer=producer(), serial=SERIAL))
    verdicts: list[Verdict] = []
    beat = Beat(50.0, 200.0, queue_length=8)
    line = Line(camera, Passing(), beat, lambda batch: verdicts.extend(settled.verdict for settled in batch))
    thread = threading.Thread(target=line.run)
    thread.start()

    def passes_until(count: int, timeout_s: float) -> None:
        give_up_s = time.monotonic() + timeout_s
        while sum(verdict.outcome is Outcome.PASS for verdict in verdicts) < count:
            assert time.monotonic() < give_up_s, (camera.counters, verdicts[-1:])
            time.sleep(0.05)

    try:
        passes_until(20, 15.0)
        ip(f"link set {cable} down")
        time.sleep(out_s)
        before = sum(verdict.outcome is Outcome.PASS for verdict in verdicts)
        ip(f"link set {cable} up")
        passes_until(before + 20, 15.0 + 2.0)
    finally:
        line.stop()
        thread.join(20.0)
    assert not thread.is_alive()
    assert [verdict.trigger_id for verdict in sorted(verdicts, key=lambda verdict: verdict.trigger_id)] == list(
        range(1, len(verdicts) + 1)
    )
    said = {verdict.reason for verdict in verdicts}
    assert said <= {Reason.SCORE, Reason.FRAME_LOST, Reason.CAMERA_DOWN}
    assert len(said) > 1
    assert max(verdict.latency_ms for verdict in verdicts) < 300.0
