"""race: every detector on one product's good images, on this machine; the best that keeps the takt wins.

Each candidate runs in a process of its own (`trainer.race_heat`), so that memory is its own, a crash is one row of the
table, and a race that was broken off goes on where it stopped. The winner then learns from all good images.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from calibration.errors import InputError
from calibration.images import SUFFIXES
from calibration.photometric import PHOTOMETRIC_FILE
from calibration.recording import INDEX
from trainer.alone import alone
from trainer.catalogue import detector_names, searches
from trainer.data import Dataset
from trainer.errors import TrainingError
from trainer.fit import FitRequest, check_size
from trainer.race_heat import Heat, Result, fit_request
from trainer.race_process import run_heat
from trainer.timing import DEADLINE
from trainer.training import digest_of

DIED = "ended without an answer: see its log, and dmesg for memory; the next race asks it again"
LOCK = ".lock"  # in the race's folder while it runs
NEED_LABELS = ("cnn", "vgg16")
Runner = Callable[[Sequence[list[str]]], Iterable[int]]
"""Runs commands, and yields the index of each as it ends."""


@dataclass(frozen=True, slots=True)
class RaceRequest:
    """What the user asked for."""

    data: Path
    out: Path  # folder of the heats' answers, the table and the page
    takt_ms: float
    detectors: tuple[str, ...] = ()  # none: every one that learns from good images alone
    sizes: tuple[tuple[int, int], ...] = ((256, 256),)  # (height, width)
    registration: str = "auto"
    overkill: float = 0.02
    seed: int = 0
    epochs: int | None = None
    weights: Path | None = None
    bit_depth: int | None = None
    part_pattern: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A candidate and its result."""

    heat: Heat
    result: Result

    @property
    def name(self) -> str:
        """The detector, and its size where it is not the usual one."""
        size = f"{self.heat.width}x{self.heat.height}" if self.heat.width != self.heat.height else f"{self.heat.width}"
        return f"{self.heat.detector} @ {size}"

    def too_slow(self, takt_ms: float) -> bool:
        """Return whether its slowest frames in a hundred miss the deadline of this takt."""
        return self.result.p99_ms is None or self.result.p99_ms > DEADLINE * takt_ms


def heats(request: RaceRequest, dataset: Dataset) -> list[Heat]:
    """Return the candidates, each once.

    Raises TrainingError naming a detector that there is not or a size that none takes, InputError for weights that
    cannot be read.
    """
    known = detector_names()
    unknown = [name for name in request.detectors if name not in known]
    if unknown:
        raise TrainingError(f"detectors {', '.join(unknown)}: unknown; there are {', '.join(known)}")
    for height, width in request.sizes:
        check_size(height, width)
    left_out = () if dataset.defects else NEED_LABELS
    chosen = request.detectors or tuple(name for name in known if name not in left_out)
    stamp, weights_digest = _stamp(request.data), digest_of(request.weights)
    found = [
        Heat(
            data=str(request.data.resolve()),
            stamp=stamp,
            detector=name,
            height=height,
            width=width,
            registration=request.registration,
            overkill=request.overkill,
            seed=request.seed,
            epochs=request.epochs,
            weights=None if request.weights is None else str(request.weights.resolve()),
            version=importlib.metadata.version("taktsight"),
            bit_depth=request.bit_depth,
            part_pattern=request.part_pattern,
            takt_ms=request.takt_ms if searches(name) else None,
            weights_digest=weights_digest,
        )
        for name in chosen
        for height, width in request.sizes
    ]
    return list(dict.fromkeys(found))


def carried_out(
    asked: Sequence[Heat], out: Path, runner: Runner, progress: Callable[[str, int, int], None]
) -> list[Entry]:
    """Return every candidate's result, in the order asked; what `out` holds of an earlier race is not run again.

    What failed is: its cause may be mended. Raises InputError if `out` cannot be written or another race works there.
    """
    folder = out / "heats"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: give a folder that can be written") from error
    with alone(out / LOCK, f"another race works in {out}", "wait for its end, or give another folder"):
        return _carried_out(asked, folder, runner, progress)


def _carried_out(
    asked: Sequence[Heat], folder: Path, runner: Runner, progress: Callable[[str, int, int], None]
) -> list[Entry]:
    try:
        open_heats = [heat for heat in asked if not _answered(folder, heat)]
        for heat in open_heats:
            _file(folder, heat).write_text(json.dumps({"heat": asdict(heat)}), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: give a folder that can be written") from error
    done = len(asked) - len(open_heats)
    progress("race", done, len(asked))
    commands = [[sys.executable, "-m", "trainer.race_heat", str(_file(folder, heat))] for heat in open_heats]
    for index in runner(commands):
        heat = open_heats[index]
        done += 1
        progress(f"race, {heat.detector}", done, len(asked))
    return [Entry(heat, _answer(folder, heat) or Result(failed=DIED)) for heat in asked]


def ranked(entries: Sequence[Entry], takt_ms: float) -> list[Entry]:
    """Return the candidates that keep the takt, best first.

    With labelled test images: by escape, then AUROC. Without: by AUROC against synthetic defects, then by their escape.
    Among equals the quicker one.
    """
    running = [entry for entry in entries if not entry.result.failed and not entry.too_slow(takt_ms)]
    labelled = ranked_by_labels(running)
    return sorted(running, key=lambda entry: _order(entry.result, labelled=labelled))


def ranked_by_labels(entries: Sequence[Entry]) -> bool:
    """Return whether labelled test images, good and defective, say what each of these candidates is worth."""
    return bool(entries) and all(entry.result.escape is not None for entry in entries)


def reason_for_none(entries: Sequence[Entry]) -> str:
    """Return why no candidate has a place: none keeps the takt, or none could be fitted at all."""
    failures = [entry.result.failed for entry in entries]
    if all(failures):
        return f"no candidate could be fitted, the first: {failures[0]}"
    return "no candidate keeps the takt: see the table; give a longer takt or a smaller --size"


def winning_request(winner: Entry, recipe: Path) -> FitRequest:
    """Return what `fit` is asked to make of the winner, from all good images."""
    return fit_request(winner.heat, recipe)


def one_after_another(commands: Sequence[list[str]]) -> Iterable[int]:
    """Run the heats on this machine, one at a time: their latencies are measured undisturbed."""
    for index, command in enumerate(commands):
        run_heat(command)
        yield index


def _stamp(data: Path) -> str:
    """Return what changes when an image, or what a recording says of them, is added, taken away or replaced."""
    told_by = (INDEX, PHOTOMETRIC_FILE)
    found = (file for file in data.rglob("*") if file.suffix.lower() in SUFFIXES or file.name in told_by)
    files = sorted(file for file in found if file.is_file())
    told = [(str(file.relative_to(data)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _order(result: Result, *, labelled: bool) -> tuple[float, float, float]:
    if labelled:
        return _or_worst(result.escape), -(result.auroc or 0.0), _or_worst(result.p50_ms)
    return -round(result.synthetic_auroc or 0.0, 3), _or_worst(result.synthetic_escape), _or_worst(result.p50_ms)


def _or_worst(value: float | None) -> float:
    return math.inf if value is None else value


def _file(folder: Path, heat: Heat) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(heat), sort_keys=True).encode()).hexdigest()[:10]
    return folder / f"{heat.detector.replace('+', '-')}-{heat.width}x{heat.height}-{digest}.json"


def _answered(folder: Path, heat: Heat) -> bool:
    result = _answer(folder, heat)
    return result is not None and not result.failed


def _answer(folder: Path, heat: Heat) -> Result | None:
    """Return what an earlier process answered to this very heat; None where it did not, or not to the end."""
    try:
        found = json.loads(_file(folder, heat).read_text(encoding="utf-8"))
        return Result(**found["result"]) if found["heat"] == asdict(heat) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
