"""Means and standard deviations that ignore NaN, against Python's `statistics`."""

import math
import statistics

import pytest
import torch

from lightning_ft.losses.statistics import mean_and_std, nanstd, power_sums

NAN = math.nan


@pytest.mark.parametrize("values", [[1.0, 4.0, NAN, 9.0], [NAN, 2.0, 2.5], [3.0], [NAN, 3.0], [NAN, NAN], []])
def test_mean_and_std_ignore_nan(values):
    numbers = [v for v in values if not math.isnan(v)]
    std = statistics.stdev(numbers) if len(numbers) > 1 else NAN
    mean = statistics.fmean(numbers) if numbers else NAN
    x = torch.tensor(values, dtype=torch.float64)
    assert nanstd(x).item() == pytest.approx(std, abs=1e-14, nan_ok=True)
    ours = mean_and_std(power_sums(x))
    assert [t.item() for t in ours] == pytest.approx([mean, std], abs=1e-14, nan_ok=True)


def test_nanstd_reduces_a_dimension():
    x = torch.tensor([[1.0, 2.0, NAN], [5.0, NAN, NAN]], dtype=torch.float64)
    expected = torch.tensor([math.sqrt(0.5), NAN], dtype=torch.float64)
    torch.testing.assert_close(nanstd(x, 1), expected, equal_nan=True)
    torch.testing.assert_close(nanstd(x.T, 0), expected, equal_nan=True)


def test_power_sums_add_up_and_respect_mask():
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)) + 1000
    mask = torch.arange(40) % 3 > 0
    whole = mean_and_std(power_sums(x, mask))
    parts = sum(power_sums(x[i : i + 7], mask[i : i + 7]) for i in range(0, 40, 7))
    kept = x[mask].double()
    for ours in (whole, mean_and_std(parts)):
        assert ours[0].item() == pytest.approx(kept.mean().item(), rel=1e-12)
        assert ours[1].item() == pytest.approx(kept.std().item(), rel=1e-8)


def test_power_sums_ignore_masked_infinities():
    x = torch.tensor([1.0, 3.0, math.inf, NAN])
    assert power_sums(x, torch.tensor([True, True, False, False])).tolist() == [2, 4, 10]


@pytest.mark.parametrize("value", [0.1, -7.3, 1e6 + 0.1])
def test_std_of_equal_values_is_zero(value):
    assert mean_and_std(power_sums(torch.full((1001,), value, dtype=torch.float64)))[1].item() == 0
