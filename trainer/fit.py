"""From a folder of good images to a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calibration.condition import learn_limits, noticed
from calibration.errors import CalibrationError
from calibration.preprocess import Rectangle, View, in_view
from calibration.recipe import Recipe
from calibration.reference import learn_reference
from calibration.registration import Reference, RegistrationSettings
from calibration.thresholds import Thresholds, good_parts_needed
from calibration.zones import DrawnZone, drawn_mask, read_zones
from trainer.catalogue import method, searches
from trainer.data import Dataset, Item, Pictures, Survey, folds, survey
from trainer.errors import TrainingError
from trainer.export import Parity
from trainer.label_limits import check_labels, needed_defects, with_labels
from trainer.labels import counted, prepared_defects
from trainer.learning import Learned, Material, Method, Options, Progress
from trainer.limits import (
    Suspect,
    fitted_thresholds,
    good_parts,
    left_out_note,
    suspicious_notes,
    unnoticed_notes,
    unregistered_notes,
)
from trainer.prepared import FEWEST_GOOD, PreparedSet, glimpses, prepare_all, prepared_defect
from trainer.proof import exported, selftest
from trainer.strangers import ROUNDS, learn_without_strangers
from trainer.tiling import Tiles, tiled, tiles_for
from trainer.timing import Timed, engine_ms_within, frame_times_ms, frame_to_score
from trainer.training import checkpoint_of, forget
from trainer.zoning import zoned, zones_of

log = logging.getLogger(__name__)

WISE_GOOD = 50
FOLDS = 5
REFERENCE_IMAGES = 60  # good images that the reference is learnt from


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What the user asked for."""

    recipe: Path
    detector: str = "patch_layout"
    height: int = 256
    width: int = 256
    registration: str = "auto"  # auto | on | off
    registration_settings: RegistrationSettings = field(default_factory=RegistrationSettings)
    region: Rectangle | None = None
    ignore: Path | None = None  # image of the reference view, nonzero where nothing is looked at
    zones: Path | None = None  # file of zones, see calibration.zones
    tiles: str = "off"  # | auto | COLUMNSxROWS, each of height x width
    smallest_defect_px: float | None = None  # reference px; for tiles auto
    mm_per_px: float | None = None  # of the reference view
    gamma: float = 1.0
    false_reject_rate: float = 0.01
    most_images: int = 1000
    resume: bool = False
    threshold: str = "false_reject_rate"  # | normal_intersection | best_f1: of the score, with labelled defects
    takt_ms: float | None = None  # cycle time: told whether a part keeps it here; picks how long dcgan searches
    keep_suspects: bool = False  # learn from good images that score as no good part does, too
    keep_checkpoint: bool = False  # until the caller has written the recipe
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, slots=True)
class FitResult:
    """A recipe without its report, and the evidence."""

    recipe: Recipe
    parity: Parity
    good_items: tuple[Item, ...]  # in the order of good_scores: the ones that were scored unseen
    good_scores: NDArray[np.float64]
    good_maps: NDArray[np.float32]
    good_pictures: NDArray[np.float32]  # (m, C, h, w)
    module: nn.Module  # the network that the graph was made from
    suspects: tuple[Suspect, ...]  # good images that were left out, worst first
    notes: tuple[str, ...]  # warnings for people; what was decided is in the recipe


def fit(dataset: Dataset, request: FitRequest, progress: Progress) -> FitResult:
    """Return a recipe learnt from dataset.good, with parity proven and thresholds from parts that it never saw.

    Raises InputError, TrainingError, CalibrationError or ParityError; nothing is written.
    """
    train = method(request.detector)
    check_size(request.height, request.width)
    good_parts_needed(request.false_reject_rate)  # a rate that is none is refused before the training, not after
    items = _chosen(dataset.good, request.most_images)
    wanted = needed_defects(dataset, request.threshold, request.detector)
    pictures = Pictures(dataset.photometric)
    found = survey(items, pictures)
    notes = [*dataset.notes, *found.notes(), *_few_notes(items)]
    reference, why = _reference(items, pictures, found, request)
    tiles = _tiles(found, reference, request)
    view = _view(found, reference, request, tiles)
    drawn = [] if request.zones is None else read_zones(request.zones, view.reference_size)
    train = _under(train, tiles, drawn, view)
    if tiles is not None and len(items) > tiles.most_parts:
        items = _chosen(items, tiles.most_parts)
        notes.append(f"in {tiles.count} tiles each, {len(items)} good images are learnt from, evenly spaced")
    keep = _keep(request.ignore, drawn, view)
    prepared = prepare_all(items, pictures, view, reference, progress)
    notes += unregistered_notes(prepared.unregistered, len(items))
    defects, defect_notes = prepared_defects(
        wanted, lambda item: prepared_defect(item, pictures, view, reference), request.options.seed
    )
    timed = partial(frame_times_ms, prepared.items, dataset.photometric, view, reference)
    engine_ms = _engine_ms(request, timed)

    def material_of(part: PreparedSet) -> Material:
        return replace(_material(part, view, keep, request), defects=defects, engine_ms=engine_ms)

    check_labels(material_of(prepared), request.threshold, request.detector)
    options, option_notes = _options(request.options, reference)
    learned, prepared, suspects = _learned(train, prepared, material_of, replace(request, options=options), progress)
    notes += [left_out_note([suspect.item.name for suspect in suspects])] if suspects else []
    material = material_of(prepared)
    seen = glimpses(prepared.items, pictures, dataset.photometric, view, registered=reference is not None)
    limits = learn_limits(seen)
    told = noticed(seen, limits)
    thresholds, threshold_notes = _thresholds(learned, prepared, suspects, material, request)
    graph, parity, half = exported(learned, material, thresholds, progress)
    took, late_notes = _took(request, graph, timed)
    recipe = Recipe(
        product=dataset.product,
        detector=request.detector,
        graph=graph,
        graph_f16=half.graph,
        view=view,
        reference=reference,
        thresholds=thresholds,
        selftest=selftest(learned, material),
        condition=limits,
        zones=zones_of(learned.module),
        mm_per_px=request.mm_per_px,
        training={
            **_training(replace(request, options=options), dataset, material, found, why),
            "zones": {zone.name: "ignored" if zone.ignore else zone.factor for zone in drawn},
            "learnt_defects": learned.learnt_defects or "none",
            "decided": list(learned.decided),
            "frame_to_score": took,
            "left_out": [suspect.item.name for suspect in suspects],
            "condition_noticed": told,
            "half_precision": half.facts(),
        },
    )
    if not request.keep_checkpoint:
        forget(checkpoint_of(request.recipe))
    return FitResult(
        recipe=recipe,
        parity=parity,
        good_items=tuple(prepared.items[index] for index in learned.held_out),
        good_scores=learned.good_scores,
        good_maps=learned.good_maps,
        good_pictures=prepared.batch[learned.held_out],
        module=learned.module,
        suspects=suspects,
        notes=(*notes, *option_notes, *defect_notes, *threshold_notes, *late_notes, *unnoticed_notes(told)),
    )


def _took(request: FitRequest, graph: bytes, timed: Timed) -> tuple[str, list[str]]:
    """Return how long a part takes here if the takt asked about is kept, and what to note if it is not."""
    if request.takt_ms is None:
        return "", []
    took, in_time = frame_to_score(request.takt_ms, graph, timed)
    return (took, []) if in_time else ("", [f"frame to score: {took}"])


def _thresholds(
    learned: Learned, prepared: PreparedSet, suspects: Sequence[Suspect], material: Material, request: FitRequest
) -> tuple[Thresholds, list[str]]:
    """Return the thresholds, and notes on them and on good images that had better be none."""
    items = [prepared.items[index] for index in learned.held_out]
    good = good_parts(learned, [item.part for item in items], [suspect.item.part for suspect in suspects])
    thresholds, notes = fitted_thresholds(good, request.false_reject_rate)
    thresholds = with_labels(thresholds, good, learned, material, request.threshold)
    return thresholds, notes + suspicious_notes(learned.good_scores, [item.name for item in items])


def _learned(
    train: Method,
    whole: PreparedSet,
    material_of: Callable[[PreparedSet], Material],
    request: FitRequest,
    progress: Progress,
) -> tuple[Learned, PreparedSet, tuple[Suspect, ...]]:
    """Return what was learnt, the images that it was learnt from, and those that no good part scores like."""
    if not request.resume:
        forget(checkpoint_of(request.recipe))

    def learn(kept: NDArray[np.int64]) -> Learned:
        material = material_of(whole.of(kept))
        if len(kept) < len(whole.items):  # again, without the suspects: resumed by itself
            material = replace(material, checkpoint=Path(f"{material.checkpoint}-{len(kept)}"))
        return _trained(train, material, request.options, progress)

    rounds = 1 if request.keep_suspects else ROUNDS
    learned, kept, left_out = learn_without_strangers(len(whole.items), learn, FEWEST_GOOD, rounds)
    suspects = (Suspect(whole.items[s.index], s.score, s.anomaly_map, whole.batch[s.index]) for s in left_out)
    return learned, whole.of(kept), tuple(suspects)


def _options(options: Options, reference: Reference | None) -> tuple[Options, list[str]]:
    """Return the options with what follows from how parts lie, and notes."""
    if reference is None:
        return options, []
    useless = "--turned on: without effect, the parts are registered, so they all lie alike"
    return replace(options, turned="off"), [useless] if options.turned == "on" else []


def _engine_ms(request: FitRequest, timed: Timed) -> float | None:
    """Return what the takt leaves for the engine where that picks something."""
    if request.takt_ms is None or not searches(request.detector):
        return None
    return engine_ms_within(request.takt_ms, timed)


def check_size(height: int, width: int) -> None:
    """Raise TrainingError unless detectors take images of this size."""
    if height % 32 or width % 32 or not min(height, width) >= 32:
        raise TrainingError(f"size {width}x{height} found, need multiples of 32, at least 32")


def _chosen(items: Sequence[Item], most: int) -> list[Item]:
    """Return all items, or `most` of them evenly spaced, so that drift over time stays in."""
    if len(items) < FEWEST_GOOD:
        raise TrainingError(
            f"{len(items)} good image{'s' if len(items) != 1 else ''} found, need at least {FEWEST_GOOD}, "
            f"better {WISE_GOOD} or more: capture more good parts"
        )
    if len(items) <= most:
        return list(items)
    return [items[round(index)] for index in np.linspace(0, len(items) - 1, most)]


def _few_notes(items: Sequence[Item]) -> list[str]:
    if len(items) >= WISE_GOOD:
        return []
    return [f"only {len(items)} good images: below {WISE_GOOD} the normal variation of a product is seldom covered"]


def _reference(
    items: Sequence[Item], pictures: Pictures, found: Survey, request: FitRequest
) -> tuple[Reference | None, str]:
    """Return the reference to register to, or None, and the reason in words."""
    if request.registration == "off":
        return None, "off, as asked"
    if not found.one_size and request.registration == "auto":
        return None, "off: the images differ in size"
    sample = _chosen(items, REFERENCE_IMAGES)
    loaded = [pictures(item) for item in sample]
    try:
        learnt = learn_reference(
            [pixels for pixels, _ in loaded], loaded[0][1], request.registration_settings, seed=request.options.seed
        )
    except CalibrationError as error:
        if request.registration == "on":
            raise
        return None, f"off: {error}"
    if request.registration == "on":
        return learnt.reference, "on, as asked"
    if not learnt.trustworthy:
        return None, f"off: {learnt.why}"
    return learnt.reference, f"on: {learnt.why}"


def _reference_size(found: Survey, reference: Reference | None) -> tuple[int, int]:
    return found.size if reference is None else (reference.image.shape[0], reference.image.shape[1])


def _tiles(found: Survey, reference: Reference | None, request: FitRequest) -> Tiles | None:
    shown = _reference_size(found, reference)
    if request.region is not None:
        shown = (request.region.height_px, request.region.width_px)
    return tiles_for(request.tiles, (request.height, request.width), shown, request.smallest_defect_px)


def _under(train: Method, tiles: Tiles | None, drawn: Sequence[DrawnZone], view: View) -> Method:
    """Return the method, judging tiles where there are some, and zones where some have limits of their own."""
    whole = train if tiles is None else tiled(train, tiles)
    return zoned(whole, drawn, view) if any(not zone.ignore for zone in drawn) else whole


def _view(found: Survey, reference: Reference | None, request: FitRequest, tiles: Tiles | None) -> View:
    size = _reference_size(found, reference)
    height, width = (request.height, request.width) if tiles is None else tiles.view
    view = View(
        height=height,
        width=width,
        colour=found.colour > 0,
        reference_size=size,
        fixed_size=found.one_size,
        region=request.region,
        gamma=request.gamma,
        bit_depth=found.bit_depth,
    )
    box = view.rectangle
    inside = (
        box.x_px >= 0 and box.y_px >= 0 and box.x_px + box.width_px <= size[1] and box.y_px + box.height_px <= size[0]
    )
    if not inside or box.width_px < 8 or box.height_px < 8:
        raise TrainingError(
            f"region {box.x_px},{box.y_px},{box.width_px},{box.height_px} found, need at least 8x8 px inside the "
            f"reference view of {size[1]}x{size[0]} px"
        )
    return view


def _material(prepared: PreparedSet, view: View, keep: NDArray[np.float32], request: FitRequest) -> Material:
    count = min(FOLDS, len({item.part for item in prepared.items}))
    if count < 2:
        raise TrainingError("all good images show one part: show at least 5 different good parts")
    return Material(
        batch=torch.from_numpy(prepared.batch),
        keep=torch.from_numpy(keep),
        fold=folds(prepared.items, count, request.options.seed),
        checkpoint=checkpoint_of(request.recipe),
        resume=request.resume,
        aspect=view.rectangle.width_px / view.rectangle.height_px,
    )


def _keep(ignore: Path | None, drawn: Sequence[DrawnZone], view: View) -> NDArray[np.float32]:
    """Return (h, w): 1 where the detector looks, 0 where the ignore mask or an ignored zone covers its view.

    Raises TrainingError where they cover all of it.
    """
    masks = [zone.inside for zone in drawn if zone.ignore]
    if ignore is not None:
        masks.append(drawn_mask(ignore, view.reference_size))
    keep = np.ones((view.height, view.width), dtype=np.float32)
    for mask in masks:
        keep[in_view(mask.astype(np.uint8), view, None)] = 0.0
    if not keep.any():
        raise TrainingError(
            "the ignore mask and the ignored zones leave nothing to look at: white is where not to look, keep a part "
            "of the view black"
        )
    return keep


def _trained(train: Method, material: Material, options: Options, progress: Progress) -> Learned:
    """Return what the method learns, the same for the same material."""
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    return train(material, options, progress)


def _training(
    request: FitRequest, dataset: Dataset, material: Material, found: Survey, registration: str
) -> dict[str, Any]:
    """Return what somebody needs to know to train the same recipe again."""
    options = asdict(replace(request.options, weights=None))
    options["weights"] = request.options.weights.name if request.options.weights else "packaged"
    return {
        "good_images": len(material),
        "asked": {
            "false_reject_rate": request.false_reject_rate,
            "threshold": request.threshold,
            "most_images": request.most_images,
            "takt_ms": request.takt_ms,
            "keep_suspects": request.keep_suspects,
            "ignore": None if request.ignore is None else request.ignore.name,
        },
        "defects": counted(item.label for item in dataset.defects),
        "folds": int(material.fold.max()) + 1,
        "image_sizes": len(found.sizes),
        "registration": registration,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": options,
    }
