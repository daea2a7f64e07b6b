"""Forecasts of money and quality, and the advice that follows from them."""

import math
import re

import pytest

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.forecast import (
    Pilot,
    QualityForecast,
    RequestTokens,
    advise,
    extrapolate,
    forecast_money,
)
from lightning_ft.evaluation.savings.cost import Prices

TOKENS = RequestTokens(50, prompted=1000.0, tuned=100.0, prefix=880.0, tuned_prefix=10.0, output=40.0)
PILOT = Pilot(200, prompted=0.6, untuned=0.1, tuned={100: 0.3, 300: 0.5})


def prices(**options):
    return Prices(**{"input": 10.0, "output": 20.0, "currency": "EUR", "date": "2026-01-31", **options})


def test_saved_share_counts_input_and_output():
    assert TOKENS.saved == pytest.approx(900 / 1040)


def test_costs_are_those_of_the_prices():
    money = forecast_money(TOKENS, prices(cached_input=1.0, training=9.0, data=3.0))
    assert money.prompted == pytest.approx(((10 * 1000 + 20 * 40) / 1e6, (10 * 120 + 880 + 20 * 40) / 1e6))
    assert money.tuned == pytest.approx(((10 * 100 + 20 * 40) / 1e6, (10 * 90 + 10 + 20 * 40) / 1e6))
    assert money.invested == 12.0
    for saved, needed, before, after in zip(money.saved, money.break_even, money.prompted, money.tuned, strict=True):
        assert saved == pytest.approx(1 - after / before)
        assert needed == pytest.approx(12.0 / (before - after))


def test_hourly_price_replaces_that_of_training():
    money = forecast_money(TOKENS, prices(training=9.0, data=3.0), hourly=2.0, seconds=5400)
    assert money.invested == 6.0


def test_training_never_pays_off_where_the_tuned_model_costs_more():
    money = forecast_money(TOKENS, prices(tuned_input=200.0, training=1.0))
    assert money.break_even == (math.inf, math.inf)
    advice, (reason,) = advise(TOKENS, money=money)
    assert advice == "don't"
    assert "93% more" in reason


def test_nothing_saved_is_no_reason_to_train():
    money = forecast_money(TOKENS, prices(input=0.0, output=0.0))
    quality = QualityForecast(4000, 0.7, 0.6, 0.8)
    assert advise(TOKENS, money=money, pilot=PILOT, quality=quality)[0] == "don't"


@pytest.mark.parametrize(
    ("tuned", "rows", "expected", "highest"),
    [
        ({100: 0.3, 300: 0.5}, 300, 0.5, 0.5),
        ({100: 0.3, 300: 0.5}, 900, 0.5 + 0.2 / 3, 0.7),
        ({100: 0.3, 300: 0.5}, 2700, 0.5 + 0.2 / 3 + 0.2 / 9, 0.9),
        ({100: 0.3, 300: 0.5}, 10**9, 0.6, 1.0),
        ({30: 0.1, 100: 0.3, 300: 0.5}, 900, 0.5 + 0.2 / 3, 0.7),  # the last two sizes count
        ({100: 0.5, 300: 0.4}, 900, 0.4, 0.4),  # no fall is extrapolated
    ],
)
def test_extrapolation_adds_a_third_per_tripling(tuned, rows, expected, highest):
    found = extrapolate(tuned, rows, requests=10**9)
    assert found.value == pytest.approx(expected, abs=1e-4)
    assert found.low == pytest.approx(tuned[300], abs=1e-4)
    assert found.high == pytest.approx(highest, abs=1e-3)


def test_interval_includes_the_sampling_error():
    few, many = (extrapolate({100: 0.3, 300: 0.5}, 900, requests=n) for n in (50, 5000))
    assert few.low == pytest.approx(0.5 - 1.96 * math.sqrt(0.25 / 50), abs=1e-4)
    assert few.high - few.low > many.high - many.low
    assert 0 <= few.low <= few.value <= few.high <= 1


def test_pilot_without_a_right_answer_says_nothing_of_more_rows():
    found = extrapolate({60: 0.0, 180: 0.0}, 1350, requests=150)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 1.0)


def test_pilot_whose_answers_are_all_right_is_not_certain():
    found = extrapolate({60: 1.0, 180: 1.0}, 180, requests=150)
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.97 < found.low < 0.99


def test_extrapolation_brackets_measured_learning_curves():
    """Curves of docs/small_model.md as they were measured: 100 and 500 rows, then all of them."""
    for curve, rows, reached in (
        ({100: 0.277, 500: 0.742}, 4000, 0.779),
        ({100: 0.152, 500: 0.742}, 4000, 0.746),
    ):
        found = extrapolate(curve, rows, requests=200)
        assert found.low <= reached <= found.high


@pytest.mark.parametrize(("tuned", "requests"), [({100: 0.3}, 50), ({100: 0.3, 300: 0.5}, 0)])
def test_extrapolation_needs_two_sizes_and_requests(tuned, requests):
    with pytest.raises(SavingsError, match="at least two sizes and one request"):
        extrapolate(tuned, 900, requests)


@pytest.mark.parametrize(
    ("quality", "options", "advice", "reason"),
    [
        (QualityForecast(4000, 0.7, 0.6, 0.8), {}, "go", r"Expect 70% \(60% to 80%\) right with 4,000 rows"),
        (QualityForecast(4000, 0.5, 0.4, 0.55), {}, "more rows", "against the prompt's 60%"),
        (QualityForecast(4000, 0.6, 0.5, 0.7), {}, "pilot first", "the pilot can't decide"),
        (None, {"pilot": None}, "pilot first", "isn't known without a pilot"),
        (
            QualityForecast(4000, 0.7, 0.6, 0.8),
            {"pilot": Pilot(200, prompted=0.1, untuned=0.2, tuned={100: 0.3, 300: 0.5})},
            "go",
            "no saving of its tokens can be claimed; what training adds is quality, 20% without it",
        ),
        (
            QualityForecast(4000, 0.0, 0.0, 1.0),
            {"pilot": Pilot(200, prompted=0.0, untuned=0.0, tuned={100: 0.0, 300: 0.0})},
            "pilot first",
            r"Neither the prompt \(0% right\) nor the pilot is shown to be better than the model as it is \(0%\)",
        ),
        (
            QualityForecast(4000, 0.7, 0.65, 0.75),
            {"min_quality": 0.8},
            "more rows",
            r"With the prompt 60% are right, below min_quality=0\.8, so no saving .* expect 70% \(65% to 75%\) right, "
            r"against the prompt's 60% and min_quality=0\.8",
        ),
        (
            QualityForecast(4000, 0.9, 0.85, 0.95),
            {"min_quality": 0.8},
            "go",
            r"below min_quality=0\.8, so no saving of its tokens can be claimed\. Expect 90%",
        ),
        (QualityForecast(4000, 0.7, 0.6, 0.8), {"min_quality": 0.65}, "pilot first", "the pilot can't decide"),
        (
            QualityForecast(4000, 0.7, 0.6, 0.8),
            {"min_quality": 0.3},
            "go",
            "right with 4,000 rows, against the prompt's",
        ),
        (
            QualityForecast(4000, 0.7, 0.6, 0.8),
            {"money": forecast_money(TOKENS, prices(training=9.0)), "requests_planned": 500},
            "don't",
            "You plan 500 requests",
        ),
        (
            QualityForecast(4000, 0.7, 0.6, 0.8),
            {"money": forecast_money(TOKENS, prices(training=9.0)), "requests_planned": 5000},
            "go",
            r"83% less without a cached prompt. Training pays off after 1,000 requests",
        ),
        (
            QualityForecast(4000, 0.7, 0.6, 0.8),
            {"money": forecast_money(TOKENS, prices(cached_input=0.1, tuned_input=10.0, tuned_cached_input=10.0))},
            "don't",
            "Your prompt is cached: training saves 14% of the costs",
        ),
        (
            QualityForecast(4000, 0.7, 0.6, 0.8),
            {"money": forecast_money(TOKENS, prices(cached_input=0.1)), "cached": False},
            "go",
            "without a cached prompt",
        ),
    ],
)
def test_advice_follows_from_the_numbers(quality, options, advice, reason):
    found, reasons = advise(TOKENS, **{"pilot": PILOT, "quality": quality, "margin": 0.02, **options})
    assert found == advice
    assert re.search(reason, " ".join(reasons))


def test_prompt_is_below_the_minimum_only_if_its_interval_is():
    quality, few = QualityForecast(4000, 0.9, 0.85, 0.95), Pilot(20, prompted=0.6, untuned=0.1, tuned=PILOT.tuned)
    for pilot, shown in ((PILOT, True), (few, False)):
        _, reasons = advise(TOKENS, pilot=pilot, quality=quality, min_quality=0.7)
        assert any("no saving of its tokens" in reason for reason in reasons) == shown


def test_nothing_is_saved_by_an_empty_prompt():
    tokens = RequestTokens(1, prompted=100.0, tuned=100.0, prefix=0.0, tuned_prefix=0.0, output=5.0)
    assert advise(tokens)[0] == "don't"
