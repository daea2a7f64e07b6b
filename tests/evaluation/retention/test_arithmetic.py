"""Formulas of retention against PyTorch's functions and values by hand."""

import json
import math

import pytest
import torch
from torch.nn.functional import kl_div

from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.retention.arithmetic import (
    PositionSums,
    RetentionResult,
    kl_divergence,
    kl_lower_bound,
    retention,
    top_k_and_tail,
)


def two_models(positions=50, vocabulary=37, scale=3.0):
    generator = torch.Generator().manual_seed(1)
    return [(scale * torch.randn(positions, vocabulary, generator=generator)).log_softmax(-1) for _ in range(2)]


def test_kl_divergence_matches_pytorch():
    base, tuned = two_models()
    expected = kl_div(tuned, base, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_divergence(base, tuned), expected)
    assert float(kl_divergence(base, tuned).mean()) != pytest.approx(float(kl_divergence(tuned, base).mean()), rel=0.01)
    assert kl_divergence(base, base).abs().max() == 0


def test_kl_handles_tokens_of_probability_zero():
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    tuned = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert float(kl_divergence(base, tuned)) == pytest.approx(math.log(2))
    assert float(kl_divergence(tuned, base)) == math.inf
    for k in (2, 3):  # the base's tail has probability 0
        assert float(kl_lower_bound(top_k_and_tail(base, k), tuned)) == pytest.approx(math.log(2))


def test_kl_lower_bound_rises_to_the_exact_divergence():
    base, tuned = two_models()
    exact = kl_divergence(base, tuned)
    previous = torch.zeros_like(exact)
    for k in (1, 2, 4, 8, 16, 32, 36, 37, 100):
        bound = kl_lower_bound(top_k_and_tail(base, k), tuned)
        assert (bound <= exact + 1e-5).all()
        assert (bound >= previous - 1e-5).all()  # more tokens kept, tighter bound
        previous = bound
    torch.testing.assert_close(previous, exact)  # every token kept


def test_kl_lower_bound_matches_value_by_hand():
    base, tuned = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.2, 0.3, 0.5]])
    bound = kl_lower_bound(top_k_and_tail(base.log(), 1), tuned.log())
    assert float(bound) == pytest.approx(0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8), abs=1e-6)


def test_top_k_and_tail_keeps_a_small_tail():
    logits = torch.full((1, 1000), -30.0)
    logits[0, 0] = 0.0
    kept = top_k_and_tail(logits.log_softmax(-1), 1)
    assert float(kept.tail) == pytest.approx(math.log(999) - 30, abs=1e-3)  # 1 - p would be 0 in fp32
    assert kept.ids.dtype == torch.int32


def test_retention_computes_ratios_of_sums():
    sums = PositionSums((1, 3), (0.4, 0.4), (1.0, 6.0), (2.0, 9.0), (1, 1))
    result = retention(sums, PositionSums((2,), (3.0,), (1.0,), (1.0,), (2,)), base="step_0", top_k=8, texts_hash="x")
    assert result.kl_general.value == pytest.approx(0.2)
    assert result.ppl_ratio.value == pytest.approx(math.exp(11 / 4) / math.exp(7 / 4))
    assert result.top1_agreement.value == 0.5
    assert result.kl_task == Interval(1.5, 1.5, 1.5)
    assert (result.texts, result.tokens, result.task_rows, result.task_tokens) == (2, 4, 1, 2)
    assert result.lower_bound
    assert "at least" in result.headline


def test_retention_intervals_contain_the_value_and_narrow_with_texts():
    generator = torch.Generator().manual_seed(0)

    def interval_of(count):
        kl = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        ones = (10,) * count
        return retention(
            PositionSums(ones, tuple(kl), ones, ones, ones), base="model", top_k=None, texts_hash=""
        ).kl_general

    few, many = interval_of(8), interval_of(200)
    for interval in (few, many):
        assert interval.lo < interval.value < interval.hi
    assert many.hi - many.lo < few.hi - few.lo


@pytest.mark.parametrize("task", [None, PositionSums((2, 2), (3.0, 1.0), (1.0, 1.0), (1.0, 1.0), (2, 2))])
def test_retention_result_survives_a_json_round_trip(tmp_path, task):
    general = PositionSums((1, 3), (math.inf, 0.4), (1.0, 6.0), (2.0, 9000.0), (1, 1))
    result = retention(general, task, base="adapter_off", top_k=None, texts_hash="x", step=7, provenance={"seed": 0})
    assert result.kl_general.value == result.ppl_ratio.value == math.inf
    path = result.save(tmp_path / "retention")
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    assert path.name == "retention.json"
    assert values["kl_general"]["value"] == "Infinity"
    assert RetentionResult.from_dict(values) == result
    names = {"kl_general", "ppl_ratio", "top1_agreement"} | (set() if task is None else {"kl_task"})
    ends = {f"{name}{end}" for name in names for end in ("", "_lo", "_hi")}
    assert set(result.metrics()) == ends | {"kl_lower_bound", "tokens"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (((), (), (), (), ()), "There is no text"),
        (((0,), (0.0,), (0.0,), (0.0,), (0,)), "without a token to predict"),
        (((1,), (math.nan,), (0.0,), (0.0,), (0,)), "kl of text 0 isn't a number .*Training has diverged"),
        (((1, 1), (0.0, 0.0), (0.0, math.nan), (0.0, 0.0), (0, 0)), "base_nll of text 1 .*the base's weights"),
    ],
)
def test_position_sums_refuses_empty_texts_and_nan(values, message):
    with pytest.raises(RetentionError, match=message):
        PositionSums(*values)
