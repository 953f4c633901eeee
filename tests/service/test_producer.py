"""The GenTL producer with the line simulator: through harvesters, as the agent uses it, and function by function."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from acquirer import (
    FORMATS,
    HEIGHT,
    PICTURES,
    TRIGGERED,
    WIDTH,
    expected,
    folder_of,
    harvester,
    noise,
    opened,
    triggered,
)
from genicam import gentl
from gentl import SOURCES, Library, Linecam, Wire, producer, write_picture

COLOUR = ("BayerRG8", "BayerGB8", "BayerGR8", "BayerBG8", "RGB8", "BGR8")
TIMEOUT, ABORT, NOT_AVAILABLE, TOO_SMALL = -1011, -1012, -1014, -1016
INVALID_HANDLE, NOT_INITIALIZED, BUSY, IN_USE, NO_DATA = -1006, -1002, -1022, -1004, -1008


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of gray pictures with 16 bits of noise."""
    return folder_of(tmp_path / "pictures", (HEIGHT, WIDTH), np.uint16)


@pytest.mark.parametrize("pixel_format", FORMATS)
def test_500_triggered_frames_arrive_in_order_and_exact_to_the_bit(tmp_path, pixel_format):
    shape, dtype = ((HEIGHT, WIDTH, 3), np.uint8) if pixel_format in COLOUR else ((HEIGHT, WIDTH), np.uint16)
    folder = folder_of(tmp_path / "pictures", shape, dtype)
    wanted = [expected(noise(number, shape, dtype), pixel_format) for number in range(PICTURES)]
    with Linecam(folder) as camera, opened(camera, PixelFormat=pixel_format, **TRIGGERED) as acquirer:
        acquirer.start()
        for number in range(500):
            pixels, frame_id = triggered(acquirer)
            assert frame_id == number + 1
            np.testing.assert_array_equal(pixels, wanted[number % PICTURES])
        assert camera.status()["missed"] == "0"


def test_harvesters_sees_width_height_format_and_time_of_a_frame(pictures):
    with Linecam(pictures) as camera, opened(camera, PixelFormat="Mono8", **TRIGGERED) as acquirer:
        acquirer.start()
        before_ns = time.monotonic_ns()
        acquirer.remote_device.node_map.TriggerSoftware.execute()
        with acquirer.try_fetch(timeout=3) as buffer:
            (component,) = buffer.payload.components
            assert (component.height, component.width, component.data_format) == (HEIGHT, WIDTH, "Mono8")
            assert before_ns <= buffer.timestamp_ns <= time.monotonic_ns()  # both clocks are the machine's
            assert buffer.payload.components[0].data.shape == (HEIGHT * WIDTH,)


class RawAcquisition:
    """The buffers of a stream as they come, incomplete ones too, which harvesters throws away."""

    def __init__(self, acquirer: Any) -> None:
        acquirer.start()
        self._trigger = acquirer.remote_device.node_map.TriggerSoftware
        (self._event,) = acquirer._new_buffer_event_monitor_dict.values()

    def frame(self) -> tuple[int | None, np.ndarray | None]:
        """Return the id of the frame that a trigger gives, None if its leader is lost; and its bytes, None if some are.

        Raises TimeoutException if nothing comes.
        """
        self._trigger.execute()
        self._event.update_event_data(1000)
        buffer = self._event.buffer
        pixels = np.frombuffer(buffer.raw_buffer, np.uint8).copy() if buffer.is_complete() else None
        try:
            frame_id = int(buffer.frame_id)
        except gentl.NotAvailableException:
            frame_id = None
        buffer.parent.queue_buffer(buffer)
        return frame_id, pixels


@pytest.mark.parametrize("resend", [True, False], ids=["with resend", "without resend"])
def test_lost_packets_are_sent_again_or_the_frame_is_flagged_incomplete(pictures, resend):
    options = ["--lose", "60", "--seed", "3", "--packet-size", "576", *([] if resend else ["--no-resend"])]
    wanted = [expected(noise(number, (HEIGHT, WIDTH), np.uint16), "Mono8") for number in range(PICTURES)]
    with Linecam(pictures, *options) as camera, opened(camera, PixelFormat="Mono8", **TRIGGERED) as acquirer:
        acquisition = RawAcquisition(acquirer)
        frames = [acquisition.frame() for _ in range(150)]
    for number, (frame_id, pixels) in enumerate(frames):
        assert frame_id in ((number + 1,) if pixels is not None else (number + 1, None))
        if pixels is not None:
            np.testing.assert_array_equal(pixels, wanted[number % PICTURES])
    complete = sum(pixels is not None for _, pixels in frames)
    assert complete >= 148 if resend else 60 < complete < 120  # 0.94^6 of 150 frames are 103
    assert resend or None in [frame_id for frame_id, _ in frames]  # some leaders were among the lost


def test_every_call_to_a_dead_camera_ends_within_a_second_and_it_can_be_opened_again(pictures):
    with Linecam(pictures) as camera:
        with opened(camera, **TRIGGERED) as acquirer:
            acquirer.start()
            triggered(acquirer)
            camera.kill()
            nodes, seconds = acquirer.remote_device.node_map, {}
            calls = {
                "read": lambda: nodes.Width.value,
                "read again": lambda: nodes.Height.value,
                "trigger": nodes.TriggerSoftware.execute,
                "stop": acquirer.stop,
            }
            for name, call in calls.items():
                started_s = time.monotonic()
                with pytest.raises(
                    gentl.TimeoutException, match=r"has not answered for \d\.\d s: check cable and power"
                ):
                    call()
                seconds[name] = time.monotonic() - started_s
            started_s = time.monotonic()
            acquirer.destroy()
            seconds["destroy"] = time.monotonic() - started_s
            assert max(seconds.values()) < 1.5, seconds
        camera.start()
        with opened(camera, **TRIGGERED) as acquirer:
            acquirer.start()
            assert triggered(acquirer)[1] == 1


def test_a_camera_whose_cable_was_out_for_a_second_goes_on_by_itself(pictures):
    with Wire() as wire, Linecam(pictures, wire=wire) as camera, opened(camera, **TRIGGERED) as acquirer:
        acquirer.start()
        assert triggered(acquirer)[1] == 1
        wire.pull()
        with pytest.raises(gentl.TimeoutException):
            acquirer.remote_device.node_map.TriggerSoftware.execute()
        time.sleep(1)
        wire.plug()
        deadline_s, frame_id = time.monotonic() + 5, 0
        while not frame_id and time.monotonic() < deadline_s:
            with contextlib.suppress(gentl.TimeoutException, AssertionError):
                frame_id = triggered(acquirer)[1]
        assert frame_id >= 2  # or 3: the trigger that timed out may have reached the camera yet


def test_a_camera_that_hears_no_broadcast_is_found_by_its_address(pictures, monkeypatch):
    with Linecam(pictures, "--unicast") as camera:
        with harvester() as found:
            assert camera.serial not in [each.serial_number for each in found.device_info_list]
        monkeypatch.setenv("TAKTSIGHT_GENTL_ADDRESSES", f"127.250.0.1, {camera.address}")
        with opened(camera, **TRIGGERED) as acquirer:
            acquirer.start()
            assert triggered(acquirer)[1] == 1


def test_two_cameras_deliver_side_by_side(tmp_path):
    folders = [folder_of(tmp_path / name, (HEIGHT, WIDTH), np.uint8) for name in ("one", "two")]
    write_picture(folders[1] / "0.pgm", noise(99, (HEIGHT, WIDTH), np.uint8))
    with Linecam(folders[0]) as one, Linecam(folders[1]) as two, harvester() as found:
        acquirers = [found.create({"serial_number": camera.serial}) for camera in (one, two)]
        for acquirer in acquirers:
            for name, value in TRIGGERED.items():
                getattr(acquirer.remote_device.node_map, name).value = value
            acquirer.start()
        first, second = (triggered(acquirer)[0] for acquirer in acquirers)
        for acquirer in acquirers:
            acquirer.stop()
            acquirer.destroy()
    np.testing.assert_array_equal(first, noise(0, (HEIGHT, WIDTH), np.uint8).ravel())
    np.testing.assert_array_equal(second, noise(99, (HEIGHT, WIDTH), np.uint8).ravel())


SECOND_CONTROLLER = """
import sys
from harvesters.core import Harvester
found = Harvester()
found.add_file(sys.argv[1])
found.update()
try:
    found.create({"serial_number": sys.argv[2]})
except Exception as error:
    print(type(error).__name__, error)
    found.reset()
"""


def test_a_second_controller_is_refused_and_told_who_has_the_camera(pictures):
    with Linecam(pictures) as camera, opened(camera, **TRIGGERED) as acquirer:
        with harvester() as other, pytest.raises(gentl.ResourceInUseException):
            other.create({"serial_number": camera.serial})
        command = [sys.executable, "-c", SECOND_CONTROLLER, str(producer()), camera.serial]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert re.search(r"AccessDenied.* is in use by a program at 127\.", done.stdout), done.stdout + done.stderr
        acquirer.start()
        assert triggered(acquirer)[1] == 1  # the first was not disturbed


def test_writing_after_the_control_was_lost_says_access_denied(pictures):
    with Linecam(pictures) as camera, opened(camera) as acquirer:
        camera.tell("release")
        with pytest.raises(gentl.AccessDeniedException, match="access-denied"):
            acquirer.remote_device.node_map.ExposureTime.value = 20.0


def test_200_open_and_close_cycles_leave_no_descriptor_and_no_memory_behind(pictures):
    with Linecam(pictures) as camera, Library() as library:
        library.must("TLOpen", ctypes.byref(library.system))
        usage = []
        for cycle in range(200):
            device = library.open_device(camera.serial) if cycle == 0 else reopened(library, camera)
            stream, _ = library.open_stream(device)
            buffer = ctypes.c_void_p()
            library.must("DSAllocAndAnnounceBuffer", stream, ctypes.c_size_t(4096), None, ctypes.byref(buffer))
            library.must("DSQueueBuffer", stream, buffer)
            library.must("DSStartAcquisition", stream, 0, ctypes.c_uint64(2**64 - 1))
            library.must("DevClose", device)
            usage.append((len(list(Path("/proc/self/fd").iterdir())), resident_kib()))
        descriptors, kib = zip(*usage, strict=True)
        assert max(descriptors[50:]) <= descriptors[20] + 1
        assert kib[-1] - kib[50] < 1024, (kib[50], kib[-1])


def reopened(library: Library, camera: Linecam) -> ctypes.c_void_p:
    device = ctypes.c_void_p()
    name = f"taktsight-linecam-{camera.serial}".encode()
    library.must("IFOpenDevice", library.interface, name, 3, ctypes.byref(device))
    return device


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])


def test_a_kill_ends_a_wait_for_ever_and_so_does_unregistering(pictures):
    with Linecam(pictures) as camera, Library() as library:
        device = library.open_device(camera.serial)
        stream, event = library.open_stream(device)
        codes: list[int] = []

        def wait() -> None:
            data, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
            codes.append(library("EventGetData", event, data, ctypes.byref(size), ctypes.c_uint64(2**64 - 1)))

        for end in (lambda: library("EventKill", event), lambda: library("GCUnregisterEvent", stream, 1)):
            waiting = threading.Thread(target=wait)
            waiting.start()
            time.sleep(0.1)
            assert waiting.is_alive()
            assert end() == 0
            waiting.join(1)
            assert not waiting.is_alive()
        assert codes == [ABORT, ABORT]
        library.must("DevClose", device)


def test_buffers_go_only_where_gentl_lets_them(pictures):
    with Linecam(pictures) as camera, Library() as library:
        device = library.open_device(camera.serial)
        stream, event = library.open_stream(device)
        memory, buffer = ctypes.create_string_buffer(8192), ctypes.c_void_p()
        library.must("DSAnnounceBuffer", stream, memory, ctypes.c_size_t(8192), None, ctypes.byref(buffer))
        library.must("DSQueueBuffer", stream, buffer)
        assert library("DSQueueBuffer", stream, buffer) == IN_USE
        assert library("DSRevokeBuffer", stream, buffer, None, None) == BUSY
        assert "flush" in library.last_error()
        size, value = ctypes.c_size_t(8), ctypes.c_uint64()
        width = (stream, buffer, 10, None, ctypes.byref(value), ctypes.byref(size))
        assert library("DSGetBufferInfo", *width) == NO_DATA
        library.must("DSStartAcquisition", stream, 0, ctypes.c_uint64(1))
        assert library("DSStartAcquisition", stream, 0, ctypes.c_uint64(1)) == IN_USE
        data = ctypes.create_string_buffer(64)
        size.value = 64
        assert library("EventGetData", event, data, ctypes.byref(size), ctypes.c_uint64(20)) == TIMEOUT
        library.must("DSFlushQueue", stream, 4)
        library.must("DSRevokeBuffer", stream, buffer, None, None)
        assert library("DSQueueBuffer", stream, buffer) == INVALID_HANDLE
        library.must("DSStopAcquisition", stream, 0)
        library.must("DevClose", device)
        assert library("EventKill", event) == library("DSClose", stream) == INVALID_HANDLE
        assert library("DevGetPort", device, ctypes.byref(buffer)) == INVALID_HANDLE
        assert "closed" in library.last_error()


def test_the_last_error_is_that_of_the_thread(pictures):
    with Library() as library:
        assert library("TLClose", None) == INVALID_HANDLE
        elsewhere: list[str] = []
        other = threading.Thread(target=lambda: elsewhere.append(library.last_error()))
        other.start()
        other.join()
        assert (library.last_error(), elsewhere) == ("the handle is NULL", [""])


def test_queries_tell_the_size_first_and_refuse_a_small_buffer():
    with Library() as library:
        size, kind = ctypes.c_size_t(0), ctypes.c_int32()
        library.must("GCGetInfo", 6, ctypes.byref(kind), None, ctypes.byref(size))
        path = ctypes.create_string_buffer(size.value)
        library.must("GCGetInfo", 6, ctypes.byref(kind), path, ctypes.byref(size))
        assert (kind.value, path.value.decode()) == (1, str(producer()))
        size.value -= 1
        assert library("GCGetInfo", 6, None, path, ctypes.byref(size)) == TOO_SMALL
        assert library("GCGetInfo", 77, None, None, ctypes.byref(size)) == NOT_AVAILABLE


EVERY_FUNCTION_WITHOUT_HANDLE = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
functions = sys.argv[2].split(",")
def codes():
    return {name: getattr(library, name)(*([ctypes.c_void_p()] * 9)) for name in functions}
before = codes()
library.GCInitLib()
print(sorted(set(before.values())), sorted(set(codes().values())))
"""


def test_no_function_crashes_without_library_or_handle():
    exported = re.findall(
        r"^GC_API (\w+)\(GENTL_HANDLE \w", (SOURCES / "gentl.h").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(exported) > 45
    command = [sys.executable, "-c", EVERY_FUNCTION_WITHOUT_HANDLE, str(producer()), ",".join(exported)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"[{NOT_INITIALIZED}] [{INVALID_HANDLE}]\n", done.stdout + done.stderr


def test_the_numbers_of_the_header_are_those_of_genicam():
    header = (SOURCES / "gentl.h").read_text(encoding="utf-8")
    ours = {name: int(value) for name, value in re.findall(r"\b([A-Z]\w+) = (-?\d+)\b", header)}
    lists = [getattr(gentl, name) for name in dir(gentl) if name.endswith(("_LIST", "_IDS"))]
    theirs = {name: int(getattr(each, name)) for each in lists for name in dir(each) if name.isupper()}
    compared = {name for name in ours if name in theirs}
    assert {name: ours[name] for name in compared} == {name: theirs[name] for name in compared}
    assert len(compared) > 110
    assert set(ours) - compared == set()
