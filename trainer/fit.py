"""From a folder of good images to a recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calibration.condition import Glimpse, glimpse, learn_limits, noticed
from calibration.errors import CalibrationError, InputError, NotRegistered
from calibration.frame import Pixels
from calibration.images import read_image
from calibration.photometric import Photometric
from calibration.preprocess import Prepared, Rectangle, View, in_view, prepare
from calibration.recipe import Recipe, SelfTest
from calibration.reference import learn_reference
from calibration.registration import Reference, RegistrationSettings
from calibration.thresholds import Thresholds, good_parts_needed, strangers
from trainer.catalogue import method
from trainer.data import Dataset, Item, Pictures, Survey, folds, survey
from trainer.errors import TrainingError
from trainer.export import Parity, answers_of, checked_parity, export_graph
from trainer.half import half_graph, with_fault
from trainer.label_limits import check_labels, with_labels
from trainer.labels import counted, prepared_defects
from trainer.learning import Learned, Material, Options, Progress
from trainer.limits import Suspect, fitted_thresholds, left_out_note, suspicious_notes

log = logging.getLogger(__name__)

FEWEST_GOOD = 5  # below this not even a fold can be held out
WISE_GOOD = 50
FOLDS = 5
REFERENCE_IMAGES = 60  # good images that the reference is learnt from
PARITY_IMAGES = 16
SELFTEST_IMAGES = 3
WELL_NOTICED = 0.9  # share of good images; a fault of light or focus that is noticed on fewer is named
MOST_UNREGISTERED = 0.1  # share of good images; above it the product does not register


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
    gamma: float = 1.0
    false_reject_rate: float = 0.01
    most_images: int = 1000
    resume: bool = False
    threshold: str = "false_reject_rate"  # | normal_intersection | best_f1: of the score, with labelled defects
    keep_suspects: bool = False  # learn from good images that score as no good part does, too
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
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _PreparedSet:
    items: tuple[Item, ...]
    batch: NDArray[np.float32]  # (n, C, h, w)
    unregistered: tuple[str, ...]

    def without(self, suspects: Sequence[Suspect]) -> _PreparedSet:
        left_out = {suspect.item.name for suspect in suspects}
        kept = [index for index, item in enumerate(self.items) if item.name not in left_out]
        return _PreparedSet(tuple(self.items[index] for index in kept), self.batch[kept], self.unregistered)


def fit(dataset: Dataset, request: FitRequest, progress: Progress) -> FitResult:
    """Return a recipe learnt from dataset.good, with parity proven and thresholds from parts that it never saw.

    Raises InputError, TrainingError, CalibrationError or ParityError; nothing is written.
    """
    train = method(request.detector)
    _check_size(request)
    good_parts_needed(request.false_reject_rate)  # a rate that is none is refused before the training, not after
    items = _chosen(dataset.good, request.most_images)
    pictures = Pictures(dataset.photometric)
    found = survey(items, pictures)
    notes = [*dataset.notes, *found.notes(), *_few_notes(items)]

    reference, why = _reference(items, pictures, found, request)
    view = _view(found, reference, request)
    prepared = _prepare_all(items, pictures, view, reference, progress)
    if prepared.unregistered:
        missing, first = len(prepared.unregistered), prepared.unregistered[0]
        notes.append(f"{missing} of {len(items)} good images could not be registered and were left out: {first}")
    defects, defect_notes = prepared_defects(
        dataset.defects, lambda item: prepared_item(item, pictures, view, reference).batch[0], request.options.seed
    )
    material = replace(_material(prepared, view, request), defects=defects)
    check_labels(material, request.threshold, request.detector)
    options = request.options if reference is None else replace(request.options, turned="off")  # they lie upright
    _make_repeatable(request.options.seed)
    learned = train(material, options, progress)
    suspects = () if request.keep_suspects else _suspects(prepared, learned)
    if suspects:
        notes.append(left_out_note([suspect.item.name for suspect in suspects]))
        prepared = prepared.without(suspects)
        material = replace(_material(prepared, view, request), resume=False, defects=defects)
        material.checkpoint.unlink(missing_ok=True)
        _make_repeatable(request.options.seed)
        learned = train(material, options, progress)

    sensor = None if dataset.photometric.is_identity else Pictures(Photometric())
    seen = _glimpses(prepared.items, pictures, sensor, view, registered=reference is not None)
    limits = learn_limits(seen)
    told = noticed(seen, limits)
    thresholds, threshold_notes = fitted_thresholds(learned, request.false_reject_rate, left_out=len(suspects))
    thresholds = with_labels(thresholds, learned, material, request.threshold)
    suspicions = suspicious_notes(learned.good_scores, [prepared.items[index].name for index in learned.held_out])
    graph, parity = _exported(learned, material, thresholds)
    half = half_graph(learned.module, _parity_images(material)[::4], thresholds.score, thresholds.map)
    recipe = Recipe(
        product=dataset.product,
        detector=request.detector,
        graph=graph,
        graph_f16=half.graph,
        view=view,
        reference=reference,
        thresholds=thresholds,
        selftest=_selftest(learned, material),
        condition=limits,
        training={
            **_training(request, material, found, why),
            "learnt_defects": learned.learnt_defects or "none",
            "decided": list(learned.decided),
            "left_out": [suspect.item.name for suspect in suspects],
            "condition_noticed": told,
            "half_precision": half.facts(),
        },
    )
    material.checkpoint.unlink(missing_ok=True)
    return FitResult(
        recipe=recipe,
        parity=parity,
        good_items=tuple(prepared.items[index] for index in learned.held_out),
        good_scores=learned.good_scores,
        good_maps=learned.good_maps,
        good_pictures=prepared.batch[learned.held_out],
        module=learned.module,
        suspects=suspects,
        notes=(*notes, *learned.decided, *defect_notes, *threshold_notes, *suspicions, *_unnoticed_notes(told)),
    )


def _suspects(prepared: _PreparedSet, learned: Learned) -> tuple[Suspect, ...]:
    """Return the good images that no good part scores like, as long as enough remain to learn from."""
    found = strangers(learned.good_scores)
    if len(prepared.items) - len(found) < FEWEST_GOOD:
        return ()
    return tuple(
        Suspect(
            prepared.items[learned.held_out[index]],
            float(learned.good_scores[index]),
            learned.good_maps[index],
            prepared.batch[learned.held_out[index]],
        )
        for index in found
    )


def _check_size(request: FitRequest) -> None:
    if request.height % 32 or request.width % 32 or not min(request.height, request.width) >= 32:
        raise TrainingError(f"size {request.width}x{request.height} found, need multiples of 32, at least 32")


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


def _view(found: Survey, reference: Reference | None, request: FitRequest) -> View:
    size = found.size if reference is None else (reference.image.shape[0], reference.image.shape[1])
    view = View(
        height=request.height,
        width=request.width,
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


def _prepare_all(
    items: Sequence[Item], pictures: Pictures, view: View, reference: Reference | None, progress: Progress
) -> _PreparedSet:
    batch = np.empty((len(items), view.channels, view.height, view.width), dtype=np.float32)
    kept: list[Item] = []
    unregistered: list[str] = []
    for count, item in enumerate(items, 1):
        try:
            batch[len(kept)] = prepared_item(item, pictures, view, reference).batch[0]
            kept.append(item)
        except NotRegistered as error:
            unregistered.append(f"{item.name} ({error})")
        progress("prepare", count, len(items))
    if len(unregistered) > MOST_UNREGISTERED * len(items) or len(kept) < FEWEST_GOOD:
        raise TrainingError(
            f"{len(unregistered)} of {len(items)} good images cannot be registered, first {unregistered[0]}: "
            "check that all show the same product, or use --registration off"
        )
    return _PreparedSet(tuple(kept), batch[: len(kept)], tuple(unregistered))


def prepared_item(item: Item, pictures: Pictures, view: View, reference: Reference | None) -> Prepared:
    """Return one image as the detector sees it; a gray image of a colour product counts as colour."""
    pixels, depth = pixels_of(item, pictures, view)
    return prepare(pixels, depth, view, reference)


def pixels_of(item: Item, pictures: Pictures, view: View) -> tuple[Pixels, int]:
    """Return (pixels, bit depth) of one image, in colour where the product is."""
    pixels, depth = pictures(item)
    if view.colour and pixels.ndim == 2:
        pixels = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    return pixels, depth


def _material(prepared: _PreparedSet, view: View, request: FitRequest) -> Material:
    count = min(FOLDS, len({item.part_id or item.name for item in prepared.items}))
    if count < 2:
        raise TrainingError("all good images show one part: show at least 5 different good parts")
    return Material(
        batch=torch.from_numpy(prepared.batch),
        keep=torch.from_numpy(_keep(request.ignore, view)),
        fold=folds(prepared.items, count, request.options.seed),
        checkpoint=request.recipe.with_name(f"{request.recipe.name}.checkpoint"),
        resume=request.resume,
        aspect=view.rectangle.width_px / view.rectangle.height_px,
    )


def _keep(ignore: Path | None, view: View) -> NDArray[np.float32]:
    """Return (h, w): 1 where the detector looks, 0 where the ignore mask covers its view."""
    if ignore is None:
        return np.ones((view.height, view.width), dtype=np.float32)
    mask = read_image(ignore)
    if mask.ndim == 3:
        mask = mask.max(axis=2)
    if mask.shape != view.reference_size:
        wanted = view.reference_size
        raise InputError(
            f"{ignore}: the ignore mask is {mask.shape[1]}x{mask.shape[0]} px, the reference view "
            f"{wanted[1]}x{wanted[0]}: draw it on a picture of that size"
        )
    return (~in_view((mask > 0).astype(np.uint8), view, None)).astype(np.float32)


def _glimpses(
    items: Sequence[Item], pictures: Pictures, sensor: Pictures | None, view: View, *, registered: bool
) -> list[Glimpse]:
    """Return the images in small. sensor: gives them as they were before correction; None: they are not corrected."""
    seen = []
    for item in items:
        pixels, depth = pixels_of(item, pictures, view)
        raw = None if sensor is None else pixels_of(item, sensor, view)[0]
        seen.append(glimpse(pixels, depth, view, registered=registered, sensor_pixels=raw))
    return seen


def _unnoticed_notes(told: Mapping[str, float]) -> list[str]:
    """Return a note on what the limits of light and focus let through, because good parts vary as much themselves."""
    missed = [f"{name} ({share:.0%} noticed)" for name, share in told.items() if share < WELL_NOTICED]
    if not missed:
        return []
    return [f"light and focus vary much on good parts: the detector alone must tell {', '.join(missed)}"]


def _make_repeatable(seed: int) -> None:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


def _exported(learned: Learned, material: Material, thresholds: Thresholds) -> tuple[bytes, Parity]:
    chosen = _parity_images(material)
    graph = export_graph(learned.module, chosen[:1])
    return graph, checked_parity(learned.module, graph, chosen, thresholds.score, thresholds.map)


def _parity_images(material: Material) -> NDArray[np.float32]:
    images = material.batch.numpy()
    return images[np.unique(np.linspace(0, len(images) - 1, PARITY_IMAGES).round().astype(int))]


def _selftest(learned: Learned, material: Material) -> SelfTest:
    """Return a few good parts, from the easiest to the hardest and that one with a fault, and the network's answers."""
    order = learned.held_out[np.argsort(learned.good_scores, kind="stable")]
    chosen = order[np.linspace(0, len(order) - 1, min(SELFTEST_IMAGES, len(order))).round().astype(int)]
    good = material.batch[torch.from_numpy(chosen)].numpy()
    batches = np.concatenate([good, with_fault(good[-1:])])  # engines must be right far above the threshold too
    answers = answers_of(learned.module, batches)
    return SelfTest(
        batches=batches,
        scores=tuple(score for _, score in answers),
        map_peaks=tuple(float(anomaly_map.max()) for anomaly_map, _ in answers),
        maps=np.stack([anomaly_map[None] for anomaly_map, _ in answers]),
    )


def _training(request: FitRequest, material: Material, found: Survey, registration: str) -> dict[str, Any]:
    """Return what somebody needs to know to train the same recipe again."""
    options = asdict(replace(request.options, weights=None))
    options["weights"] = request.options.weights.name if request.options.weights else "packaged"
    return {
        "good_images": len(material),
        "defects": {} if material.defects is None else counted(material.defects.labels),
        "folds": int(material.fold.max()) + 1,
        "image_sizes": len(found.sizes),
        "registration": registration,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "options": options,
    }
