"""Advantages of GRPO and RLOO against plain Python."""

import math
import statistics

import pytest
import torch

from lightning_ft.errors import ConfigError
from lightning_ft.losses.advantages import (
    combine_rewards,
    group_advantages,
    groups_without_signal,
    leave_one_out_advantages,
    leave_one_out_differences,
)
from lightning_ft.losses.statistics import mean_and_std, nanstd, power_sums

NAN = math.nan
G = 4
REWARDS = [
    [1.0, 2.0, 4.0, -3.0],
    [0.5, NAN, 0.25, 1.0],
    [2.0, 2.0, 2.0, 2.0],  # equal
    [NAN, NAN, 7.0, NAN],  # a single reward
    [NAN, NAN, NAN, NAN],
]
NUMBERS = [r for group in REWARDS for r in group if not math.isnan(r)]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64).flatten()


def non_nan(group):
    return [r for r in group if not math.isnan(r)]


def group_reference(rows, scale):
    advantages = []
    for group in rows:
        for reward in group:
            if math.isnan(reward) or (scale == "group" and len(non_nan(group)) == 1):
                advantages.append(0.0)
                continue
            std = {"group": lambda g=group: statistics.stdev(non_nan(g)), "batch": lambda: statistics.stdev(NUMBERS)}
            divisor = 1.0 if scale == "none" else std[scale]() + 1e-4
            advantages.append((reward - statistics.fmean(non_nan(group))) / divisor)
    return advantages


def leave_one_out_reference(rows):
    differences = []
    for group in rows:
        for i, reward in enumerate(group):
            others = non_nan(group[:i] + group[i + 1 :])
            differences.append(NAN if math.isnan(reward) or not others else reward - statistics.fmean(others))
    return differences


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_match_plain_python(scale):
    advantages = group_advantages(tensor(REWARDS), G, scale=scale)
    assert advantages.tolist() == pytest.approx(group_reference(REWARDS, scale), abs=1e-12)
    assert not advantages[8:].any()  # equal, single and missing rewards


def test_leave_one_out_differences_match_plain_python():
    expected = leave_one_out_reference(REWARDS)
    assert leave_one_out_differences(tensor(REWARDS), G).tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_leave_one_out_advantages_match_plain_python(normalize):
    expected = leave_one_out_reference(REWARDS)
    if normalize:
        mean, std = statistics.fmean(non_nan(expected)), statistics.stdev(non_nan(expected))
        expected = [(x - mean) / (std + 1e-4) for x in expected]
    expected = [0.0 if math.isnan(x) else x for x in expected]
    advantages = leave_one_out_advantages(tensor(REWARDS), G, normalize=normalize)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)


def test_advantages_over_ranks_equal_those_on_one_rank():
    rewards = tensor(REWARDS)
    ranks = rewards[: 2 * G], rewards[2 * G :]
    std = mean_and_std(sum(power_sums(r) for r in ranks))[1]
    joined = torch.cat([group_advantages(r, G, scale="batch", batch_std=std) for r in ranks])
    torch.testing.assert_close(joined, group_advantages(rewards, G, scale="batch"), atol=1e-12, rtol=0)
    assert std.item() == pytest.approx(nanstd(rewards).item(), abs=1e-14)

    statistics = mean_and_std(sum(power_sums(leave_one_out_differences(r, G)) for r in ranks))
    joined = torch.cat([leave_one_out_advantages(r, G, normalize=True, statistics=statistics) for r in ranks])
    torch.testing.assert_close(joined, leave_one_out_advantages(rewards, G, normalize=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rewards", [[3.0], [1.0, 5.0], [NAN, 5.0], []])
def test_advantage_of_single_completion_is_zero(rewards):
    rewards = torch.tensor(rewards)
    assert not group_advantages(rewards, 1).any()
    assert not leave_one_out_advantages(rewards, 1).any()
    assert not leave_one_out_advantages(rewards, 1, normalize=True).any()


def test_advantages_do_not_depend_on_order():
    rows = [row[::-1] for row in REWARDS[::-1]]
    for function in (group_advantages, leave_one_out_advantages):
        forwards, backwards = function(tensor(REWARDS), G), function(tensor(rows), G)
        torch.testing.assert_close(forwards.flip(0), backwards, atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [3, 7, 8, 11])
@pytest.mark.parametrize("reward", [0.7, 0.1, -1e-3, 1e6 + 0.1])
def test_advantages_of_equal_rewards_are_exactly_zero(reward, count):
    """In fp32 the mean of eight times 0.7 isn't 0.7, and Adam takes full steps however small a gradient is."""
    other = torch.linspace(0.3, 1.1, count)
    rewards = torch.cat([torch.full((count,), reward), other])
    rewards[count - 1] = NAN
    results = [group_advantages(rewards, count, scale=scale) for scale in ("group", "batch", "none")]
    results += [leave_one_out_advantages(rewards, count, normalize=normalize) for normalize in (False, True)]
    for advantages in results:
        assert not advantages[:count].any()
        assert advantages[count:].any()
        assert groups_without_signal(advantages, count).tolist() == [True, False]


def test_group_advantages_keep_infinite_rewards_visible():
    assert group_advantages(torch.tensor([-math.inf, 1.0]), 2, scale="none").isinf().any()


def test_combine_rewards_is_unchanged_by_a_function_that_is_only_logged():
    values = torch.tensor([[1.0, 5.0], [math.nan, 5.0], [math.nan, math.nan]])
    torch.testing.assert_close(
        combine_rewards(values, torch.tensor([2.0, 0.0])),
        combine_rewards(values[:, :1], torch.tensor([2.0])),
        equal_nan=True,
    )


def test_combine_rewards_is_weighted_sum_without_nan():
    table = [[1.0, NAN, -2.0], [NAN, NAN, NAN], [NAN, 3.0, NAN], [0.0, 0.0, 0.0]]
    weights = [1.0, 0.5, 2.0]
    expected = [
        NAN if not non_nan(row) else sum(w * r for w, r in zip(weights, row, strict=True) if not math.isnan(r))
        for row in table
    ]
    ours = combine_rewards(torch.tensor(table), torch.tensor(weights))
    assert ours.tolist() == pytest.approx(expected, nan_ok=True)


def test_advantages_reject_invalid_arguments():
    with pytest.raises(ConfigError, match="whole groups"):
        group_advantages(torch.zeros(7), 4)
    with pytest.raises(ConfigError, match="whole groups"):
        leave_one_out_advantages(torch.zeros(8), 0)
    with pytest.raises(ConfigError, match="scale='std'"):
        group_advantages(torch.zeros(8), 4, scale="std")
    with pytest.raises(ConfigError, match="only used with scale='batch'"):
        group_advantages(torch.zeros(8), 4, batch_std=torch.tensor(1.0))
    with pytest.raises(ConfigError, match="normalize=True"):
        leave_one_out_advantages(torch.zeros(8), 4, statistics=(torch.tensor(0.0), torch.tensor(1.0)))
    with pytest.raises(ConfigError, match="one weight for each function"):
        combine_rewards(torch.zeros(3, 2), torch.ones(3))
