"""Which images there are to learn from and to be measured on."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.errors import BadFrame, InputError
from calibration.frame import Pixels
from calibration.images import SUFFIXES, check_16_bits, check_depth, check_name, image_files, printable, read_image
from calibration.photometric import Photometric, recorded_photometric
from calibration.recording import is_recording, recorded_frames

GOOD = "good"
JOINED = "+"  # between the types of a part with several defects: the folder crack+stain
CACHE_BYTES = 1024**3


@dataclass(frozen=True, slots=True)
class Item:
    """One image and what is known about it."""

    file: Path
    name: str  # below the dataset's root, for people
    label: str  # "good" or the defect type's folder; crack+stain: a part with both
    part_id: str | None = None  # images of one part share it and are never split apart
    bit_depth: int | None = None  # None: the file's own 8 or 16 bits
    mask: Path | None = None  # true defect, nonzero inside

    @property
    def part(self) -> str:
        """Which part it shows: images of one part are never split apart, and count once."""
        return self.part_id or self.name


@dataclass(frozen=True, slots=True)
class Dataset:
    """Images of one product."""

    product: str
    good: tuple[Item, ...]  # to learn from
    test: tuple[Item, ...]  # good and defective, never learnt from; empty where there are none
    photometric: Photometric
    notes: tuple[str, ...] = ()  # what the user should know about the folder
    defects: tuple[Item, ...] = ()  # labelled ones, for methods that learn from them; none of them is in test


def read_dataset(root: Path, *, part_pattern: str | None = None, bit_depth: int | None = None) -> Dataset:
    """Return what root holds: MVTec AD layout (train/good, test/*, ground_truth/*), a recording, or plain images.

    Folders beside train/good hold labelled defects; the layout of MVTec AD has none.

    part_pattern: regular expression; what its first group (or the whole match) finds in a file's name is the part id.
    It must find one in the name of every good image to learn from; another without one is a part of its own.
    bit_depth: of the sensor, for 16-bit files. A recording knows both: a pattern or another depth is refused.

    Raises InputError if root is empty, mixes layouts, holds images in folders below its own or cannot be read, and
    where the name of a folder that becomes the product's or a label is not UTF-8.
    """
    if not root.is_dir():
        raise InputError(f"{root}: {'not a folder' if root.exists() else 'not found'}: give a folder of images")
    check_name(root.resolve())
    reader = _Reader(root, _compiled(part_pattern), bit_depth)
    if (root / "train" / GOOD).is_dir():
        return reader.mvtec()
    if is_recording(root):
        return reader.recording()
    return reader.plain()


class _Reader:
    def __init__(self, root: Path, part_pattern: re.Pattern[str] | None, bit_depth: int | None) -> None:
        self.root = root
        self.part_pattern = part_pattern
        self.bit_depth = bit_depth

    def mvtec(self) -> Dataset:
        good = self._items(self.root / "train" / GOOD, GOOD)
        test: list[Item] = []
        test_root = self.root / "test"
        for folder in _folders(test_root) if test_root.is_dir() else []:
            test += self._items(folder, folder.name)
        defects: list[Item] = []
        for folder in _folders(self.root / "train"):
            if folder.name != GOOD:  # masks are known by the names of the test images alone
                defects += [replace(item, mask=None) for item in self._items(folder, folder.name)]
        dataset = self._dataset(good, test, Photometric(), self._strangers(self.root / "train" / GOOD))
        return replace(dataset, defects=tuple(defects))

    def recording(self) -> Dataset:
        """Raises InputError where the user says otherwise than the recording itself."""
        if self.part_pattern is not None:
            raise InputError(f"{self.root}: a recording names its parts itself: leave --part-pattern out")
        frames = recorded_frames(self.root)
        for frame in frames:
            if self.bit_depth not in (None, frame.bit_depth):
                raise InputError(
                    f"{frame.file}: recorded with {frame.bit_depth} bits, {self.bit_depth} were given: a recording "
                    "knows its depth, leave --bit-depth out"
                )
        items = [Item(frame.file, frame.file.name, GOOD, frame.part_id, frame.bit_depth) for frame in frames]
        return self._dataset(items, [], recorded_photometric(self.root), ())

    def plain(self) -> Dataset:
        items = self._items(self.root, GOOD)
        below = [path.name for path in _entries(self.root) if path.is_dir() and image_files(path)]
        if below:
            raise InputError(
                f"{self.root}: {len(items)} images found beside folders of images ({', '.join(sorted(below)[:4])}): "
                "give one folder of good images only, or the layout train/good, test/good, test/DEFECT"
            )
        return self._dataset(items, [], Photometric(), self._strangers(self.root))

    def _dataset(
        self, good: Sequence[Item], test: Sequence[Item], photometric: Photometric, notes: Sequence[str]
    ) -> Dataset:
        if not good:
            raise InputError(
                f"{self.root}: no good images found: put images ({', '.join(SUFFIXES)}) of good parts there"
            )
        unknown = [] if self.part_pattern is None else [item.file for item in good if item.part_id is None]
        if self.part_pattern is not None and unknown:
            raise InputError(
                f"{unknown[0]}: the part pattern {self.part_pattern.pattern!r} finds nothing in its name: mend the "
                "pattern"
            )
        return Dataset(self.root.resolve().name, tuple(good), tuple(test), photometric, tuple(notes))

    def _items(self, folder: Path, label: str) -> list[Item]:
        masks = self.root / "ground_truth" / label
        below = []
        if folder != self.root:
            check_name(folder)
            below = _folders_of_images(folder)
        if below:
            raise InputError(
                f"{folder}: images found in folders below it ({', '.join(below[:4])}), which would be passed over: "
                "put them directly into it, or take the folders away"
            )
        return [
            Item(
                file=file,
                name=str(file.relative_to(self.root)),
                label=label,
                part_id=self._part_id(file),
                bit_depth=self.bit_depth,
                mask=_mask_file(masks, file),
            )
            for file in image_files(folder)
        ]

    def _part_id(self, file: Path) -> str | None:
        if self.part_pattern is None:
            return None
        found = self.part_pattern.search(file.name)
        return (found and (found.group(1) if found.groups() else found.group(0))) or None

    def _strangers(self, folder: Path) -> tuple[str, ...]:
        strangers = sorted(
            printable(path.name) for path in _entries(folder) if path.is_file() and path.suffix.lower() not in SUFFIXES
        )
        if not strangers:
            return ()
        return (f"{len(strangers)} files are not images and were left out: {', '.join(strangers[:4])}",)


class Pictures:
    """Pixels of items after photometric correction; keeps what fits into a gibibyte."""

    def __init__(self, photometric: Photometric) -> None:
        self._photometric = photometric
        self._held: OrderedDict[Path, Pixels] = OrderedDict()
        self._bytes = 0

    def __call__(self, item: Item) -> tuple[Pixels, int]:
        """Return (pixels, bit depth) of one item. Raises InputError if the file cannot be used."""
        pixels = self._held.get(item.file)
        if pixels is None:
            pixels = read_image(item.file)
            check_depth(pixels, item.bit_depth, str(item.file))
            if self._bytes + pixels.nbytes <= CACHE_BYTES:
                self._held[item.file] = pixels
                self._bytes += pixels.nbytes
        depth = item.bit_depth or (8 if pixels.dtype == np.uint8 else 16)
        return self._photometric.correct(pixels, depth), depth


@dataclass(frozen=True, slots=True)
class Survey:
    """What the good images have in common."""

    sizes: Counter[tuple[int, int]]  # (height, width) -> how many
    gray: int
    colour: int
    bit_depth: int

    @property
    def one_size(self) -> bool:
        """True if every image has the same size, as from one camera."""
        return len(self.sizes) == 1

    @property
    def size(self) -> tuple[int, int]:
        """The commonest (height, width)."""
        return self.sizes.most_common(1)[0][0]

    def notes(self) -> list[str]:
        """Return what the user should know before trusting a recipe made from these images."""
        notes = []
        if not self.one_size:
            heights, widths = zip(*self.sizes, strict=True)
            notes.append(
                f"the images have {len(self.sizes)} sizes, from {min(widths)}x{min(heights)} to "
                f"{max(widths)}x{max(heights)} px: each is stretched to the detector's size; "
                "a line camera delivers one size, crop to it if these came from one"
            )
        if self.gray and self.colour:
            notes.append(
                f"{self.gray} gray and {self.colour} colour images are mixed: all are used as colour; "
                "a station refuses gray frames"
            )
        return notes


def survey(items: Sequence[Item], pictures: Pictures) -> Survey:
    """Read every image once. Raises InputError naming the first file that cannot be used."""
    sizes: Counter[tuple[int, int]] = Counter()
    depths: Counter[int] = Counter()
    gray = brightest = 0
    for item in items:
        try:
            pixels, depth = pictures(item)
        except BadFrame as error:
            raise InputError(f"{item.file}: {error}") from error
        depths[depth] += 1
        sizes[(pixels.shape[0], pixels.shape[1])] += 1
        gray += pixels.ndim == 2
        if pixels.dtype == np.uint16 and item.bit_depth is None:
            brightest = max(brightest, int(pixels.max()))
    check_16_bits(brightest)
    if len(depths) > 1:
        counted = ", ".join(f"{number} of {depth} bits" for depth, number in sorted(depths.items()))
        raise InputError(f"images of several depths are mixed ({counted}): a camera delivers one, keep that")
    return Survey(sizes, gray, len(items) - gray, next(iter(depths)))


def folds(items: Sequence[Item], count: int, seed: int) -> NDArray[np.int64]:
    """Return the fold 0..count-1 of each item; images of one part share a fold, sizes are as even as parts allow."""
    parts = [item.part for item in items]
    generator = np.random.default_rng(seed)
    tally = Counter(parts)
    order = sorted(tally, key=lambda part: (-tally[part], part))
    ties = dict(zip(order, generator.permutation(len(order)), strict=True))
    order.sort(key=lambda part: (-tally[part], ties[part]))
    filled = np.zeros(count, dtype=np.int64)
    fold_of = {}
    for part in order:
        fold_of[part] = int(filled.argmin())
        filled[fold_of[part]] += tally[part]
    return np.array([fold_of[part] for part in parts])


def types_of(label: str) -> tuple[str, ...]:
    """Return the defect types that a folder's name stands for, such as crack and stain of crack+stain."""
    return tuple(dict.fromkeys(part for part in label.split(JOINED) if part))


def _compiled(part_pattern: str | None) -> re.Pattern[str] | None:
    if part_pattern is None:
        return None
    try:
        return re.compile(part_pattern)
    except re.error as error:
        raise InputError(f"part pattern {part_pattern!r}: {error}: give a regular expression") from error


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: give a folder that you can read") from error


def _folders_of_images(folder: Path) -> list[str]:
    """Return the names of the folders in a folder that hold images, at any depth; hidden ones do not count."""
    return [
        below.name
        for below in _folders(folder)
        if not below.name.startswith(".") and any(path.suffix.lower() in SUFFIXES for path in below.rglob("*"))
    ]


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in _entries(root) if path.is_dir())


def _mask_file(folder: Path, image: Path) -> Path | None:
    for name in (f"{image.stem}_mask.png", f"{image.stem}.png"):
        if (folder / name).is_file():
            return folder / name
    return None
