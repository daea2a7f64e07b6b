"""Advantages for GRPO and RLOO from the rewards of groups of completions.

Completions are ordered by prompt: the `g` completions of the first prompt, then those of the second. A NaN reward means
that no reward function applied to the completion: it is left out of means and standard deviations, and its advantage
is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.statistics import nanstd

Scale = Literal["group", "batch", "none"]
EPSILON = 1e-4
"""Added to a standard deviation before dividing by it, as in TRL."""


def combine_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the rewards from several functions; NaN adds nothing, and a function of weight 0 is left out.

    Args:
        per_function: Rewards of `c` completions from `k` functions, NaN where a function didn't apply, ``[c, k]``.
        weights: Weight of each function, ``[k]``.

    Returns:
        ``[c]``; NaN where no function with a weight applied.

    Raises:
        ConfigError: If there isn't one weight per function.

    Example:
        >>> nan = float("nan")
        >>> combine_rewards(torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan]]), torch.tensor([1.0, 0.5]))
        tensor([2., 1., nan])
        >>> combine_rewards(torch.tensor([[1.0, 2.0], [nan, 2.0]]), torch.tensor([1.0, 0.0]))
        tensor([1., nan])
    """
    if per_function.ndim != 2 or weights.shape != per_function.shape[1:]:
        raise ConfigError(
            f"Rewards have shape {tuple(per_function.shape)} and weights {tuple(weights.shape)}: expected [c, k] and "
            "[k], one weight for each function."
        )
    total = (per_function * weights.to(per_function)).nansum(1)
    applied = ~per_function.isnan() & (weights.to(per_function.device) != 0)  # what is only logged changes no total
    return torch.where(applied.any(1), total, torch.nan)


def group_advantages(
    rewards: Tensor,
    num_completions: int,
    *,
    scale: Scale = "group",
    epsilon: float = EPSILON,
    batch_std: Tensor | None = None,
) -> Tensor:
    """GRPO's advantages: ``(reward - mean of its group) / (std + epsilon)``.

    See https://arxiv.org/abs/2402.03300. The standard deviation has Bessel's correction, as in TRL. Equal rewards, or a
    single reward that isn't NaN, give exactly 0.

    Args:
        rewards: Rewards ordered by prompt, NaN where there is none, ``[p * g]``.
        num_completions: Number of completions `g` per prompt.
        scale: Divisor: the standard deviation of the ``group``, that of the ``batch``
            (https://arxiv.org/abs/2508.08221), or ``none`` (Dr. GRPO, https://arxiv.org/abs/2503.20783).
        epsilon: Number added to the standard deviation.
        batch_std: Standard deviation over the completions of all ranks, ``[]``, if `rewards` holds those of one rank.
            By default it is computed from `rewards`.

    Returns:
        ``[p * g]``, never NaN.

    Raises:
        ConfigError: If `rewards` doesn't hold whole groups, `scale` is unknown, or `batch_std` is passed without
            ``scale="batch"``.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, float("nan"), 7.0, 7.0, 7.0]), 3, scale="none")
        tensor([-1.,  1.,  0.,  0.,  0.,  0.])
        >>> group_advantages(torch.tensor([0.0, 2.0]), 2)
        tensor([-0.7071,  0.7071])
    """
    grouped = _minus_first(_grouped(rewards, num_completions))  # [p, g]
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"scale={scale!r}: expected 'group', 'batch' or 'none'.")
    if batch_std is not None and scale != "batch":
        raise ConfigError(f"batch_std is only used with scale='batch', got scale={scale!r}. Leave batch_std out.")
    centered = grouped - grouped.nanmean(1, keepdim=True)
    if scale == "group":
        centered = centered / (nanstd(grouped, 1)[:, None] + epsilon)
    elif scale == "batch":
        centered = centered / ((nanstd(rewards) if batch_std is None else batch_std) + epsilon)
    return _zero_for_nan(centered.flatten())


def leave_one_out_differences(rewards: Tensor, num_completions: int) -> Tensor:
    """Each reward minus the mean reward of the other completions of its prompt.

    Args:
        rewards: Rewards ordered by prompt, NaN where there is none, ``[p * g]``.
        num_completions: Number of completions `g` per prompt.

    Returns:
        ``[p * g]``; exactly 0 for equal rewards; NaN for a completion without a reward, and if no other completion of
        its prompt has one.

    Raises:
        ConfigError: If `rewards` doesn't hold whole groups.

    Example:
        >>> leave_one_out_differences(torch.tensor([1.0, 3.0, 5.0, 2.0, float("nan"), float("nan")]), 3)
        tensor([-3.,  0.,  3., nan, nan, nan])
    """
    grouped = _minus_first(_grouped(rewards, num_completions))  # [p, g]
    others = (~grouped.isnan()).sum(1, keepdim=True) - 1
    baseline = (grouped.nansum(1, keepdim=True) - grouped) / others  # 0 / 0 without others
    return (grouped - baseline).flatten()


def leave_one_out_advantages(
    rewards: Tensor,
    num_completions: int,
    *,
    normalize: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """RLOO's advantages: each reward minus the mean reward of its prompt's other completions.

    See https://arxiv.org/abs/2402.14740.

    Args:
        rewards: Rewards ordered by prompt, KL penalty included, NaN where there is none, ``[p * g]``.
        num_completions: Number of completions `g` per prompt.
        normalize: Whether to subtract the mean over the batch and divide by its standard deviation plus 1e-4.
        statistics: Mean and standard deviation over all ranks, ``[]`` each, if `rewards` holds those of one rank:
            ``mean_and_std`` of the summed ``power_sums(leave_one_out_differences(...))``. By default they are computed
            from `rewards`.

    Returns:
        ``[p * g]``, never NaN.

    Raises:
        ConfigError: If `rewards` doesn't hold whole groups, or `statistics` is passed without `normalize`.

    Example:
        >>> leave_one_out_advantages(torch.tensor([1.0, 3.0, 5.0, 2.0, float("nan"), float("nan")]), 3)
        tensor([-3.,  0.,  3.,  0.,  0.,  0.])
    """
    if statistics is not None and not normalize:
        raise ConfigError("statistics is only used with normalize=True. Set it, or leave statistics out.")
    differences = leave_one_out_differences(rewards, num_completions)
    if normalize:
        mean, std = (differences.nanmean(), nanstd(differences)) if statistics is None else statistics
        # The mean is 0 up to rounding. Subtracting it would give groups of equal rewards a tiny advantage.
        differences = torch.where(differences == 0, 0.0, (differences - mean) / (std + EPSILON))
    return _zero_for_nan(differences)


def groups_without_signal(advantages: Tensor, num_completions: int) -> Tensor:
    """Which groups give no gradient since all their advantages are 0, for example because their rewards are equal.

    Args:
        advantages: Advantages ordered by prompt, ``[p * g]``.
        num_completions: Number of completions `g` per prompt.

    Returns:
        ``bool [p]``.

    Raises:
        ConfigError: If `advantages` doesn't hold whole groups.

    Example:
        >>> groups_without_signal(torch.tensor([0.0, 0.0, -1.0, 1.0]), 2)
        tensor([ True, False])
    """
    return (_grouped(advantages, num_completions) == 0).all(1)


def _minus_first(grouped: Tensor) -> Tensor:
    """Rewards minus the first finite reward of their group, ``[p, g]``, which is exactly 0 for equal rewards.

    Advantages depend on differences only, and in fp32 the mean of eight times 0.7 isn't 0.7. Adam's steps don't shrink
    with the gradient, so it would take full steps on that rounding error.
    """
    if not grouped.numel():
        return grouped
    first = grouped.isfinite().int().argmax(1, keepdim=True)  # [p, 1]
    return grouped - grouped.gather(1, first).nan_to_num(0.0, 0.0, 0.0)


def _grouped(rewards: Tensor, num_completions: int) -> Tensor:
    if rewards.ndim != 1 or num_completions < 1 or rewards.numel() % num_completions:
        raise ConfigError(
            f"Rewards have shape {tuple(rewards.shape)} with num_completions={num_completions}: expected "
            "[prompts * num_completions], whole groups of completions."
        )
    return rewards.view(-1, num_completions)


def _zero_for_nan(advantages: Tensor) -> Tensor:
    return torch.where(advantages.isnan(), 0.0, advantages)  # nan_to_num would hide infinite rewards
