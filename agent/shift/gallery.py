"""Which parts the shift report shows, and their pictures out of the archive, small enough for one page."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.shift.chart import CLASSES, scores, told
from agent.shift.parts import CAUSES, Part, counted
from agent.verdict import Outcome, Reason
from calibration.heatmap import scale_bar

# Cards shown at most, 60 in all.
MOST_REJECTED = 36
MOST_DOUBTFUL = 12  # of the rejected parts, where not all can be shown: those nearest to the threshold
MOST_SILENT = 16
MOST_PASSED = 8

SIDES_PX = (512, 384, 320, 256, 192, 128)  # the largest at which all pictures fit
MOST_PICTURE_CHARACTERS = 6_500_000  # of base64, so that the file stays below 8 MB
QUALITY = 85  # JPEG, of pictures made smaller
LARGEST_PICTURE_BYTES = 20_000_000
WIDE_FROM = 1.7  # width / height from which on the pictures of a card stand one under the other
FRAMELESS = (Reason.FRAME_LOST, Reason.CAMERA_DOWN)
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class Choice:
    """Parts to show under one heading, out of n that belong there."""

    title: str
    explanation: str
    parts: tuple[Part, ...]
    n: int


@dataclass(frozen=True, slots=True)
class _Picture:
    """A JPEG file of the archive."""

    data: bytes
    pixels: NDArray[np.uint8]  # (H, W) or (H, W, 3) BGR

    @property
    def wide(self) -> bool:
        return bool(self.pixels.shape[1] > WIDE_FROM * self.pixels.shape[0])

    def uri(self, side_px: int) -> str:
        """Return the picture as a data URI, its longer side at most side_px."""
        height, width = self.pixels.shape[:2]
        shrink = side_px / max(height, width)
        data = self.data
        if shrink < 1.0:
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            small = cv2.resize(self.pixels, size, interpolation=cv2.INTER_AREA)
            data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"


def choices(parts: Sequence[Part], archive: Path) -> tuple[Choice, ...]:
    """Return what the page shows: rejected parts, parts without verdict, and passed parts that have pictures."""
    rejected = [part for part in parts if part.outcome is Outcome.REJECT]
    silent = [part for part in parts if part.outcome is Outcome.NO_VERDICT]
    passed = [part for part in parts if part.outcome is Outcome.PASS and _has_picture(part, archive)]
    found = (
        Choice(
            "Rejected parts",
            "The farthest above the threshold first, those nearest to it last: look at these twice.",
            _clear_and_doubtful(rejected, archive),
            len(rejected),
        ),
        Choice(
            "Parts without verdict",
            "A few of every cause, the newest first; those of which a frame is left before the others.",
            _spread_over_reasons(silent, archive),
            len(silent),
        ),
        Choice(
            "Passed parts, for comparison",
            "Those nearest to the threshold, of the passed parts that have pictures.",
            tuple(_by_ratio(passed)[:MOST_PASSED]),
            len(passed),
        ),
    )
    return tuple(choice for choice in found if choice.parts)


def galleries(chosen: Sequence[Choice], archive: Path) -> tuple[str, ...]:
    """Return the cards of each choice as HTML, with the largest pictures that fit the page."""
    shown = [part for choice in chosen for part in choice.parts]
    pictures = [_pictures(part, archive) for part in shown]
    for side_px in SIDES_PX:
        uris = [{kind: picture.uri(side_px) for kind, picture in each.items()} for each in pictures]
        if sum(len(uri) for each in uris for uri in each.values()) <= MOST_PICTURE_CHARACTERS:
            break
    wide = [any(picture.wide for picture in each.values()) for each in pictures]
    cards = iter([_card(*arguments) for arguments in zip(shown, uris, wide, strict=True)] if shown else [])
    return tuple("".join(next(cards) for _ in choice.parts) for choice in chosen)


def scale_bar_uri() -> str:
    """Return the legend of the heatmaps' colours as a PNG data URI: zero at the left, twice the threshold right."""
    bar = scale_bar(256, 1)
    data = cv2.imencode(".png", bar[:, :, ::-1])[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


# ---- choosing --------------------------------------------------------------------------------------------------------


def _by_ratio(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with the highest score / threshold first, the newest first among equals."""
    newest_first = parts[::-1]
    return sorted(newest_first, key=lambda part: -(part.ratio or 0.0))


def _pictured_first(parts: Sequence[Part], archive: Path) -> list[Part]:
    return sorted(parts, key=lambda part: not _has_picture(part, archive))


def _clear_and_doubtful(parts: Sequence[Part], archive: Path) -> tuple[Part, ...]:
    """Return parts with the highest and parts with the lowest ratio, those with pictures if there are enough."""
    ranked = _by_ratio(parts)
    pictured = [part for part in ranked if _has_picture(part, archive)]
    if len(pictured) < MOST_REJECTED:
        return tuple(_pictured_first(ranked, archive)[:MOST_REJECTED])
    return tuple(pictured[: MOST_REJECTED - MOST_DOUBTFUL] + pictured[-MOST_DOUBTFUL:])


def _spread_over_reasons(parts: Sequence[Part], archive: Path) -> tuple[Part, ...]:
    """Return a few parts of every reason, the newest of each, those with a frame before the others."""
    by_reason: dict[Reason, list[Part]] = defaultdict(list)
    for part in _pictured_first(parts[::-1], archive):
        by_reason[part.reason].append(part)
    order = sorted(by_reason, key=lambda reason: (-len(by_reason[reason]), list(CAUSES).index(reason)))
    rounds = max((len(members) for members in by_reason.values()), default=0)
    taken = [by_reason[reason][turn] for turn in range(rounds) for reason in order if turn < len(by_reason[reason])]
    return tuple(sorted(taken[:MOST_SILENT], key=lambda part: order.index(part.reason)))


# ---- pictures --------------------------------------------------------------------------------------------------------


def _path(archive: Path, name: str) -> Path | None:
    """Return the file of a picture if it is there and lies in the archive: the line may have been tampered with."""
    try:
        path = (archive / name).resolve()
        inside = path.is_relative_to(archive.resolve()) and path.is_file()
    except (OSError, ValueError):
        return None
    return path if inside else None


def _has_picture(part: Part, archive: Path) -> bool:
    return any(_path(archive, name) is not None for name in part.pictures.values())


def _pictures(part: Part, archive: Path) -> dict[str, _Picture]:
    """Return the pictures of the part that are still there and whole, the frame first."""
    found = {}
    for kind in ("frame", "heatmap"):
        path = _path(archive, part.pictures[kind]) if kind in part.pictures else None
        picture = None if path is None else _read(path)
        if picture is not None:
            found[kind] = picture
    return found


def _read(path: Path) -> _Picture | None:
    """Return the picture of a JPEG file, None where it is cut off or none."""
    try:
        if path.stat().st_size > LARGEST_PICTURE_BYTES:
            return None
        data = path.read_bytes()
        if not (data.startswith(JPEG_START) and data.endswith(JPEG_END)):
            return None
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except (OSError, cv2.error):
        return None
    return None if pixels is None else _Picture(data, np.asarray(pixels, dtype=np.uint8))


# ---- cards -----------------------------------------------------------------------------------------------------------


def _card(part: Part, uris: dict[str, str], wide: bool) -> str:
    layout = f"{CLASSES[part.outcome]}{' wide' if wide else ''}"
    places = f" · {counted(part.region_count, 'place')}" if part.region_count > 1 else ""
    lines = (scores(part), f"{part.detail}{places}")
    more = "".join(f'<span class="detail">{escape(line)}</span>' for line in lines if line)
    trigger = part.trigger_name if part.name != part.trigger_name else ""
    meta = " · ".join(filter(None, (trigger, f"{part.created[11:19]} UTC" if part.created else "")))
    badge, _, rest = told(part).partition(", ")
    return (
        f'<figure class="card strip {layout}">{_panels(part, uris)}<figcaption>'
        f'<span class="head"><b>{escape(part.name)}</b><span class="soft">{escape(meta)}</span></span>'
        f'<span class="badge">{escape(badge)}</span><span class="numbers">{escape(rest)}</span>'
        f"{more}</figcaption></figure>"
    )


def _panels(part: Part, uris: dict[str, str]) -> str:
    if not uris:
        why = "no frame came" if part.reason in FRAMELESS else "no picture kept"
        return f'<div class="empty">{why}</div>'
    texts = {
        "frame": f"{part.name} as the camera saw it: {told(part)}",
        "heatmap": f"Anomaly map over {part.name}: {part.detail or told(part)}",
    }
    images = "".join(f'<img src="{uri}" alt="{escape(texts[kind])}">' for kind, uri in uris.items())
    return f'<div class="panels{" single" if len(uris) == 1 else ""}">{images}</div>'
