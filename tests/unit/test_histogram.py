"""Counted durations, against the sorted values themselves and against HdrHistogram's own package."""

import math

import numpy as np
import pytest

from agent.health.histogram import Histogram, merged, merged_by_name


def of(values):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


def rank(values, percentile):
    """The value at the nearest rank."""
    return sorted(values)[max(1, math.ceil(len(values) * percentile / 100 - 1e-9)) - 1]


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e5])
@pytest.mark.parametrize("n", [1, 7, 999, 20_000])
def test_percentiles_are_those_of_the_values_to_a_thousandth(scale, n):
    values = (scale * np.random.default_rng(n).lognormal(0.0, 1.0, n)).tolist()
    summary = of(values).summary()
    assert summary.n == n
    assert summary.mean == pytest.approx(np.mean(values), rel=1e-4, abs=5e-4)
    assert summary.max == pytest.approx(max(values), abs=5e-4)
    for percentile, found in ((50, summary.p50), (99, summary.p99), (99.9, summary.p999)):
        wanted = rank(values, percentile)
        assert wanted - 5.1e-4 <= found <= wanted * (1 + 1 / 1024) + 1e-3


def test_hdrhistogram_says_the_same():
    package = pytest.importorskip("hdrh.histogram")
    values = (20.0 * np.random.default_rng(1).lognormal(0.0, 1.0, 5000)).tolist()
    theirs = package.HdrHistogram(1, 3_600_000_000, 3)
    for value in values:
        theirs.record_value(round(value * 1e3))
    ours = of(values).summary()
    for percentile, found in ((50, ours.p50), (99, ours.p99), (99.9, ours.p999)):
        assert found * 1e3 == pytest.approx(theirs.get_value_at_percentile(percentile))


def test_of_nothing_there_is_no_summary():
    assert Histogram().summary() is None


def test_what_is_no_duration_is_not_counted_and_less_than_none_counts_as_none():
    histogram = of([math.nan, math.inf, -3.0, 5.0])
    assert (histogram.summary().n, histogram.summary().max) == (2, 5.0)
    assert histogram.cumulative([0.0])[0] == [1]


def test_no_percentile_lies_above_the_greatest_value():
    summary = of([49.999] * 10).summary()
    assert summary.p50 == summary.p999 == summary.max == pytest.approx(49.999)


def test_counts_below_bounds_are_those_of_the_values():
    values = np.random.default_rng(2).gamma(4.0, 5.0, 10_000)
    below, n, sum_ms = of(values.tolist()).cumulative([1, 10, 20, 50, 1e6])
    assert n == 10_000
    assert below[-1] == n
    assert below == sorted(below)
    assert sum_ms == pytest.approx(values.sum(), rel=1e-4)
    for bound, found in zip([1, 10, 20, 50], below, strict=False):
        assert (values <= bound - 1e-3).sum() <= found <= (values <= bound * 1.001 + 1e-3).sum()


def test_merged_is_as_if_all_had_been_recorded_in_one():
    values = np.random.default_rng(3).gamma(4.0, 5.0, 2000).tolist()
    parts = [of(values[:500]), of([]), of(values[500:])]
    assert merged(parts).summary() == of(values).summary()
    assert parts[0].summary().n == 500


def test_merged_by_name_keeps_the_order_of_the_stages():
    groups = [{"engine": of([1.0])}, {"photometric": of([2.0]), "engine": of([3.0])}]
    found = merged_by_name(groups)
    assert list(found) == ["engine", "photometric"]
    assert found["engine"].summary().n == 2
