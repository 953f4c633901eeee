"""`taktsight-agent capture`: parts taken as `run` takes them, recorded and not judged; no recipe is needed.

Two threads: the caller's is the clock and gives triggers, another takes frames from the camera and records them, so
that no trigger waits for the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import yaml

from agent.cameras.camera import NO_FRAME, Camera, SelfTriggeredCamera
from agent.cameras.genicam_settings import FREE_RUN
from agent.cameras.several import CAMERAS, file_and_camera
from agent.cameras.trigger import Announced
from agent.config import Station, read_station
from agent.errors import CameraError, EndOfFrames, FrameError
from agent.line.beat import Beat
from agent.line.pace import pace_of, running
from calibration.frame import Frame
from calibration.settings import read_file, read_settings

POLL_S = 0.05  # how soon a thread notices that it should stop
FRAME_S = 2.0  # after its trigger, and after the frame before it, a frame that has not come is lost
WAIT_TOLD_S = 3.0  # without a part, then it is told what is waited for
NO_RECIPE = {"recipe": "none.recipe", "recipes": {"unsigned": "allow"}}
TOO_LATE = "the trigger's source told of a part too late for a picture, or of several at once"

Progress = Callable[[str, int, int], None]  # (what, done, total)


def read_station_without_recipe(path: Path) -> Station:
    """Return the station without its recipe and without whose recipes run there: neither need be there yet.

    path: as for `agent.config.read_station`. Raises SettingsError as that does for all else.
    """
    file, _ = file_and_camera(path)
    data = read_file(file)
    read_settings(file, data)  # refuses what is not strict
    values = yaml.safe_load(data)
    cameras = values.get(CAMERAS)
    for block in cameras.values() if isinstance(cameras, dict) else ():
        for key in NO_RECIPE if isinstance(block, dict) else ():
            block.pop(key, None)
    return read_station(path, yaml.safe_dump({**values, **NO_RECIPE}, allow_unicode=True).encode())


def beat_of(station: Station) -> Beat:
    """Return what gives this station its parts, as `run` does. Raises MissingPackage naming the extra."""
    return replace(station.beat, source=None if station.trigger is None else station.trigger.open())


def awaited(station: Station) -> str:
    """Return what the next part waits for, for people."""
    if station.trigger is not None and (plc := station.trigger.plc) is not None:
        return f"a part on {plc.signal} {plc.address} of {plc.host}:{plc.port}"
    if station.trigger is not None and (pin := station.trigger.pin) is not None:
        return f"a part on {pin.chip} line {pin.line}"
    if station.camera.genicam is not None and station.camera.opens_parts:
        source = station.camera.genicam.trigger.source
        return "a frame of the camera, in free run" if source == FREE_RUN else f"a part on {source} of the camera"
    return f"the next part, one every {station.beat.takt_ms:g} ms (takt_ms)"


@dataclass(frozen=True, slots=True)
class Captured:
    """What came of a capture."""

    recorded: int
    lost: int  # parts without a frame
    was_interrupted: bool  # by Ctrl-C


class PartCapture:
    """One camera, one beat; each frame of a part is handed to `record`, in a thread of its own."""

    def __init__(
        self,
        camera: Camera,
        beat: Beat,
        record: Callable[[Frame], object],
        *,
        awaited: str,
        tell: Callable[[str], object],
        progress: Progress = lambda *_: None,
    ) -> None:
        """tell: gets what a person should know meanwhile."""
        self._camera = camera
        self._self_triggered = cast(SelfTriggeredCamera, camera) if beat.by_camera else None
        self._is_signalled = beat.source is not None  # else what stands there at the beat is as good a picture
        self._most_open = beat.queue_length
        self._pace = pace_of(beat)
        self._record = record
        self._awaited = awaited
        self._tell = tell
        self._progress = progress
        self._wake = threading.Event()  # something changed for the clock
        self._ended = threading.Event()
        self._lock = threading.Lock()  # over what stands below
        self._wanted = self._recorded = self._lost = self._triggers = 0
        self._open: dict[int, int] = {}  # triggers without a frame, and when each was given, time.monotonic_ns()
        self._given_up: set[int] = set()  # triggers that were counted as lost
        self._newest = 0  # trigger that has its frame
        self._last_ns = 0  # when a part or a frame came, time.monotonic_ns()
        self._last_frame_ns = 0  # when a frame came
        self._has_no_more = False
        self._camera_fault = ""
        self._loss_told = ""  # of the parts since the last frame
        self._wait_is_told = False

    def run(self, count: int) -> Captured:
        """Return once so many parts are recorded, the camera has no more, or at Ctrl-C.

        Raises CameraError if the camera or the trigger's source cannot be started, and what `record` raises.
        """
        self._wanted = count
        was_interrupted = False
        self._camera.start()
        try:
            with running(self._pace, self._wake.set), ThreadPoolExecutor(1, "acquisition") as threads:
                recording = threads.submit(self._record_frames)
                try:
                    self._keep_the_beat(recording)
                except KeyboardInterrupt:
                    was_interrupted = True
                finally:
                    self._ended.set()
                recording.result()
        finally:
            self._camera.stop()
        return Captured(self._recorded, self._lost, was_interrupted)

    def _keep_the_beat(self, recording: Future[None]) -> None:
        """Trigger when parts come, until all are recorded or nothing more will be."""
        self._last_ns = time.monotonic_ns()
        while not recording.done() and not (self._has_no_more and not self._open):
            now_ns = time.monotonic_ns()
            self._give_up_on_lost(now_ns)
            if (announced := self._pace.take(now_ns)) is not None:
                self._take_up(announced)
                continue
            self._tell_what_it_waits_for(now_ns)
            wait_s = POLL_S if self._pace.next_ns is None else min(POLL_S, (self._pace.next_ns - now_ns) / 1e9)
            self._wake.wait(wait_s)
            self._wake.clear()

    def _take_up(self, announced: Announced) -> None:
        """Trigger for a part that has come, unless those under way are enough."""
        with self._lock:
            self._last_ns = time.monotonic_ns()
            waiting = len(self._open)
            if self._has_no_more or self._recorded + waiting >= self._wanted:
                return
            if announced.lost and self._is_signalled:
                self._lose(announced.lost, TOO_LATE)
            if not announced.opens:
                return
            if waiting > self._most_open:
                self._lose(1, f"{waiting} frames are awaited already: slow the line")
                return
            until_ns = self._pace.until_ns(announced) if self._is_signalled else None
            if until_ns is not None and self._last_ns > until_ns:
                self._lose(1, TOO_LATE)
                return
            self._triggers = trigger_id = self._triggers + 1
            self._open[trigger_id] = self._last_ns
        try:
            self._camera.trigger(trigger_id, until_ns)
        except EndOfFrames:
            with self._lock:
                del self._open[trigger_id]
                self._has_no_more = True
        except CameraError as error:
            with self._lock:
                del self._open[trigger_id]
                self._lose(1, str(error))

    def _give_up_on_lost(self, now_ns: int) -> None:
        """Count what does not come any more; a camera that is slow, but sends one frame after the other, is waited for.

        A trigger whose successor has its frame waits for no other frame.
        """
        with self._lock:
            for trigger_id, given_ns in list(self._open.items()):
                since_ns = given_ns if trigger_id < self._newest else max(given_ns, self._last_frame_ns)
                if now_ns - since_ns > FRAME_S * 1e9:
                    del self._open[trigger_id]
                    is_first = trigger_id - 1 not in self._given_up
                    self._given_up.add(trigger_id)
                    self._lose(1, f"part {trigger_id}: no frame within {FRAME_S:g} s" if is_first else self._loss_told)

    def _lose(self, parts: int, why: str) -> None:
        """Count parts that are not recorded; what is told of several in a row, is told once. The lock is held."""
        self._lost += parts
        if why != self._loss_told:
            self._loss_told = why
            self._tell(f"{why}: it does not count")

    def _lose_picture(self, error: FrameError) -> None:
        """Count a part whose frame is no picture; the camera is there."""
        self._note_camera("")
        with self._lock:
            if self._open.pop(error.trigger_id, None) is not None:
                self._lose(1, str(error))

    def _tell_what_it_waits_for(self, now_ns: int) -> None:
        """Tell once where no part comes for long."""
        is_awaiting_part = not self._open and not self._camera_fault and not self._wait_is_told
        if is_awaiting_part and now_ns - self._last_ns > WAIT_TOLD_S * 1e9:
            self._wait_is_told = True
            self._tell(f"waiting for {self._awaited} ... (Ctrl-C ends; what was recorded stays)")

    def _record_frames(self) -> None:
        """Record what the camera sends until that is enough, or the clock has ended."""
        frames = missing = 0
        while self._recorded < self._wanted and not self._ended.is_set():
            try:
                frame = self._camera.next_frame(POLL_S)
            except FrameError as error:
                self._lose_picture(error)
                continue
            except CameraError as error:
                self._note_camera(str(error))
                self._ended.wait(POLL_S)
                continue
            self._note_camera("")
            frames += frame is not None
            if self._self_triggered is not None and self._self_triggered.parts - frames > missing:
                before, missing = missing, self._self_triggered.parts - frames
                with self._lock:
                    self._lose(missing - before, NO_FRAME)
            if frame is not None:
                self._take_in(frame)
        self._wake.set()

    def _take_in(self, frame: Frame) -> None:
        """Record a frame, unless it is nobody's."""
        trigger_id = frame.trigger_id
        with self._lock:
            if self._self_triggered is None and trigger_id not in self._open and trigger_id not in self._given_up:
                return
            self._last_ns = self._last_frame_ns = time.monotonic_ns()
            self._loss_told = ""
        self._record(frame)
        with self._lock:
            if self._open.pop(trigger_id, None) is None and trigger_id in self._given_up:
                self._given_up.remove(trigger_id)  # it was late, not lost
                self._lost -= 1
            self._newest = max(self._newest, trigger_id)
            self._recorded += 1
        self._progress("capture", self._recorded, self._wanted)
        self._wake.set()

    def _note_camera(self, fault: str) -> None:
        """Tell the camera's state when it changes."""
        if bool(fault) != bool(self._camera_fault):
            self._tell(f"camera down: {fault}" if fault else "camera back")
        self._camera_fault = fault
