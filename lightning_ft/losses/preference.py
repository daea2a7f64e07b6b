"""Preference losses by name, from summed log-probabilities of whole completions.

The losses themselves stand in `pairwise` and `unpaired`; here a name becomes one of them, or a weighted sum of several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.kto import kto_kl, kto_loss
from lightning_ft.losses.pairwise import (
    bradley_terry_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_loss,
    sft_loss,
    sigmoid_loss,
    simpo_loss,
)

__all__ = [
    "PREFERENCE_LOSSES",
    "SequenceLogProbs",
    "bradley_terry_loss",
    "check_preference_losses",
    "implicit_rewards",
    "kto_kl",
    "kto_loss",
    "preference_loss",
    "weighted_preference_loss",
]

PREFERENCE_LOSSES: Mapping[str, bool] = {
    "sigmoid": True,
    "ipo": True,
    "hinge": True,
    "robust": True,
    "simpo": False,
    "orpo": False,
    "sft": False,
}
"""Names of the losses of pairs, and whether each needs log-probabilities under the reference."""

_SMOOTHED = ("sigmoid", "robust", "simpo")  # losses that label_smoothing means something to


class SequenceLogProbs(NamedTuple):
    """Log-probabilities of `p` completions.

    Args:
        logprobs: Under the policy, summed over the tokens of each completion, nats, ``[p]``.
        ref_logprobs: Under the reference, ``[p]``, or None without a reference.
        lengths: Tokens that were summed over, ``int64 [p]``.
    """

    logprobs: Tensor
    ref_logprobs: Tensor | None
    lengths: Tensor

    @property
    def average(self) -> Tensor:
        """Average log-probability of a token under the policy, nats, ``[p]``; 0 for a completion without tokens."""
        return self.logprobs / self.lengths.clamp(min=1)

    @property
    def logratios(self) -> Tensor:
        """``log (p / p_ref)`` of each completion, nats, ``[p]``.

        Raises:
            ConfigError: Without log-probabilities under the reference.
        """
        if self.ref_logprobs is None:
            raise ConfigError(
                "A log-ratio needs ref_logprobs, got None. Score the completions with the reference, or use a loss "
                f"without one: {', '.join(name for name, needed in PREFERENCE_LOSSES.items() if not needed)}."
            )
        return self.logprobs - self.ref_logprobs


def preference_loss(
    kind: str,
    chosen: SequenceLogProbs,
    rejected: SequenceLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """Loss of each pair.

    With the same arguments each is TRL's, with two exceptions. TRL's ``sigmoid`` ignores `label_smoothing`. The NLL of
    its ``sft`` and ORPO is a mean over all tokens of a micro-batch (ORPO's over the prompts' too), which depends on how
    a step is cut into them; here it is one over the tokens of each pair's chosen completion.

    Args:
        kind: One of `PREFERENCE_LOSSES`.
        chosen: Of the chosen completions, ``[p]``.
        rejected: Of the rejected ones, ``[p]``.
        beta: Strength of the KL constraint; SimPO's scale of the reward (2 to 10 in its paper), ORPO's lambda.
        label_smoothing: Share of pairs whose label is wrong (``sigmoid``, ``robust``, ``simpo``).
        gamma: SimPO's margin.

    Returns:
        ``[p]``.

    Raises:
        ConfigError: For an unknown kind, log-probabilities under the reference that are missing, a `beta` that isn't
            above 0, a `label_smoothing` outside ``[0, 0.5)`` or one that the loss has no use for.

    Example:
        >>> import torch
        >>> length = torch.tensor([4])
        >>> chosen = SequenceLogProbs(torch.tensor([-4.0]), torch.tensor([-6.0]), length)
        >>> rejected = SequenceLogProbs(torch.tensor([-9.0]), torch.tensor([-7.0]), length)
        >>> preference_loss("sigmoid", chosen, rejected)
        tensor([0.5130])
        >>> preference_loss("simpo", chosen, rejected, beta=2.0)
        tensor([0.1269])
    """
    return weighted_preference_loss(
        {kind: 1.0}, chosen, rejected, beta=beta, label_smoothing=label_smoothing, gamma=gamma
    )


def weighted_preference_loss(
    kinds: Mapping[str, float],
    chosen: SequenceLogProbs,
    rejected: SequenceLogProbs,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """Weighted sum of several losses, such as MPO's ``{"sigmoid": 0.8, "sft": 0.2}`` (https://arxiv.org/abs/2411.10442).

    Args:
        kinds: Weight of each loss, by its name in `PREFERENCE_LOSSES`.
        chosen: Of the chosen completions, ``[p]``.
        rejected: Of the rejected ones, ``[p]``.
        beta: As in :func:`preference_loss`, of all losses.
        label_smoothing: As in :func:`preference_loss`, of the losses that have it.
        gamma: SimPO's margin.

    Returns:
        ``[p]``.

    Raises:
        ConfigError: As :func:`preference_loss`, and for no kinds or a weight that isn't a number of at least 0.

    Example:
        >>> import torch
        >>> one = SequenceLogProbs(torch.tensor([-4.0]), torch.tensor([-4.0]), torch.tensor([4]))
        >>> weighted_preference_loss({"hinge": 1.0, "sft": 0.5}, one, one)
        tensor([1.5000])
    """
    check_preference_losses(kinds, beta=beta, label_smoothing=label_smoothing)
    losses = []
    for kind, weight in kinds.items():
        match kind:
            case "sigmoid":
                loss = sigmoid_loss(chosen.logratios - rejected.logratios, beta=beta, label_smoothing=label_smoothing)
            case "robust":
                loss = robust_loss(chosen.logratios - rejected.logratios, beta=beta, label_smoothing=label_smoothing)
            case "hinge":
                loss = hinge_loss(chosen.logratios - rejected.logratios, beta=beta)
            case "ipo":
                averages = [side.logratios / side.lengths.clamp(min=1) for side in (chosen, rejected)]
                loss = ipo_loss(averages[0] - averages[1], beta=beta)
            case "simpo":
                loss = simpo_loss(
                    chosen.average, rejected.average, beta=beta, gamma=gamma, label_smoothing=label_smoothing
                )
            case "orpo":
                loss = orpo_loss(chosen.average, rejected.average, beta=beta)
            case "sft":
                loss = sft_loss(chosen.average)
            case _:
                raise _unknown(kind)
        losses.append(weight * loss)
    return sum(losses[1:], start=losses[0])


def implicit_rewards(logprobs: SequenceLogProbs, *, beta: float = 0.1) -> Tensor:
    """The reward that a policy stands for: ``beta * log (p / p_ref)``, equation 5 of https://arxiv.org/abs/2305.18290.

    Args:
        logprobs: Of the completions, ``[p]``. Without a reference the reward is SimPO's, `beta` times the average
            log-probability.
        beta: Strength of the KL constraint.

    Returns:
        ``[p]``, with the gradient of the log-probabilities.

    Example:
        >>> import torch
        >>> implicit_rewards(SequenceLogProbs(torch.tensor([-4.0]), torch.tensor([-6.0]), torch.tensor([4])))
        tensor([0.2000])
    """
    return beta * (logprobs.average if logprobs.ref_logprobs is None else logprobs.logratios)


def check_preference_losses(kinds: Mapping[str, float], *, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
    """Refuse what :func:`weighted_preference_loss` would refuse, before there are any log-probabilities.

    Args:
        kinds: Weight of each loss, by its name in `PREFERENCE_LOSSES`.
        beta: Strength of the KL constraint.
        label_smoothing: Share of pairs whose label is wrong.

    Raises:
        ConfigError: For no kinds, an unknown one, or a number out of its range.
    """
    if not kinds:
        raise ConfigError(f"No preference loss: name at least one of {', '.join(PREFERENCE_LOSSES)}.")
    for kind, weight in kinds.items():
        if kind not in PREFERENCE_LOSSES:
            raise _unknown(kind)
        if not 0 <= weight < math.inf:
            raise ConfigError(f"Preference loss {kind!r}: weight {weight!r}, expected a number of at least 0.")
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta={beta!r}: expected a number above 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"label_smoothing={label_smoothing!r}: expected a share of wrong labels of at least 0 and below 0.5."
        )
    if label_smoothing and not any(kind in _SMOOTHED for kind in kinds):
        raise ConfigError(
            f"label_smoothing={label_smoothing!r} means nothing to {', '.join(kinds)}; it belongs to "
            f"{', '.join(_SMOOTHED)}."
        )


def _unknown(kind: str) -> ConfigError:
    return ConfigError(f"Preference loss {kind!r}: expected one of {', '.join(PREFERENCE_LOSSES)}.")
