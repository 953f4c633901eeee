"""A threshold keeps its promised rate, and says how far it can be trusted."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from calibration.errors import CalibrationError
from calibration.thresholds import (
    bound_told,
    good_parts_needed,
    median_and_deviation,
    rate_upper_bound,
    reject_threshold,
    smallest_rate,
    strangers,
)

RATES = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 10), Fraction(1, 20), Fraction(1, 100), Fraction(3, 1000)]


def rank_by_hand(n_good: int, rate: Fraction) -> int:
    """Return the least k with k / (n + 1) >= 1 - rate, by counting up in exact arithmetic."""
    return next(k for k in range(1, n_good + 2) if Fraction(k, n_good + 1) >= 1 - rate)


@pytest.mark.parametrize("rate", RATES)
def test_the_threshold_is_the_score_of_the_rank_found_by_counting(rate):
    generator = np.random.default_rng(1)
    for n_good in (*range(1, 60), 99, 100, 199, 332, 333, 999, 1000):
        scores = generator.normal(size=n_good)
        rank = rank_by_hand(n_good, rate)
        if rank > n_good:
            with pytest.raises(CalibrationError):
                reject_threshold(scores, float(rate))
        else:
            assert reject_threshold(scores, float(rate)) == sorted(scores)[rank - 1]


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 3000), st.integers(2, 3000))
def test_the_parts_needed_are_the_fewest_that_are_accepted(n_good, one_in):
    enough = rank_by_hand(n_good, Fraction(1, one_in)) <= n_good
    assert (n_good >= good_parts_needed(1 / one_in)) == enough


@pytest.mark.parametrize(("n_good", "rate"), [(19, 0.05), (99, 0.01), (150, 0.02), (200, 0.1)])
def test_new_good_parts_are_rejected_at_the_promised_rate_on_average(n_good, rate):
    generator = np.random.default_rng(20)
    trials = 4000
    scores = generator.gamma(2.0, size=(trials, n_good))
    rejected = [stats.gamma.sf(reject_threshold(row, rate), 2.0) for row in scores]  # the true rate of each threshold
    promised = (n_good + 1 - rank_by_hand(n_good, Fraction(rate).limit_denominator(1000))) / (n_good + 1)
    assert promised <= rate
    assert np.mean(rejected) == pytest.approx(promised, abs=4 * np.std(rejected) / np.sqrt(trials))


@pytest.mark.parametrize(("n_good", "rate"), [(99, 0.01), (200, 0.01), (400, 0.05)])
def test_the_true_rate_is_below_the_bound_in_95_of_100_calibrations(n_good, rate):
    generator = np.random.default_rng(21)
    trials = 4000
    true_rates = 1 - np.sort(generator.uniform(size=(trials, n_good)), axis=1)[:, -1 - int(rate * (n_good + 1)) + 1]
    below = np.mean(true_rates <= rate_upper_bound(n_good, rate))
    assert below == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / trials))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_bound_is_the_quantile_of_a_beta_distribution(rate, confidence):
    for n_good in (1, 2, 9, 19, 99, 150, 333, 1000, 5000):
        if n_good < good_parts_needed(float(rate)):
            continue
        rank = rank_by_hand(n_good, rate)
        wanted = stats.beta.ppf(confidence, n_good + 1 - rank, rank)
        assert rate_upper_bound(n_good, float(rate), confidence) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("n_good", "bound"), [(99, 0.030), (200, 0.023), (1000, 0.016)])
def test_a_rate_of_one_per_cent_is_bounded_as_the_documents_say(n_good, bound):
    assert round(rate_upper_bound(n_good, 0.01), 3) == bound


def test_parts_that_were_set_aside_count_as_good_parts_rejected():
    assert rate_upper_bound(95, 1 / 96, left_out=5) == pytest.approx(stats.beta.ppf(0.95, 6, 95), rel=1e-9)


@pytest.mark.parametrize("n_good", [10, 20, 70, 250, 1000])
def test_an_exponential_tail_loses_good_parts_in_five_sets_of_a_hundred(n_good):
    generator = np.random.default_rng(22)
    trials = 2000
    lost = sum(len(strangers(generator.exponential(size=n_good))) > 0 for _ in range(trials))
    assert lost / trials == pytest.approx(0.045, abs=0.02)


@pytest.mark.parametrize(
    ("n_good", "n_strange"), [(20, 1), (60, 3), (200, 10), (1000, 50), (40, 4), (200, 20), (1000, 100)]
)
def test_up_to_ten_per_cent_of_strangers_are_found_wherever_they_stand(n_good, n_strange):
    generator = np.random.default_rng(23)
    scores = np.concatenate([generator.normal(5.0, 1.0, n_good - n_strange), generator.uniform(20.0, 60.0, n_strange)])
    place = generator.permutation(n_good)
    found = strangers(scores[place])
    assert sorted(place[found]) == list(range(n_good - n_strange, n_good))
    assert list(scores[place][found]) == sorted(scores[place][found], reverse=True)


def test_strangers_far_apart_from_one_another_are_found_and_cost_no_good_part():
    generator = np.random.default_rng(24)
    good = generator.exponential(1.0, 200)
    strange = good.max() + np.array([3.0, 3.1, 3.3, 40.0, 41.0, 400.0])
    found = strangers(np.concatenate([good, strange]))
    assert list(found) == [205, 204, 203, 202, 201, 200]


def with_a_gap(rank: int, by_chance: float) -> np.ndarray:
    """Return 260 scores that fall as an exponential tail does, with one gap that is this likely by chance."""
    scores = -np.log((np.arange(260) + 0.5) / 260)
    usual = (np.arange(1, 260) * -np.diff(scores))[26:130]
    distance = usual.sum() * (by_chance ** (-1.0 / len(usual)) - 1.0)
    scores[:rank] += distance / rank - (scores[rank - 1] - scores[rank])
    return scores


def test_many_strangers_need_stronger_evidence_than_one() -> None:
    assert len(strangers(with_a_gap(1, 1e-3))) == 1
    assert len(strangers(with_a_gap(25, 1e-3))) == 0  # a kind of good parts, more likely
    assert len(strangers(with_a_gap(25, 1e-9))) == 25


def test_who_stands_less_than_a_deviation_apart_is_no_stranger() -> None:
    scores = np.concatenate([np.linspace(0.0, 2.0, 200), np.linspace(2.5, 2.6, 12)])  # deviation about 0.75
    assert len(strangers(scores)) == 0
    scores[200:] += 1.0
    assert len(strangers(scores)) == 12


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 2.0, 50.0], [3.0] * 40, [3.0] * 39 + [9.0]])
def test_nobody_is_a_stranger_where_there_is_nothing_to_compare_with(scores):
    assert len(strangers(np.array(scores))) == 0


def test_too_few_parts_are_refused_with_the_number_missing():
    wanted = (
        "80 good parts found, a false reject rate of 0.01 needs 99: inspect 19 more good parts, "
        "or ask for a rate of 0.013 or more"
    )
    with pytest.raises(CalibrationError, match=f"^{re.escape(wanted)}$"):
        reject_threshold(np.zeros(80), 0.01)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 200_000))
def test_the_rate_that_a_refusal_offers_is_accepted(n_good):
    with pytest.raises(CalibrationError) as caught:
        reject_threshold(np.zeros(n_good), 0.9 / (n_good + 1))
    offered = float(re.search(r"ask for a rate of (\S+) or more", str(caught.value)).group(1))
    assert good_parts_needed(offered) <= n_good
    assert offered <= 1.12 * smallest_rate(n_good)


def test_no_part_at_all_is_refused():
    with pytest.raises(CalibrationError, match=r"no good parts found, a false reject rate of 0\.01 needs 99: inspect"):
        reject_threshold(np.zeros(0), 0.01)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(strange):
    with pytest.raises(CalibrationError, match="1 of 200 scores are not finite, need finite ones: check the engine"):
        reject_threshold(np.array([strange, *range(199)]), 0.01)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(CalibrationError, match="found, need a share above 0 and below 1"):
        reject_threshold(np.zeros(100), rate)


def test_no_bound_is_given_where_the_threshold_would_be_refused():
    with pytest.raises(CalibrationError, match=r"98 good parts found, need 99 to bound a false reject rate of 0\.01"):
        rate_upper_bound(98, 0.01)


@pytest.mark.parametrize("n_good", [4000, 4001])
def test_median_and_deviation_are_those_of_a_normal_distribution_and_outliers_hardly_move_them(n_good):
    scores = np.random.default_rng(3).normal(5.0, 2.0, n_good)
    assert median_and_deviation(scores) == pytest.approx((5.0, 2.0), rel=0.05)
    scores[: n_good // 10] = 1e6
    assert median_and_deviation(scores) == pytest.approx((5.0, 2.0), rel=0.2)


def test_the_deviation_of_equal_scores_is_zero():
    assert median_and_deviation(np.full(9, 1.5)) == (1.5, 0.0)


def test_the_order_of_the_scores_does_not_matter_and_they_are_not_changed():
    scores = np.array([3.0, 1.0, 2.0])
    assert reject_threshold(scores, 0.25) == 3.0
    assert scores.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("bound", "told"), [(0.0234985, "2.4%"), (0.0298067, "3.0%"), (0.030000000000000002, "3.0%"), (0.0004, "0.1%")]
)
def test_a_bound_is_told_rounded_up_so_that_the_rate_is_below_it(bound, told):
    assert bound_told(bound) == told
