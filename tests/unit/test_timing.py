"""What is timed, and what is said of a takt."""

from __future__ import annotations

import math
import types

from calibration.errors import BadFrame
from trainer import timing
from trainer.timing import FRAMES, WARM_UP, engine_ms_within, engine_times_ms, frame_times_ms, takt_note


def test_frames_for_the_latency_are_no_more_than_are_timed(monkeypatch):
    taken, ran = [], []

    def pixels_of(item, pictures, view):
        taken.append(item)
        if item == 1:
            raise BadFrame("the reference patch is covered")
        return item, 8

    monkeypatch.setattr(timing, "pixels_of", pixels_of)
    monkeypatch.setattr(timing, "prepare", lambda pixels, *_: types.SimpleNamespace(batch=pixels))
    times = frame_times_ms(range(1000), None, None, None, ran.append)
    assert taken == list(range(WARM_UP + FRAMES))
    assert len(times) == FRAMES and len(ran) == len(taken) and 1 not in ran
    assert frame_times_ms([1], None, None, None, ran.append) == [math.inf]


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

    kept, missed = takt_note(20.0, b"", timed), takt_note(10.0, b"", timed)
    assert "4 ms" in kept and "9.1 ms" in kept and "an engine" in kept
    assert "within 18 ms" in kept and "--size" not in kept
    assert "more than 9 ms" in missed and "--size" in missed and "race" in missed
