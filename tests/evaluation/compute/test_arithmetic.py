"""Estimates of a run's cost from sampled micro-batches, and the results of runs."""

import json
import math
from dataclasses import replace

import pytest

from lightning_ft.errors import ConfigError
from lightning_ft.evaluation.compute.arithmetic import (
    ComputeResult,
    StepSums,
    combine_ranks,
    estimated_flops,
    estimated_seconds,
    work_share,
)


def make_result(**fields):
    defaults = {
        "flops": 6e9,
        "flops_source": "counted",
        "sampled_steps": 3,
        "steps": 10,
        "tokens": 2000,
        "supervised_tokens": 500,
        "train_seconds": 4.0,
        "peak_memory_bytes": 300,
        "memory_source": "resident",
        "memory_at_start_bytes": 100,
        "trainable_parameters": 10,
        "parameters": 1000,
        "available_flops": 3e9,
        "device": "cpu",
        "dtype": "float32",
    }
    return ComputeResult(**{**defaults, **fields})


def test_estimated_flops_scales_by_positions_if_known():
    counted = StepSums(micro_batches=2, positions=10 + 30, flops=6.0 * 40)
    assert estimated_flops(counted, StepSums(micro_batches=5, positions=400)) == pytest.approx(6 * 400)
    unknown = replace(counted, positions=0, unknown=2)
    assert estimated_flops(unknown, StepSums(micro_batches=6, unknown=6)) == pytest.approx(3 * 240)


def test_work_share_ignores_positions_if_one_batch_is_unknown():
    part, whole = StepSums(micro_batches=1, positions=90), StepSums(micro_batches=4, positions=100, unknown=1)
    assert work_share(part, whole) == 0.25


def test_estimated_flops_needs_a_counted_micro_batch():
    with pytest.raises(ConfigError, match="No micro-batch was counted"):
        estimated_flops(StepSums(), StepSums(micro_batches=3))


def test_estimated_seconds_replaces_time_of_counted_batches():
    slowed = StepSums(micro_batches=2, positions=100, seconds=1000.0)
    total = slowed + StepSums(micro_batches=3, positions=300, seconds=6.0)
    assert estimated_seconds(slowed, total) == pytest.approx(8.0)


def test_compute_result_survives_a_json_round_trip(tmp_path):
    for result in (make_result(uncounted=("lib::attention",), ranks=2), make_result(available_flops=None, tokens=0)):
        assert ComputeResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result
        path = result.save(tmp_path / "new")
        assert ComputeResult.from_dict(json.loads(path.read_text(encoding="utf-8"))) == result
        assert all(isinstance(value, float) and math.isfinite(value) for value in result.metrics().values())


def test_compute_result_leaves_out_unknown_metrics():
    result = make_result(tokens=0, available_flops=None)
    assert (result.flops_per_token, result.tokens_per_second, result.mfu) == (None, None, None)
    assert not {"flops_per_token", "tokens_per_second", "mfu"} & set(result.metrics())
    assert "tokens per second" not in result.headline
    assert "of the peak" not in result.headline


@pytest.mark.parametrize("field", ["flops", "train_seconds", "steps", "available_flops"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_compute_result_refuses_negative_and_infinite_values(field, value):
    with pytest.raises(ConfigError, match=f"{field}="):
        make_result(**{field: value})


def test_combine_ranks_sums_work_and_takes_maxima():
    slow = make_result(train_seconds=5.0, steps=10, uncounted=("b",))
    large = make_result(flops=4e9, tokens=1000, peak_memory_bytes=900, memory_at_start_bytes=50, uncounted=("a",))
    both = combine_ranks([slow, large])
    assert (both.flops, both.tokens, both.supervised_tokens, both.sampled_steps) == (1e10, 3000, 1000, 6)
    assert (both.steps, both.train_seconds, both.ranks) == (10, 5.0, 2)
    assert (both.peak_memory_bytes, both.memory_at_start_bytes, both.uncounted) == (900, 50, ("a", "b"))
    assert both.trainable_parameters == 10
    assert both.mfu == pytest.approx(1e10 / (5.0 * 3e9 * 2))
    with pytest.raises(ConfigError, match="Some ranks"):
        combine_ranks([slow, make_result(flops_source="formula")])
