"""What is timed, and what is said of a takt."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest

from agent.line import pipeline
from calibration import preprocess
from calibration.errors import BadFrame
from calibration.preprocess import View
from trainer import timing
from trainer.timing import FRAMES, WARM_UP, engine_ms_within, engine_times_ms, frame_times_ms, frame_to_score

VIEW = View(height=32, width=32, colour=False, reference_size=(32, 32))
COSTS_MS = {"photometric": 20, "condition": 5, "registration": 3, "preprocess": 2, "engine": 1}


class Station:
    """Every stage of the way to a score, each of which only moves a clock of its own on."""

    is_identity = False

    def __init__(self, monkeypatch):
        self.now_ms, self.stages, self.raw = 0, [], []
        self.refused = ()  # brightness of frames whose reference patch is covered
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter_ns=lambda: self.now_ms * 1_000_000))
        monkeypatch.setattr(timing, "pixels_of", self.pixels_of)
        monkeypatch.setattr(timing, "glimpse", lambda *_, registered, sensor_pixels: self.raw.append(sensor_pixels))
        monkeypatch.setattr(timing, "measured", lambda seen: self.takes("condition"))
        monkeypatch.setattr(preprocess, "to_batch", self.to_batch)
        self.taken = []

    def takes(self, stage):
        self.stages.append(stage)
        self.now_ms += COSTS_MS[stage]

    def pixels_of(self, item, pictures, view):
        self.taken.append(item)
        return np.full((32, 32), item % 256, np.uint8), 8

    def correct(self, pixels, depth):
        self.takes("photometric")
        if pixels[0, 0] in self.refused:
            raise BadFrame("the reference patch is covered")
        return pixels / np.float32(255)

    def register(self, pixels, depth):
        self.takes("registration")

    def to_batch(self, pixels, *_):
        self.takes("preprocess")
        return pixels

    def engine(self, batch):
        self.takes("engine")


@pytest.fixture
def station(monkeypatch):
    return Station(monkeypatch)


def test_all_that_a_station_does_before_it_knows_the_score_is_timed(station):
    times_ms = frame_times_ms(range(3), station, VIEW, station, station.engine)
    assert times_ms == [sum(COSTS_MS.values())] * FRAMES
    assert tuple(station.stages[: len(COSTS_MS)]) == pipeline.STAGES[: pipeline.STAGES.index("engine") + 1]
    assert {pixels.dtype for pixels in station.raw} == {np.dtype(np.uint8)}  # saturation is the sensor's own
    assert engine_ms_within(50, lambda engine: frame_times_ms(range(3), station, VIEW, station, engine)) == 45 - 30


def test_where_nothing_is_corrected_the_picture_is_made_small_once(station):
    station.is_identity = True
    frame_times_ms(range(3), station, VIEW, None, station.engine)
    assert set(station.raw) == {None}
    assert "registration" not in station.stages


def test_frames_for_the_latency_are_no_more_than_are_timed(station):
    station.refused = (1,)
    times = frame_times_ms(range(1000), station, VIEW, None, station.engine)
    assert station.taken == list(range(WARM_UP + FRAMES))
    assert len(times) == FRAMES and station.stages.count("engine") == WARM_UP + FRAMES - 1
    assert frame_times_ms([1], station, VIEW, None, station.engine) == [math.inf]


def test_the_engine_is_warm_when_it_is_timed():
    ran = []
    assert len(engine_times_ms(ran.append, "image")) == FRAMES
    assert ran == ["image"] * (WARM_UP + FRAMES)


def test_the_engine_is_left_what_preparing_does_not_take_of_the_deadline():
    assert engine_ms_within(20.0, lambda engine: [3.0] * 60) == 15.0
    assert engine_ms_within(2.0, lambda engine: [math.inf]) == -math.inf


def test_a_takt_that_is_kept_and_one_that_is_not_are_told_with_the_time(monkeypatch):
    monkeypatch.setattr(timing, "engine_of", lambda graph: (len, "an engine"))

    def timed(engine):
        return [4.0] * 98 + [9.1] * 2

    (kept, in_time), (missed, too_late) = (frame_to_score(takt_ms, b"", timed) for takt_ms in (20.0, 10.0))
    assert in_time and not too_late
    assert "4 ms" in kept and "9.1 ms" in kept and "an engine" in kept
    assert "within 18 ms" in kept and "--size" not in kept
    assert "more than 9 ms" in missed and "--size" in missed and "race" in missed
