"""Which parts the report shows and what it says under each: mistakes first, then the typical, then the silent ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calibration.chart import number
from trainer.figures import photo_panels
from trainer.metrics import ScoredImage

# Strips shown at most, 72 in all.
MOST_ESCAPES = 16
MOST_FALSE_ALARMS = 12
MOST_DETECTIONS = 18
MOST_DETECTIONS_PER_TYPE = 3
MOST_HARDEST_GOOD = 6
MOST_WITHOUT_VERDICT = 8
MOST_SUSPECTS = 12
MOST_FIRST_LOOKS = 24  # where there are good parts only

PANEL_SIDES_PX = (640, 512, 384, 320, 256, 192, 128)  # the largest at which all pictures fit
MOST_PICTURE_CHARACTERS = 4_300_000  # of base64, so that the file stays below 5 MB
WIDE_FROM = 1.7  # width / height from which on the panels of a strip stand one under the other


@dataclass(frozen=True, slots=True)
class Strip:
    """One part: its pictures and its caption."""

    name: str
    label: str  # what it is in truth
    judgement: str  # what happened to it, in words
    tone: str  # "wrong", "costly", "right" or "unknown": colour and sign of the judgement
    scores: str
    photo: str  # data URI, empty where no picture was kept
    overlay: str  # data URI, empty without a map
    overlay_text: str  # what the overlay shows, for those who do not see it
    wide: bool  # one panel under the other


@dataclass(frozen=True, slots=True)
class Gallery:
    """Strips that belong together, out of n that do."""

    title: str
    explanation: str
    strips: tuple[Strip, ...]
    n: int


@dataclass(frozen=True, slots=True)
class _Choice:
    """A gallery before its pictures are drawn."""

    title: str
    explanation: str
    images: tuple[ScoredImage, ...]
    n: int


def evaluation_galleries(
    images: Sequence[ScoredImage], threshold: float, map_threshold: float, suspects: Sequence[ScoredImage] = ()
) -> tuple[Gallery, ...]:
    """Return the galleries of a test with good and defective parts, empty ones left out.

    suspects: good images that were left out of the training, worst first; they come before all.
    """
    return _drawn([_suspect_choice(suspects), *_choices(images, threshold)], threshold, map_threshold)


def first_looks(
    images: Sequence[ScoredImage], threshold: float, map_threshold: float, suspects: Sequence[ScoredImage] = ()
) -> tuple[Gallery, ...]:
    """Return the galleries of good parts only: those with the highest scores, and those without a verdict."""
    return _drawn([_suspect_choice(suspects), *_first_choices(images)], threshold, map_threshold)


def _diverted(image: ScoredImage, threshold: float) -> bool:
    return image.outcome(threshold) != "pass"


def _ordered(images: Sequence[ScoredImage], keep: Callable[[ScoredImage], bool]) -> list[ScoredImage]:
    """Return the parts to keep that have a score, lowest score first, equal scores by name."""
    return sorted((i for i in images if i.score is not None and keep(i)), key=lambda i: (i.score, i.name))


def _choices(images: Sequence[ScoredImage], threshold: float) -> list[_Choice]:
    escapes = _ordered(images, lambda i: i.defective and not _diverted(i, threshold))
    false_alarms = _ordered(images, lambda i: not i.defective and _diverted(i, threshold))[::-1]
    hardest = _ordered(images, lambda i: not i.defective and not _diverted(i, threshold))[::-1]
    detections, n_detected = _typical_detections(images, threshold)
    return [
        _Choice(
            "Defective parts that were passed",
            "The costliest mistakes, worst first: these would have reached the customer.",
            tuple(escapes[:MOST_ESCAPES]),
            len(escapes),
        ),
        _Choice(
            "Good parts that were rejected",
            "False alarms, worst first. Look closely: is one of them defective after all?",
            tuple(false_alarms[:MOST_FALSE_ALARMS]),
            len(false_alarms),
        ),
        _Choice(
            "Typical detections",
            "Caught defects of each type, with a middling score. The colour should lie inside the outline.",
            detections,
            n_detected,
        ),
        _Choice(
            "Good parts nearest to the threshold",
            "Passed, but with the highest scores among the good parts.",
            tuple(hardest[:MOST_HARDEST_GOOD]),
            len(hardest),
        ),
        _silent_choice(images),
    ]


def _typical_detections(images: Sequence[ScoredImage], threshold: float) -> tuple[tuple[ScoredImage, ...], int]:
    """Return a few rejected parts round the median score of each defect type, and how many there are in all."""
    defects = sorted({image.label for image in images if image.defective})
    each = max(1, min(MOST_DETECTIONS_PER_TYPE, MOST_DETECTIONS // max(1, len(defects))))
    chosen, n = [], 0
    for defect in defects:
        caught = _ordered(images, lambda i, defect=defect: i.label == defect and _diverted(i, threshold))
        start = max(0, (len(caught) - each) // 2)
        chosen += caught[start : start + each]
        n += len(caught)
    return tuple(chosen[:MOST_DETECTIONS]), n


def _first_choices(images: Sequence[ScoredImage]) -> list[_Choice]:
    highest = _ordered(images, lambda _: True)[::-1]
    return [
        _Choice(
            "Look at these first: is one of them defective?",
            "The good parts with the highest scores. A defective part among the good ones teaches the detector to "
            "accept its defect: take it out and train again.",
            tuple(highest[:MOST_FIRST_LOOKS]),
            len(highest),
        ),
        _silent_choice(images),
    ]


def _suspect_choice(suspects: Sequence[ScoredImage]) -> _Choice:
    return _Choice(
        "Good images that were left out: are they defective?",
        "They score as no good part does, so nothing was learnt from them. Take defective ones out of the folder; "
        "where all are good, fit again with --keep-suspects.",
        tuple(suspects[:MOST_SUSPECTS]),
        len(suspects),
    )


def _silent_choice(images: Sequence[ScoredImage]) -> _Choice:
    seen = tuple(image for image in images if image.score is None and image.view is not None)
    return _Choice(
        "Parts without a verdict",
        "They were not judged, so nothing is known of their surface. The line diverts them like rejects.",
        seen[:MOST_WITHOUT_VERDICT],
        sum(image.score is None for image in images),
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _drawn(choices: Sequence[_Choice], threshold: float, map_threshold: float) -> tuple[Gallery, ...]:
    """Return the galleries with the largest pictures that fit the page."""
    shown = [image for choice in choices for image in choice.images]
    for side_px in PANEL_SIDES_PX:
        panels = [photo_panels(image, map_threshold, side_px) for image in shown]
        if sum(len(uri) for pair in panels for uri in pair) <= MOST_PICTURE_CHARACTERS:
            break
    strips = iter(_strip(image, pair, threshold, map_threshold) for image, pair in zip(shown, panels, strict=True))
    return tuple(
        Gallery(choice.title, choice.explanation, tuple(next(strips) for _ in choice.images), choice.n)
        for choice in choices
        if choice.images
    )


def _strip(image: ScoredImage, panels: tuple[str, str], threshold: float, map_threshold: float) -> Strip:
    judgement, tone = _judgement(image, threshold)
    wide = image.view is not None and image.view.shape[1] > WIDE_FROM * image.view.shape[0]
    peak = "" if image.anomaly_map is None else f"{float(image.anomaly_map.max()) / map_threshold:.2g}"
    scores = (
        ""
        if image.score is None
        else f"score {number(image.score, threshold)}, threshold {number(threshold, image.score)}"
    )
    return Strip(
        name=image.name,
        label=image.label,
        judgement=judgement,
        tone=tone,
        scores=scores,
        photo=panels[0],
        overlay=panels[1],
        overlay_text=f"highest map value {peak} times the map threshold" if peak else "",
        wide=wide,
    )


def _judgement(image: ScoredImage, threshold: float) -> tuple[str, str]:
    """Return what happened to the part in words, and its tone."""
    outcome = image.outcome(threshold)
    if image.reason and image.score is not None:
        return image.reason, "unknown"
    if outcome == "no_verdict":
        return f"no verdict: {image.reason or 'no reason given'}", "unknown"
    if image.defective:
        return ("caught", "right") if outcome == "reject" else ("passed, though defective", "wrong")
    return ("passed", "right") if outcome == "pass" else ("rejected, though good", "costly")
