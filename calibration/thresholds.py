"""Thresholds from good parts only, with a statement of how far they can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from calibration.errors import CalibrationError

CONFIDENCE = 0.95
SD_PER_MEDIAN_DISTANCE = 1.4826  # of a normal distribution
MOST_STRANGERS = 0.1  # share of a set of good parts that may be none
BY_CHANCE = 0.05  # share of sets of nothing but good parts that lose some


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where a recipe draws its lines, in the units of its graph, and what they rest on."""

    score: float  # a part whose score is above is rejected
    map: float  # a place whose map value is above is marked; yellow on the heatmap
    false_reject_rate: float  # share of good parts that the score threshold rejects on average
    rate_upper_bound: float  # with 95 % confidence the true share is not above this
    n_good: int  # good parts that the thresholds rest on
    fitted_on: str  # engine and precision that gave the scores, such as "openvino f32"
    good_median: float | None = None  # of the scores that the thresholds rest on; None in recipes that do not tell
    good_deviation: float | None = None  # robust standard deviation of the same, see `median_and_deviation`


def reject_threshold(good_scores: NDArray[np.float64], false_reject_rate: float) -> float:
    """Return the score above which a part is rejected.

    good_scores: (n,) scores of known-good parts from the production path, any order.
    false_reject_rate: wanted share of good parts rejected, in (0, 1).

    Raises CalibrationError if n is too small to support the rate, or a score is not finite.
    Source: split conformal quantile, Angelopoulos & Bates 2021 (arXiv:2107.07511), sec. 1.
    """
    scores = _checked(good_scores)
    if len(scores) == 0:
        raise CalibrationError(
            f"no good parts found, a false reject rate of {false_reject_rate:g} needs "
            f"{good_parts_needed(false_reject_rate)}: inspect good parts first"
        )
    missing = good_parts_needed(false_reject_rate) - len(scores)
    if missing > 0:
        raise CalibrationError(
            f"{len(scores)} good parts found, a false reject rate of {false_reject_rate:g} needs "
            f"{len(scores) + missing}: inspect {missing} more good parts, or ask for a rate of "
            f"{_rounded_up(smallest_rate(len(scores)))} or more"
        )
    return float(scores[_rank(len(scores), false_reject_rate) - 1])


def median_and_deviation(good_scores: NDArray[np.float64]) -> tuple[float, float]:
    """Return the median of the scores and 1.4826 times the median distance from it.

    good_scores: (n,), n >= 1. The second is the standard deviation where scores are normal, and one part in ten that
    scores apart hardly moves it; 0 where more than half of the scores are equal.
    """
    middle = float(np.median(good_scores))
    return middle, SD_PER_MEDIAN_DISTANCE * float(np.median(np.abs(good_scores - middle)))


def good_parts_needed(false_reject_rate: float) -> int:
    """Return the least number of good parts that supports the rate: 1 / rate - 1, rounded up."""
    if not 0.0 < false_reject_rate < 1.0:
        raise CalibrationError(f"false reject rate {false_reject_rate:g} found, need a share above 0 and below 1")
    return math.ceil(1.0 / false_reject_rate - 1.0 - 1e-9)


def smallest_rate(n_good: int) -> float:
    """Return the smallest false reject rate that n good parts support."""
    return 1.0 / (n_good + 1)


def strangers(good_scores: NDArray[np.float64], *, looks: int | None = None) -> NDArray[np.int64]:
    """Return the indices of scores, highest first, that lie too far above the others to be of good parts.

    good_scores: (n,); 10 % of them at most are returned, rounded up. The tail of good scores is taken to fall as an
    exponential one, or faster: then rank times distance to the next lower score is alike for all ranks, and one of the
    highest 10 % that is too large beside those from there to the median is no chance (F test, 5 % over all ranks
    together). Few strangers are likelier than many, which may be a kind of good parts: of the 5 % rank k has a share in
    proportion to 1 / k. A gap of less than a robust standard deviation of the scores sets nobody apart, however little
    of a chance it is. All above the gap of least chance, so weighed, are strangers; what is left is tried again, its
    highest being of rank 1, since strangers above would make every gap of a good part count as many times as they are:
    until none is found, or `looks` times. A heavier tail loses good parts more often.
    Source: Sukhatme 1937, normalised spacings; Rosner 1975 for many outliers, largest deviation first; Holm 1979,
    weighted tests.
    """
    scores = np.asarray(good_scores, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    most, found = math.ceil(MOST_STRANGERS * len(scores)), 0
    least = median_and_deviation(scores)[1] if len(scores) else 0.0
    for _ in count() if looks is None else range(looks):
        more = _above_gap(scores[order[found:]], most - found, least)
        if not more:
            break
        found += more
    return order[:found]


def _above_gap(falling: NDArray[np.float64], most: int, least: float) -> int:
    """Return how many of the scores (n,), highest first, lie above a gap that is no chance, at most `most`; 0: none.

    least: width of a gap that counts.
    """
    distances = np.arange(1, len(falling)) * -np.diff(falling)  # [k - 1]: between ranks k and k + 1, times k
    usual = distances[most : len(falling) // 2]
    if most == 0 or len(usual) < 3 or not usual.mean() > 0.0:
        return 0
    ranks = np.arange(1, most + 1)
    by_chance = (1.0 + distances[:most] / usual.sum()) ** -float(len(usual))
    weighed = np.where(distances[:most] < least * ranks, 1.0, by_chance * ranks * (1.0 / ranks).sum())
    found = int(np.argmin(weighed))
    return found + 1 if weighed[found] < BY_CHANCE else 0


def rate_upper_bound(
    n_good: int, false_reject_rate: float, confidence: float = CONFIDENCE, *, left_out: int = 0
) -> float:
    """Return the share of good parts that is truly rejected at most, with the given confidence.

    left_out: parts beside the n_good that scored above all and were set aside; they count as good parts rejected.

    Raises CalibrationError if n is too small to support the rate.

    Given the calibration set, the true rate follows Beta(n + 1 - k, k) with k the rank of the threshold.
    Source: Vovk 2012 (arXiv:1209.2673), prop. 2; Angelopoulos & Bates 2021, sec. 3.2.
    """
    if n_good < good_parts_needed(false_reject_rate):
        raise CalibrationError(
            f"{n_good} good parts found, need {good_parts_needed(false_reject_rate)} to bound a false reject rate of "
            f"{false_reject_rate:g}: inspect more good parts"
        )
    above = n_good + 1 - _rank(n_good, false_reject_rate) + left_out
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection to 1e-18
        middle = (low + high) / 2
        if _chance_of_fewer(above, n_good + left_out, middle) > 1.0 - confidence:
            low = middle
        else:
            high = middle
    return high


def bound_told(rate_upper_bound: float) -> str:
    """Return a bound such as "2.4%", rounded up: the true share is below what people read, too."""
    return f"{math.ceil(rate_upper_bound * 1000 - 1e-9) / 10:.1f}%"


def _rank(n_good: int, false_reject_rate: float) -> int:
    """Return k: the threshold is the k-th smallest good score."""
    return math.ceil((n_good + 1) * (1.0 - false_reject_rate) - 1e-9)


def _chance_of_fewer(count: int, n: int, share: float) -> float:
    """Return P(Binomial(n, share) < count) for small count, which equals P(Beta(count, n + 1 - count) > share)."""
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        + i * math.log(share) + (n - i) * math.log1p(-share)
        for i in range(count)
    ]  # fmt: skip
    return math.fsum(math.exp(value) for value in logs)


def _checked(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    strange = int((~np.isfinite(scores)).sum())
    if strange:
        raise CalibrationError(
            f"{strange} of {len(scores)} scores are not finite, need finite ones: check the engine with its self-test"
        )
    return np.sort(np.asarray(scores, dtype=np.float64))


def _rounded_up(rate: float) -> str:
    """Return the rate to two digits, never below it: a user who asks for what we print must get it."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return f"{math.ceil(rate / step - 1e-9) * step:.2g}"
