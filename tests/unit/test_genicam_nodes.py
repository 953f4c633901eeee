"""A camera is set up in an order that works, everything is read back, and what it refuses is said with its key."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from agent.cameras.genicam_nodes import apply
from agent.cameras.genicam_settings import KEEP, GenicamSettings, TriggerSettings
from agent.errors import CameraError


@dataclass
class FakeNodes:
    """A camera's nodes in memory; values behind a selector are kept apart."""

    values: dict = field(default_factory=dict)
    enumerations: dict = field(default_factory=dict)
    commands: tuple = ()
    selectors: dict = field(default_factory=dict)  # node -> its selector
    steps: list = field(default_factory=list)  # what was written, in order
    limits: dict = field(default_factory=dict)
    rounds: dict = field(default_factory=dict)  # node -> to what the camera rounds

    def _place(self, name):
        selector = self.selectors.get(name)
        return name if selector is None else (name, self.values[selector])

    def has(self, name):
        return name in self.values or name in self.commands or name in self.selectors

    def get(self, name):
        return self.values[self._place(name)]

    def set(self, name, value):
        if name in self.limits and not self.limits[name][0] <= value <= self.limits[name][1]:
            raise CameraError(f"{name} = {value} is refused")
        if name in self.rounds:
            value = round(value / self.rounds[name]) * self.rounds[name]
        self.steps.append((name, value))
        self.values[self._place(name)] = value

    def run(self, name):
        self.steps.append((name, None))

    def choices(self, name):
        return self.enumerations.get(name, ())

    def written(self, name):
        return [value for step, value in self.steps if step == name]


def modern() -> FakeNodes:
    """Return a camera that follows the SFNC of today."""
    return FakeNodes(
        values={
            "UserSetSelector": "UserSet1", "AcquisitionMode": "SingleFrame", "TriggerSelector": "FrameStart",
            ("TriggerMode", "FrameStart"): "Off", ("TriggerMode", "AcquisitionStart"): "On",
            ("TriggerSource", "FrameStart"): "Line1", ("TriggerActivation", "FrameStart"): "FallingEdge",
            "OffsetX": 8, "OffsetY": 8, "Width": 640, "Height": 480, "PixelFormat": "Mono8",
            "ExposureAuto": "Continuous", "ExposureTime": 100.0, "Gain": 0.0,
            "ChunkModeActive": False, "ChunkSelector": "Timestamp",
            ("ChunkEnable", "Timestamp"): False, ("ChunkEnable", "CounterValue"): False,
        },
        enumerations={
            "TriggerSelector": ("AcquisitionStart", "FrameStart"), "TriggerSource": ("Software", "Line1"),
            "PixelFormat": ("Mono8", "Mono12"), "ExposureAuto": ("Off", "Continuous"), "TriggerMode": ("Off", "On"),
            "ChunkSelector": ("Timestamp", "CounterValue"), "UserSetSelector": ("Default", "UserSet1"),
            "AcquisitionMode": ("SingleFrame", "Continuous"), "TriggerActivation": ("RisingEdge", "FallingEdge"),
        },
        commands=("UserSetLoad", "TriggerSoftware"),
        selectors={
            **dict.fromkeys(("TriggerMode", "TriggerSource", "TriggerActivation"), "TriggerSelector"),
            "ChunkEnable": "ChunkSelector",
        },
    )  # fmt: skip


LINE1 = TriggerSettings(source="Line1", activation="RisingEdge")


def test_the_trigger_is_armed_after_all_that_it_depends_on():
    nodes = modern()
    apply(nodes, GenicamSettings(region=(16, 32, 320, 240), pixel_format="Mono12", exposure_us=2000.0, trigger=LINE1))
    order = [name for name, _ in nodes.steps]
    places = [order.index(name) for name in ("UserSetLoad", "Width", "PixelFormat", "ExposureTime", "TriggerSource")]
    assert places == sorted(places)
    assert nodes.steps.index(("TriggerMode", "On")) > places[-1]
    assert nodes.written("OffsetX") == [0, 16]  # a large offset would limit the width
    assert nodes.get("ExposureAuto") == "Off"
    assert nodes.values[("TriggerMode", "AcquisitionStart")] == "Off"
    assert nodes.values[("TriggerActivation", "FrameStart")] == "RisingEdge"


def test_everything_is_read_back_and_the_same_settings_have_the_same_digest():
    first, again = apply(modern(), GenicamSettings(trigger=LINE1)), apply(modern(), GenicamSettings(trigger=LINE1))
    assert first.differences == ()
    assert first.values["TriggerMode[FrameStart]"] == "On"
    assert first.values["TriggerMode[AcquisitionStart]"] == "Off"
    assert first.digest == again.digest
    assert apply(modern(), GenicamSettings(trigger=LINE1, exposure_us=7.0)).digest != first.digest


def test_what_the_camera_rounds_is_told_and_runs():
    nodes = modern()
    nodes.rounds = {"ExposureTime": 20.0}
    assert apply(nodes, GenicamSettings(exposure_us=2005.0)).differences == (
        "ExposureTime: 2000.0 found, 2005.0 wanted",
    )
    assert apply(nodes, GenicamSettings(exposure_us=2000.0001)).differences == ()


def test_an_older_camera_is_set_by_its_older_names():
    light = {"ExposureTimeAbs": 1.0, "GainAbs": 0.0}
    trigger = {"TriggerMode": "Off", "TriggerSelector": "FrameStart", "TriggerSource": "Software"}
    nodes = FakeNodes(values={**light, **trigger, "LineSelector": "Line1", "LineDebouncerTimeAbs": 0.0})
    applied = apply(
        nodes, GenicamSettings(exposure_us=500.0, gain_db=3.0, trigger=TriggerSettings("Line1", debounce_us=9.0))
    )
    assert (nodes.get("ExposureTimeAbs"), nodes.get("GainAbs"), nodes.get("LineDebouncerTimeAbs")) == (500.0, 3.0, 9.0)
    assert "ExposureTimeAbs" in applied.values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GenicamSettings(gain_raw=5), r"camera\.gain_raw: this camera has no GainRaw: leave the key out"),
        (GenicamSettings(pixel_format="RGB8"), r"camera\.pixel_format: RGB8 found, this camera takes Mono8, Mono12"),
        (GenicamSettings(exposure_us=9e6), r"camera\.exposure_us: ExposureTime = 9000000\.0 is refused"),
        (
            GenicamSettings(user_set="UserSet7"),
            r"camera\.user_set: UserSet7 found, this camera takes Default, UserSet1",
        ),
        (GenicamSettings(trigger=TriggerSettings("Line4")), r"camera\.trigger\.source: Line4 found"),
        (GenicamSettings(chunks=("Gain",)), r"camera\.chunks: Gain found, this camera takes Timestamp, CounterValue"),
        (GenicamSettings(nodes=("GammaEnable=false",)), r"camera\.nodes: this camera has no GammaEnable"),
        (GenicamSettings(strobe="Line2"), r"camera\.strobe: this camera has no LineSelector"),
    ],
)
def test_what_the_camera_has_not_or_refuses_is_said_with_its_key(settings, message):
    nodes = modern()
    nodes.limits = {"ExposureTime": (10.0, 1e6)}
    with pytest.raises(CameraError, match=message):
        apply(nodes, settings)


def test_a_camera_that_has_next_to_nothing_is_set_up_where_nothing_is_asked():
    nodes = FakeNodes(values={"Width": 10})
    assert apply(nodes, GenicamSettings(trigger=TriggerSettings("free_run"))).differences == ()
    assert nodes.steps == []


def test_a_camera_that_is_to_keep_its_state_loads_no_user_set():
    nodes = modern()
    apply(nodes, GenicamSettings(user_set=KEEP))
    assert "UserSetLoad" not in [name for name, _ in nodes.steps]


def test_a_counter_of_triggers_brings_its_value_with_each_frame():
    nodes = modern()
    nodes.values["CounterSelector"] = "Counter0"
    apply(nodes, GenicamSettings(trigger=TriggerSettings("Line1", counter="Counter1")))
    assert nodes.values["CounterSelector"] == "Counter1"
    assert nodes.values[("ChunkEnable", "CounterValue")] is True
    assert nodes.values[("ChunkEnable", "Timestamp")] is False


def test_other_nodes_are_set_last_as_numbers_words_and_switches():
    nodes = modern()
    nodes.values |= {"BlackLevel": 0.0, "GammaEnable": True, "Mode": "a"}
    apply(nodes, GenicamSettings(nodes=("BlackLevel=4", "GammaEnable=false", "Mode=fast")))
    armed = nodes.steps.index(("TriggerMode", "On"))
    written = [step for step in nodes.steps[armed:] if step[0] in ("BlackLevel", "GammaEnable", "Mode")]
    assert written == [("BlackLevel", 4), ("GammaEnable", False), ("Mode", "fast")]
