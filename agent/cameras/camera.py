"""Port: where frames come from. Real and simulated cameras stand in files beside this one."""

from __future__ import annotations

from typing import Protocol

from calibration.frame import Frame

NO_FRAME = "the camera was triggered, its frame did not arrive, or not whole"  # of a part


class Camera(Protocol):
    """Delivers one frame per trigger, or nothing: the loop knows which triggers went unanswered.

    `trigger` and `next_frame` may be called from two threads.
    """

    def start(self) -> None:
        """Connect and arm. Raises CameraError with what to check."""

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
        """Ask for the exposure of one part; returns at once. The frame will carry trigger_id.

        until_ns: time.monotonic_ns() after which another part may stand before the camera: an exposure that would come
        later is not made, or brings no frame. None: at any time.

        Raises EndOfFrames if the source has no more parts.
        """

    def next_frame(self, timeout_s: float) -> Frame | None:
        """Return the next frame with pixels of our own, or None if none came within timeout_s.

        Raises FrameError if what came for one trigger is no picture, CameraError if the camera is gone.
        """

    def stop(self) -> None:
        """Disarm and disconnect; never raises, may be called twice."""


class SelfTriggeredCamera(Camera, Protocol):
    """A camera whose own trigger opens the parts: a light barrier on its line, or nothing at all in free run.

    Its frames carry the number of their part as trigger_id, counted from 1 over reconnects. A part whose number is
    skipped has lost its frame; `trigger` does nothing.
    """

    @property
    def parts(self) -> int:
        """How many parts it has announced, those included whose frame was lost; changes in `next_frame` alone."""

    @property
    def lag_ns(self) -> int:
        """How long after its trigger a frame is received: deadlines count from the trigger."""
