"""Registration on parts whose pose is known: accuracy, time, false accepts and false refusals.

    python benchmarks/registration.py [--data DIR] [--out FILE.csv] [--frames N]

Simulated products are learned from eight good frames, then looked for in fresh frames: any angle, shifts of 40 px,
light +-30 %, noise, every second part with a defect. With --data, the first image of each DIR/<category>/train/good is
the reference for moved copies of itself, as it is and enlarged to 1000 px. Wrong products are all the others.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from calibration.errors import CalibrationError, NotRegistered
from calibration.images import image_files, read_image
from calibration.reference import learn_reference
from calibration.registration import Reference, Registration, RegistrationSettings

SIDE_PX = 1000
FINER = 3  # outlines are drawn this much larger and averaged down
LEARN_FRAMES = 8
WARM_UP = 5

Gray = NDArray[np.uint8]
Outline = NDArray[np.float64]  # (n, 2) px from the part's centre


@dataclass(frozen=True, slots=True)
class Product:
    """A flat part: solid outlines, then holes through it. Turning by symmetry_deg changes nothing."""

    name: str
    solids: tuple[Outline, ...]
    holes: tuple[Outline, ...] = ()
    symmetry_deg: float = 360.0


@dataclass(frozen=True, slots=True)
class Shot:
    """One frame and where its part lies."""

    frame: Gray
    reference_from_image: NDArray[np.float64]  # with the drawing as reference


@dataclass(frozen=True, slots=True)
class Row:
    """What one source gave."""

    source: str
    frames: int
    false_refusals: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    warp_ratio: float
    error_median_px: float
    error_p99_px: float
    error_max_px: float
    lowest_similarity: float
    wrong_frames: int
    false_accepts: int
    highest_wrong: float


def circle(radius: float, x: float = 0, y: float = 0) -> Outline:
    """Return a round outline, px from the part's centre."""
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def box(x: float, y: float, width: float, height: float) -> Outline:
    """Return a rectangle from its corner."""
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], float)


def star(count: int, outer: float, inner: float) -> Outline:
    """Return a gear with count teeth."""
    angle = np.arange(4 * count) * np.pi / (2 * count)
    radius = np.where(np.arange(4 * count) % 4 < 2, outer, inner)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def thread(length: float, radius: float, pitch: float) -> Outline:
    """Return the outline of a screw's thread along x."""
    x = np.arange(-length / 2, length / 2, pitch / 2)
    edge = radius + np.where(np.arange(x.size) % 2 == 0, 0, pitch / 3)
    return np.concatenate([np.stack([x, edge], axis=1), np.stack([x + pitch / 2, -edge], axis=1)[::-1]])


def products() -> list[Product]:
    """Return the simulated products: round, nearly round, long, angular, with many like details."""
    bolts = tuple(circle(30, 265 * np.cos(a), 265 * np.sin(a)) for a in np.arange(6) * np.pi / 3)
    hexagon = 300 * np.stack([np.cos(np.arange(6) * np.pi / 3), np.sin(np.arange(6) * np.pi / 3)], axis=1)
    generator = np.random.default_rng(7)
    pads = tuple(box(*generator.uniform(-330, 290, 2) * [1, 0.6], *generator.uniform(15, 60, 2)) for _ in range(45))
    bracket = np.array([[-300, -250], [300, -250], [300, -120], [-120, -120], [-120, 280], [-300, 280]], float)
    return [
        Product("flange", (circle(350),), (circle(170), box(150, -25, 65, 50), *bolts)),
        Product("plain ring", (circle(320),), (circle(190),), symmetry_deg=0),
        Product("hex nut", (hexagon,), (circle(150),), symmetry_deg=60),
        Product("gear", (star(24, 330, 285),), (circle(90), box(70, -20, 50, 40))),
        Product("screw", (thread(560, 45, 36), box(-380, -95, 110, 190)), (box(-375, -12, 40, 24),)),
        Product("bracket", (bracket,), (circle(45, -210, 200), circle(45, 220, -185), box(-100, -215, 180, 50))),
        Product("board", (box(-400, -260, 800, 520),), pads),
    ]


def belt(generator: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a dark, mottled ground."""
    fine, broad = (generator.normal(0, 1, shape).astype(np.float32) for _ in range(2))
    fine, broad = cv2.GaussianBlur(fine, (0, 0), 2), cv2.GaussianBlur(broad, (0, 0), 25)
    return np.asarray(45 + 7 * fine / fine.std() + 9 * broad / broad.std(), np.float32)


def placed(outline: Outline, matrix: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return the outline in the finer picture, in 1/16 px as fillPoly wants it."""
    points = outline @ matrix[:2, :2].T + matrix[:2, 2]
    return np.asarray(np.round(((points + 0.5) * FINER - 0.5) * 16), np.int32)


def drawn(product: Product, generator: np.random.Generator, matrix: NDArray[np.float64], *, defect: bool) -> Gray:
    """Return a frame with the part at matrix (image px from part px), in changing light, with noise."""
    cover = np.zeros((SIDE_PX * FINER, SIDE_PX * FINER), np.uint8)
    # a missing hole, but never the keyway: without it a flange has no angle
    skipped = int(generator.integers(2, len(product.holes))) if defect and len(product.holes) > 3 else -1
    for solid in product.solids:
        cv2.fillPoly(cover, [placed(solid, matrix)], 255, shift=4)
    for number, hole in enumerate(product.holes):
        if number != skipped:
            cv2.fillPoly(cover, [placed(hole, matrix)], 0, shift=4)
    share = cv2.resize(cover, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    brushed = cv2.GaussianBlur(generator.normal(0, 60, (SIDE_PX, SIDE_PX)).astype(np.float32), (0, 0), 6, sigmaY=0.8)
    frame = belt(generator, (SIDE_PX, SIDE_PX)) * (1 - share) + (160 + brushed) * share
    if defect:
        ends = (matrix[:2, 2] + generator.uniform(-250, 250, (2, 2))).astype(int).tolist()
        cv2.line(frame, ends[0], ends[1], float(generator.uniform(30, 230)), int(generator.integers(2, 7)))
        spot = (matrix[:2, 2] + generator.uniform(-250, 250, 2)).astype(int).tolist()
        cv2.circle(frame, spot, int(generator.integers(8, 30)), float(generator.uniform(40, 200)), -1)
    frame = frame * generator.uniform(0.7, 1.3) + generator.normal(0, 4, frame.shape)
    return np.asarray(np.clip(frame, 0, 255).round(), np.uint8)


def pose(
    generator: np.random.Generator, centre: tuple[float, float], shift_px: float, angle_deg: float
) -> NDArray[np.float64]:
    """Return image px from part px."""
    angle = np.radians(generator.uniform(-angle_deg, angle_deg))
    x, y = np.add(centre, generator.uniform(-shift_px, shift_px, 2))
    return np.array([[np.cos(angle), -np.sin(angle), x], [np.sin(angle), np.cos(angle), y], [0, 0, 1]])


def shots(product: Product, generator: np.random.Generator, count: int, *, defects: bool) -> Iterator[Shot]:
    """Yield frames of a product in any pose, every second one with a defect if defects are wanted."""
    centre = ((SIDE_PX - 1) / 2, (SIDE_PX - 1) / 2)
    for number in range(count):
        matrix = pose(generator, centre, 40, 180)
        frame = drawn(product, generator, matrix, defect=defects and number % 2 == 1)
        yield Shot(frame, np.linalg.inv(matrix))


def moved(picture: Gray, generator: np.random.Generator, count: int, angle_deg: float) -> Iterator[Shot]:
    """Yield turned and shifted copies of a picture, edges repeated, light and noise changed."""
    height, width = picture.shape
    centre = ((width - 1) / 2, (height - 1) / 2)
    home = np.array([[1, 0, -centre[0]], [0, 1, -centre[1]], [0, 0, 1]])
    for _ in range(count):
        matrix = pose(generator, centre, 0.04 * min(picture.shape), angle_deg) @ home
        copy = cv2.warpAffine(
            picture, matrix[:2], (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        light = copy * generator.uniform(0.7, 1.2) + generator.normal(0, 3, copy.shape)
        yield Shot(np.asarray(np.clip(light, 0, 255).round(), np.uint8), np.linalg.inv(matrix))


def corner_error_px(
    found: Registration, shot: Shot, drawing: NDArray[np.float64], corners: NDArray[np.float64], symmetry_deg: float
) -> float:
    """Return the largest error at the part's corners (3, n) in the image, among poses that look the same.

    drawing: reference px from part px, as in the shot's own truth.
    """
    truth = np.linalg.inv(shot.reference_from_image) @ corners  # image px
    part = np.linalg.inv(drawing) @ found.reference_from_image @ truth
    if symmetry_deg == 0:  # any turn is right
        return float(
            np.linalg.norm(
                (np.linalg.inv(drawing) @ found.reference_from_image @ np.linalg.inv(shot.reference_from_image))[:2, 2]
            )
        )
    errors = []
    for turn in np.radians(np.arange(0, 360, symmetry_deg)):
        back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        errors.append(np.linalg.norm(back @ part[:2] - corners[:2], axis=0).max())
    return float(min(errors))


def measured(
    source: str,
    reference: Reference,
    trials: list[Shot],
    error: Callable[[Registration, Shot], float],
    wrong: list[Gray],
) -> Row:
    """Return the row of one source."""
    for shot in trials[:WARM_UP]:
        attempt(reference, shot.frame)
    times, errors, similarities, refusals = [], [], [], 0
    for shot in trials:
        start = time.perf_counter()
        found = attempt(reference, shot.frame)
        times.append((time.perf_counter() - start) * 1e3)
        if isinstance(found, NotRegistered):
            refusals += 1
            continue
        errors.append(error(found, shot))
        similarities.append(found.similarity)
    accepted = [
        each.similarity for each in (attempt(reference, frame) for frame in wrong) if isinstance(each, Registration)
    ]
    loose = Reference(reference.image, reference.weight, reference.settings, 0.0, np.inf)
    reached = [each.similarity for each in (attempt(loose, frame) for frame in wrong) if isinstance(each, Registration)]
    quantiles = np.quantile(errors, [0.5, 0.99, 1]) if errors else [np.nan] * 3
    return Row(
        source, len(trials), refusals, *np.quantile(times, [0.5, 0.99, 1]).tolist(),
        float(np.median(times)) / warp_ms(trials[0].frame), *map(float, quantiles),
        min(similarities, default=np.nan), len(wrong), len(accepted), max(reached, default=0.0),
    )  # fmt: skip


def warp_ms(frame: Gray) -> float:
    """Return the median time of one cv2.warpAffine of the frame."""
    matrix, times = np.array([[0.9, 0.1, 3], [-0.1, 0.9, 4]]), []
    for _ in range(20):
        start = time.perf_counter()
        cv2.warpAffine(frame, matrix, frame.shape[::-1])
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def attempt(reference: Reference, frame: Gray) -> Registration | NotRegistered:
    """Return what registration gives or why it refuses."""
    try:
        return reference.register(frame)
    except NotRegistered as refusal:
        return refusal


def wrong_frames(generator: np.random.Generator, count: int) -> list[tuple[str, Gray]]:
    """Return (product, frame): count frames of every simulated product, belts, noise, black, white, ramps."""
    frames = [(p.name, shot.frame) for p in products() for shot in shots(p, generator, count, defects=False)]
    shape = (SIDE_PX, SIDE_PX)
    for _ in range(count):
        ground = np.clip(belt(generator, shape) + generator.normal(0, 4, shape), 0, 255)
        frames.append(("belt", np.asarray(ground, np.uint8)))
        frames.append(("noise", generator.integers(0, 256, shape, dtype=np.uint8)))
        frames.append(
            ("flat", np.clip(generator.normal(generator.choice([0, 128, 255]), 4, shape), 0, 255).astype(np.uint8))
        )
    return frames


def simulated(generator: np.random.Generator, count: int, wrong: list[tuple[str, Gray]]) -> Iterator[Row]:
    """Yield the row of every simulated product, learned from good frames."""
    for product in products():
        good = list(shots(product, generator, LEARN_FRAMES, defects=False))
        learned = learn_reference([shot.frame for shot in good], 8, RegistrationSettings())
        print(f"  {product.name}: trustworthy={learned.trustworthy}: {learned.why}")
        drawing = drawing_in_reference(learned.registrations, good, product.symmetry_deg)
        outline = np.concatenate(product.solids)
        low, high = outline.min(axis=0), outline.max(axis=0)
        corners = np.array([[low[0], low[1], 1], [high[0], low[1], 1], [low[0], high[1], 1], [high[0], high[1], 1]]).T
        symmetry = product.symmetry_deg if learned.reference.settings.max_angle_deg > 0 else 0
        yield measured(
            product.name, learned.reference, list(shots(product, generator, count, defects=True)),
            lambda found, shot, d=drawing, c=corners, s=symmetry: corner_error_px(found, shot, d, c, s),
            [frame for name, frame in wrong if name != product.name],
        )  # fmt: skip


def drawing_in_reference(
    found: tuple[Registration | NotRegistered, ...], good: list[Shot], symmetry_deg: float
) -> NDArray[np.float64]:
    """Return reference px from part px: the median over the frames that the reference was learned from."""
    matrices: list[NDArray[np.float64]] = []
    for each, shot in zip(found, good, strict=True):
        if isinstance(each, Registration):
            matrix = each.reference_from_image @ np.linalg.inv(shot.reference_from_image)
            turns = np.radians(np.arange(0, 360, symmetry_deg)) if symmetry_deg else [0.0]
            same = [
                matrix @ np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]]) for t in turns
            ]
            first = matrices[0] if matrices else same[0]
            matrices.append(min(same, key=lambda other: float(np.abs(other - first).max())))
    return np.asarray(np.median(matrices, axis=0))


def real(data: Path, generator: np.random.Generator, count: int, wrong: list[tuple[str, Gray]]) -> Iterator[Row]:
    """Yield the rows of real pictures registered against themselves."""
    for folder in sorted(path for path in data.iterdir() if (path / "train/good").is_dir()):
        picture = gray_file(image_files(folder / "train/good")[0])
        for name, each in ((folder.name, picture), (f"{folder.name} {SIDE_PX} px", enlarged(picture))):
            try:  # 0.7 is what few good images would give as limit
                reference = Reference(each, np.full_like(each, 255), RegistrationSettings(min_in_view=0.7), 0.7, 5.0)
            except CalibrationError as error:
                print(f"  {name}: {error}")
                continue
            drawing = np.array([[1, 0, (each.shape[1] - 1) / 2], [0, 1, (each.shape[0] - 1) / 2], [0, 0, 1]])
            yield measured(
                name, reference, list(moved(each, generator, count, any_angle_deg(reference))),
                lambda f, s, d=drawing, r=reference: corner_error_px(f, shifted(s, d), d, square(r, d), 360),
                [frame for source, frame in wrong if source != folder.name],
            )  # fmt: skip


def any_angle_deg(reference: Reference) -> float:
    """Return 180 where the part stays in view at any angle, 10 where it fills the frame."""
    distance = np.linalg.norm(reference.contour_px - np.asarray(reference.centre_px), axis=1)
    return 180.0 if np.quantile(distance, 0.95) < min(reference.image.shape) / 2 else 10.0


def shifted(shot: Shot, drawing: NDArray[np.float64]) -> Shot:
    """Return the shot with its truth in part px, as the simulated ones have it."""
    return Shot(shot.frame, np.linalg.inv(drawing) @ shot.reference_from_image)


def square(reference: Reference, drawing: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the corners (3, 4) of a square around the part, px from the drawing's centre."""
    x, y = np.asarray(reference.centre_px) - drawing[:2, 2]
    r = reference.radius_px
    return np.array([[x - r, y - r, 1], [x + r, y - r, 1], [x - r, y + r, 1], [x + r, y + r, 1]]).T


def enlarged(picture: Gray) -> Gray:
    """Return the picture with its long side at SIDE_PX."""
    ratio = SIDE_PX / max(picture.shape)
    return np.asarray(cv2.resize(picture, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_CUBIC))


def gray_file(path: Path) -> Gray:
    """Return an image file as gray."""
    pixels = read_image(path)
    return np.asarray(pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def main() -> None:
    """Print the table, and write it as CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of <category>/train/good")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--frames", type=int, default=60, help="frames per source")
    options = parser.parse_args()
    cv2.setNumThreads(2)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {SIDE_PX} px, warm-up {WARM_UP}"
    )
    print(f"Python {platform.python_version()}, NumPy {np.__version__}, OpenCV {cv2.__version__}")
    generator = np.random.default_rng(0)
    wrong = wrong_frames(generator, 20)
    folders = sorted(path for path in options.data.iterdir() if path.is_dir()) if options.data else []
    wrong += [(f.name, enlarged(gray_file(p))) for f in folders for p in image_files(f / "train/good")[:60:6]]
    rows = list(simulated(generator, options.frames, wrong))
    if options.data:
        rows += real(options.data, generator, options.frames, wrong)
    report(rows, options.out)


def report(rows: list[Row], out: Path | None) -> None:
    """Print the rows and write them as CSV."""
    print(f"{'source':22s}    n refused   p50   p99   max ms  /warp   error p50   p99   max px  lowest  ", end="")
    print("wrong accepted highest")
    for r in rows:
        print(
            f"{r.source:22s} {r.frames:4d} {r.false_refusals:7d} {r.p50_ms:5.1f} {r.p99_ms:5.1f} {r.max_ms:5.1f}"
            f" {r.warp_ratio:9.1f} {r.error_median_px:11.3f} {r.error_p99_px:5.2f} {r.error_max_px:5.2f}"
            f" {r.lowest_similarity:10.2f} {r.wrong_frames:6d} {r.false_accepts:8d} {r.highest_wrong:7.2f}"
        )
    if out:
        with out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row.__dataclass_fields__)
            writer.writerows([getattr(row, name) for name in Row.__dataclass_fields__] for row in rows)


if __name__ == "__main__":
    main()
