"""Losses on pairs of a chosen and a rejected completion, one small function each.

The losses of the DPO family take `gap`, the difference of the two log-ratios in nats:
``log (p / p_ref)(chosen) - log (p / p_ref)(rejected)``. It says how much more strongly than the reference the policy
prefers the chosen completion. Their `beta` is the strength of the KL constraint from which the papers derive them. The
reference-free losses take average log-probabilities per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_loss(gap: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: ``-logsigmoid(beta * gap)`` (https://arxiv.org/abs/2305.18290).

    Args:
        gap: Difference of the log-ratios of each pair, in nats, ``[p]``.
        beta: Strength of the KL constraint.
        label_smoothing: Share of pairs whose label is assumed to be wrong, as in conservative DPO
            (https://ericmitchell.ai/cdpo.pdf).

    Returns:
        ``[p]``.

    Example:
        >>> sigmoid_loss(torch.tensor([0.0, 10.0]))
        tensor([0.6931, 0.3133])
    """
    loss = -logsigmoid(beta * gap)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-beta * gap)
    return loss


def robust_loss(gap: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: an estimate of the DPO loss that noisy labels don't bias (https://arxiv.org/abs/2403.00409).

    Args:
        gap: Difference of the log-ratios of each pair, in nats, ``[p]``.
        beta: Strength of the KL constraint.
        label_smoothing: Share of pairs whose label is wrong, below 0.5.

    Returns:
        ``[p]``; individual losses may be negative.

    Example:
        >>> robust_loss(torch.tensor([0.0, 10.0]), label_smoothing=0.1)
        tensor([0.6931, 0.1883])
    """
    clean, flipped = -logsigmoid(beta * gap), -logsigmoid(-beta * gap)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(gap: Tensor, *, beta: float = 0.1) -> Tensor:
    """SLiC's hinge on DPO's gap: ``max(0, 1 - beta * gap)`` (https://arxiv.org/abs/2309.06657).

    Args:
        gap: Difference of the log-ratios of each pair, in nats, ``[p]``.
        beta: Inverse of the gap beyond which a pair has no loss.

    Returns:
        ``[p]``.

    Example:
        >>> hinge_loss(torch.tensor([0.0, 5.0, 20.0]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    return torch.relu(1 - beta * gap)


def ipo_loss(average_gap: Tensor, *, beta: float = 0.1) -> Tensor:
    """IPO: ``(average_gap - 1 / (2 * beta)) ** 2``, equation 17 of https://arxiv.org/abs/2310.12036.

    Args:
        average_gap: Difference of the log-ratios per token, ``[p]``: each log-ratio is divided by the length of its
            completion, as in the authors' code and in TRL.
        beta: Strength of the KL constraint, tau in the paper.

    Returns:
        ``[p]``.

    Example:
        >>> ipo_loss(torch.tensor([0.0, 5.0]))
        tensor([25.,  0.])
    """
    return (average_gap - 1 / (2 * beta)) ** 2


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO: ``-logsigmoid(beta * (chosen - rejected) - gamma)``, without a reference (https://arxiv.org/abs/2405.14734).

    Args:
        chosen: Average log-probability per token of each chosen completion, in nats, ``[p]``.
        rejected: Average log-probability per token of each rejected completion, in nats, ``[p]``.
        beta: Scale of the reward; the paper uses 2 to 10.
        gamma: Margin in units of the reward, gamma in the paper (not the ratio gamma / beta).
        label_smoothing: Share of pairs whose label is assumed to be wrong.

    Returns:
        ``[p]``.

    Example:
        >>> simpo_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.25, -3.0]))
        tensor([0.6931, 0.0298])
    """
    return sigmoid_loss(beta * (chosen - rejected) - gamma, beta=1.0, label_smoothing=label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """ORPO: NLL of the chosen plus ``-beta * logsigmoid(log odds ratio)`` (https://arxiv.org/abs/2403.07691).

    The odds are ``p / (1 - p)``, where `p` is the geometric mean of the probabilities of a completion's tokens. ORPO
    needs no reference.

    Args:
        chosen: Average log-probability per token of each chosen completion, in nats, ``[p]``.
        rejected: Average log-probability per token of each rejected completion, in nats, ``[p]``.
        beta: Weight of the odds-ratio term, lambda in the paper.

    Returns:
        ``[p]``.

    Example:
        >>> half, third = torch.tensor([1 / 2]).log(), torch.tensor([1 / 3]).log()  # odds 1 and 1/2
        >>> orpo_loss(half, third, beta=1.0) - sft_loss(half)
        tensor([0.4055])
    """
    return sft_loss(chosen) - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def sft_loss(chosen: Tensor) -> Tensor:
    """Average negative log-likelihood per token of the chosen completion, a regularizer for the other losses.

    Args:
        chosen: Average log-probability per token of each chosen completion, in nats, ``[p]``.

    Returns:
        ``[p]``.

    Example:
        >>> sft_loss(torch.tensor([-1.5]))
        tensor([1.5000])
    """
    return -chosen


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Loss of a reward model: ``-logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2``.

    The margin is from Llama 2 (https://arxiv.org/abs/2307.09288). The centering term, which pulls the mean of the
    rewards towards 0, is from https://arxiv.org/abs/2312.09244.

    Args:
        chosen: Rewards of the chosen completions, ``[p]``.
        rejected: Rewards of the rejected completions, ``[p]``.
        margins: How much larger the reward of the chosen completion should be, ``[p]``. None means 0.
        centering: Weight of the centering term, 0.01 in the paper.

    Returns:
        ``[p]``.

    Example:
        >>> bradley_terry_loss(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor([0.6931, 0.6931])
    """
    difference = chosen - rejected
    if margins is not None:
        difference = difference - margins
    loss = -logsigmoid(difference)
    if centering:
        loss = loss + centering * (chosen + rejected) ** 2
    return loss


def _log_odds(average: Tensor) -> Tensor:
    """``log (p / (1 - p))`` from ``log p``; the value and its gradient are finite for every ``log p <= 0``."""
    # A p that rounds to 1 would have infinite odds.
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    # Two forms of log(1 - p): each is accurate on its own side of p = 1/2.
    near_one, near_zero = torch.log(-torch.expm1(average)), torch.log1p(-torch.exp(average))
    return average - torch.where(average > -math.log(2), near_one, near_zero)
