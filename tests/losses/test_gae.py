"""Token rewards, generalized advantage estimation, whitening and the critic's loss against plain Python."""

import math
import statistics

import pytest
import torch

from lightning_ft.errors import ConfigError
from lightning_ft.losses.gae import (
    clipped_value_loss,
    explained_variance,
    gae,
    token_rewards,
    value_sums,
    whiten,
)
from lightning_ft.losses.statistics import mean_and_std, power_sums

LENGTHS = [4, 1, 9, 2, 1]
N = sum(LENGTHS)
SEQUENCES = torch.arange(5).repeat_interleave(torch.tensor(LENGTHS))


def draw(seed, n=N):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_rewards_put_reward_at_last_token():
    rewards, penalties = [1.0, -2.0, 0.5, 3.0, 7.0], draw(0).tolist()
    expected, position = [], 0
    for reward, length in zip(rewards, LENGTHS, strict=True):
        for t in range(length):
            expected.append(-penalties[position] + (reward if t == length - 1 else 0.0))
            position += 1
    ours = token_rewards(torch.tensor(rewards).double(), draw(0), SEQUENCES)
    assert ours.tolist() == pytest.approx(expected, abs=1e-14)


def test_token_rewards_reject_completion_without_tokens():
    with pytest.raises(ConfigError, match="3 rewards for 2 completions"):
        token_rewards(torch.ones(3), torch.zeros(2), torch.tensor([0, 2]))


def test_token_rewards_keep_nan_in_its_completion():
    ours = token_rewards(torch.tensor([1.0, math.nan]), torch.zeros(3), torch.tensor([0, 1, 1]))
    assert ours.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_is_sum_of_discounted_errors(gamma, lam):
    rewards, values = draw(0), draw(1)
    advantages, returns = gae(rewards, values.requires_grad_(), SEQUENCES, gamma, lam)
    expected, start = [], 0
    for length in LENGTHS:
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        expected += [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]
        start += length
    assert advantages.tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns, advantages + values.detach(), atol=0, rtol=0)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_gae_returns_at_lam_1_do_not_depend_on_values():
    rewards, values = draw(0), draw(1)
    _, returns = gae(rewards, values, SEQUENCES, lam=1.0)
    expected = [sum(rewards[i:][SEQUENCES[i:] == SEQUENCES[i]].tolist()) for i in range(len(rewards))]
    assert returns.tolist() == pytest.approx(expected, abs=1e-12)


def test_gae_treats_completions_separately():
    rewards, values = draw(0), draw(1)
    here = SEQUENCES == 2
    alone = gae(rewards[here], values[here], torch.zeros(9, dtype=torch.int64))
    joint = gae(rewards, values, SEQUENCES)
    next_to_nan = gae(torch.where(here, rewards, math.nan), values, SEQUENCES)
    for expected, *others in zip(alone, joint, next_to_nan, strict=True):
        for other in others:
            torch.testing.assert_close(expected, other[here], atol=0, rtol=0)


def test_gae_accepts_gaps_in_completion_indices():
    rewards, values = draw(0), draw(1)
    torch.testing.assert_close(gae(rewards, values, 3 * SEQUENCES + 1), gae(rewards, values, SEQUENCES))


def test_gae_accepts_no_tokens():
    nothing = torch.zeros(0)
    assert [x.shape for x in gae(nothing, nothing, nothing.long())] == [(0,), (0,)]
    assert token_rewards(nothing, nothing, nothing.long()).shape == (0,)
    assert whiten(nothing).shape == (0,)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_matches_plain_python(shift_mean):
    x = draw(0) * 5 + 3
    mask = torch.arange(len(x)) % 4 > 0
    kept = x[mask].tolist()
    mean, variance = statistics.fmean(kept), statistics.variance(kept)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean) for v in kept]
    ours = whiten(torch.where(mask, x, math.nan), mask, shift_mean)
    assert ours[mask].tolist() == pytest.approx(expected, abs=1e-12)
    assert not ours[~mask].any()

    all_ranks = mean_and_std(power_sums(x[:8], mask[:8]) + power_sums(x[8:], mask[8:]))
    parts = [whiten(x[:8], mask[:8], shift_mean, all_ranks), whiten(x[8:], mask[8:], shift_mean, all_ranks)]
    torch.testing.assert_close(torch.cat(parts), ours, atol=1e-12, rtol=0)


def test_whiten_accepts_equal_and_single_values():
    assert whiten(torch.full((5,), 0.3)).abs().max() < 1e-3
    assert whiten(torch.tensor([3.0])).tolist() == [0]
    assert whiten(torch.tensor([3.0, 4.0]), torch.tensor([False, False])).tolist() == [0, 0]


@pytest.mark.parametrize("clip", [0.2, 1.5, None])
def test_clipped_value_loss_matches_plain_python(clip):
    values, old, returns = draw(0).requires_grad_(), draw(1), draw(2)
    expected = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        limited = v if clip is None else min(max(v, o - clip), o + clip)
        expected.append(0.5 * max((v - r) ** 2, (limited - r) ** 2))
    assert clipped_value_loss(values, old, returns, clip).tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda v: clipped_value_loss(v, old, returns, clip), values)
    with pytest.raises(ConfigError, match="clip=0"):
        clipped_value_loss(values, old, returns, 0)


def test_explained_variance_matches_plain_python():
    returns, mask = draw(0), torch.arange(N) % 5 > 0
    values = returns + 0.5 * draw(1)
    kept = list(zip(returns[mask].tolist(), values[mask].tolist(), strict=True))
    expected = 1 - statistics.variance([r - v for r, v in kept]) / statistics.variance([r for r, _ in kept])
    parts = value_sums(returns[:6], values[:6], mask[:6]) + value_sums(returns[6:], values[6:], mask[6:])
    assert explained_variance(parts).item() == pytest.approx(expected, abs=1e-12)
    assert explained_variance(value_sums(returns, returns - 4)).item() == pytest.approx(1)  # a constant offset is free
    assert explained_variance(value_sums(returns, torch.zeros_like(returns))).item() == pytest.approx(0)
    assert explained_variance(value_sums(torch.full((7,), 0.1), draw(0, 7))).isnan()
