"""F1 against the share of defective parts, for the report: what a threshold is worth where defects are rare.

Source: paper 000, fig. 11, 22, sec. 5.1, 5.3. The paper trains once for each share of defective images; a recipe is
trained once. Reading chosen: recall of each defect type and overkill are those of the tested parts at the recipe's
threshold, and the share is that of the parts on the line. What the share in the training does is a table of its own
(`benchmarks/papers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data import types_of
from trainer.metrics import ScoredImage

MOST_SHARE = 0.5
POINTS = 100
EVERY = "all defects"


@dataclass(frozen=True, slots=True)
class ShareCurve:
    """F1 of one defect type against the share of defective parts."""

    label: str
    n: int  # tested parts of the type
    path: str  # SVG path in a unit square of 100 x 100: shares 0..0.5 to the right, F1 0..1; y counts downwards


def share_curves(images: Sequence[ScoredImage], threshold: float) -> tuple[ShareCurve, ...]:
    """Return one curve for all defects and one for each type; none where good or defective parts are missing."""
    caught = [(types_of(image.label), image.outcome(threshold) != "pass") for image in images if image.defective]
    overkill = [image.outcome(threshold) != "pass" for image in images if not image.defective]
    if not caught or not overkill:
        return ()
    groups = {EVERY: [found for _, found in caught]}
    kinds = sorted({kind for several, _ in caught for kind in several})
    if len(kinds) > 1:
        groups |= {kind: [found for several, found in caught if kind in several] for kind in kinds}
    wrong = float(np.mean(overkill))
    return tuple(ShareCurve(label, len(found), _path(float(np.mean(found)), wrong)) for label, found in groups.items())


def f1_at(share: float, recall: float, overkill: float) -> float:
    """Return F1 where this share of the parts, above 0, is defective."""
    return 2 * recall * share / (recall * share + overkill * (1 - share) + share)


def _path(recall: float, overkill: float) -> str:
    shares = np.linspace(0.0, MOST_SHARE, POINTS + 1)[1:]
    points = (f"{100 * s / MOST_SHARE:.4g} {100 - 100 * f1_at(s, recall, overkill):.4g}" for s in shares)
    return "M" + "L".join(points)
