"""Losses of a chosen and a rejected completion, one small function each.

Those of DPO's family see `gap`, how much more than the reference the policy prefers the chosen completion:
``log (p / p_ref)(chosen) - log (p / p_ref)(rejected)``, nats. `beta` is the strength of the KL constraint that their
papers start from. The reference-free ones see average log-probabilities of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_loss(gap: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: ``-logsigmoid(beta * gap)`` (https://arxiv.org/abs/2305.18290).

    Args:
        gap: Of each pair, ``[p]``.
        beta: Strength of the KL constraint.
        label_smoothing: Share of pairs whose label is taken to be wrong: conservative DPO
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
    """Robust DPO: the DPO loss, unbiased although labels are wrong now and then (https://arxiv.org/abs/2403.00409).

    Args:
        gap: Of each pair, ``[p]``.
        beta: Strength of the KL constraint.
        label_smoothing: Share of pairs whose label is wrong, below 0.5.

    Returns:
        ``[p]``; may be negative.

    Example:
        >>> robust_loss(torch.tensor([0.0, 10.0]), label_smoothing=0.1)
        tensor([0.6931, 0.1883])
    """
    clean, flipped = -logsigmoid(beta * gap), -logsigmoid(-beta * gap)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(gap: Tensor, *, beta: float = 0.1) -> Tensor:
    """SLiC's hinge on DPO's gap: ``max(0, 1 - beta * gap)`` (https://arxiv.org/abs/2309.06657).

    Args:
        gap: Of each pair, ``[p]``.
        beta: Inverse of the margin that is asked for.

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
        average_gap: The gap of log-ratios divided by the length of their completion, as the authors computed it and
            TRL does, ``[p]``.
        beta: The paper's tau.

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
        chosen: Average log-probability of a token of each chosen completion, nats, ``[p]``.
        rejected: Of each rejected one, ``[p]``.
        beta: Scale of the reward; the paper uses 2 to 10.
        gamma: Margin in units of the reward, the paper's gamma (not the ratio gamma / beta).
        label_smoothing: Share of pairs whose label is taken to be wrong.

    Returns:
        ``[p]``.

    Example:
        >>> simpo_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-1.25, -3.0]))
        tensor([0.6931, 0.0298])
    """
    return sigmoid_loss(beta * (chosen - rejected) - gamma, beta=1.0, label_smoothing=label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """ORPO: NLL of the chosen plus ``-beta * logsigmoid(log odds ratio)`` (https://arxiv.org/abs/2403.07691).

    ``odds = p / (1 - p)``, `p` the geometric mean of a completion's probabilities. No reference.

    Args:
        chosen: Average log-probability of a token of each chosen completion, nats, ``[p]``.
        rejected: Of each rejected one, ``[p]``.
        beta: Weight of the odds ratio, the paper's lambda.

    Returns:
        ``[p]``.

    Example:
        >>> half, third = torch.tensor([1 / 2]).log(), torch.tensor([1 / 3]).log()  # odds 1 and 1/2
        >>> orpo_loss(half, third, beta=1.0) - sft_loss(half)
        tensor([0.4055])
    """
    return sft_loss(chosen) - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def sft_loss(chosen: Tensor) -> Tensor:
    """Negative log-likelihood of a token of the chosen completion: to keep it probable beside other losses.

    Args:
        chosen: Average log-probability of a token of each chosen completion, nats, ``[p]``.

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

    Margins are Llama 2's (https://arxiv.org/abs/2307.09288); centring, which pulls rewards to a mean of 0, is that of
    https://arxiv.org/abs/2312.09244.

    Args:
        chosen: Rewards of the chosen completions, ``[p]``.
        rejected: Of the rejected ones, ``[p]``.
        margins: By how much the chosen one should be better, ``[p]``; None: 0.
        centering: Weight of the centring, 0.01 in the paper.

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
    """``log (p / (1 - p))`` of ``log p``, finite and with finite gradients for every ``log p <= 0``."""
    # p = 1 in this precision would have infinite odds
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    # log(1 - p): each form keeps its digits on its own side of p = 1/2
    near_one, near_zero = torch.log(-torch.expm1(average)), torch.log1p(-torch.exp(average))
    return average - torch.where(average > -math.log(2), near_one, near_zero)
