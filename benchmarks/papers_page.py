"""docs/papers.md from the rows of papers.csv: the papers' numbers beside ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from papers_cells import TYPES, Cell

NOT_YET, MISSED = "not yet measured", "missed"
LEAST_RATIO, LEAST_AUC, LEAST_AP = 10.0, 0.997, 0.999
ON_BACKBONE = ("deep_knn", "map_knn", "siamese", "vgg16")  # how the names of such detectors end
TRAINED = ("+", "cnn", "vgg16")  # in the names of detectors that are trained in epochs

TYPES_000 = ("shrinked hole", "dirty spot", "discoloured line", "edge erosion", "printed line")
# Table 2 of paper 000: method -> F1 of its types.
PAPER_000 = {
    "GAN": (0.16, 0.10, 0.14, 0.39, 0.04),
    "VAE": (0.52, 0.30, 0.125, 0.67, 0.61),
    "Siamese + GAN": (0.765, 0.754, 0.157, 0.872, 0.883),
    "Siamese + VAE": (0.75, 0.55, 0.25, 0.89, 0.86),
}
# Table III of paper 001: method -> accuracy, solar panel and wood.
PAPER_001 = {
    "GAN": {"solar_mono": 0.9375, "wood": 0.9204},
    "GMM": {"solar_mono": 0.8633, "wood": 0.6853},
    "one-class SVM": {"solar_mono": 0.5696, "wood": 0.4454},
    "LOF": {"solar_mono": 0.4656, "wood": 0.6574},
}
IMAGENET = ", ImageNet"  # ends the names of methods that judge features of ImageNet instead of the GAN's codes
# Tables I and II of paper 001: Frechet distances of good and of defective images.
FRECHET_001 = {"solar_mono": ("0.03", "0.31-0.33"), "wood": ("0.026", "3.4e7")}
FRECHET_COLUMNS = (
    ("paper", "good"), ("paper", "defect"), ("ours", "good"), ("ours", "defect"), ("ours", "ratio"),
)  # fmt: skip
# Table 4 of paper 002: method -> AUC and AP on bottle.
PAPER_002 = {
    "hybrid": (0.9971, 0.9990),
    "AE (L2)": (0.8977, 0.9683),
    "deep feature": (0.9671, 0.9890),
    "NN": (0.8102, 0.9378),
    "variation": (0.7925, 0.9312),
}
HEAD = """# The papers' tables, and ours

Written by `benchmarks/papers.py`; do not edit. A cell that nobody has run says so.

```text
python benchmarks/papers.py --data ../shared/data --out DIR
```

The rows are in `benchmarks/results/papers.csv`; copied to `DIR/papers.csv`, only what is missing is run.

Machine of the rows below: AMD EPYC, 2 shared cores, no GPU. Scores come from the exported graph in ONNX Runtime,
images prepared as beside the line; `infer` is the graph alone in OpenVINO f32, 2 threads, p50 of 50 after 5. It was
busy with other programs: times are upper bounds. The papers' images are others than ours except where the name is
the same (bottle); compare the order of the methods.
"""


def page(rows: Sequence[dict], every: Sequence[Cell]) -> str:
    """Return the page."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        figures = found.setdefault((row["table"], row["category"], row["method"]), {})
        figures |= {name: row[name] for name in ("detector", "backbone", "size_px", "minutes")}
        figures[row["measure"]] = row["value"]
    tables = [_table_1, _table_2, _table_3, _table_4, _costs]
    return HEAD + _targets(found) + "".join(table(list(every), found) for table in tables)


def _targets(found: dict) -> str:
    """Return what was to be reached, whether it was, and why not."""
    rows = []
    for name, judged in TARGETS.items():
        ours, verdict = judged(found)
        rows.append([name, ours, verdict, WHY.get(name, "") if verdict == MISSED else ""])
    return "\n## What was to be reached\n" + _grid(["target", "ours", "", "why"], rows)


def _figure(found: dict, table: int, category: str, method: str, measure: str) -> float | None:
    """Return a figure as a number; None where it was not measured, or does not exist."""
    text = found.get((str(table), category, method), {}).get(measure, "")
    return float(text) if text else None


def _judged(ours: str, met: bool | None) -> tuple[str, str]:
    return (ours, NOT_YET) if met is None else (ours, "met" if met else MISSED)


def _siamese(found: dict) -> tuple[str, str]:
    """Judge whether the Siamese network on either reconstructor beats both pixel scores in every type."""
    won, missing = 0, 0
    for kind in TYPES:
        f1 = {name: _figure(found, 1, "magnetic_tile", name, f"{kind} f1") for name in PAPER_000}
        values = [value for value in f1.values() if value is not None]
        missing += len(values) < len(f1)
        if len(values) == len(f1):
            pixels, learnt = values[:2], values[2:]  # in the order of PAPER_000
            won += min(learnt) > max(pixels)
    if missing:
        return _judged("-", None)
    return _judged(f"in {won} of {len(TYPES)} types", won == len(TYPES))


def _ratio(found: dict, category: str) -> tuple[str, str]:
    ratio = _figure(found, 2, category, "GAN", "frechet_ratio")
    return _judged("-", None) if ratio is None else _judged(f"{ratio:.3g}", ratio >= LEAST_RATIO)


def _first(found: dict, category: str) -> tuple[str, str]:
    """Judge whether the GAN method has the highest accuracy."""
    values = {name: _figure(found, 2, category, name, "accuracy") for name in PAPER_001}
    if any(value is None for value in values.values()):
        return _judged("-", None)
    order = sorted(values, key=lambda name: -float(values[name] or 0.0))
    return _judged(f"place {order.index('GAN') + 1} of {len(order)}", order[0] == "GAN")


def _hybrid(found: dict) -> tuple[str, str]:
    auc, ap = (_figure(found, 3, "bottle", "hybrid", measure) for measure in ("auroc", "ap"))
    if auc is None or ap is None:
        return _judged("-", None)
    return _judged(f"{auc:.4f}, {ap:.4f}", auc >= LEAST_AUC and ap >= LEAST_AP)


def _hybrid_first(found: dict) -> tuple[str, str]:
    values = {name: _figure(found, 3, "bottle", name, "auroc") for name in PAPER_002}
    if any(value is None for value in values.values()):
        return _judged("-", None)
    beaten = [name for name in values if float(values["hybrid"] or 0.0) > float(values[name] or 0.0)]
    return _judged(f"beats {', '.join(beaten) or 'none'}", len(beaten) == len(values) - 1)


TARGETS: dict[str, Callable[[dict], tuple[str, str]]] = {
    "000: Siamese on either reconstructor above both pixel scores in every type": _siamese,
    "001: Fréchet distance defect / good at least 10, solar_mono": lambda found: _ratio(found, "solar_mono"),
    "001: Fréchet distance defect / good at least 10, wood": lambda found: _ratio(found, "wood"),
    "001: the GAN method has the best accuracy on its codes, solar_mono": lambda found: _first(found, "solar_mono"),
    "001: the GAN method has the best accuracy on its codes, wood": lambda found: _first(found, "wood"),
    "002: hybrid on bottle, AUC at least 0.997, AP at least 0.999": _hybrid,
    "002: the hybrid beats all four baselines on bottle": _hybrid_first,
}
WHY = {
    "001: Fréchet distance defect / good at least 10, solar_mono": (
        "after 200 epochs it was 12.9, with accuracy 0.805 and AUROC 0.879: with more of them unseen good images, too, "
        "lie further from those learnt from (5.6 instead of 2.1)"
    ),
    "001: Fréchet distance defect / good at least 10, wood": (
        "after 200 epochs it was 1.62, with accuracy 0.716 and AUROC 0.738: the generator has learnt from three fifths "
        "of 70 images, and its codes of wood with a defect resemble those of other wood. On a network of 2 minutes, "
        "codes of the encoder, of 16, 64 and 200 steps of Adam and of 16 and 64 of plain gradient descent (the "
        "paper's) had AUROC 0.58 to 0.80 and ratios of 2.0 to 2.8"
    ),
    "002: the hybrid beats all four baselines on bottle": (
        "`deep_knn` with lite0 at 256 px ranks all 83 test images rightly, which leaves nothing to beat; the paper's, "
        "with another network, has 0.967"
    ),
}


def _of(found: dict, cell: Cell, measure: str) -> str:
    figures = found.get(cell.key)
    if figures is None:
        return NOT_YET
    if "failed" in figures:
        return "failed"
    return _short(figures.get(measure, "-") or "-")


def _short(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return f"{number:.3f}" if abs(number) < 100 else f"{number:.3g}"


def _grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _table_1(every: Sequence[Cell], found: dict) -> str:
    lines = []
    for cell in (one for one in every if one.table == 1 and "share" not in one.method):
        paper = PAPER_000.get(cell.method)
        lines.append([cell.method, "paper: F1", *(("-",) * 5 if paper is None else map(str, paper))])
        if cell.key not in found:
            lines.append(["", "ours", *(NOT_YET for _ in TYPES)])
            continue
        for measure in ("precision", "recall", "f1"):
            ours = [_of(found, cell, f"{kind} {measure}") for kind in TYPES]
            lines.append(["", f"ours: {measure.replace('f1', 'F1')}", *ours])
    return (
        "\n## Paper 000, table 2: each defect type against good parts\n\n"
        "Another product with other defects: above the stroke the paper's types, below it those of magnetic_tile. Four "
        "fifths of every type are learnt from, the rest is tested; thresholds as in the paper (where fitted normals "
        "cross; probability 0.5 for the networks).\n"
        + _grid(["method", "", *(f"{theirs} / {kind}" for theirs, kind in zip(TYPES_000, TYPES, strict=True))], lines)
        + _cut_short(found)
        + "\nF1 against the share of defective images that is learnt from (paper: fig. 11 and 22, pictures only; there "
        "F1 rises with the share and falls again):\n"
        + _grid(
            ["method", *TYPES],
            [
                [cell.method, *(_of(found, cell, f"{kind} f1") for kind in TYPES)]
                for cell in every
                if cell.table == 1 and "share" in cell.method
            ],
        )
    )


def _cut_short(found: dict) -> str:
    """Say what a GAN that ran out of time is worth; empty where it had all its epochs."""
    figures = found.get(("1", "magnetic_tile", "GAN"), {})
    epochs, minutes = int(figures.get("epochs_at_most", 200)), figures.get("minutes", "inf")
    if epochs >= 200:
        return ""
    return (
        f"\nThe GAN had {epochs} of 200 epochs in its {minutes} minutes, 18 steps of the generator each. After 15 of "
        "them its pictures have the tiles' brightness and dark edges, and the grid of transposed convolutions in place "
        "of their grain; the nearest of them to a good image, after 300 steps of the search, is 0.079 away (mean "
        "absolute difference in -1..1; the mean of eight images 0.094). In the paper, too, "
        "the GAN is the weakest of the methods.\n"
    )


def _table_2(every: Sequence[Cell], found: dict) -> str:
    lines, distances = [], []
    for cell in (one for one in every if one.table == 2):
        paper = f"{PAPER_001[cell.method][cell.category]:.3f}" if cell.method in PAPER_001 else "-"
        lines.append([
            cell.category, cell.method, paper, _of(found, cell, "accuracy"), _of(found, cell, "auroc"),
            _setting(found, cell),
        ])  # fmt: skip
        if cell.method == "GAN":
            good, defect = FRECHET_001[cell.category]
            ours = [_of(found, cell, f"frechet_{name}") for name in ("good", "defect", "ratio")]
            covariance = found.get(cell.key, {}).get("frechet_covariance", "diagonal" if cell.key in found else "-")
            distances.append([cell.category, good, defect, *ours, covariance])
    return (
        "\n## Paper 001, tables I-III: latent distances and accuracy\n\n"
        "Accuracy at the best threshold, chosen with labels, for every method alike; the paper does not say its own, "
        "nor what it gave the methods that it compares with: here they judge the GAN's codes as it does and, in rows "
        "of their own, features of a network that knows ImageNet. The GAN had `--epochs 1200`; on wood it went through "
        "them all.\n"
        + _grid(["category", "method", "paper: accuracy", "ours: accuracy", "ours: AUROC", "with"], lines)
        + "\nFréchet distance of latents to those of unseen good images, by whole covariances where each set has two "
        "images for every dimension, else along each dimension alone:\n"
        + _grid(["category", *(f"{whose}: {what}" for whose, what in FRECHET_COLUMNS), "covariance"], distances)
    )


def _table_3(every: Sequence[Cell], found: dict) -> str:
    lines = []
    for cell in (one for one in every if one.table == 3):
        paper = PAPER_002[cell.method] if cell.category == "bottle" else ("-", "-")
        ours = [_of(found, cell, "auroc"), _of(found, cell, "ap")]
        lines.append([cell.category, cell.method, *(map(str, paper)), *ours, _setting(found, cell)])
    head = ["category", "method", "paper: AUC", "paper: AP", "ours: AUC", "ours: AP", "with"]
    return "\n## Paper 002, table 4: the hybrid and its baselines\n" + _grid(head, lines)


def _table_4(every: Sequence[Cell], found: dict) -> str:
    lines = [
        [cell.category, cell.method, _of(found, cell, "best_f1"), _of(found, cell, "auroc"), _setting(found, cell)]
        for cell in every
        if cell.table == 4
    ]
    return (
        "\n## Paper 003, tables 2 and 3: autoencoders and a supervised network\n\n"
        "The text that we have of the paper lacks its tables; it says: the density estimate is best on most classes, "
        "noise costs F1 everywhere (2.56 % on transistor, 28.10 % on toothbrush), the CNN reached about 65 % AUC and "
        "25 % F1.\n" + _grid(["category", "method", "ours: best F1", "ours: AUROC", "with"], lines)
    )


def _costs(every: Sequence[Cell], found: dict) -> str:
    lines = [
        [str(cell.table), cell.category, cell.method, f"`{found[cell.key]['detector']}`", found[cell.key]["size_px"],
         *(found[cell.key].get(name, "-") for name in ("infer_ms", "fit_s", "fit_peak_mb")),
         found[cell.key].get("epochs_at_most", "-") if any(word in cell.detector for word in TRAINED) else "-"]
        for cell in every
        if cell.key in found and "failed" not in found[cell.key]
    ]  # fmt: skip
    failed = [
        f"- table {cell.table}, {cell.category}, {cell.method}: {found[cell.key]['failed']}\n"
        for cell in every
        if "failed" in found.get(cell.key, {})
    ]
    head = ["table", "category", "method", "detector", "size, px", "infer, ms", "fit, s", "peak, MB", "epochs at most"]
    text = "\n## What it costs\n" + (_grid(head, lines) if lines else f"\n{NOT_YET}\n")
    return text + ("\nFailed:\n\n" + "".join(failed) if failed else "")


def _setting(found: dict, cell: Cell) -> str:
    figures = found.get(cell.key)
    if figures is None:
        return "-"
    on_backbone = cell.detector.endswith(ON_BACKBONE) or cell.method.endswith(IMAGENET)
    network = f"{figures['backbone']}, " if on_backbone else ""
    cut = "" if figures["minutes"] == "inf" else f", at most {figures['minutes']} min"
    return f"{network}{figures['size_px']} px{cut}"
