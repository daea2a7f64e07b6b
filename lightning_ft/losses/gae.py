"""Advantages for PPO from token rewards and a critic's values, and the critic's loss.

A value is the return that the critic expects in the state from which a token is sampled: ``values[t]`` and
``logprobs[t]`` come from the same hidden state. Tensors with one entry per token are flat, ``[n]``, and `sequences`
holds the index of each token's completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.statistics import mean_and_std, power_sums


def token_rewards(rewards: Tensor, kl_penalties: Tensor, sequences: Tensor) -> Tensor:
    """Reward of each token: its negative KL penalty, plus the reward of the completion at the last token.

    Equation 2 of https://arxiv.org/abs/1909.08593.

    Args:
        rewards: Rewards of the `s` completions, ``[s]``. A NaN makes the reward of the last token NaN, so mask such
            completions.
        kl_penalties: ``kl_coef * kl`` of each token, ``[n]``.
        sequences: Index of the completion each token belongs to, ``int64 [n]``, never decreasing.

    Returns:
        ``[n]``.

    Raises:
        ConfigError: If a completion has no token to carry its reward.

    Example:
        >>> token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 0, 1]))
        tensor([-0.1000,  0.8000,  1.7000])
    """
    last = _last_tokens(sequences)
    if int(last.sum()) != len(rewards):
        raise ConfigError(
            f"Got {len(rewards)} rewards for {int(last.sum())} completions with tokens. The last token of a completion "
            "carries its reward: leave out completions without tokens."
        )
    return torch.where(last, rewards[sequences], 0.0) - kl_penalties


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, sequences: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438), without gradient.

    ``A[t] = delta[t] + gamma * lam * A[t + 1]`` with ``delta[t] = rewards[t] + gamma * values[t + 1] - values[t]``,
    separately for each completion. After the last token, value and advantage are 0. For a truncated completion this
    ignores the reward of the missing tokens: give such completions a penalty, or mask them.

    Args:
        rewards: Reward of each token, ``[n]``.
        values: Value of each token from the critic, ``[n]``.
        sequences: Index of the completion each token belongs to, ``int64 [n]``, never decreasing.
        gamma: Discount factor per token.
        lam: Trade-off between one-step estimates (0: low variance, the critic's bias) and full returns (1).

    Returns:
        Advantages, ``[n]``, and returns, ``advantages + values``, ``[n]``, which are the critic's targets.

    Example:
        >>> rewards, values = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 0.5, 1.0])
        >>> advantages, returns = gae(rewards, values, torch.tensor([0, 0, 1]), lam=1.0)
        >>> advantages.tolist(), returns.tolist()
        ([0.5, 0.5, 1.0], [1.0, 1.0, 2.0])
    """
    n = rewards.numel()
    if not n:
        return rewards.clone(), values.clone()
    following = torch.cat([values[1:], values.new_zeros(1)]).masked_fill(_last_tokens(sequences), 0.0)
    deltas = rewards + gamma * following - values
    _, lengths = sequences.unique_consecutive(return_counts=True)  # [s]
    columns = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # [n]
    positions = torch.arange(n, device=lengths.device) - (lengths.cumsum(0) - lengths)[columns]  # [n]
    # Completions of 2 and 1 tokens become the columns [[d0, d2], [d1, 0]]: one column per completion, padded with
    # zeros, so that a single backward pass over the positions serves all completions.
    padded = deltas.new_zeros(int(lengths.max()), len(lengths))  # [longest, s]
    padded[positions, columns] = deltas
    for t in range(len(padded) - 2, -1, -1):
        padded[t] += gamma * lam * padded[t + 1]
    advantages = padded[positions, columns]  # [n]
    return advantages, advantages + values


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scale to variance 1 and shift to mean 0: ``(x - mean) / sqrt(std ** 2 + 1e-8)``.

    Args:
        x: Values to whiten, such as advantages, ``[n]``.
        mask: Which values count, ``bool [n]``; None means all.
        shift_mean: Whether to shift the mean to 0; otherwise it is kept.
        statistics: Mean and standard deviation over all ranks, ``[]`` each, if `x` holds the values of one rank:
            ``mean_and_std`` of the summed ``power_sums(x, mask)``. By default they are computed from `x`.

    Returns:
        ``[n]``; 0 where masked, and for a single value.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    mean, std = mean_and_std(power_sums(x, mask)) if statistics is None else statistics
    std = std.nan_to_num(0.0)  # NaN for a single value
    whitened = (x - mean) * (std**2 + 1e-8).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return whitened if mask is None else whitened.masked_fill(~mask, 0.0)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """The critic's loss: ``0.5 * max((V - R) ** 2, (V_clipped - R) ** 2)``.

    `V_clipped` stays within `clip` of the value at rollout time, as in OpenAI's implementation of PPO
    (https://arxiv.org/abs/2005.12729, section 3).

    Args:
        values: Current values, ``[n]``.
        old_values: Values at rollout time, ``[n]``.
        returns: Targets of the values, from `gae`, ``[n]``.
        clip: Largest distance of the clipped value from the old one; None turns clipping off.

    Returns:
        ``[n]``.

    Raises:
        ConfigError: If `clip` isn't above 0.

    Example:
        >>> clipped_value_loss(torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
        tensor([0.3200, 0.4050])
    """
    squares = (values - returns) ** 2
    if clip is not None:
        if not clip > 0:
            raise ConfigError(f"clip={clip!r}: expected a number above 0, or None.")
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        squares = torch.max(squares, (clipped - returns) ** 2)
    return 0.5 * squares


def value_sums(returns: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sums that `explained_variance` needs; add them over micro-batches and ranks.

    Args:
        returns: Targets of the values, ``[n]``.
        values: Values from the critic, ``[n]``.
        mask: Which tokens count, ``bool [n]``; None means all.

    Returns:
        ``[2, 3]``: `power_sums` of the returns and of the residuals ``returns - values``.
    """
    return torch.stack([power_sums(returns, mask), power_sums(returns - values, mask)])


def explained_variance(sums: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: ``1 - var(returns - values) / var(returns)``.

    It is 1 for a perfect critic, 0 for one that is no better than a constant, and negative for a worse one.

    Args:
        sums: Sums from `value_sums`, ``[2, 3]``.

    Returns:
        ``[]``; NaN if all returns are equal.

    Example:
        >>> returns = torch.tensor([1.0, 2.0, 3.0])
        >>> [explained_variance(value_sums(returns, values)).item() for values in (returns, -returns)]
        [1.0, -3.0]
    """
    _, (total, residual) = mean_and_std(sums)
    return torch.where(total > 0, 1 - (residual / total) ** 2, torch.nan)


def _last_tokens(sequences: Tensor) -> Tensor:
    """Whether each token is the last of its completion, ``bool [n]``."""
    return torch.cat([sequences[1:] != sequences[:-1], sequences.new_ones(sequences[:1].shape, dtype=torch.bool)])
