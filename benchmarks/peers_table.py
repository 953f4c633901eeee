"""What `peers.py` makes of its answers: rows, the CSV and the tables. Knows neither anomalib nor torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.metrics import ScoredImage, evaluate

KINDS = ("trained", "export")
FROM_ANSWER = (
    "fit_s", "fit_cpu_s", "fit_peak_mb", "coreset_s", "own_coreset_s", "coreset_same", "coreset_compared", "onnx_mb",
    "openvino_mb", "recipe_mb", "export", "export_note", "registration", "backbone_difference", "torchvision_stub",
)  # fmt: skip
TIMED = {
    "export": "",
    "path": " path",
    "openvino": " openvino",
    "default": " default",
    "torch": " torch",
}  # column: what the duel calls it
COLUMNS = (
    "category", "side", "method", "train", "test_good", "test_defective", "trained_auroc", "trained_ap", "export_auroc",
    "export_ap", "flips", "default_flips", "default_precision", "no_verdict", *FROM_ANSWER,
    *(f"{column}_{figure}" for column in TIMED for figure in ("p50_ms", "p99_ms", "cpu_ms")),
    "against", "export_ratio", "export_cpu_ratio", "path_ratio", "path_cpu_ratio", "rounds", "load", "lists",
)  # fmt: skip


def row(lists: Mapping[str, Any], side: str, method: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of one method on one category, without latency.

    lists: {"category", "digest", "train": [file], "test": [[file, label]]}; answer: what either side wrote.

    Raises SystemExit if the answer is about other files.
    """
    check_lists(lists, method, answer)
    label_of = dict(lists["test"])
    labels = [label_of[file] for file in answer["test"]]
    filled: dict[str, Any] = {
        "category": lists["category"],
        "side": side,
        "method": method,
        "train": len(answer["train"]),
        "test_good": labels.count("good"),
        "test_defective": len(labels) - labels.count("good"),
        "lists": lists["digest"][:12],
        **{name: answer[name] for name in FROM_ANSWER if name in answer},
    }
    for kind in KINDS:
        if f"{kind}_score" in answer:
            figures = evaluate(
                [
                    ScoredImage(file, label, score)
                    for file, label, score in zip(answer["test"], labels, answer[f"{kind}_score"], strict=True)
                ],
                0.0,
            )
            filled[f"{kind}_auroc"], filled[f"{kind}_ap"] = figures.auroc, figures.average_precision
    filled["no_verdict"] = sum(score is None for score in answer["trained_score"])
    for name, kind in (("flips", "export"), ("default_flips", "default_export")):
        if f"{kind}_reject" in answer:
            filled[name] = flips(answer["trained_reject"], answer[f"{kind}_reject"])
    filled["default_precision"] = answer.get("default_export_precision")
    return filled


def check_lists(lists: Mapping[str, Any], method: str, answer: Mapping[str, Any]) -> None:
    """Raise SystemExit unless the answer is about exactly the files of the lists."""
    for name, wanted in (("train", lists["train"]), ("test", [file for file, _ in lists["test"]])):
        found = answer[name]
        if sorted(found) != sorted(wanted):
            strangers = sorted(set(found) ^ set(wanted))[:1] or ["one of them twice"]
            raise SystemExit(
                f"{lists['category']}, {method}: {len(found)} {name} files found, {len(wanted)} wanted, first that "
                f"differs {strangers[0]}: delete its answer and run again"
            )


def flips(trained: Sequence[bool | None], exported: Sequence[bool | None]) -> int:
    """Return how many images the export judges otherwise than the trained model."""
    return sum(before != after for before, after in zip(trained, exported, strict=True))


def with_latency(rows: Sequence[dict[str, Any]], duel: Mapping[str, Any], against: str) -> list[dict[str, Any]]:
    """Return the rows of one category with the duel's times, and the ratios to our detector `against`.

    anomalib's path is its OpenVINOInferencer at f32, ours the agent's pipeline; above 1 says that ours is quicker.
    """
    filled = []
    for plain in rows:
        entry = {**plain, "rounds": duel["rounds"], "load": duel["load"], "against": against}
        for column, suffix in TIMED.items():
            for figure, value in duel.get(f"{plain['method']}{suffix}", {}).items():
                entry[f"{column}_{figure}"] = value
        path = "path" if plain["side"] == "taktsight" else "openvino"
        for name, theirs, ours in (("export", "export", ""), ("path", path, " path")):
            base = duel.get(f"{against}{ours}", {})
            for ratio, figure in ((f"{name}_ratio", "p50_ms"), (f"{name}_cpu_ratio", "cpu_ms")):
                if base and f"{theirs}_{figure}" in entry:
                    entry[ratio] = round(entry[f"{theirs}_{figure}"] / base[figure], 2)
        filled.append(entry)
    return filled


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]], replaced: Sequence[str]) -> None:
    """Write the rows; of an existing file, the categories that are not replaced stay."""
    kept: list[Mapping[str, Any]] = []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stored:
            kept = [old for old in csv.DictReader(stored) if old["category"] not in replaced]
    written = sorted([*kept, *rows], key=lambda entry: entry["category"])
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: rounded(value) for name, value in entry.items()} for entry in written)


def rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) and value >= 0.001 else value


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return both tables in Markdown, and what must be known to read them."""
    timed = [latency_table(rows)] if any(entry.get("rounds") for entry in rows) else []
    return "\n\n".join([accuracy_table(rows), *timed, notes(rows)])


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown(
        ["category", "method", "AUROC trained / export", "AP", "flips f32 (default)", "fit s (CPU s)", "peak MiB",
         "ONNX / OpenVINO / recipe MB"],
        [
            [
                entry["category"],
                name(entry),
                f"{share(entry, 'trained_auroc')} / {share(entry, 'export_auroc')}",
                share(entry, "trained_ap"),
                flipped(entry),
                f"{number(entry, 'fit_s', 0)} ({number(entry, 'fit_cpu_s', 0)})",
                number(entry, "fit_peak_mb", 0),
                " / ".join(number(entry, f"{kind}_mb", 1) for kind in ("onnx", "openvino", "recipe")),
            ]
            for entry in rows
        ],
    )  # fmt: skip


def latency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    against = next((str(entry["against"]) for entry in rows if entry.get("against")), "ours")
    return markdown(
        ["category", "method", "export p50 / p99", "CPU", f"x {against} (CPU)", "own path p50 / p99", "CPU",
         f"x {against} (CPU)", "by default", "TorchInferencer p50 / p99", "n", "load"],
        [
            [
                entry["category"],
                name(entry),
                f"{number(entry, 'export_p50_ms', 1)} / {number(entry, 'export_p99_ms', 1)}",
                number(entry, "export_cpu_ms", 1),
                f"{number(entry, 'export_ratio', 1)} ({number(entry, 'export_cpu_ratio', 1)})",
                f"{number(entry, f'{path(entry)}_p50_ms', 1)} / {number(entry, f'{path(entry)}_p99_ms', 1)}",
                number(entry, f"{path(entry)}_cpu_ms", 1),
                f"{number(entry, 'path_ratio', 1)} ({number(entry, 'path_cpu_ratio', 1)})",
                by_default(entry),
                f"{number(entry, 'torch_p50_ms', 1)} / {number(entry, 'torch_p99_ms', 1)}",
                number(entry, "rounds", 0),
                number(entry, "load", 0),
            ]
            for entry in rows
            if entry.get("rounds")
        ],
    )  # fmt: skip


def notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line per thing that is not as it looks."""
    lines = [
        "Flips: test images that the export judges otherwise than the trained model, at the method's own threshold.",
        "anomalib sets its threshold with the labels of these test images and clamps exported scores to 0..1; ours "
        "rests on good training images alone.",
        "Fit: ours includes five-fold scoring for the threshold and the export, anomalib's neither.",
        "Export: both in one process, OpenVINO f32, 2 threads, batch 1. Own path, from the same decoded image: the "
        "agent's pipeline less registration; anomalib's OpenVINOInferencer, f32, 2 threads; by default: the same "
        "without settings, in the precision that OpenVINO then takes (p50). Flips in brackets belong to that one.",
    ]
    quick = [entry for entry in rows if entry.get("coreset_s") not in (None, "")]
    lines += [
        f"PatchCore's coreset on {entry['category']} was picked in C in {number(entry, 'coreset_s', 0)} s (in the fit "
        f"time); anomalib's own loop would take about {number(entry, 'own_coreset_s', 0)} s. On 4096 patches "
        f"{entry['coreset_same']} of {entry['coreset_compared']} picks are the same."
        for entry in quick
    ]
    lines += sorted({
        f"{entry['method']}: {entry['export_note']}: exported again for one."
        for entry in rows
        if entry.get("export_note")
    })  # fmt: skip
    lines += [
        f"{entry['method']} on {entry['category']} was not exported: {entry['export']}"
        for entry in rows
        if entry.get("export") not in (None, "", "ok")
    ]
    differences = [float(entry["backbone_difference"]) for entry in rows if entry.get("backbone_difference")]
    if differences:
        lines.append(f"Both backbones answer alike: at most {max(differences):.1e} of the largest feature apart.")
    if any(str(entry.get("torchvision_stub")) == "True" for entry in rows):
        lines.append("torchvision's compiled operators were declared, not loaded; anomalib called none of them.")
    return "\n".join(f"- {line}" for line in lines)


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])


def name(entry: Mapping[str, Any]) -> str:
    return f"**{entry['method']}**" if entry["side"] == "taktsight" else f"anomalib {entry['method']}"


def path(entry: Mapping[str, Any]) -> str:
    return "path" if entry["side"] == "taktsight" else "openvino"


def flipped(entry: Mapping[str, Any]) -> str:
    total = int(entry["test_good"]) + int(entry["test_defective"])
    by_default = "" if entry.get("default_flips") in (None, "") else f" ({entry['default_flips']})"
    return "-" if entry.get("flips") in (None, "") else f"{entry['flips']}{by_default} of {total}"


def by_default(entry: Mapping[str, Any]) -> str:
    return (
        f"{number(entry, 'default_p50_ms', 1)} ({entry['default_precision']})" if entry.get("default_p50_ms") else "-"
    )


def share(entry: Mapping[str, Any], column: str) -> str:
    return number(entry, column, 3)


def number(entry: Mapping[str, Any], column: str, digits: int) -> str:
    value = entry.get(column)
    return "-" if value in (None, "") else f"{float(value):.{digits}f}"
