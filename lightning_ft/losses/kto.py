"""KTO: a loss of completions that are merely good or bad, without pairs (https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError


def kto_kl(mismatched_logratios: Tensor) -> Tensor:
    """KTO's reference point: the KL divergence, estimated from completions of other prompts, at least 0.

    Args:
        mismatched_logratios: ``log (p / p_ref)``, summed over the tokens, of completions behind prompts that they don't
            belong to, nats, ``[c]``. Gather them from all ranks first: a mean of clamped means is another number.

    Returns:
        ``[]``, without gradient.

    Raises:
        ConfigError: If there is none.

    Example:
        >>> kto_kl(torch.tensor([0.5, 1.0])), kto_kl(torch.tensor([-3.0, 1.0]))
        (tensor(0.7500), tensor(0.))
    """
    if not mismatched_logratios.numel():
        raise ConfigError("KTO's KL needs at least one mismatched completion, got none.")
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
    """KTO: ``weight * (1 - sigmoid(±beta * (logratio - kl)))``, plus for desirable completions, minus for others.

    Equation 7 of https://arxiv.org/abs/2402.01306.

    Args:
        logratios: ``log (p / p_ref)``, summed over the tokens of each completion, nats, ``[c]``.
        labels: Whether each is desirable, ``bool [c]``.
        kl: The reference point, from `kto_kl`, ``[]``.
        beta: Strength of the KL constraint.
        desirable_weight: Weight of desirable completions. With ``n`` times as many undesirable ones, the paper advises
            up to ``n``.
        undesirable_weight: Weight of the others.

    Returns:
        ``[c]``.

    Raises:
        ConfigError: If labels aren't one ``bool`` a completion.

    Example:
        >>> kto_loss(torch.tensor([10.0, 10.0]), torch.tensor([True, False]), torch.tensor(0.0))
        tensor([0.2689, 0.7311])
    """
    if labels.dtype != torch.bool or labels.shape != logratios.shape:
        raise ConfigError(
            f"KTO's labels are {labels.dtype} {tuple(labels.shape)}, expected bool {tuple(logratios.shape)}."
        )
    signs = torch.where(labels, 1.0, -1.0).to(logratios)
    weights = torch.where(labels, desirable_weight, undesirable_weight).to(logratios)
    return weights * torch.sigmoid(-beta * signs * (logratios - kl))  # 1 - sigmoid(x) loses digits where x is large
