import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from lightning_ft.data.prompt_baseline import check_no_overlap
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval, bootstrap_intervals
from lightning_ft.evaluation.savings.arithmetic import (
    ArmRecords,
    Prices,
    PromptBaseline,
    SavingsResult,
    required_requests,
    token_savings,
)
from lightning_ft.evaluation.savings.cost import break_even_requests
from lightning_ft.evaluation.savings.gate import quality_gate
from lightning_ft.types import Message, Request


def make_arm(n=200, tokens=500, out=20, quality=0.8, seed=0, **changes):
    draw = random.Random(seed)
    arm = ArmRecords(
        ids=tuple(f"r{i}" for i in range(n)),
        input_tokens=tuple(draw.randint(tokens - 10, tokens + 10) for _ in range(n)),
        output_tokens=tuple(draw.randint(out - 5, out + 5) for _ in range(n)),
        scores=tuple(float(draw.random() < quality) for _ in range(n)),
        truncated=(False,) * n,
    )
    return replace(arm, **changes)


def paired_scores(n, worse=0, better=0):
    """Prompted and tuned scores; the tuned arm is worse in `worse` and better in `better` of the `n` requests."""
    prompted = [1.0] * worse + [0.0] * better + [1.0] * (n - worse - better)
    tuned = [0.0] * worse + [1.0] * better + [1.0] * (n - worse - better)
    return tuple(prompted), tuple(tuned)


def compare(n, *, margin=0.02, worse=0, better=0):
    prompted, tuned = paired_scores(n, worse, better)
    return token_savings(
        make_arm(n, scores=prompted), make_arm(n, 50, scores=tuned, seed=1), margin=margin, resamples=999
    )


def test_token_savings_are_ratios_of_sums():
    prompted = make_arm(2, input_tokens=(1000, 10), output_tokens=(10, 10), scores=(1.0, 1.0))
    tuned = make_arm(2, input_tokens=(100, 9), output_tokens=(5, 10), scores=(1.0, 0.5))
    result = token_savings(prompted, tuned, resamples=99)
    value = {name: interval.value for name, interval in result.savings.items()}
    assert value["input"] == pytest.approx(1 - 109 / 1010)
    assert value["output"] == pytest.approx(1 - 15 / 20)
    assert value["total"] == pytest.approx(1 - 124 / 1030)
    assert value["per_success"] == pytest.approx(1 - (124 / 1.5) / (1030 / 2))
    assert result.arms["tuned"].tokens_per_success == pytest.approx(124 / 1.5)


def test_token_savings_pairs_arms_by_id():
    prompted, tuned = make_arm(), make_arm(tokens=50, seed=1)
    shuffled = tuned.ordered(tuple(random.Random(0).sample(tuned.ids, len(tuned.ids))), "tuned")
    assert shuffled.scores != tuned.scores
    assert token_savings(prompted, shuffled, resamples=99) == token_savings(prompted, tuned, resamples=99)


def test_bootstrap_intervals_match_scipy():
    from scipy import stats

    draw = np.random.default_rng(0)
    prompted, tuned = draw.integers(400, 600, 80), draw.integers(40, 60, 80)
    ours = bootstrap_intervals({"t": tuned, "p": prompted}, {"s": lambda s: 1 - s["t"] / s["p"]}, resamples=5000)["s"]
    theirs = stats.bootstrap(
        (tuned, prompted), lambda t, p, axis: 1 - t.sum(axis) / p.sum(axis), paired=True, n_resamples=5000, rng=1
    ).confidence_interval
    assert ours.lo == pytest.approx(theirs.low, abs=1e-3)
    assert ours.hi == pytest.approx(theirs.high, abs=1e-3)
    assert ours.lo < ours.value < ours.hi


def test_bootstrap_intervals_are_reproducible_in_any_order():
    columns = {"x": list(np.random.default_rng(0).random(40)), "n": [1.0] * 40}
    reverse = {name: column[::-1] for name, column in columns.items()}
    mean = {"mean": lambda s: s["x"] / s["n"]}
    assert bootstrap_intervals(columns, mean) == bootstrap_intervals(reverse, mean)
    assert bootstrap_intervals(columns, mean, seed=1) != bootstrap_intervals(columns, mean)


def test_bootstrap_intervals_resample_whole_clusters():
    draw = np.random.default_rng(0)
    cluster_scores = draw.random(20)
    scores = np.repeat(cluster_scores, 10)  # ten equal scores per cluster: 20 observations, not 200
    clusters = [f"c{i // 10}" for i in range(200)]
    mean = {"q": lambda s: s["x"] / s["n"]}
    columns = {"x": scores, "n": np.ones(200)}
    independent = bootstrap_intervals(columns, mean)["q"]
    clustered = bootstrap_intervals(columns, mean, clusters=clusters)["q"]
    twenty = bootstrap_intervals({"x": cluster_scores, "n": np.ones(20)}, mean)["q"]
    assert clustered.hi - clustered.lo > 2.5 * (independent.hi - independent.lo)
    assert (clustered.lo, clustered.hi) == pytest.approx((twenty.lo, twenty.hi), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_token_savings_of_degenerate_data_has_percentile_intervals(n):
    result = token_savings(
        make_arm(n, input_tokens=(100,) * n, output_tokens=(10,) * n, scores=(1.0,) * n),
        make_arm(n, input_tokens=(20,) * n, output_tokens=(2,) * n, scores=(1.0,) * n),
    )
    assert result.savings["total"] == Interval(0.8, 0.8, 0.8)
    assert result.difference == Interval(0, 0, 0)


def test_token_savings_without_tuned_success_is_minus_infinity_per_success():
    result = token_savings(make_arm(), make_arm(tokens=50, scores=(0.0,) * 200), resamples=199)
    assert result.savings["per_success"].value == -math.inf
    assert not result.gate.passed
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["savings"]["per_success"]["value"] == "-Infinity"


def test_required_requests_match_known_values():
    assert required_requests(0.10, 0.02) == 1960
    assert required_requests(0.10, 0.05) == 314
    assert required_requests(0.0, 0.02) == 183  # 0.98 ** 183 < 0.025


@pytest.mark.parametrize(("n", "margin"), [(1960, 0.02), (320, 0.05)])  # 320: the smallest multiple of 20 above 314
def test_gate_passes_with_the_required_requests(n, margin):
    assert compare(n, margin=margin, worse=n // 20, better=n // 20).gate.passed


def test_gate_fails_when_underpowered():
    result = compare(300, margin=0.05, worse=15, better=15)
    assert result.gate.bound > -0.05
    assert (result.gate.underpowered, result.gate.passed, result.gate.required_n) == (True, False, 314)
    assert any("Underpowered: 300 requests" in w and "314 are needed" in w for w in result.warnings)
    assert result.headline.startswith("FAIL")
    assert not result.saves_half  # despite 88% fewer tokens
    clustered = [replace(arm, clusters=tuple(f"c{i // 2}" for i in range(300))) for arm in result.arms.values()]
    (warning,) = (w for w in token_savings(*clustered, margin=0.05, resamples=99).warnings if "Underpowered" in w)
    assert warning.startswith("Underpowered: 150 requests or clusters can't")  # there are 300 requests


def test_gate_fails_with_few_requests_and_equal_answers():
    assert not compare(20).gate.passed
    assert compare(200).gate.passed


def test_gate_requires_lower_bound_above_minus_margin():
    assert not compare(2000, worse=60, better=0, margin=0.02).gate.passed  # 3 points worse
    gate = quality_gate(Interval(0.0, -0.02, 0.02), 0.0, 10_000, 0.02)
    assert not gate.passed  # the bound must be above, not at the margin
    assert quality_gate(Interval(0.0, -0.0199, 0.02), 0.0, 10_000, 0.02).passed


def test_gate_needs_only_the_minimum_for_a_clear_improvement():
    result = compare(250, better=150)
    assert result.gate.required_n > 250
    assert result.gate.passed


def test_saves_half_requires_lower_bound_and_gate():
    assert compare(200).saves_half
    many = make_arm(200, 500, scores=(1.0,) * 200)
    barely = make_arm(200, 251, out=9, scores=(1.0,) * 200, seed=2)
    result = token_savings(many, barely)
    assert result.savings["total"].value > 0.49
    assert result.savings["total"].lo < 0.5
    assert not result.saves_half


def test_costs_match_manual_computation():
    prompted = make_arm(2, input_tokens=(1000, 1100), output_tokens=(10, 20), cached_prefix_tokens=(900, 900))
    tuned = make_arm(2, input_tokens=(100, 200), output_tokens=(10, 20), cached_prefix_tokens=(4, 4))
    prices = Prices(1.0, 4.0, 0.1, tuned_input=3.0, tuned_output=12.0, training=7, data=2, sweep=1, **DATED)
    costs = token_savings(prompted, tuned, prices=prices, resamples=99).costs
    assert costs.prompted_uncached == pytest.approx((2100 * 1.0 + 30 * 4.0) / 1e6 / 2)
    assert costs.prompted_cached == pytest.approx((300 * 1.0 + 1800 * 0.1 + 30 * 4.0) / 1e6 / 2)
    assert costs.tuned_uncached == pytest.approx((300 * 3.0 + 30 * 12.0) / 1e6 / 2)
    assert costs.tuned_cached == costs.tuned_uncached  # no price for cached tokens of the tuned model
    assert costs.break_even_uncached == pytest.approx(10 / (costs.prompted_uncached - costs.tuned_uncached))
    assert costs.break_even_cached == math.inf  # fewer tokens, but a higher cost


def test_break_even_is_infinite_without_savings():
    assert break_even_requests(10, 1.0, 1.0) == break_even_requests(10, 1.0, 2.0) == math.inf


DATED = {"currency": "USD", "date": "2026-01-31"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"currency": ""}, "currency and date"),
        ({"date": ""}, "currency and date"),
        ({"date": "last week"}, "YYYY-MM-DD"),
        ({"input": -1.0}, "input=-1.0"),
        ({"training": math.nan}, "training=nan"),
    ],
)
def test_prices_require_currency_date_and_valid_numbers(changes, message):
    with pytest.raises(SavingsError, match=message):
        Prices(**{"input": 1.0, "output": 2.0, **DATED, **changes})


def test_arm_records_refuse_invalid_requests():
    with pytest.raises(SavingsError, match=r"1 requests are missing from the tuned arm \(first: \['r2'\]\)"):
        token_savings(make_arm(3), make_arm(3, ids=("r0", "r1", "other")))
    with pytest.raises(SavingsError, match="more than once: r0"):
        make_arm(3, ids=("r0", "r0", "r1"))
    with pytest.raises(SavingsError, match="No requests"):
        ArmRecords((), (), (), (), ())
    with pytest.raises(SavingsError, match="scores has 2 entries for 3"):
        make_arm(3, scores=(1.0, 1.0))
    with pytest.raises(SavingsError, match="'r1' has a score of nan"):
        make_arm(3, scores=(1.0, math.nan, 1.0))


def test_token_savings_without_success_leave_out_tokens_per_success():
    zero = (0.0,) * 200
    result = token_savings(make_arm(scores=zero), make_arm(scores=zero))
    assert list(result.savings) == ["input", "output", "total"]
    assert result.gate.verdict == "VOID"


@pytest.mark.parametrize("margin", [0, -0.1, 1, math.nan])
def test_token_savings_refuses_a_margin_outside_0_and_1(margin):
    with pytest.raises(SavingsError, match="margin="):
        token_savings(make_arm(), make_arm(), margin=margin)


@pytest.mark.parametrize("confidence", [95, 0, 1, "0.95"])
def test_token_savings_refuse_a_confidence_outside_0_and_1(confidence):
    with pytest.raises(SavingsError, match=f"confidence={confidence!r}: expected a (share between 0 and 1|number)"):
        token_savings(make_arm(), make_arm(), confidence=confidence)


def test_token_savings_warns_of_truncated_answers():
    result = token_savings(make_arm(truncated=(True,) * 50 + (False,) * 150), make_arm(tokens=50), resamples=99)
    assert result.metrics()["truncated_rate"] == pytest.approx(50 / 400)
    assert any("25.0% of the prompted arm's answers hit max_new_tokens" in w for w in result.warnings)


def test_metrics_have_documented_names():
    result = token_savings(
        make_arm(), make_arm(tokens=50), make_arm(seed=3), prices=Prices(1, 2, **DATED), resamples=99
    )
    names = {f"{name}{end}" for name in ("input", "output", "total", "per_success") for end in ("", "_lo", "_hi")}
    names |= {f"quality_{name}" for name in ("prompted", "tuned", "untuned", "diff", "diff_lo")}
    names |= {"gate_passed", "truncated_rate", "n", "cost_cached", "cost_uncached", "break_even_requests"}
    assert names <= set(result.metrics())
    assert result.metrics()["n"] == 200


def test_result_survives_json():
    tuned = make_arm(tokens=50, scores=(0.0,) * 200, parts={"request": 3}, first_token_seconds={"cold": (0.1, 0.2)})
    prices = Prices(1, 2, 0.1, **DATED)
    result = token_savings(make_arm(), tuned, prices=prices, provenance={"seed": 0}, resamples=99)
    assert SavingsResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


def test_equality_ignores_times():
    one, other = (make_arm(first_token_seconds={"cold": (seconds,)}) for seconds in (0.1, 0.2))
    assert one == other


def test_baseline_formats_are_equivalent(tmp_path):
    pairs = PromptBaseline("Be brief.", [{"input": "a", "output": "b"}])
    turns = PromptBaseline("Be brief.", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    own = (Message(role="system", content="It is Monday."), Message(role="user", content="c"))
    assert pairs.messages(own) == turns.messages(own)
    assert pairs.messages(own)[0] == {"role": "system", "content": "Be brief.\n\nIt is Monday."}
    (tmp_path / "prompt.json").write_text(json.dumps({"system": "Be brief.", "few_shot": pairs.few_shot}))
    assert PromptBaseline.from_file(tmp_path / "prompt.json") == pairs
    assert pairs.hash == PromptBaseline.from_file(tmp_path / "prompt.json").hash != turns.hash


def test_baseline_refuses_invalid_content(tmp_path):
    with pytest.raises(SavingsError, match="empty"):
        PromptBaseline(" ")
    with pytest.raises(SavingsError, match=r"few_shot\[1\]"):
        PromptBaseline("", [{"input": "a", "output": "b"}, {"input": "a"}])
    with pytest.raises(SavingsError, match="no answer"):
        PromptBaseline("", [{"role": "user", "content": "a"}])
    with pytest.raises(SavingsError, match="can't be read"):
        PromptBaseline.from_file(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SavingsError, match="JSON object"):
        PromptBaseline.from_file(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"system": None, "few_shot": [{"input": "a", "output": "b"}]}, ("", [{"input": "a", "output": "b"}])),
        ({"system": "Be brief.", "few_shot": None}, ("Be brief.", [])),
        ({"system": None, "few_shot": None}, "PromptBaseline is empty"),
        ({"system": ["Be", "brief."]}, r"system is \['Be', 'brief\.'\]: expected one text"),
        ({"system": 0}, "system is 0: expected one text"),
        ({"system": "Be brief.", "few_shot": 3}, "few_shot is a int: expected a list of examples"),
    ],
)
def test_baseline_of_a_file_with_nulls_and_other_types(tmp_path, content, found):
    (tmp_path / "prompt.json").write_text(json.dumps(content))
    if isinstance(found, str):
        with pytest.raises(SavingsError, match=found):
            PromptBaseline.from_file(tmp_path / "prompt.json")
    else:
        assert PromptBaseline.from_file(tmp_path / "prompt.json") == PromptBaseline(*found)


def test_check_no_overlap_names_evaluated_examples():
    baseline = PromptBaseline("", [{"input": "Where is my  parcel?", "output": "b"}])
    request = Request("r7", (Message(role="user", content="where is MY parcel? "),), "b")
    with pytest.raises(SavingsError, match="r7"):
        check_no_overlap(baseline, [request])
