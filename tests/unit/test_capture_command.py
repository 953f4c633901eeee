"""`capture` takes parts as `run` does: on the beat, when the plant says so, or when the camera's own trigger does."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from broker import wait_until
from click.testing import CliRunner

from agent.__main__ import commands
from agent.cameras.folder import FolderCamera
from agent.cameras.trigger import Announced, Announcements
from agent.capture import Captured, PartCapture, awaited, beat_of, read_station_without_recipe
from agent.errors import CameraError
from agent.line.beat import Beat
from calibration.errors import InputError, SettingsError
from calibration.frame import Frame

MS = 1_000_000
AGES_MS = 60_000.0  # a beat that is never waited for


def frame(trigger_id: int) -> Frame:
    return Frame(np.zeros((2, 2), np.uint8), trigger_id, trigger_id, exposed_ns=0, received_ns=time.monotonic_ns())


class Camera:
    """Answers each trigger at once, or as a test says."""

    def __init__(self, lost: tuple[int, ...] = (), refused: tuple[int, ...] = ()) -> None:
        self.lost, self.refused = lost, refused
        self.triggers: list[int] = []
        self.frames: queue.SimpleQueue[Frame | CameraError | None] = queue.SimpleQueue()
        self.calls: list[str] = []
        self.on_trigger = lambda trigger_id: None
        self.parts = 0  # as a camera with a trigger of its own announces them
        self.lag_ns = 0

    def start(self):
        self.calls.append("start")

    def stop(self):
        self.calls.append("stop")

    def trigger(self, trigger_id, until_ns=None):
        del until_ns
        self.triggers.append(trigger_id)
        self.on_trigger(trigger_id)
        if trigger_id in self.refused:
            raise CameraError("the camera is away")
        if trigger_id not in self.lost:
            self.frames.put(frame(trigger_id))

    def next_frame(self, timeout_s):
        try:
            item = self.frames.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, CameraError):
            raise item
        if item is not None:
            self.parts = max(self.parts, item.trigger_id)
        return item


class Source:
    """A PLC or a pin, as a test says."""

    def __init__(self) -> None:
        self.announcements = Announcements()
        self.is_on = False

    def start(self, on_event):
        self.announcements.on_event = on_event
        self.is_on = True

    def stop(self):
        self.is_on = False

    def put(self, lost=0, opens=True, since_ns=None):
        self.announcements.put(Announced(time.monotonic_ns(), lost=lost, opens=opens, since_ns=since_ns))


class Bench:
    """A capture, what it recorded and what it told."""

    def __init__(self, camera, takt_ms: float = 5.0, record=None, **beat) -> None:
        self.camera = camera
        self.recorded: list[int] = []
        self.told: list[str] = []
        self.capture = PartCapture(
            camera,
            Beat(takt_ms, 400.0, **beat),
            record or (lambda one: self.recorded.append(one.trigger_id)),
            awaited="a part on Line1",
            tell=self.told.append,
        )
        self.captured: Captured | None = None

    def run(self, count: int) -> Captured:
        return self.capture.run(count)

    def begin(self, count: int) -> threading.Thread:
        def work():
            self.captured = self.run(count)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def end(self, thread: threading.Thread) -> Captured:
        thread.join(20.0)
        assert self.captured is not None, (self.recorded, self.told)
        return self.captured


def test_a_part_is_taken_every_takt_and_the_first_one_at_once():
    moments: list[int] = []
    camera = Camera()
    camera.on_trigger = lambda _: moments.append(time.monotonic_ns())
    began_ns = time.monotonic_ns()
    assert Bench(camera, 40.0).run(4) == Captured(4, 0, was_interrupted=False)
    assert [moment - began_ns >= number * 40 * MS for number, moment in enumerate(moments)] == [True] * 4
    assert camera.calls == ["start", "stop"]
    assert Bench(Camera(), AGES_MS).run(1).recorded == 1


def test_a_clock_that_was_put_aside_for_takts_loses_no_part_of_a_beat_of_its_own(monkeypatch):
    class Ahead:
        by_ns = 0

        def monotonic_ns(self):
            return time.monotonic_ns() + self.by_ns

    def put_aside(_):
        ahead.by_ns += 320 * MS

    ahead, camera = Ahead(), Camera()
    monkeypatch.setattr("agent.capture.time", ahead)
    camera.on_trigger = put_aside
    bench = Bench(camera, 100.0)
    assert bench.run(3) == Captured(3, 0, was_interrupted=False)
    assert (bench.recorded, bench.told) == ([1, 2, 3], [])


def test_a_part_that_the_plant_announces_is_taken_and_no_other():
    source, camera = Source(), Camera()
    bench = Bench(camera, 5.0, source=source)
    thread = bench.begin(4)
    wait_until(lambda: source.is_on)
    for number in (1, 2, 3):
        source.put(lost=number == 2)
        wait_until(lambda number=number: len(bench.recorded) == number)
    source.put(since_ns=time.monotonic_ns() - 10_000_000_000)  # long gone by: its picture would be another part's
    wait_until(lambda: len(bench.told) == 2)
    source.put()
    assert bench.end(thread) == Captured(4, 2, was_interrupted=False)
    assert camera.triggers == bench.recorded == [1, 2, 3, 4]
    late = "the trigger's source told of a part too late for a picture, or of several at once: it does not count"
    assert bench.told == [late] * 2
    assert not source.is_on


def test_no_pause_between_parts_uses_up_the_count_of_a_camera_that_triggers_itself():
    camera = Camera()
    for item in (*[None] * 9, frame(1), *[None] * 9, frame(2), *[None] * 9, frame(4)):
        camera.frames.put(item)
    bench = Bench(camera, by_camera=True)
    assert bench.run(3) == Captured(3, 1, was_interrupted=False)
    assert (bench.recorded, camera.triggers) == ([1, 2, 4], [])
    assert len(bench.told) == 1
    assert "its frame did not arrive" in bench.told[0]


def test_a_frame_that_is_lost_is_told_and_does_not_count(monkeypatch):
    monkeypatch.setattr("agent.capture.FRAME_S", 0.3)
    bench = Bench(Camera(lost=(2, 5)))
    captured = bench.run(4)
    assert (captured.recorded, captured.lost) == (4, 2)
    assert bench.recorded == [1, 3, 4, 6]
    assert bench.told == [f"part {number}: no frame within 0.3 s: it does not count" for number in (2, 5)]


def test_a_frame_that_comes_after_all_is_recorded(monkeypatch):
    monkeypatch.setattr("agent.capture.FRAME_S", 0.01)
    camera = Camera(lost=(1,))
    bench = Bench(camera, AGES_MS)
    thread = bench.begin(1)
    wait_until(lambda: bench.told)
    camera.frames.put(frame(7))  # nobody's
    camera.frames.put(frame(1))
    assert bench.end(thread) == Captured(1, 0, was_interrupted=False)
    assert bench.recorded == [1]


def test_a_camera_that_is_away_is_told_once_and_waited_for():
    camera = Camera(refused=(2, 3, 4))
    camera.frames.put(CameraError("no answer: check its cable"))
    camera.frames.put(CameraError("no answer: check its cable"))
    bench = Bench(camera)
    captured = bench.run(3)
    assert (captured.recorded, captured.lost) == (3, 3)
    assert bench.recorded == [1, 5, 6]
    assert bench.told.count("camera down: no answer: check its cable") == 1
    assert bench.told.count("camera back") == 1
    assert bench.told.count("the camera is away: it does not count") == 1


def test_a_burst_brings_no_more_triggers_than_may_wait():
    source, camera = Source(), Camera(lost=tuple(range(1, 6)))
    bench = Bench(camera, source=source, queue_length=4)
    thread = bench.begin(9)
    wait_until(lambda: source.is_on)
    for _ in range(7):
        source.put()
    wait_until(lambda: bench.told)
    assert bench.told == ["5 frames are awaited already: slow the line: it does not count"]
    assert camera.triggers == [1, 2, 3, 4, 5]
    for number in range(1, 6):
        camera.frames.put(frame(number))
    wait_until(lambda: len(bench.recorded) == 5)
    for number in range(6, 10):
        source.put()
        wait_until(lambda number=number: len(bench.recorded) == number)
    assert bench.end(thread) == Captured(9, 2, was_interrupted=False)


def test_parts_beyond_those_that_are_wanted_are_not_triggered():
    camera = Camera(lost=(1, 2, 3))
    bench = Bench(camera, 1.0)
    thread = bench.begin(3)
    wait_until(lambda: len(camera.triggers) == 3)
    began_ns = time.monotonic_ns()
    wait_until(lambda: time.monotonic_ns() > began_ns + 30 * MS)  # thirty beats
    assert camera.triggers == [1, 2, 3]
    for number in (1, 2, 3):
        camera.frames.put(frame(number))
    assert bench.end(thread).recorded == 3


@pytest.mark.parametrize("by_camera", [True, False], ids=["line", "plant"])
def test_what_is_waited_for_is_told_once(by_camera, monkeypatch):
    monkeypatch.setattr("agent.capture.WAIT_TOLD_S", 0.01)
    camera, source = Camera(), Source()
    bench = Bench(camera, by_camera=by_camera, source=None if by_camera else source)
    thread = bench.begin(3)
    for number in (1, 2, 3):
        began_ns = time.monotonic_ns()
        wait_until(lambda: bench.told)
        wait_until(lambda began_ns=began_ns: time.monotonic_ns() > began_ns + 100 * MS)  # longer than that each time
        camera.frames.put(frame(number)) if by_camera else source.put()
    assert bench.end(thread).recorded == 3
    assert bench.told == ["waiting for a part on Line1 ... (Ctrl-C ends; what was recorded stays)"]


def test_ctrl_c_ends_it_with_what_was_recorded():
    camera = Camera()
    bench = Bench(camera)

    def interrupted(trigger_id):
        if trigger_id == 3:
            wait_until(lambda: len(bench.recorded) == 2)
            raise KeyboardInterrupt

    camera.on_trigger = interrupted
    assert bench.run(60) == Captured(2, 0, was_interrupted=True)
    assert camera.calls == ["start", "stop"]


def test_a_disk_that_refuses_ends_it():
    def refuse(_):
        raise InputError("no space left on device: free space, then capture again")

    camera = Camera()
    with pytest.raises(InputError, match="free space"):
        Bench(camera, AGES_MS, record=refuse).run(3)
    assert camera.calls == ["start", "stop"]


def test_stored_images_end_it_and_one_that_cannot_be_read_is_told(tmp_path):
    for number in (1, 2, 3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((4, 4), np.uint8))
    (tmp_path / "2.png").write_bytes(b"no picture")
    bench = Bench(FolderCamera(sorted(tmp_path.glob("*.png"))))
    assert bench.run(60) == Captured(2, 1, was_interrupted=False)
    assert bench.recorded == [1, 3]
    (told,) = bench.told  # not of the camera, and at once
    assert told.startswith(f"{tmp_path / '2.png'}: ") and told.endswith(": it does not count")
    assert "camera" not in told.removeprefix(str(tmp_path))


STATION = "station: cell7\ntakt_ms: 250\ncamera: {kind: simulated}\n"
LINE1 = "camera: {kind: genicam, serial: S1, trigger: {source: Line1}}\n"


def capture_station(folder: Path, text: str, camera: str = ""):
    (folder / "station.yaml").write_text(text)
    return read_station_without_recipe(folder / "station.yaml" / camera if camera else folder / "station.yaml")


@pytest.mark.parametrize(
    "recipes",
    ["", "recipe: not-yet.recipe\nrecipes: {keys: [not-yet.key.pub]}\n", "recipe: x\nrecipes: {folder: y}\n"],
)
def test_a_station_without_its_first_recipe_can_be_captured(tmp_path, recipes):
    station = capture_station(tmp_path, STATION + recipes)
    assert (station.name, beat_of(station).takt_ms) == ("cell7", 250.0)


def test_a_camera_among_several_needs_no_recipe_either(tmp_path):
    cameras = "cameras:\n  top: {recipe: a, recipes: {keys: [b.pub]}, camera: {kind: simulated, seed: 3}}\n"
    station = capture_station(tmp_path, f"station: cell7\ntakt_ms: 250\n{cameras}", "top")
    assert station.name == "cell7-top"
    assert station.camera.line.seed == 3


def test_a_camera_is_looked_at_without_a_recipe_too(tmp_path):
    capture_station(tmp_path, STATION)
    with pytest.raises(SettingsError, match="kind is not genicam"):  # and not: recipe: missing
        CliRunner().invoke(commands, ["camera", "show", str(tmp_path / "station.yaml")], catch_exceptions=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("takt_ms: 250\ncamera: {kind: simulated}\n", "station: missing"),
        (STATION + "gain: 3\n", "gain: unknown key"),
        (STATION + "takt_ms: 300\n", "'takt_ms' is given twice"),
        ("station: cell7\ntakt_ms: 250\ncameras: {top: 3}\n", "need a block of indented keys"),
    ],
)
def test_all_else_is_as_strict_as_ever(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        capture_station(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (STATION, "the next part, one every 250 ms (takt_ms)"),
        (STATION.replace("camera: {kind: simulated}\n", LINE1), "a part on Line1 of the camera"),
        (
            STATION.replace("camera: {kind: simulated}\n", LINE1.replace("Line1", "free_run")),
            "a frame of the camera, in free run",
        ),
        (
            STATION + "trigger: {kind: modbus, host: 10.0.0.5, signal: coil, address: 3}\n",
            "a part on coil 3 of 10.0.0.5:502",
        ),
        (STATION + "trigger: {kind: gpio, line: 17}\n", "a part on /dev/gpiochip0 line 17"),
    ],
)
def test_what_is_waited_for_has_a_name(tmp_path, text, wanted):
    assert awaited(capture_station(tmp_path, text)) == wanted


def test_the_signal_of_the_station_takes_the_place_of_the_beat(tmp_path):
    signal = "trigger: {kind: modbus, host: 127.0.0.1, signal: coil, address: 3}\n"
    station = capture_station(tmp_path, STATION + signal)
    assert beat_of(station).source is not None
    assert beat_of(capture_station(tmp_path, STATION)).source is None
