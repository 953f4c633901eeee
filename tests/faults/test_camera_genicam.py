"""The camera as the agent sees it, with a process of its own that does as a script says."""

from __future__ import annotations

import contextlib
import sys
import time

import numpy as np
import pytest

import agent.cameras.child
import agent.cameras.genicam
from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import GenicamSettings, TriggerSettings
from agent.errors import CameraError
from calibration.errors import MissingPackage

CHILD = """
import json, os, socket, sys, time
import numpy as np
from agent.cameras.slots import FrameSlots

end = socket.socket(fileno=int(sys.argv[-1]))
hello = json.loads(end.recv(65536))
slots, descriptor = FrameSlots.make(hello["slots"], 64)
frames = 0

def tell(what, **arguments):
    end.sendall(json.dumps({"what": what, **arguments}).encode())

def ready(counter=None):
    message = {"what": "ready", "facts": {"camera": "S1", "settings": "d" * 16}, "first_frame_id": 1,
               "counter_before": counter, "counter_now": counter, "values": {},
               "differences": ["Gain: 1 found, 2 wanted"]}
    slots.beat()
    socket.send_fds(end, [json.dumps(message).encode()], [descriptor])

def frame(trigger_id, frame_id, exposed_ns=0, **facts):
    while (slot := slots.take()) is None:
        time.sleep(0.001)
    slots.room(slot, (8, 8), np.uint8)[:] = frame_id % 256
    slots.fill(slot)
    tell("frame", slot=slot, shape=(8, 8), bit_depth=8, frame_id=frame_id, trigger_id=trigger_id,
         exposed_ns=exposed_ns, received_ns=time.monotonic_ns(), facts={"format": "Mono8", **facts},
         counted={"incomplete_frames": 0})

def answer(after=10**9):
    for number in range(1, after + 1):
        data = end.recv(65536)
        message = json.loads(data) if data else {"what": "stop"}
        if message["what"] == "stop":
            sys.exit()
        frame(message["trigger_id"], number)
        slots.beat()

def linger():
    while (data := end.recv(65536)) and b"stop" not in data:
        pass
"""


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Try again at once, and take nobody for alive for long."""
    monkeypatch.setattr(agent.cameras.genicam, "START_AGAIN_S", (0.05,))
    monkeypatch.setattr(agent.cameras.genicam, "END_S", 2.0)


@pytest.fixture
def scripted():
    """Return a function that makes a camera whose process runs these lines; all are stopped in the end."""
    made = []

    def make(*lines: str, **trigger) -> GenicamCamera:
        program = (sys.executable, "-c", CHILD + "\n".join(lines))
        made.append(GenicamCamera(GenicamSettings(trigger=TriggerSettings(**trigger)), program=program))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def next_frame(camera, timeout_s=10.0):
    """Return the next frame, as a line waits for it: through whatever happens to the camera."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        try:
            if (frame := camera.next_frame(0.05)) is not None:
                return frame
        except CameraError:
            time.sleep(0.01)
    raise AssertionError("no frame came")


def test_each_trigger_is_answered_with_a_frame_that_is_ours(scripted):
    camera = scripted("ready()", "answer()")
    camera.start()
    frames = []
    for trigger_id in (7, 8, 9):
        camera.trigger(trigger_id)
        frames.append(next_frame(camera))
    assert [(frame.trigger_id, frame.frame_id) for frame in frames] == [(7, 1), (8, 2), (9, 3)]
    assert [int(frame.pixels[0, 0]) for frame in frames] == [1, 2, 3]
    assert frames[0].facts == {"camera": "S1", "settings": "d" * 16, "format": "Mono8"}
    assert camera.differences == ("Gain: 1 found, 2 wanted",)
    camera.stop()
    assert [int(frame.pixels[0, 0]) for frame in frames] == [1, 2, 3]


def test_what_keeps_the_camera_from_starting_is_raised_as_what_it_is(scripted):
    camera = scripted('tell("failed", error="MissingPackage", text="harvesters is not installed")')
    with pytest.raises(MissingPackage, match="harvesters is not installed"):
        camera.start()
    with pytest.raises(CameraError, match="not started"):
        camera.trigger(1)


def test_a_process_that_dies_is_started_again_and_meanwhile_every_trigger_is_refused_at_once(scripted):
    camera = scripted("ready()", "answer(after=2)", "os._exit(9)")
    camera.start()
    for trigger_id in (1, 2):
        camera.trigger(trigger_id)
        assert next_frame(camera).trigger_id == trigger_id
    with pytest.raises(CameraError, match="ended with code"):
        while True:
            camera.next_frame(0.5)
    before_s = time.monotonic()
    with pytest.raises(CameraError, match="ended with code"):
        camera.trigger(3)
    assert time.monotonic() - before_s < 0.02
    give_up_s = time.monotonic() + 10.0
    while not camera.is_up and time.monotonic() < give_up_s:
        with contextlib.suppress(CameraError):
            camera.next_frame(0.01)
    camera.trigger(4)
    assert next_frame(camera).trigger_id == 4
    assert camera.restarts == 1


def test_a_process_that_hangs_is_ended_and_nobody_waits_for_it(scripted, monkeypatch):
    monkeypatch.setattr(agent.cameras.child, "HUNG_S", 0.5)
    camera = scripted("ready()", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", "time.sleep(60)")
    camera.start()
    camera.trigger(1)
    longest_s, fault = 0.0, ""
    for _ in range(100):
        before_s = time.monotonic()
        try:
            camera.next_frame(0.02)
        except CameraError as error:
            fault = str(error)
        longest_s = max(longest_s, time.monotonic() - before_s)
        if fault:
            break
    assert "no sign of life" in fault
    assert longest_s < 0.5
    assert camera.restarts == 0


def test_frames_that_come_by_themselves_are_numbered_and_a_gap_is_a_part(scripted):
    camera = scripted("ready()", "for number in (1, 2, 5): frame(None, number)", "linger()", source="Line1")
    camera.start()
    assert [next_frame(camera).trigger_id for _ in range(3)] == [1, 2, 5]
    assert camera.parts == 5


def test_a_part_whose_frame_came_incomplete_is_announced_at_once(scripted):
    camera = scripted("ready()", "frame(None, 1)", 'tell("lost")', "linger()", source="Line1")
    camera.start()
    assert next_frame(camera).trigger_id == 1
    assert camera.next_frame(5.0) is None
    assert camera.parts == 2


def test_the_same_frame_twice_and_triggers_that_follow_too_closely_are_counted(scripted):
    shots = "for number, ms in ((1, 0), (2, 100), (2, 100), (3, 103)): frame(None, number, 10**12 + ms * 10**6)"
    camera = scripted("ready()", shots, "linger()", source="Line1", least_gap_ms=20.0)
    camera.start()
    frames = [next_frame(camera) for _ in range(3)]
    assert [frame.frame_id for frame in frames] == [1, 2, 3]
    assert [frame.facts.get("early_trigger", False) for frame in frames] == [False, False, True]
    assert (camera.counters["duplicate_frames"], camera.counters["early_triggers"]) == (1, 1)


def test_frames_that_show_no_new_part_give_their_room_back(scripted):
    shots = "for number in [1] * 40 + [2]: frame(None, number)"
    camera = scripted("ready()", shots, "linger()", source="Line1")
    camera.start()
    assert [next_frame(camera).frame_id for _ in range(2)] == [1, 2]


def test_parts_go_on_being_counted_over_a_restart_with_what_the_camera_counted_meanwhile(scripted, tmp_path):
    flag = tmp_path / "second"
    is_first = f"flag = {str(flag)!r}\nif not os.path.exists(flag):"
    dies = "    open(flag, 'w').close(); ready(0); frame(None, 1, counter=1); os._exit(1)"
    camera = scripted(
        is_first, dies, "ready(4)", "frame(None, 1, counter=5)", "linger()", source="Line1", counter="Counter0"
    )
    camera.start()
    assert next_frame(camera).trigger_id == 1
    assert next_frame(camera).trigger_id == 5  # three went by meanwhile


def test_stopping_twice_and_before_the_start_is_harmless(scripted):
    camera = scripted("ready()", "answer()")
    camera.stop()
    camera.start()
    camera.start()
    camera.stop()
    camera.stop()
    with pytest.raises(CameraError, match="not started"):
        camera.next_frame(0.01)


def test_the_pixels_of_frames_that_are_kept_never_change_however_many_come_after_them(scripted):
    camera = scripted("ready()", "answer()")
    camera.start()
    held = []
    for trigger_id in range(1, 41):
        camera.trigger(trigger_id)
        held.append(next_frame(camera))
    assert [int(np.unique(frame.pixels)[0]) for frame in held] == list(range(1, 41))


def test_the_cameras_process_hears_until_when_a_part_stands_there(scripted):
    answer = (
        "    message = json.loads(end.recv(65536)); frame(message['trigger_id'], number, until=message['until_ns'])"
    )
    camera = scripted("ready()", "for number in (1, 2):", answer, "linger()")
    camera.start()
    camera.trigger(1, 10**15 + 7)
    camera.trigger(2)
    assert [next_frame(camera).facts["until"] for _ in range(2)] == [10**15 + 7, None]
