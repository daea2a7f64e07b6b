"""KTO, a loss on single completions labeled desirable or undesirable (https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError


def kto_kl(mismatched_logratios: Tensor) -> Tensor:
    """KTO's reference point: the KL divergence from the reference, estimated from mismatched completions.

    The estimate is clamped at 0 from below, since a KL divergence is never negative.

    Args:
        mismatched_logratios: ``log (p / p_ref)``, summed over the tokens of each completion, where each completion
            follows the prompt of another row, in nats, ``[c]``. Gather them from all ranks first: the mean of clamped
            means differs from the clamped mean.

    Returns:
        ``[]``, without gradient.

    Raises:
        ConfigError: If there are no completions.

    Example:
        >>> kto_kl(torch.tensor([0.5, 1.0])), kto_kl(torch.tensor([-3.0, 1.0]))
        (tensor(0.7500), tensor(0.))
    """
    if not mismatched_logratios.numel():
        raise ConfigError("KTO's KL estimate needs at least one mismatched completion, got none.")
    return mismatched_logratios.detach().mean().clamp(min=0.0)


def kto_loss(
    logratios: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: ``weight * (1 - sigmoid(sign * beta * (logratio - kl)))``, the sign +1 if desirable, -1 if undesirable.

    Equation 7 of https://arxiv.org/abs/2402.01306.

    Args:
        logratios: ``log (p / p_ref)``, summed over the tokens of each completion, in nats, ``[c]``.
        labels: Whether each completion is desirable, ``bool [c]``.
        kl: Reference point, from `kto_kl`, ``[]``.
        beta: Strength of the KL constraint.
        desirable_weight: Weight of desirable completions. If undesirable ones are ``n`` times as frequent, the paper
            advises a value of up to ``n``.
        undesirable_weight: Weight of undesirable completions.

    Returns:
        ``[c]``.

    Raises:
        ConfigError: If `labels` isn't one ``bool`` per completion.

    Example:
        >>> kto_loss(torch.tensor([10.0, 10.0]), torch.tensor([True, False]), torch.tensor(0.0))
        tensor([0.2689, 0.7311])
    """
    if labels.dtype != torch.bool or labels.shape != logratios.shape:
        raise ConfigError(f"labels is {labels.dtype} {tuple(labels.shape)}, expected bool {tuple(logratios.shape)}.")
    signs = torch.where(labels, 1.0, -1.0).to(logratios)
    weights = torch.where(labels, desirable_weight, undesirable_weight).to(logratios)
    return weights * torch.sigmoid(-beta * signs * (logratios - kl))  # 1 - sigmoid(x) would lose digits for large x
