"""What the benchmarks on folders of images share: which categories there are, and the table that is written."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


def categories_in(data: Path, chosen: Sequence[str] | None) -> list[str]:
    """Return the categories in MVTec AD layout below data, or those that were asked for."""
    return list(chosen or sorted(path.name for path in data.iterdir() if (path / "train" / "good").is_dir()))


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table as CSV, whole."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
