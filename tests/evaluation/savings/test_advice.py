"""One sentence of advice for each verdict; it follows from the result and doesn't contradict the headline."""

from dataclasses import replace

import pytest

from lightning_ft.evaluation.savings.advice import advice
from lightning_ft.evaluation.savings.arithmetic import ArmRecords, Prices, token_savings
from lightning_ft.evaluation.savings.result import SavingsResult

PRICES = Prices(10.0, 20.0, cached_input=0.1, tuned_input=10.0, training=5.0, currency="USD", date="2026-01-31")


def arm(right, n, tokens):
    scores = tuple(float(i < right) for i in range(n))
    return ArmRecords(tuple(map(str, range(n))), (tokens,) * n, (5,) * n, scores, (False,) * n)


def measured(prompted, tuned, *, n=400, tokens=(1000, 50), cached=0, **options):
    first = arm(prompted, n, tokens[0])
    if cached:
        first = replace(first, cached_prefix_tokens=(cached,) * n)
    return token_savings(
        first, arm(tuned, n, tokens[1]), arm(0, n, tokens[1]), resamples=299, **{"margin": 0.05, **options}
    )


def test_advice_is_to_ship_at_no_loss():
    result = measured(300, 320)
    assert result.gate.verdict == "PASS"
    assert advice(result) == "Ship: 94.5% fewer tokens per request, at no loss of quality."


def test_advice_names_the_loss_that_is_not_ruled_out():
    result = measured(380, 376, n=1000)
    assert result.gate.passed
    assert result.gate.bound < 0
    condition, loss = advice(result).split(": 94.5% fewer tokens per request, ")
    assert condition == "Ship if a quality of 0.376 is enough"
    assert loss.startswith("at a loss of quality of at most ")
    assert -100 * result.gate.bound <= float(loss.split()[8]) < -100 * result.gate.bound + 0.1


def test_advice_of_a_weak_prompt_has_its_condition():
    result = measured(100, 120)
    assert result.warnings[0].startswith("The prompted arm's quality is only 0.250")
    assert advice(result).startswith("Ship if a quality of 0.300 is enough: 94.5% fewer tokens per request, at no loss")


def test_weak_prompt_is_a_field_of_the_gate():
    result = measured(100, 120)
    assert result.gate.weak
    rephrased = replace(result, warnings=("Another wording.",))
    assert advice(rephrased) == advice(result)
    assert SavingsResult.from_dict(rephrased.to_dict()).gate.weak
    older = result.to_dict()
    del older["gate"]["weak"]  # of a file that has the warning only
    assert SavingsResult.from_dict(older) == result


@pytest.mark.parametrize("strong", [measured(300, 320), measured(100, 120, min_quality=0.2), measured(0, 200)])
def test_prompt_is_not_weak_if_good_enough_or_void(strong):
    assert not strong.gate.weak
    assert not any("is only" in warning for warning in strong.warnings)


def test_advice_is_not_to_ship_if_quality_was_not_kept():
    result = measured(320, 200)
    assert result.gate.verdict == "FAIL"
    assert advice(result) == "Don't ship: quality was not kept, 0.500 against 0.800 with the prompt."


def test_advice_says_how_many_requests_are_missing():
    result = measured(30, 30, n=40)
    assert result.gate.underpowered
    missing = result.gate.required_n - 40
    assert advice(result) == f"Ask {missing} more requests: with 40 it can't be said whether quality was kept."


def test_advice_of_enough_requests_with_an_open_loss():
    result = measured(320, 310, margin=0.03)
    gate = replace(result.gate, required_n=100)  # as if few answers were discordant
    assert not gate.underpowered
    assert not gate.passed
    found = advice(replace(result, gate=gate))
    assert found.startswith("Don't ship yet: a loss of quality of up to ")
    assert "isn't ruled out, and 3 points would be acceptable" in found


def test_advice_of_a_minimum_that_is_missed():
    result = measured(320, 318, min_quality=0.8, margin=0.05)
    assert advice(result) == "Don't ship: quality is 0.795, and 0.800 is needed (min_quality)."


def test_advice_of_a_void_gate():
    result = measured(0, 45)
    assert result.gate.verdict == "VOID"
    assert advice(result).startswith("Don't claim a saving: the prompt that the model is compared with isn't shown")


def test_advice_of_requests_that_were_trained_on():
    result = measured(300, 320, in_training=["1", "2"])
    assert result.gate.passed
    assert advice(result).startswith("Measure again before you ship: 2 of 400 requests (0.5%) also appear")
    assert advice(result).endswith("so quality on new ones may be lower.")


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((50, 100), "Don't ship to save tokens: quality was kept, but requests take 90.9% more tokens."),
        ((50, 50), "Don't ship to save tokens: quality was kept, but requests take as many tokens as before."),
    ],
)
def test_advice_without_a_saving(tokens, expected):
    assert advice(measured(300, 320, tokens=tokens)) == expected


def test_advice_of_a_saving_that_is_not_shown():
    result = measured(300, 320)
    open_saving = replace(result.savings["total"], lo=-0.1)
    result = replace(result, savings={**result.savings, "total": open_saving})
    assert advice(result) == "Measure more requests: quality was kept, but a saving isn't shown yet."


def test_advice_of_fewer_tokens_that_cost_more():
    expensive = replace(PRICES, tuned_input=1000.0)
    assert advice(measured(300, 320, prices=expensive)) == (
        "Don't ship to save money: requests take 94.5% fewer tokens, but at these prices a tuned one isn't cheaper."
    )


def test_advice_of_a_prompt_that_is_cached_cheaply():
    found = advice(measured(300, 320, prices=PRICES, cached=990))
    assert found == (
        "Ship: 94.5% fewer tokens per request, at no loss of quality; where the prompt is cached, it doesn't save "
        "money."
    )
