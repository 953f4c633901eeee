"""What a camera's process does with its camera, and what it tells: with a camera that does as the test says."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time

import numpy as np
import pytest

import agent.cameras.process
from agent.between.control import pair
from agent.cameras.genicam_formats import Layout
from agent.cameras.genicam_settings import GenicamSettings, TriggerSettings
from agent.cameras.process import CameraSession
from agent.cameras.slots import FrameSlots
from agent.errors import CameraError
from calibration.errors import MissingPackage
from tests.broker import wait_until

MONO8, MONO16 = 0x0108_0001, 0x0110_0007
WIDTH, HEIGHT = 6, 4


class Shot:
    """A frame in a buffer."""

    def __init__(self, frame_id, exposed_ns=0, *, width=WIDTH, height=HEIGHT, code=MONO8):
        self.layout = Layout(code, width, height, width * height)
        self.data = np.full(width * height, frame_id, np.uint8)
        self.frame_id, self.exposed_ns = frame_id, exposed_ns


class ScriptedDevice:
    """A device and its nodes: answers each trigger with the next shot of a script, None for no frame."""

    def __init__(self, script=(), *, comes_by_itself=False):
        self.script, self.comes_by_itself = list(script), comes_by_itself
        self.ready, self.given_back, self.triggers = [], [], 0
        self.incomplete, self.first_frame_id, self.pixel_format = 0, 1, MONO8
        self.fault, self.is_closed, self.values = "", False, {"Width": WIDTH, "Height": HEIGHT}
        self.nodes = self
        self.found = type("Found", (), dict.fromkeys(("id", "vendor", "model", "firmware", "producer_version"), "x"))
        self.found.serial, self.found.producer = "S1", "x.cti"

    def has(self, name):
        return name in self.values

    def get(self, name):
        if self.fault:
            raise CameraError(self.fault)
        return self.values[name]

    def set(self, name, value):
        self.values[name] = value

    def choices(self, name):
        return ()

    def software_trigger(self):
        return self._triggered

    def _triggered(self):
        self.triggers += 1
        shot = self.script.pop(0) if self.script else None
        if shot is not None:
            shot.exposed_ns = shot.exposed_ns or 10**12 + time.monotonic_ns()
            self.ready.append(shot)

    def start(self, buffers):
        pass

    def fetch(self, wait_ms):
        if self.comes_by_itself and self.script:
            shot = self.script.pop(0)
            if shot is None:
                self.incomplete += 1
            return shot
        if self.ready:
            return self.ready.pop(0)
        time.sleep(wait_ms / 1e3)
        return None

    def give_back(self, frame):
        frame.data[:] = 255  # whatever was not copied is gone
        self.given_back.append(frame.frame_id)

    def check(self):
        if self.fault:
            raise CameraError(self.fault)

    def close(self):
        self.is_closed = True


class Parent:
    """The other end: a session in a thread, and what it says."""

    def __init__(self, device, monkeypatch, *, slots=8, **settings):
        device.values |= {"TriggerSource": "x", "TriggerMode": "x"}
        monkeypatch.setattr(agent.cameras.process, "open_device", lambda _: device)
        self.end, theirs = pair()
        self.end.settimeout(10.0)
        hello = {"settings": GenicamSettings(**settings).as_dict(), "slots": slots, "patient": False}
        self.session, self.fault = CameraSession(theirs, hello), None
        data, descriptors, _, _ = socket.recv_fds(self.end, 65536, 1)
        self.ready, self.slots = json.loads(data), FrameSlots(descriptors[0])
        os.close(descriptors[0])
        self._theirs = theirs
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self.session.run()
        except (CameraError, OSError) as error:
            self.fault = str(error)

    def tell(self, **message):
        self.end.sendall(json.dumps(message).encode())

    def hear(self):
        return json.loads(self.end.recv(65536))

    def pixels(self, message):
        return self.slots.lend(message["slot"], tuple(message["shape"]), np.uint8)

    def wait_for_fault(self):
        self._thread.join(10.0)
        return self.fault

    def close(self):
        self.end.close()
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._theirs.close()


@pytest.fixture
def session(monkeypatch):
    made = []

    def start(device, **settings):
        made.append(Parent(device, monkeypatch, **settings))
        return made[-1]

    yield start
    for one in made:
        one.close()


LINE1 = TriggerSettings(source="Line1")


def test_it_says_which_camera_it_is_and_what_does_not_fit(session):
    parent = session(ScriptedDevice())
    assert parent.ready["facts"]["camera"] == "S1"
    assert parent.ready["differences"] == []
    assert parent.ready["values"]["TriggerMode"] == "On"


def test_a_frame_is_copied_before_its_buffer_is_given_back(session):
    device = ScriptedDevice([Shot(1), Shot(2)])
    parent = session(device)
    for trigger_id in (11, 12):
        parent.tell(what="trigger", trigger_id=trigger_id)
        message = parent.hear()
        assert (message["what"], message["trigger_id"], message["frame_id"]) == ("frame", trigger_id, trigger_id - 10)
        assert np.all(parent.pixels(message) == trigger_id - 10)
    assert device.given_back == [1, 2]


def test_a_frame_that_came_incomplete_is_told_and_the_camera_is_not_taken_for_dead(session):
    parent = session(ScriptedDevice([Shot(1), None, Shot(3)], comes_by_itself=True), trigger=LINE1)
    assert [parent.hear()["what"] for _ in range(3)] == ["frame", "lost", "frame"]


def test_with_no_room_left_a_frame_of_a_part_that_came_by_itself_is_told_as_lost(session):
    parent = session(ScriptedDevice([Shot(1), Shot(2), Shot(3)], comes_by_itself=True), slots=2, trigger=LINE1)
    assert [parent.hear()["what"] for _ in range(3)] == ["frame", "frame", "lost"]


def test_triggers_without_an_answer_say_that_the_camera_is_gone(session, monkeypatch):
    monkeypatch.setattr(agent.cameras.process, "UNANSWERED_S", 0.05)
    monkeypatch.setattr("agent.cameras.reckoning.ASTRAY_NS", 10**7)
    parent = session(ScriptedDevice())
    for trigger_id in range(1, 5):
        parent.tell(what="trigger", trigger_id=trigger_id)
        time.sleep(0.04)
    assert "triggers in a row brought no frame" in parent.wait_for_fault()


@pytest.mark.parametrize("shot", [Shot(1, width=WIDTH - 2), Shot(1, code=MONO16)], ids=["size", "format"])
def test_a_frame_unlike_the_one_that_was_set_up_ends_the_session(session, shot):
    parent = session(ScriptedDevice([shot], comes_by_itself=True), trigger=LINE1)
    assert "somebody else changes the camera" in parent.wait_for_fault()


def test_a_silent_camera_is_asked_whether_it_is_there_and_as_it_was(session, monkeypatch):
    monkeypatch.setattr(agent.cameras.process, "PROBE_S", 0.05)
    device = ScriptedDevice(comes_by_itself=True)
    parent = session(device, trigger=LINE1)
    time.sleep(0.3)
    assert parent.fault is None
    device.values["TriggerMode"] = "Off"
    assert "forgotten its settings (TriggerMode is Off)" in parent.wait_for_fault()


def test_a_camera_that_does_not_answer_ends_the_session_with_its_reason(session, monkeypatch):
    monkeypatch.setattr(agent.cameras.process, "PROBE_S", 0.05)
    device = ScriptedDevice()
    parent = session(device)
    device.fault = "the camera does not answer"
    assert parent.wait_for_fault() == "the camera does not answer"


def test_it_says_that_it_lives_and_ends_when_nobody_listens_any_more(session):
    parent = session(ScriptedDevice())
    first_ns = parent.slots.beat_ns
    time.sleep(0.1)
    assert parent.slots.beat_ns > first_ns > 0
    parent.close()
    assert parent.fault is None


def test_without_harvesters_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "agent.cameras.genicam_device", None)
    with pytest.raises(MissingPackage, match=r"pip install 'taktsight\[genicam\]'"):
        agent.cameras.process.open_device(GenicamSettings())


def test_a_line_of_the_camera_is_set_as_the_parent_says(session):
    device = ScriptedDevice()
    device.values |= {"UserOutputSelector": "UserOutput0", "UserOutputValue": False}
    parent = session(device)
    parent.tell(what="line", name="UserOutput1", on=True, number=7)
    assert parent.hear() == {"what": "line", "number": 7}
    assert (device.values["UserOutputSelector"], device.values["UserOutputValue"]) == ("UserOutput1", True)


def test_a_trigger_that_waited_until_its_part_had_gone_by_is_not_given(session):
    device = ScriptedDevice([Shot(1)])
    parent = session(device)
    now_ns = time.monotonic_ns()
    parent.tell(what="trigger", trigger_id=9, until_ns=now_ns - 1)
    parent.tell(what="trigger", trigger_id=10, until_ns=now_ns + 10**12)
    message = parent.hear()
    assert (message["trigger_id"], message["counted"]["withheld_triggers"]) == (10, 1)
    assert device.triggers == 1


class Standing:
    """Stands in for the module `time`: it goes on when a test says so."""

    monotonic = staticmethod(time.monotonic)
    now_ns = 10**12

    def monotonic_ns(self):
        return self.now_ns


def test_a_trigger_that_took_until_its_part_had_gone_by_brings_no_frame(session, monkeypatch):
    clock = Standing()
    monkeypatch.setattr(agent.cameras.process, "time", clock)

    class Blocking(ScriptedDevice):
        def _triggered(self):
            clock.now_ns += 10**8  # the camera confirms the trigger, at the second question
            super()._triggered()

    device = Blocking([Shot(1), Shot(2)])
    parent = session(device)
    parent.tell(what="trigger", trigger_id=9, until_ns=clock.now_ns + 10**7)
    wait_until(lambda: device.given_back == [1])
    parent.tell(what="trigger", trigger_id=10, until_ns=clock.now_ns + 10**9)
    message = parent.hear()
    assert (message["trigger_id"], message["frame_id"]) == (10, 2)
    assert message["counted"]["withheld_triggers"] == 1
