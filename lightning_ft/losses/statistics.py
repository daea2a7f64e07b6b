"""Means and standard deviations that ignore NaN, from sums that can be added over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def nanstd(x: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation of the values that aren't NaN, with Bessel's correction.

    Args:
        x: Values, of any shape.
        dim: Dimension to reduce; None reduces all of them.

    Returns:
        A tensor of the shape of `x` without `dim`; NaN where fewer than two values are left.

    Example:
        >>> nanstd(torch.tensor([[1.0, 3.0, float("nan")], [5.0, float("nan"), float("nan")]]), dim=1)
        tensor([1.4142,    nan])
    """
    if dim is None:
        x, dim = x.flatten(), 0
    count = (~x.isnan()).sum(dim)
    squares = ((x - x.nanmean(dim, keepdim=True)) ** 2).nansum(dim)
    return torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan)


def power_sums(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count, sum and sum of squares of the values that aren't NaN.

    Add them over micro-batches and ranks, then call `mean_and_std`.

    Args:
        x: Values, of any shape.
        mask: Which values count, ``bool``, of the same shape; None means all.

    Returns:
        ``float64 [3]``, without gradient.

    Example:
        >>> power_sums(torch.tensor([1.0, 3.0, float("nan")])).tolist()
        [2.0, 4.0, 10.0]
    """
    x = x.detach()
    kept = ~x.isnan() if mask is None else mask & ~x.isnan()
    x = torch.where(kept, x, 0.0)
    # In fp32 the variance would be the small difference of two large, rounded numbers. MPS has no float64.
    x = (x.cpu() if x.device.type == "mps" else x).double()
    return torch.stack([kept.to(x).sum(), x.sum(), (x * x).sum()])


def mean_and_std(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, with Bessel's correction, from `power_sums`.

    Args:
        sums: Count, sum and sum of squares, ``[..., 3]``.

    Returns:
        The mean, NaN where no value was counted, and the standard deviation, NaN where fewer than two were, ``[...]``
        each.

    Example:
        >>> one, other = torch.tensor([1.0, 3.0]), torch.tensor([5.0])
        >>> mean, std = mean_and_std(power_sums(one) + power_sums(other))
        >>> mean.item(), std.item()
        (3.0, 2.0)
    """
    count, total, squares = sums.unbind(-1)
    mean = total / count
    deviations = squares - total * mean  # sum of squared deviations from the mean
    # For equal values the difference is rounding error alone: it counts as 0.
    deviations = torch.where(deviations > 64 * torch.finfo(sums.dtype).eps * squares, deviations, 0.0)
    return mean, torch.where(count > 1, (deviations / (count - 1)).sqrt(), torch.nan)
