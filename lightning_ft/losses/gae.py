"""PPO's critic: rewards and values of tokens to advantages, and the loss of the values.

A value is what the critic expects from here on, read in the state in which a token is chosen: ``values[t]`` belongs to
the same place as ``logprobs[t]``. Per-token tensors are flat, ``[n]``, with `sequences` naming the completion of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.statistics import mean_and_std, power_sums


def token_rewards(scores: Tensor, kl_penalties: Tensor, sequences: Tensor) -> Tensor:
    """Reward of each token: minus its KL penalty, and the score of the completion at its last token.

    https://arxiv.org/abs/1909.08593, equation 2.

    Args:
        scores: Of the `s` completions, ``[s]``. NaN makes every reward of the completion but the penalties NaN, so mask
            such completions.
        kl_penalties: ``kl_coef * kl`` of each token, ``[n]``.
        sequences: Which completion each token belongs to, ``int64 [n]``, never decreasing.

    Returns:
        ``[n]``.

    Raises:
        ConfigError: If a completion has no token that its score could stand at.

    Example:
        >>> token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 0, 1]))
        tensor([-0.1000,  0.8000,  1.7000])
    """
    last = _last_tokens(sequences)
    if int(last.sum()) != len(scores):
        raise ConfigError(
            f"{len(scores)} scores for {int(last.sum())} completions with tokens: a score stands at the last token of "
            "its completion. Leave out completions without tokens."
        )
    return torch.where(last, scores[sequences], 0.0) - kl_penalties


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, sequences: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438), without gradient.

    ``A[t] = delta[t] + gamma * lam * A[t + 1]`` with ``delta[t] = rewards[t] + gamma * values[t + 1] - values[t]``,
    each completion by itself. Nothing comes after the last token: value and advantage there are 0. For a completion
    that was cut off this is untrue, and what it would still have earned is counted as nothing; give such completions a
    score of their own or mask them.

    Args:
        rewards: Of each token, ``[n]``.
        values: The critic's, ``[n]``.
        sequences: Which completion each token belongs to, ``int64 [n]``, never decreasing.
        gamma: Discount a token.
        lam: Between one-step estimates (0: little variance, the critic's bias) and full returns (1).

    Returns:
        Advantages ``[n]``, and returns ``advantages + values`` ``[n]``, the critic's targets.

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
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # [n]
    places = torch.arange(n, device=lengths.device) - (lengths.cumsum(0) - lengths)[rows]
    # One column a completion, zeros behind its end: one pass backwards over places serves all completions.
    padded = deltas.new_zeros(int(lengths.max()), len(lengths))  # [longest, s]
    padded[places, rows] = deltas
    for t in range(len(padded) - 2, -1, -1):
        padded[t] += gamma * lam * padded[t + 1]
    advantages = padded[places, rows]  # [n]
    return advantages, advantages + values


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scale to a variance of 1, and shift to a mean of 0: ``(x - mean) / sqrt(std ** 2 + 1e-8)``.

    Args:
        x: Such as advantages, ``[n]``.
        mask: Which of them count, ``bool [n]``; None: all.
        shift_mean: Whether the mean becomes 0; if not it stays.
        statistics: Mean and standard deviation over all ranks, ``[]`` each, where `x` is of one rank: ``mean_and_std``
            of the summed ``power_sums(x, mask)``. By default those of `x`.

    Returns:
        ``[n]``; 0 where masked, and where it is the only number.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    mean, std = mean_and_std(power_sums(x, mask)) if statistics is None else statistics
    std = std.nan_to_num(0.0)  # of a single number
    whitened = (x - mean) * (std**2 + 1e-8).rsqrt()
    if not shift_mean:
        whitened = whitened + mean
    return whitened if mask is None else whitened.masked_fill(~mask, 0.0)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """Loss of the critic: ``0.5 * max((V - R) ** 2, (V_clipped - R) ** 2)``.

    `V_clipped` stays within `clip` of the value at the time of the rollout, as in OpenAI's implementation of PPO
    (https://arxiv.org/abs/2005.12729, section 3).

    Args:
        values: The critic's now, ``[n]``.
        old_values: At the time of the rollout, ``[n]``.
        returns: Their targets, from `gae`, ``[n]``.
        clip: How far a value may move; None: anywhere.

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
    """What `explained_variance` needs: add it over micro-batches and ranks.

    Args:
        returns: Targets, ``[n]``.
        values: The critic's, ``[n]``.
        mask: Which of them count, ``bool [n]``; None: all.

    Returns:
        ``[2, 3]``: `power_sums` of the returns and of what the values leave of them.
    """
    return torch.stack([power_sums(returns, mask), power_sums(returns - values, mask)])


def explained_variance(sums: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: ``1 - var(returns - values) / var(returns)``.

    1 is a perfect critic, 0 one that is no better than a constant, below 0 a worse one.

    Args:
        sums: From `value_sums`, added up, ``[2, 3]``.

    Returns:
        ``[]``; NaN where all returns are equal.

    Example:
        >>> returns = torch.tensor([1.0, 2.0, 3.0])
        >>> [explained_variance(value_sums(returns, values)).item() for values in (returns, -returns)]
        [1.0, -3.0]
    """
    _, (total, left) = mean_and_std(sums)
    return torch.where(total > 0, 1 - (left / total) ** 2, torch.nan)


def _last_tokens(sequences: Tensor) -> Tensor:
    """Whether each token is the last one of its completion, ``bool [n]``."""
    return torch.cat([sequences[1:] != sequences[:-1], sequences.new_ones(sequences[:1].shape, dtype=torch.bool)])
