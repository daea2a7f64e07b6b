"""Comparisons of runs: chosen learning rates, pooled seeds, ratios against values by hand, errors and warnings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.comparison.methods import (
    EvaluationSet,
    choose_learning_rates,
    compare_methods,
    compute_metrics,
)
from lightning_ft.evaluation.comparison.result import Comparison, CurvePoint, RunResult
from lightning_ft.evaluation.compute.arithmetic import ComputeResult
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.records import ArmRecords

N = 100
TEST_SET = EvaluationSet(tuple(f"q{i}" for i in range(N)), ("a",) * N, margin=0.05)


def arm(right, *, tokens=20, n=N):
    """Records of which the first `right` answers are right."""
    scores = tuple(float(i < right) for i in range(n))
    outputs = tuple("a" if score else "b" for score in scores)
    return ArmRecords(tuple(f"r{i}" for i in range(n)), (tokens,) * n, (2,) * n, scores, (False,) * n, outputs=outputs)


def compute(scale=1.0, *, trainable=100, dtype="float32", uncounted=()):
    return ComputeResult(
        flops=1e9 * scale,
        flops_source="counted",
        sampled_steps=2,
        steps=10,
        tokens=1000,
        supervised_tokens=500,
        train_seconds=10.0 * scale,
        peak_memory_bytes=int(1000 * scale),
        memory_at_start_bytes=10,
        memory_source="resident",
        trainable_parameters=trainable,
        parameters=100,
        available_flops=None,
        device="cpu",
        dtype=dtype,
        uncounted=uncounted,
    )


def retention(kl=0.01, ppl=1.01):
    return RetentionResult(
        kl_general=Interval(kl, kl / 2, kl * 2),
        ppl_ratio=Interval(ppl, ppl - 0.005, ppl + 0.005),
        top1_agreement=Interval(0.99, 0.98, 1.0),
        kl_task=None,
        base="adapter_off",
        top_k=None,
        texts=4,
        tokens=100,
        task_rows=0,
        task_tokens=0,
        texts_hash="x",
    )


def run(method, seed, right, *, rate=1e-3, size=1000, scale=1.0, curve=(), retained=None, **options):
    return RunResult(
        method, seed, rate, size, right / N, arm(right), curve, compute(scale, **options), retained, int(1000 * scale)
    )


def original_runs(prompted=60, untuned=10):
    return [
        RunResult("untuned", 0, None, None, untuned / N, arm(untuned)),
        RunResult("prompted", 0, None, None, prompted / N, arm(prompted, tokens=200)),
    ]


def curve_points(*qualities):
    return tuple(CurvePoint(i + 1, 1e8 * (i + 1), float(i + 1), quality) for i, quality in enumerate(qualities))


def compared(runs, test_set=TEST_SET, **options):
    return compare_methods(runs, test_set, resamples=199, **options)


def test_ratios_match_values_by_hand():
    full = [run("full", seed, 90, curve=curve_points(0.5, 0.86, 0.9)) for seed in (0, 1)]
    lora = [run("lora", seed, 80 + seed, scale=0.5, trainable=10, curve=curve_points(0.8, 0.88)) for seed in (0, 1)]
    ratios = compared([*original_runs(), *full, *lora]).ratios["lora"]
    assert ratios["quality_ratio"].value == pytest.approx(0.805 / 0.9)
    assert ratios["gain_retained"].value == pytest.approx((0.805 - 0.1) / (0.9 - 0.1))
    assert ratios["quality_ratio"].lo < ratios["quality_ratio"].value < ratios["quality_ratio"].hi
    assert ratios["flops"] == Interval(0.5, 0.5, 0.5)
    assert ratios["trainable_parameters"].value == pytest.approx(0.1)
    assert ratios["checkpoint_bytes"].value == 0.5
    assert ratios["flops_to_95"].value == pytest.approx(1.0)  # both reach 0.855 at their second point


def test_ratios_are_infinite_if_95_percent_of_full_is_never_reached():
    full, lora = run("full", 0, 90, curve=curve_points(0.9)), run("lora", 0, 20, curve=curve_points(0.1, 0.2))
    assert math.isinf(compared([*original_runs(), full, lora]).ratios["lora"]["flops_to_95"].value)


def test_compare_methods_pools_seeds_and_clusters_by_request():
    result = compared([*original_runs(), *(run("lora", seed, 70 + seed) for seed in range(3))])
    savings = result.savings["lora"]
    assert savings.n == 3 * N
    assert savings.gate.n == N
    assert result.quality["lora"].value == pytest.approx(0.71)
    assert result.seed_quality["lora"] == (0.70, 0.71, 0.72)
    assert savings.savings["total"].value == pytest.approx(1 - 22 / 202)
    assert savings.requests[N] == "q0"


def test_choose_learning_rates_uses_validation_rows_of_the_first_seed():
    runs = [
        run("lora", 0, 70, rate=1e-3),
        replace(run("lora", 0, 60, rate=2e-3), validation_quality=0.75),  # worse on test rows, which don't count
        replace(run("lora", 1, 99, rate=1e-3), validation_quality=0.99),
        replace(run("lora", 0, 99, rate=1e-3, size=10), validation_quality=0.99),
    ]
    assert choose_learning_rates(runs) == {"lora": 2e-3}


def test_compare_methods_drops_answers_of_the_sweep_and_sums_its_cost():
    runs = [run("lora", 0, 70), run("lora", 0, 60, rate=2e-3, scale=3.0)]
    result = compared([*original_runs(), *runs])
    assert result.runs[-1].test is None
    assert (result.sweep_seconds, result.sweep_flops) == (30.0, 3e9)


def test_learning_rate_that_diverged_is_not_chosen_and_counts_in_the_cost_of_the_search():
    lost = replace(run("lora", 0, 0, rate=1e-2), test=None, diverged="Optimizer step 2 is not finite.")
    runs = [*original_runs(), run("lora", 0, 60, rate=1e-3), run("lora", 0, 50, rate=3e-4), lost]
    result = compared(runs)
    assert result.chosen == {"lora": 1e-3}
    assert result.sweep_flops == 2 * lost.compute.flops
    assert "lora: training diverged at 0.01, which isn't chosen." in result.warnings
    assert not any("at the edge of its grid" in warning for warning in result.warnings)
    assert choose_learning_rates([lost]) == {}
    assert Comparison.from_dict(result.to_dict()) == result


def test_learning_curve_includes_each_size_and_final_runs_the_largest():
    runs = [run("lora", seed, right, size=size) for seed in (0, 1) for right, size in ((30, 100), (70, 1000))]
    result = compared([*original_runs(), *runs])
    assert {size: curve.value for size, curve in result.learning_curve["lora"].items()} == {100: 0.3, 1000: 0.7}
    assert {r.size for r in result.final_runs("lora")} == {1000}
    assert result.quality["lora"].value == pytest.approx(0.7)


@pytest.mark.parametrize("value", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), "0.5"])
def test_compute_metrics_converts_values_to_floats(value):
    assert compute_metrics(lambda outputs, references: {"f1": value}, ["a"], ["a"]) == {"f1": 0.5}
    number = compute_metrics(lambda outputs, references: {"n": np.int64(5)}, ["a"], ["a"])["n"]
    assert (number, type(number)) == (5.0, float)


def _failing(outputs, references):
    raise ZeroDivisionError("no wrong answer")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (lambda outputs, references: {"f1": None}, r"function '.*<lambda>' returned None for 'f1': expected a number"),
        (lambda outputs, references: {"f1": torch.zeros(2)}, r"returned tensor\(\[0\., 0\.\]\) for 'f1'"),
        (lambda outputs, references: 0.5, r"returned 0\.5: expected a dict of numbers"),
        (_failing, "'_failing' failed on 1 answers, the first of which is 'a': ZeroDivisionError: no wrong answer"),
    ],
)
def test_compute_metrics_names_function_and_value(metrics, message):
    with pytest.raises(ComparisonError, match=message):
        compute_metrics(metrics, ["a"], ["a"])


def test_prices_of_zero_leave_the_share_of_costs_out():
    def evidence(price):
        prices = Prices(price, price, training=5.0, currency="USD", date="2026-01-31")
        runs = [*original_runs(), run("lora", 0, 60)]
        tokens = {"prompted": 1000, "untuned": 20}
        runs = [
            replace(r, test=arm(60 if r.method != "untuned" else 10, tokens=tokens.get(r.method, 20))) for r in runs
        ]
        test_set = replace(TEST_SET, prices=prices)
        claims = compare_methods(runs, test_set, resamples=99).claims
        return next(claim.evidence for claim in claims if claim.name == "lora: fewer tokens")

    assert "; costs 98% less" in evidence(1.0)
    assert "costs" not in evidence(0.0)


def test_metrics_span_the_range_of_seeds():
    test_set = replace(TEST_SET, metrics=lambda outputs, references: {"b": outputs.count("b") / len(outputs)})
    result = compared([*original_runs(), *(run("lora", seed, 70 + 10 * seed) for seed in (0, 1))], test_set)
    assert result.metrics["prompted"]["b"] == Interval(0.4, 0.4, 0.4)
    assert result.metrics["lora"]["b"].value == pytest.approx(0.25)
    assert (result.metrics["lora"]["b"].lo, result.metrics["lora"]["b"].hi) == (0.2, 0.3)


def test_compare_methods_warns_and_omits_ratios_if_full_never_beat_the_base():
    result = compared([*original_runs(untuned=50), run("full", 0, 40), run("lora", 0, 60)])
    assert result.ratios == {}
    assert any("Full fine-tuning never beat the untuned model" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "bfloat16"}, "different precision"), ({"uncounted": ("my::attention",)}, "my::attention")],
)
def test_compare_methods_refuses_incomparable_runs(options, message):
    with pytest.raises(ComparisonError, match=message):
        compared([*original_runs(), run("full", 0, 70), run("lora", 0, 70, **options)])


def test_compare_methods_needs_original_weights_and_a_trained_method():
    with pytest.raises(ComparisonError, match="no measurement of the original weights, prompted"):
        compared([original_runs()[0], run("lora", 0, 70)])
    with pytest.raises(ComparisonError, match="nothing to compare"):
        compared(original_runs())


def test_compare_methods_leaves_out_methods_that_the_budget_ended_in_their_search():
    search = replace(run("full", 0, 70), search=True)
    result = compared([*original_runs(), run("lora", 0, 70), search], complete=False)
    assert set(result.savings) == {"lora"}
    with pytest.raises(ComparisonError, match=r"nothing to compare\. Raise the budget"):
        compared([*original_runs(), search], complete=False)


def test_compare_methods_warns_of_budget_seeds_and_grid_edge():
    runs = [run("lora", 0, 70, rate=rate) for rate in (1e-3, 2e-3)]
    warnings = compared([*original_runs(), runs[0], replace(runs[1], validation_quality=0.8)], complete=False).warnings
    assert any("budget was spent" in w for w in warnings)
    assert any("1 seed; at least 3" in w for w in warnings)
    assert any("at the edge of its grid (0.001, 0.002)" in w for w in warnings)


def verdicts(result):
    return {claim.name: claim.verdict for claim in result.claims}


def test_claims_follow_the_measurements():
    full = [run("full", seed, 95, retained=retention(ppl=1.2)) for seed in range(3)]
    lora = [run("lora", seed, 94, scale=0.7, trainable=5, retained=retention()) for seed in range(3)]
    small = [run("lora", seed, 30, size=100, scale=0.7, trainable=5) for seed in range(3)]
    result = compared([*original_runs(), *full, *lora, *small])
    assert verdicts(result) == {
        "full: fewer tokens": "held",
        "lora: fewer tokens": "held",
        "full: better than the prompt": "held",
        "lora: better than the prompt": "held",
        "lora: quality of full": "held",
        "lora: compute": "held if",
        "full: abilities kept": "not held",
        "lora: abilities kept": "held",
        "lora: thousands are enough": "held",
    }
    claims = {claim.name: claim for claim in result.claims}
    assert claims["lora: compute"].condition == "compute means trainable parameters"
    assert "100: 0.300, 1,000: 0.940; within 5% of the prompt's 0.600 from 1,000 on" in (
        claims["lora: thousands are enough"].evidence
    )


def test_claims_can_fail_or_be_undecided():
    worse = compared([*original_runs(prompted=90), *(run("lora", seed, 50) for seed in range(3))])
    assert verdicts(worse)["lora: better than the prompt"] == "not held"
    assert verdicts(worse)["lora: fewer tokens"] == "held if"
    alike = compared([*original_runs(prompted=70), *(run("lora", seed, 70) for seed in range(3))])
    assert verdicts(alike)["lora: better than the prompt"] == "undecided"  # the same requests: no worse
    some = [replace(r, test=replace(arm(70), scores=tuple(reversed(arm(70).scores)))) for r in [run("lora", 0, 70)]]
    assert verdicts(compared([*original_runs(prompted=70), *some]))["lora: better than the prompt"] == "undecided"


def test_claims_are_undecided_where_no_answer_was_right():
    result = compared([*original_runs(0, 0), *(run("lora", 0, 0, size=size) for size in (100, 1000))])
    assert verdicts(result)["lora: better than the prompt"] == "undecided"
    claim = next(claim for claim in result.claims if claim.name == "lora: thousands are enough")
    assert claim.verdict == "undecided"
    assert claim.evidence == "100: 0.000, 1,000: 0.000; no answer was right, with the prompt neither"


def test_comparison_survives_a_json_round_trip():
    full = [run("full", 0, 90, curve=curve_points(0.9), retained=retention())]
    lora = [run("lora", 0, 20, curve=curve_points(0.1), retained=retention())]
    result = compared([*original_runs(), *full, *lora], provenance={"model": "m"})
    assert Comparison.from_dict(result.to_dict()).to_dict() == result.to_dict()
