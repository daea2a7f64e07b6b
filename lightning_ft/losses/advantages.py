"""Rewards of groups of completions to advantages: GRPO's and RLOO's.

Completions stand prompt-major: the `g` of the first prompt, then those of the second. A reward of NaN is one that no
function could give; such a completion counts in no mean and no standard deviation, and its advantage is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.statistics import nanstd

Scale = Literal["group", "batch", "none"]
EPSILON = 1e-4
"""Added to standard deviations before dividing by them, as TRL does."""


def combine_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of what several functions gave; a function that gave NaN adds nothing.

    Args:
        per_function: Rewards of `c` completions by `k` functions, NaN where a function didn't apply, ``[c, k]``.
        weights: Of the functions, ``[k]``.

    Returns:
        ``[c]``; NaN where no function applied.

    Raises:
        ConfigError: If there isn't one weight a function.

    Example:
        >>> nan = float("nan")
        >>> combine_rewards(torch.tensor([[1.0, 2.0], [nan, 2.0], [nan, nan]]), torch.tensor([1.0, 0.5]))
        tensor([2., 1., nan])
    """
    if per_function.ndim != 2 or weights.shape != per_function.shape[1:]:
        raise ConfigError(
            f"Rewards of shape {tuple(per_function.shape)} with weights of shape {tuple(weights.shape)}: expected "
            "[c, k] and [k], one weight for each function."
        )
    total = (per_function * weights.to(per_function)).nansum(1)
    return torch.where(per_function.isnan().all(1), torch.nan, total)


def group_advantages(
    rewards: Tensor,
    num_completions: int,
    *,
    scale: Scale = "group",
    epsilon: float = EPSILON,
    batch_std: Tensor | None = None,
) -> Tensor:
    """GRPO's advantages: ``(reward - mean of its group) / (std + epsilon)``.

    https://arxiv.org/abs/2402.03300; standard deviations have Bessel's correction, as in TRL. Equal rewards, or a
    single one that isn't NaN, give exactly 0.

    Args:
        rewards: Prompt-major, NaN where there is none, ``[p * g]``.
        num_completions: `g`, completions of a prompt.
        scale: What to divide by: the standard deviation of the group, that of the batch
            (https://arxiv.org/abs/2508.08221), or nothing (Dr. GRPO, https://arxiv.org/abs/2503.20783).
        epsilon: Added to the standard deviation.
        batch_std: Standard deviation over the completions of all ranks, ``[]``, where `rewards` are those of one; by
            default that of `rewards`.

    Returns:
        ``[p * g]``, never NaN.

    Raises:
        ConfigError: If rewards aren't whole groups, for an unknown `scale`, or for `batch_std` without
            ``scale="batch"``.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, float("nan"), 7.0, 7.0, 7.0]), 3, scale="none")
        tensor([-1.,  1.,  0.,  0.,  0.,  0.])
        >>> group_advantages(torch.tensor([0.0, 2.0]), 2)
        tensor([-0.7071,  0.7071])
    """
    grouped = _from_first(_grouped(rewards, num_completions))  # [p, g]
    if scale not in ("group", "batch", "none"):
        raise ConfigError(f"scale={scale!r}, expected 'group', 'batch' or 'none'.")
    if batch_std is not None and scale != "batch":
        raise ConfigError(f"batch_std with scale={scale!r}: it is only used with scale='batch'.")
    centred = grouped - grouped.nanmean(1, keepdim=True)
    if scale == "group":
        centred = centred / (nanstd(grouped, 1)[:, None] + epsilon)
    elif scale == "batch":
        centred = centred / ((nanstd(rewards) if batch_std is None else batch_std) + epsilon)
    return _zero_for_nan(centred.flatten())


def leave_one_out_differences(rewards: Tensor, num_completions: int) -> Tensor:
    """Each reward minus the mean reward of the other completions of its prompt.

    Args:
        rewards: Prompt-major, NaN where there is none, ``[p * g]``.
        num_completions: `g`, completions of a prompt.

    Returns:
        ``[p * g]``; exactly 0 for equal rewards; NaN for completions without a reward, and for those whose siblings
        have none.

    Raises:
        ConfigError: If rewards aren't whole groups.

    Example:
        >>> leave_one_out_differences(torch.tensor([1.0, 3.0, 5.0, 2.0, float("nan"), float("nan")]), 3)
        tensor([-3.,  0.,  3., nan, nan, nan])
    """
    grouped = _from_first(_grouped(rewards, num_completions))  # [p, g]
    others = (~grouped.isnan()).sum(1, keepdim=True) - 1
    baseline = (grouped.nansum(1, keepdim=True) - grouped) / others  # 0 / 0 without siblings
    return (grouped - baseline).flatten()


def leave_one_out_advantages(
    rewards: Tensor,
    num_completions: int,
    *,
    normalize: bool = False,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """RLOO's advantages: each reward minus the mean of its siblings' (https://arxiv.org/abs/2402.14740).

    Args:
        rewards: Prompt-major, the KL penalty already in them, NaN where there is none, ``[p * g]``.
        num_completions: `g`, completions of a prompt.
        normalize: Whether to subtract the mean over the batch and divide by its standard deviation plus 1e-4.
        statistics: That mean and standard deviation over all ranks, ``[]`` each, where `rewards` are those of one:
            ``mean_and_std`` of the summed ``power_sums(leave_one_out_differences(...))``. By default of `rewards`.

    Returns:
        ``[p * g]``, never NaN.

    Raises:
        ConfigError: If rewards aren't whole groups, or for `statistics` without `normalize`.

    Example:
        >>> leave_one_out_advantages(torch.tensor([1.0, 3.0, 5.0, 2.0, float("nan"), float("nan")]), 3)
        tensor([-3.,  0.,  3.,  0.,  0.,  0.])
    """
    if statistics is not None and not normalize:
        raise ConfigError("statistics without normalize=True: they are only used to normalize.")
    differences = leave_one_out_differences(rewards, num_completions)
    if normalize:
        mean, std = (differences.nanmean(), nanstd(differences)) if statistics is None else statistics
        # The mean is 0 but for rounding, which would move the weights by groups that teach nothing.
        differences = torch.where(differences == 0, 0.0, (differences - mean) / (std + EPSILON))
    return _zero_for_nan(differences)


def groups_without_signal(advantages: Tensor, num_completions: int) -> Tensor:
    """Which groups teach nothing: all of their advantages are 0, as where all of their rewards are equal.

    Args:
        advantages: Prompt-major, ``[p * g]``.
        num_completions: `g`, completions of a prompt.

    Returns:
        ``bool [p]``.

    Raises:
        ConfigError: If advantages aren't whole groups.

    Example:
        >>> groups_without_signal(torch.tensor([0.0, 0.0, -1.0, 1.0]), 2)
        tensor([ True, False])
    """
    return (_grouped(advantages, num_completions) == 0).all(1)


def _from_first(grouped: Tensor) -> Tensor:
    """Rewards less the first finite one of their group, ``[p, g]``: 0 where they are equal.

    Advantages only depend on differences, and the mean of eight times 0.7 isn't 0.7 in single precision. Adam doesn't
    mind how small a gradient is, so it would take whole steps on that rounding.
    """
    if not grouped.numel():
        return grouped
    first = grouped.isfinite().int().argmax(1, keepdim=True)  # [p, 1]
    return grouped - grouped.gather(1, first).nan_to_num(0.0, 0.0, 0.0)


def _grouped(rewards: Tensor, num_completions: int) -> Tensor:
    if rewards.ndim != 1 or num_completions < 1 or rewards.numel() % num_completions:
        raise ConfigError(
            f"Rewards of shape {tuple(rewards.shape)} with num_completions={num_completions}: expected "
            "[prompts * num_completions], whole groups of completions."
        )
    return rewards.view(-1, num_completions)


def _zero_for_nan(advantages: Tensor) -> Tensor:
    return torch.where(advantages.isnan(), 0.0, advantages)  # nan_to_num would make infinite rewards look finite
