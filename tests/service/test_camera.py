"""The GenICam camera over our own producer and line simulator: each trigger has its own frame, or its no_verdict.

Pictures carry their number in their first pixels, so that a frame in the wrong place is known.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
from gentl import Linecam, producer, write_picture
from recipes import write_tiny_recipe

from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import FREE_RUN, GenicamSettings, TriggerSettings
from agent.cameras.process import open_device
from agent.errors import CameraError
from agent.line.beat import Beat
from agent.line.loop import Line
from agent.outputs.camera import CameraLine
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame
from calibration.preprocess import View
from calibration.recording import recorded_frames
from tests.broker import wait_until

pytest.importorskip("harvesters", reason="harvesters is not installed: pip install 'taktsight[genicam]'")
pytest.importorskip("genicam", reason="genicam is not installed: pip install 'taktsight[genicam]'")

PICTURES = 500
SIDE = 96
TAKT_MS = 25.0
LINE1 = TriggerSettings(source="Line1", activation="RisingEdge", counter="Counter1")


def number_of(pixels) -> int:
    """Return the number that a picture carries."""
    return int(pixels[0, 0]) + 256 * int(pixels[0, 1])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder of numbered pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    dice = np.random.default_rng(5)
    for number in range(PICTURES):
        pixels = dice.integers(0, 256, (SIDE, SIDE), np.uint8)
        pixels[0, :2] = number % 256, number // 256
        write_picture(folder / f"{number:04d}.pgm", pixels)
    return folder


@pytest.fixture
def linecam(images):
    """Return a function that starts a camera; all are ended in the end."""
    made = []

    def start(*options: str) -> Linecam:
        made.append(Linecam(images, *options).start())
        return made[-1]

    yield start
    for one in made:
        one.kill()


@pytest.fixture
def opened():
    """Return a function that starts a GenicamCamera; all are stopped in the end."""
    made = []

    def start(camera: Linecam, **settings) -> GenicamCamera:
        made.append(GenicamCamera(GenicamSettings(producer=producer(), serial=camera.serial, **settings)))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.stop()


class Looking:
    """An inspector that notes which picture each part got."""

    def __init__(self) -> None:
        self.seen: dict[int, Frame] = {}

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        self.seen[frame.trigger_id] = replace(frame, pixels=frame.pixels.copy())
        return Verdict(frame.trigger_id, Outcome.PASS, Reason.SCORE, score=0.0, threshold=1.0)


class Running:
    """A line that runs in a thread, and what came of it."""

    def __init__(self, camera: GenicamCamera, count: int | None, takt_ms: float = TAKT_MS, **beat) -> None:
        self.looking, self.verdicts = Looking(), []
        settings = Beat(takt_ms, 400.0, queue_length=32, by_camera=not camera.settings.trigger.is_ours, **beat)
        self.line = Line(camera, self.looking, settings, self._deliver)
        self._thread = threading.Thread(target=self.line.run, args=(count,))
        self._thread.start()

    def _deliver(self, batch) -> None:
        self.verdicts += [settled.verdict for settled in batch]

    def join(self, timeout_s: float = 60.0) -> dict[int, Verdict]:
        """Return the verdicts by trigger, each trigger once, without a gap."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.line.stop()
            self._thread.join(10.0)
        by_trigger = {verdict.trigger_id: verdict for verdict in self.verdicts}
        assert len(by_trigger) == len(self.verdicts)
        assert sorted(by_trigger) == list(range(1, len(by_trigger) + 1))
        return by_trigger

    def wait_for(self, parts: int, timeout_s: float = 20.0) -> None:
        """Wait until so many parts have their verdict."""
        give_up_s = time.monotonic() + timeout_s
        while len(self.verdicts) < parts:
            assert time.monotonic() < give_up_s, f"{len(self.verdicts)} of {parts} verdicts: {self.line.tally}"
            time.sleep(0.02)


def reasons(verdicts: dict[int, Verdict]) -> Counter[str]:
    return Counter(str(verdict.reason) for verdict in verdicts.values())


def test_500_triggers_bring_500_pictures_in_order_none_lost_none_twice(linecam, opened):
    camera = opened(linecam())
    frames = []
    for trigger_id in range(1, PICTURES + 1):  # each as soon as the one before is there
        camera.trigger(trigger_id)
        frame = camera.next_frame(5.0)
        frames.append((frame.trigger_id, number_of(frame.pixels), frame.exposed_ns))
    assert [frame[:2] for frame in frames] == [(number + 1, number) for number in range(PICTURES)]
    assert [frame[2] for frame in frames] == sorted({frame[2] for frame in frames})
    assert camera.next_frame(0.3) is None
    assert not any(camera.counters.values()), camera.counters


@pytest.mark.parametrize(
    ("name", "bit_depth", "colour"),
    [("Mono8", 8, False), ("Mono10p", 10, False), ("Mono12p", 12, False), ("Mono10Packed", 10, False),
     ("Mono12Packed", 12, False), ("Mono16", 16, False), ("BayerRG8", 8, True), ("RGB8", 8, True), ("BGR8", 8, True)],
)  # fmt: skip
def test_every_format_arrives_to_the_bit(request, images, name, bit_depth, colour):
    linecam, opened = request.getfixturevalue("linecam"), request.getfixturevalue("opened")
    camera = opened(linecam(), pixel_format=name)
    camera.trigger(1)
    frame = camera.next_frame(5.0)
    sent = cv2.imread(str(images / "0000.pgm"), cv2.IMREAD_UNCHANGED)
    assert (frame.bit_depth, frame.pixels.ndim) == (bit_depth, 3 if colour else 2)
    if colour:  # a gray picture: all channels the same, away from the rim
        wanted = cv2.cvtColor(cv2.cvtColor(sent, cv2.COLOR_BayerRGGB2RGB), cv2.COLOR_RGB2BGR)[..., ::-1]
        expected = wanted if name.startswith("Bayer") else np.dstack([sent] * 3)
        np.testing.assert_array_equal(frame.pixels, expected)
    else:
        np.testing.assert_array_equal(frame.pixels >> (bit_depth - 8), sent)
    assert frame.facts["format"] == name


def test_parts_that_the_cameras_own_line_triggers_are_opened_by_their_frames(linecam, opened):
    simulator = linecam()
    running = Running(opened(simulator, trigger=LINE1), 40)
    for _ in range(40):
        simulator.tell("line")
        time.sleep(0.02)
    verdicts = running.join()
    assert reasons(verdicts) == {"score": 40}
    assert [number_of(running.looking.seen[trigger].pixels) for trigger in verdicts] == list(range(40))


def test_a_frame_that_is_swallowed_is_no_verdict_for_exactly_its_part(linecam, opened):
    simulator = linecam("--drop", "5,6,11")
    running = Running(opened(simulator, trigger=LINE1), 20)
    for _ in range(20):
        simulator.tell("line")
        time.sleep(0.03)
    verdicts = running.join()
    lost = [trigger for trigger, verdict in verdicts.items() if verdict.reason is Reason.FRAME_LOST]
    assert lost == [5, 6, 11]
    seen = {trigger: number_of(frame.pixels) for trigger, frame in running.looking.seen.items()}
    assert seen == {trigger: trigger - 1 for trigger in range(1, 21) if trigger not in lost}


def test_free_run_makes_a_part_of_every_frame(linecam, opened):
    camera = opened(linecam(), trigger=TriggerSettings(source=FREE_RUN), rate_hz=40.0)
    verdicts = Running(camera, 30).join(10.0)
    assert reasons(verdicts) == {"score": 30}


@pytest.mark.parametrize("trigger", [TriggerSettings(), LINE1], ids=["software", "line"])
def test_with_lost_packets_every_trigger_has_its_frame_or_none_and_never_another(linecam, opened, trigger):
    simulator = linecam("--lose", "5", "--no-resend", "--packet-size", "576")
    running = Running(opened(simulator, trigger=trigger), 150)
    if not trigger.is_ours:
        for _ in range(150):
            simulator.tell("line")
            time.sleep(TAKT_MS / 1e3)
        time.sleep(0.5)
        simulator.tell("lose 0")
        simulator.tell("line")  # what was lost last is known by the next
    verdicts = running.join(20.0)
    said = reasons(verdicts)
    assert set(said) == {"score", "frame_lost"}, said
    assert said["score"] > 20
    if not trigger.is_ours:
        wrong = {part: number_of(frame.pixels) for part, frame in running.looking.seen.items()
                 if number_of(frame.pixels) != part - 1}  # fmt: skip
        assert wrong == {}
    else:  # pictures count triggers that the camera took
        numbers = [number_of(running.looking.seen[part].pixels) for part in sorted(running.looking.seen)]
        assert numbers == sorted(set(numbers))


def test_a_camera_that_dies_is_no_verdict_until_it_is_back_with_the_same_settings(linecam, opened):
    simulator = linecam()
    camera = opened(simulator, exposure_us=3000.0, gain_db=2.0)
    running = Running(camera, None, takt_ms=50.0)
    running.wait_for(20)
    before = camera.facts
    simulator.kill()
    time.sleep(3.0)
    seen = len(running.looking.seen)
    simulator.start()
    back_s = time.monotonic()
    while len(running.looking.seen) <= seen:
        assert time.monotonic() - back_s < 15.0, camera.counters
        time.sleep(0.05)
    running.wait_for(len(running.verdicts) + 10)
    running.line.stop()
    verdicts = running.join()
    assert camera.facts == before
    assert camera.restarts == 1
    assert set(reasons(verdicts)) <= {"score", "frame_lost", "camera_down"}
    assert reasons(verdicts)["camera_down"] > 0
    assert all(verdict.latency_ms < 450.0 for verdict in verdicts.values())  # nobody waited for the camera
    assert running.line.heartbeat_ns > 0


def test_parts_that_went_by_while_the_cable_was_out_are_counted(linecam, opened):
    simulator = linecam()
    camera = opened(simulator, trigger=LINE1)
    running = Running(camera, None)
    for _ in range(5):
        simulator.tell("line")
        time.sleep(0.03)
    running.wait_for(5)
    simulator.tell("release")  # the camera lives, its connection does not
    for _ in range(4):
        simulator.tell("line")
        time.sleep(0.03)
    give_up_s = time.monotonic() + 20.0
    while simulator.status()["controller"] in ("nobody", "0.0.0.0"):
        assert time.monotonic() < give_up_s
        time.sleep(0.1)
    time.sleep(1.0)
    simulator.tell("line")
    running.wait_for(10)
    running.line.stop()
    verdicts = running.join()
    assert [str(verdicts[part].reason) for part in range(1, 11)] == ["score"] * 5 + ["frame_lost"] * 4 + ["score"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serial": "ABSENT"}, "serial number ABSENT was not found; found:"),
        ({"producer": Path("absent.cti")}, r"camera\.producer: absent\.cti: no such file"),
        ({"producer": Path(__file__)}, r"camera\.producer: .*test_camera\.py cannot be loaded"),
        ({"pixel_format": "Mono9"}, r"camera\.pixel_format: Mono9 found, this camera takes Mono8"),
        ({"exposure_us": 59e6}, r"camera\.exposure_us: ExposureTime = .* is refused, need"),
        ({"nodes": ("Nonsense=1",)}, r"camera\.nodes: this camera has no Nonsense"),
        ({"trigger": TriggerSettings(source="Line9")}, r"camera\.trigger\.source: Line9 found, this camera takes"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(linecam, settings, message):
    given = {"producer": producer(), "serial": linecam().serial, **settings}
    with pytest.raises(CameraError, match=message):
        GenicamCamera(GenicamSettings(**given)).start()


def test_a_camera_that_another_program_has_says_so(linecam, opened):
    simulator = linecam()
    opened(simulator)
    with pytest.raises(CameraError, match=r"cannot be opened: .*another program has it"):
        GenicamCamera(GenicamSettings(producer=producer(), serial=simulator.serial)).start()


def test_a_camera_whose_region_somebody_changes_comes_back_as_it_was(linecam, opened):
    simulator = linecam()
    camera = opened(simulator, region=(0, 0, SIDE, SIDE))
    camera.trigger(1)
    assert camera.next_frame(5.0).size == (SIDE, SIDE)
    simulator.tell("size 64 48")
    shapes, give_up_s = [], time.monotonic() + 20.0
    while (SIDE, SIDE) not in shapes and time.monotonic() < give_up_s:
        with contextlib.suppress(CameraError):
            camera.trigger(len(shapes) + 2)
        try:
            frame = camera.next_frame(0.3)
        except CameraError:
            time.sleep(0.1)
            continue
        if frame is not None:
            shapes.append(frame.size)
    assert set(shapes) == {(SIDE, SIDE)}
    assert camera.restarts == 1


def test_a_gate_on_a_line_of_the_camera_opens_and_rests_again_when_the_camera_comes_back(linecam, opened):
    simulator = linecam()
    camera = opened(simulator)
    running = Running(camera, None, takt_ms=50.0)
    running.wait_for(5)
    gate = CameraLine(camera, "UserOutput1")
    gate.drive(is_open=True)
    assert simulator.status()["output1"] == "1"
    gate.drive(is_open=False)
    assert simulator.status()["output1"] == "0"
    gate.drive(is_open=True)
    simulator.tell("release")
    seen, give_up_s = len(running.looking.seen), time.monotonic() + 20.0
    while camera.restarts == 0 or len(running.looking.seen) < seen + 20:
        assert time.monotonic() < give_up_s
        time.sleep(0.05)
    assert simulator.status()["output1"] == "0"
    running.line.stop()
    running.join()


def agent_process(folder: Path, simulator: Linecam, trigger: str, *options: str) -> subprocess.Popen[bytes]:
    """Start `taktsight-agent run` of a station with this camera; its gate's file is `folder / "gate"`."""
    write_tiny_recipe(folder / "tiny.recipe", view=View(32, 32, colour=False, reference_size=(SIDE, SIDE)))
    (folder / "station.yaml").write_text(
        "station: cell7\nrecipe: tiny.recipe\nrecipes: {unsigned: allow}\ntakt_ms: 50\ndeadline_ms: 400\n"
        "queue_length: 16\nengine: {threads: 1}\noutput: {kind: file, file: gate}\n"
        f"camera: {{kind: genicam, serial: {simulator.serial}, producer: {producer()}, trigger: {trigger}}}\n"
    )
    command = [sys.executable, "-m", "agent", "run", str(folder / "station.yaml"), *options]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null)


def told_to_the_gate(folder: Path) -> list[int]:
    """Return the parts that the gate was told of, in order."""
    path = folder / "gate"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_agent_answers_every_part_that_the_cameras_line_announces(linecam, tmp_path):
    simulator = linecam()
    agent = agent_process(tmp_path, simulator, "{source: Line1, counter: Counter1}", "--count", "40")
    try:
        give_up_s = time.monotonic() + 60.0
        while agent.poll() is None and time.monotonic() < give_up_s:
            simulator.tell("line")
            time.sleep(0.05)
        assert agent.wait(20.0) == 0
    finally:
        agent.kill()
        agent.wait()
    assert told_to_the_gate(tmp_path) == list(range(1, 41))


def test_capture_takes_the_parts_that_the_cameras_line_announces_however_long_they_take(linecam, tmp_path):
    simulator, recording = linecam("--drop", "3"), tmp_path / "recording"
    (tmp_path / "station.yaml").write_text(  # no recipe yet
        "station: cell7\ntakt_ms: 50\n"
        f"camera: {{kind: genicam, serial: {simulator.serial}, producer: {producer()}, trigger: {{source: Line1}}}}\n"
    )
    command = [sys.executable, "-m", "agent", "capture", str(tmp_path / "station.yaml"), str(recording), "--count", "4"]
    capture = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        give_up_s, has_paused = time.monotonic() + 60.0, False
        while capture.poll() is None and time.monotonic() < give_up_s:
            if not has_paused and list(recording.glob("*.png")):
                has_paused = True
                time.sleep(4.5)  # as long as two frames may take that are lost
            simulator.tell("line")
            time.sleep(0.2)
        told = capture.communicate(timeout=20.0)[0]
    finally:
        capture.kill()
        capture.wait()
    assert capture.returncode == 0
    assert [frame.trigger_id for frame in recorded_frames(recording)] == [1, 2, 4, 5]
    assert "waiting for a part on Line1 of the camera" in told
    assert "1 of 5 triggers brought no frame" in told


def test_an_agent_that_is_killed_leaves_the_camera_free_for_the_next(linecam, opened, tmp_path):
    simulator = linecam()
    agent = agent_process(tmp_path, simulator, "{source: Software}")
    try:
        give_up_s = time.monotonic() + 60.0
        while len(told_to_the_gate(tmp_path)) < 5:
            assert time.monotonic() < give_up_s
            time.sleep(0.1)
        children = psutil.Process(agent.pid).children()
        mine = [child for child in children if "agent.cameras.process" in child.cmdline()]
        assert len(mine) == 1
    finally:
        agent.kill()
        agent.wait()
    gone, _ = psutil.wait_procs(mine, timeout=10.0)
    assert gone == mine
    assert opened(simulator).is_up


def test_a_trigger_that_the_camera_was_too_busy_for_is_no_verdict_for_exactly_that_part(linecam, opened):
    simulator = linecam()
    camera = opened(simulator, exposure_us=40_000.0, trigger=LINE1)
    running = Running(camera, 4)
    for pause_s in (0.2, 0.01, 0.2, 0.2):  # the third comes while the second is exposed
        simulator.tell("line")
        time.sleep(pause_s)
    verdicts = running.join(10.0)
    assert [str(verdict.reason) for _, verdict in sorted(verdicts.items())] == ["score", "score", "frame_lost", "score"]
    assert camera.counters["ignored_triggers"] == 1


def test_no_wait_for_a_frame_hangs_on_the_wall_clock(linecam, monkeypatch):
    simulator = linecam()

    def asked():
        pytest.fail("the wall clock is asked: once it is set back, this wait is as much longer")

    monkeypatch.setattr("harvesters.core.time", SimpleNamespace(time=asked, sleep=time.sleep))
    device = open_device(GenicamSettings(producer=producer(), serial=simulator.serial))
    try:
        device.nodes.set("TriggerMode", "On")
        device.nodes.set("TriggerSource", "Software")
        device.start(4)
        assert device.fetch(2) is None
        device.nodes.software_trigger()()
        frames = []
        wait_until(lambda: frames.append(device.fetch(50)) or frames[-1] is not None)
        assert frames[-1].frame_id == 1
        assert list(frames[-1].data[:2]) == [0, 0]
        device.give_back(frames[-1])
    finally:
        device.close()
