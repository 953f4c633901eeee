"""Does anything that is read as a recipe or as settings do harm? Five kinds of strange files, one after the other.

    python tests/soak/fuzz.py [--minutes 5] [--first 0] [--out fuzz.csv]

`read` is what was read well, a change without effect; `refused` ended with an error of ours and its sentence; `harm` is
any other error, a warning, or more than 20 s for one file. The files are those of the tests, `--first` is the number to
begin with: other numbers are other files. An audit hook of the interpreter sees what is opened for writing, renamed,
deleted, started or called up anywhere but in the folder that the recipe is brought into; afterwards that folder, and
what lies beside it, must be byte for byte as before.
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from fuzzing import FUZZERS, Place, dice_of, only_our_own_errors
from machine import describe

HEADINGS = ("kind", "files", "read", "refused", "harm", "slowest ms", "s")
LONGEST_S = 20.0  # for one file; then the script ends, and shows where it stood
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.truncate",
)
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")


class Guard:
    """Notes what this process does outside a folder, while it is on."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}/"
        self.is_on = False
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            path, _, flags = arguments
            if flags & WRITES and not self._is_inside(path):
                self.seen[f"open {path}"] += 1
        elif event in CHANGES:
            outside = [path for path in arguments if isinstance(path, str | bytes | Path) and not self._is_inside(path)]
            self.seen.update(f"{event} {path!r}" for path in outside)
        elif event in STARTS:
            self.seen[f"{event} {str(arguments)[:100]}"] += 1

    def _is_inside(self, path: object) -> bool:
        if not isinstance(path, str | bytes | Path):  # a descriptor that is open already
            return True
        return str(Path(os.fsdecode(path)).resolve()).startswith(self._folder)


def fuzz(place: Place, guard: Guard, kind: str, seconds: float, first: int) -> dict[str, Any]:
    """Try files of one kind for so long, and return what became of them."""
    tally: Counter[str] = Counter()
    slowest_s, began_s, number = 0.0, time.monotonic(), first
    while time.monotonic() < began_s + seconds:
        read = FUZZERS[kind](place, dice_of(kind, number))
        if read is not None:
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            file_s, guard.is_on = time.monotonic(), True
            try:
                tally["read" if only_our_own_errors(read) else "refused"] += 1
            except Exception as error:  # noqa: BLE001 what is looked for
                tally["harm"] += 1
                print(f"HARM {kind!r} {number}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            guard.is_on = False
            slowest_s = max(slowest_s, time.monotonic() - file_s)
        number += 1
    faulthandler.cancel_dump_traceback_later()
    figures = {"kind": kind, "files": tally.total(), **{name: tally[name] for name in ("read", "refused", "harm")}}
    return {**figures, "slowest ms": round(1e3 * slowest_s, 1), "s": round(time.monotonic() - began_s)}


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder but the one that is being read."""
    return {
        str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.stem != "hostile"
    }


def main() -> int:
    """Fuzz every kind, print one line for each; 0 if nothing did harm."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    print(describe())
    rows = []
    with tempfile.TemporaryDirectory() as around:
        inside = Path(around).resolve() / "station" / "place"
        inside.mkdir(parents=True)
        place, guard = Place(inside), Guard(inside)
        before = contents(Path(around))
        for kind in FUZZERS:
            rows.append(fuzz(place, guard, kind, 60 * wanted.minutes / len(FUZZERS), wanted.first))
            print("  ".join(f"{name} {rows[-1][name]}" for name in HEADINGS), flush=True)
        untouched = contents(Path(around)) == before and place.store.current()[0] == "good"
    for what, times in guard.seen.most_common():
        print(f"OUTSIDE {what}: {times}")
    print(f"files as before: {'yes' if untouched else 'NO'}; done outside: {guard.seen.total()}")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    if wanted.out is not None:
        with wanted.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, HEADINGS)
            writer.writeheader()
            writer.writerows(rows)
    return 0 if untouched and not guard.seen and not any(row["harm"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
