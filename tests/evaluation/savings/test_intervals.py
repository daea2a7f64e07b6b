"""Intervals that only reports show, against the result's own metrics and brute force."""

import math
from dataclasses import replace

import numpy as np
import pytest

from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.intervals import break_even_intervals, gain_interval, per_success_intervals


def test_interval_values_match_the_result(make):
    result = make.savings()
    found = per_success_intervals(result, resamples=99)
    for name, arm in result.arms.items():
        assert found[name].value == pytest.approx(arm.tokens_per_success, rel=1e-12)
        assert found[name].lo <= found[name].value <= found[name].hi
    spans = break_even_intervals(result, resamples=99)
    assert spans["cached"].value == pytest.approx(result.costs.break_even_cached, rel=1e-9)
    assert spans["uncached"].value == pytest.approx(result.costs.break_even_uncached, rel=1e-9)
    assert all(span.lo < span.value < span.hi for span in spans.values())


def test_break_even_interval_matches_plain_resampling(make):
    """On data this regular, BCa is close to percentiles of resampled means."""
    result = make.savings()
    prompted, tuned, prices = result.arms["prompted"], result.arms["tuned"], make.prices
    saved = [
        (prices.input * (i - t) + prices.output * (o - u)) / 1e6
        for i, t, o, u in zip(
            prompted.input_tokens, tuned.input_tokens, prompted.output_tokens, tuned.output_tokens, strict=True
        )
    ]
    means = np.random.default_rng(1).choice(saved, (4000, len(saved))).mean(axis=1)
    lo, hi = prices.invested / np.quantile(means, [0.975, 0.025])
    span = break_even_intervals(result, resamples=4000)["uncached"]
    assert (span.lo, span.hi) == pytest.approx((lo, hi), rel=2e-4)


def test_break_even_interval_is_infinite_if_savings_may_be_zero(make):
    expensive = Prices(0.15, 0.6, tuned_input=0.15, tuned_output=11.7, training=5, currency="USD", date="2026-01-31")
    spans = break_even_intervals(make.savings(prices=expensive), resamples=999)
    assert spans["uncached"].lo < math.inf
    assert spans["uncached"].hi == math.inf
    never = break_even_intervals(make.savings(prices=replace(expensive, tuned_output=40.0)), resamples=99)["uncached"]
    assert (never.lo, never.value, never.hi) == (math.inf,) * 3
    assert break_even_intervals(make.savings(prices=None)) == {}


def test_per_success_interval_is_infinite_without_success(make):
    result = make.savings(tuned=0.0)
    found = per_success_intervals(result, resamples=99)["tuned"]
    assert found.value == found.lo == found.hi == math.inf


def test_gain_interval_pairs_requests_and_averages_seeds(make):
    untuned, arms = make.arm("untuned", 0.2), [make.arm("tuned", 0.9, seed=seed) for seed in range(3)]
    backwards = arms[0].ordered(tuple(reversed(arms[0].ids)), "tuned")
    assert gain_interval([backwards], untuned, resamples=99) == gain_interval([arms[0]], untuned, resamples=99)
    expected = sum(arm.quality for arm in arms) / 3 - untuned.quality
    found = gain_interval(arms, untuned, resamples=999)
    assert found.value == pytest.approx(expected, abs=1e-12)
    # matches the interval of tuned minus prompted quality of the same scores
    result = token_savings(untuned, arms[0], resamples=999)
    alone = gain_interval([arms[0]], untuned, resamples=999)
    assert (alone.lo, alone.hi) == pytest.approx((result.difference.lo, result.difference.hi), abs=0.01)
