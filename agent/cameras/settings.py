"""Which camera a station has, as `camera` in station.yaml says, and how it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.cameras.camera import Camera
from agent.cameras.folder import FolderCamera
from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import GenicamSettings, read_genicam
from agent.cameras.simulated import SimulatedCamera
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.images import image_files
from calibration.recording import is_recording, recorded_frames
from calibration.settings import Section


@dataclass(frozen=True, slots=True)
class CameraSettings:
    """Which camera; exactly one of line, folder and genicam is set."""

    line: LineSettings | None
    folder: Path | None
    bit_depth: int | None = None  # of the folder's images; None: the files' own, or what the recording says
    prerendered: int = 0  # of a simulated line: parts drawn beforehand; 0: each as it comes
    genicam: GenicamSettings | None = None

    @property
    def simulated(self) -> bool:
        """True where no real part stands before a camera."""
        return self.genicam is None

    @property
    def producer(self) -> Path | None:
        """The GenTL producer that station.yaml names."""
        return None if self.genicam is None else self.genicam.producer

    @property
    def is_unnamed(self) -> bool:
        """True where it is whatever camera is found."""
        return self.genicam is not None and self.genicam.serial is None and self.genicam.id is None

    @property
    def opens_parts(self) -> bool:
        """True where the camera's own trigger does, not the clock."""
        return self.genicam is not None and not self.genicam.trigger.is_ours

    def open(self) -> Camera:
        """Return the camera, not started yet."""
        if self.genicam is not None:
            return GenicamCamera(self.genicam)
        if self.line is not None:
            return SimulatedCamera(SimulatedLine(self.line), prerendered=self.prerendered)
        assert self.folder is not None
        if is_recording(self.folder):
            frames = recorded_frames(self.folder)
            return FolderCamera([frame.file for frame in frames], bit_depth=frames[0].bit_depth if frames else None)
        return FolderCamera(image_files(self.folder), bit_depth=self.bit_depth)


def read_camera(section: Section) -> CameraSettings:
    """Return the settings under `camera`. Raises SettingsError naming the key that is unknown, missing or wrong."""
    kind = section.choice("kind", ("simulated", "folder", "genicam"))
    if kind == "genicam":
        return CameraSettings(None, None, genicam=read_genicam(section))
    if kind == "folder":
        depth = section.whole("bit_depth", minimum=8, maximum=16) if section.has("bit_depth") else None
        return CameraSettings(None, section.required_path("path"), depth)
    return CameraSettings(_line(section), None, prerendered=section.whole("prerendered", 0, minimum=0, maximum=1000))


def _line(section: Section) -> LineSettings:
    return LineSettings(
        seed=section.whole("seed", 0, minimum=0, maximum=2**31 - 1),
        lot=section.whole("lot", 0, minimum=0, maximum=2**31 - 1),
        width_px=section.whole("width_px", 640, minimum=64, maximum=8192),
        height_px=section.whole("height_px", 640, minimum=64, maximum=8192),
        shift_px=section.number("shift_px", 20.0, minimum=0.0, maximum=4096.0),
        angle_deg=section.number("angle_deg", 180.0, minimum=0.0, maximum=180.0),
        light_drift=section.number("light_drift", 0.1, minimum=0.0, maximum=0.9),
        noise=section.number("noise", 1.0, minimum=0.0, maximum=100.0),
        defect_share=section.number("defect_share", 0.0, minimum=0.0, maximum=1.0),
        lost=section.whole_list("lost"),
        dark=section.whole_list("dark"),
        saturated=section.whole_list("saturated"),
        blurred=section.whole_list("blurred"),
        wrong_part=section.whole_list("wrong_part"),
        half_out=section.whole_list("half_out"),
        late=section.whole_list("late"),
        late_ms=section.number("late_ms", 400.0, minimum=0.0, maximum=60_000.0),
        colour=section.flag("colour", False),
    )
