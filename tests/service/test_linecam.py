"""The line simulator: what it shows, how it is triggered, what it refuses."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from acquirer import HEIGHT, TRIGGERED, WIDTH, expected, fetched, folder_of, noise, opened, triggered
from gentl import Linecam, linecam_program

from demo.line_camera import free_address


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of gray pictures with 16 bits of noise."""
    return folder_of(tmp_path / "pictures", (HEIGHT, WIDTH), np.uint16)


def test_chunks_tell_time_frame_exposure_and_the_line_counter(pictures):
    chunks = ("Timestamp", "FrameID", "CounterValue", "ExposureTime", "Gain", "LineStatusAll")
    with Linecam(pictures) as camera, opened(camera, PixelFormat="Mono8") as acquirer:
        nodes = acquirer.remote_device.node_map
        nodes.TriggerMode.value, nodes.TriggerSource.value = "On", "Line1"
        nodes.ExposureTime.value, nodes.Gain.value, nodes.ChunkModeActive.value = 250.0, 6.5, True
        for chunk in chunks:
            nodes.ChunkSelector.value, nodes.ChunkEnable.value = chunk, True
        acquirer.start()
        for number in range(1, 6):
            camera.tell("line")
            with acquirer.try_fetch(timeout=3) as buffer:
                assert nodes.ChunkTimestamp.value == buffer.timestamp_ns
                assert nodes.ChunkFrameID.value == buffer.module.frame_id == number
                nodes.ChunkCounterSelector.value = "Counter1"
                assert nodes.ChunkCounterValue.value == number
                assert (nodes.ChunkExposureTime.value, nodes.ChunkGain.value) == (250.0, 6.5)
                pixels = buffer.payload.components[0].data
                np.testing.assert_array_equal(
                    pixels, expected(noise(number - 1, (HEIGHT, WIDTH), np.uint16), "Mono8")[: HEIGHT * WIDTH]
                )


def test_a_line_triggers_on_its_edge_and_bouncing_does_not(pictures):
    nodes = {"TriggerMode": "On", "TriggerSource": "Line1", "TriggerActivation": "FallingEdge", "ExposureTime": 1.0}
    with Linecam(pictures) as camera, opened(camera, **nodes) as acquirer:
        acquirer.start()
        camera.tell("line high")
        assert acquirer.try_fetch(timeout=0.2) is None
        camera.tell("line low")
        assert fetched(acquirer)[1] == 1
        acquirer.remote_device.node_map.LineDebouncerTime.value = 1_000_000.0
        camera.tell("line")  # within a second of the last edge
        assert acquirer.try_fetch(timeout=0.2) is None
        assert camera.status()["line1"] == "1"


def test_a_trigger_during_an_exposure_is_missed_and_counted(pictures):
    nodes = {**TRIGGERED, "ExposureTime": 200_000.0}
    with Linecam(pictures) as camera, opened(camera, **nodes) as acquirer:
        acquirer.start()
        for _ in range(3):
            acquirer.remote_device.node_map.TriggerSoftware.execute()
        assert fetched(acquirer)[1] == 1
        assert acquirer.try_fetch(timeout=0.4) is None
        assert (camera.status()["triggers"], camera.status()["missed"]) == ("3", "2")


def test_a_swallowed_frame_leaves_a_gap_in_the_frame_ids(pictures):
    with Linecam(pictures, "--drop", "3,4") as camera, opened(camera, **TRIGGERED) as acquirer:
        acquirer.start()
        ids = []
        for _ in range(6):
            acquirer.remote_device.node_map.TriggerSoftware.execute()
            with contextlib.suppress(AssertionError):
                ids.append(fetched(acquirer, 0.3)[1])
        assert ids == [1, 2, 5, 6]


def test_a_late_frame_holds_up_those_behind_it_and_each_comes_whole_in_its_order(pictures):
    options = ("--late", "2,5", "--late-ms", "400")
    with Linecam(pictures, *options) as camera, opened(camera, **TRIGGERED) as acquirer:
        acquirer.start()
        found = [triggered(acquirer)]
        began_s = time.monotonic()
        for _ in range(2):
            acquirer.remote_device.node_map.TriggerSoftware.execute()
        assert acquirer.try_fetch(timeout=0.2) is None
        found += [fetched(acquirer), fetched(acquirer), triggered(acquirer)]
        assert 0.4 <= time.monotonic() - began_s < 2.0
        assert camera.status()["missed"] == "0"
        for number, (pixels, frame_id) in enumerate(found):
            assert frame_id == number + 1
            np.testing.assert_array_equal(pixels, expected(noise(number, (HEIGHT, WIDTH), np.uint16), "Mono8"))


def test_frame_ids_leave_out_zero_when_their_16_bits_are_used_up(pictures):
    with Linecam(pictures) as camera, opened(camera, **TRIGGERED) as acquirer:
        acquirer.start()
        camera.tell("id 65534")
        assert [triggered(acquirer)[1] for _ in range(4)] == [65534, 65535, 1, 2]


def test_without_a_trigger_frames_come_at_the_rate_that_is_set(pictures):
    nodes = {"TriggerMode": "Off", "AcquisitionFrameRateEnable": True, "AcquisitionFrameRate": 100.0}
    with Linecam(pictures) as camera, opened(camera, **nodes) as acquirer:
        acquirer.start()
        exposed_ns = []
        for _ in range(30):
            with acquirer.try_fetch(timeout=3) as buffer:
                exposed_ns.append(buffer.timestamp_ns)
        assert np.median(np.diff(exposed_ns)) == pytest.approx(10e6, rel=0.1)


def test_a_request_that_is_sent_twice_is_carried_out_once(pictures):
    def write(request: int, register: int, value: int) -> bytes:
        return struct.pack(">BBHHHII", 0x42, 1, 0x82, 8, request, register, value)

    with Linecam(pictures) as camera, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(3)
        client.connect((camera.address, 3956))
        trigger = write(2, 0x10308, 1)
        for request in (write(1, 0xA00, 2), write(5, 0x10020, 1), trigger, trigger):  # control, TriggerMode, twice
            client.send(request)
            assert client.recv(600)[:4] == b"\x00\x00\x00\x83"  # done
        assert camera.status()["triggers"] == "1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nowhere"], "--images nowhere: no readable PGM (P5) or PPM (P6) picture"),
        (["--pixel-format", "Mono9"], "--pixel-format Mono9: not one of this camera"),
        (["--drop", "1,x"], "--drop 1,x: wanted frame ids of 1 to 65535 with commas between"),
        (["--late", "0"], "--late 0: wanted frame ids of 1 to 65535 with commas between"),
        (["--interface", "nonsense0"], "--interface nonsense0: no such interface with an IPv4 address"),
        ([], "Address already in use: another camera at this address?"),
    ],
)
def test_linecam_says_which_of_its_options_it_cannot_obey(pictures, options, message):
    with Linecam(pictures) as camera:
        command = [str(linecam_program()), "--interface", camera.address, "--images", str(pictures), *options]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False
        )
    assert done.returncode == 2
    assert message in done.stderr


def test_a_list_of_pictures_is_replayed_in_its_order_and_commands_come_by_stdin_too(pictures, tmp_path):
    (tmp_path / "list.txt").write_text(f"# a comment\n{pictures / '5.pgm'}\n{pictures / '2.pgm'}\n", encoding="utf-8")
    with Linecam(tmp_path / "list.txt") as camera, opened(camera, PixelFormat="Mono16", **TRIGGERED) as acquirer:
        acquirer.start()
        for number in (5, 2, 5):
            np.testing.assert_array_equal(
                triggered(acquirer)[0].view("<u2"), noise(number, (HEIGHT, WIDTH), np.uint16).ravel()
            )
    command = [str(linecam_program()), "--interface", free_address(), "--images", str(pictures)]
    told = "drop 2\nnonsense\nstatus\ndie\n"
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=20, check=False)
    ready, dropped, nonsense, status = done.stdout.splitlines()
    assert ready.startswith("ready 127.") and ready.endswith(f"images 7 size {WIDTH}x{HEIGHT} command -1")
    assert (dropped, nonsense.split(":")[0], status.split()[0], done.returncode) == ("ok", "error", "acquiring=0", 1)


def test_a_region_changed_by_somebody_else_shows_in_the_next_frame(pictures):
    with Linecam(pictures) as camera, opened(camera, PixelFormat="Mono8", **TRIGGERED) as acquirer:
        acquirer.start()
        assert len(triggered(acquirer)[0]) == HEIGHT * WIDTH
        camera.tell("size 20 10")
        acquirer.remote_device.node_map.TriggerSoftware.execute()
        with acquirer.try_fetch(timeout=3) as buffer:
            assert (buffer.module.height, buffer.module.width, buffer.module.size_filled) == (10, 20, 200)


def test_settings_are_kept_read_back_and_refused_where_they_do_not_fit(pictures):
    with Linecam(pictures) as camera, opened(camera) as acquirer:
        nodes = acquirer.remote_device.node_map
        nodes.Width.value, nodes.OffsetX.value, nodes.ExposureTime.value = 32, 21, 1234.5
        assert (nodes.Width.value, nodes.OffsetX.value, nodes.ExposureTime.value) == (32, 21, 1234.5)
        with pytest.raises(Exception, match=r"(?i)range|max|greater"):
            nodes.OffsetX.value = 22
        nodes.DeviceUserID.value = "gate 3"
        nodes.UserSetSelector.value = "UserSet1"
        nodes.UserSetSave.execute()
        nodes.ExposureTime.value = 10.0
        nodes.UserSetLoad.execute()
        assert (nodes.ExposureTime.value, nodes.DeviceUserID.value) == (1234.5, "gate 3")
        nodes.UserOutputSelector.value, nodes.UserOutputValue.value = "UserOutput1", True
        assert (camera.status()["output0"], camera.status()["output1"]) == ("0", "1")
        assert nodes.DeviceSerialNumber.value == camera.serial
