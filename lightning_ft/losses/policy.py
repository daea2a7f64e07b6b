"""The policy loss on sampled completions: GRPO and its variants, RLOO and PPO.

Tensors with one entry per token are flat: ``[n]`` over the tokens of `s` completions, and `sequences` holds the index
of each token's completion. The loss of an optimizer step is ``sum(weights[sequences] * per_token * mask)`` over all its
micro-batches and ranks. How a step is divided into micro-batches therefore doesn't matter, as long as gradients are
summed over ranks rather than averaged.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.kl import k3
from lightning_ft.losses.surrogate import (
    Level,
    check_clip,
    check_mask,
    cispo_loss,
    clipped_surrogate,
    importance_ratio,
)

__all__ = [
    "CISPO_CLIP",
    "POLICY_LOSSES",
    "LossType",
    "PolicyLoss",
    "check_policy_loss",
    "cispo_loss",
    "clipped_surrogate",
    "importance_ratio",
    "policy_loss",
    "token_weights",
]

LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo", "cispo", "rloo"]
POLICY_LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "rloo")
CISPO_CLIP = 5.0
"""CISPO's largest ratio if `clip_high` is None. A bound near 1, as for the other losses, would defeat its purpose."""


class PolicyLoss(NamedTuple):
    """The loss of a micro-batch, and metrics as sums that can be added over micro-batches and ranks.

    Args:
        loss: Contribution of the micro-batch to the loss of the step, ``[]``, with gradient.
        per_token: Loss of each token before weighting, including the KL term, 0 where masked, ``[n]``, with gradient.
        ratio: Importance ratio of each token, without gradient, ``[n]``.
        clipped_low: Number of tokens clipped by the lower bound, ``[]``.
        clipped_high: Number of tokens clipped by the upper bound, ``[]``.
        kl: Sum of the KL terms in nats (k3 against the reference, times the ratio if corrected), ``[]``; 0 without a
            reference.
        approx_kl: Sum of the k3 estimates of KL(old policy || policy) in nats, ``[]``, used for early stopping.
        tokens: Number of tokens that count, ``[]``, by which to divide the four sums.
    """

    loss: Tensor
    per_token: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor
    approx_kl: Tensor
    tokens: Tensor


def check_policy_loss(
    loss_type: str,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
    kl_coef: float = 0.0,
) -> None:
    """Check the settings of :func:`policy_loss` before anything is sampled.

    Args:
        loss_type: One of `POLICY_LOSSES`.
        clip_low: Distance of the ratio's lower bound from 1.
        clip_high: Distance of the ratio's upper bound from 1; for ``cispo`` the bound itself.
        delta: Largest ratio of tokens whose advantage is negative.
        kl_coef: Weight of the KL term.

    Raises:
        ConfigError: If the loss is unknown, or a number is out of its range.
    """
    if loss_type not in POLICY_LOSSES:
        gspo = " GSPO is loss_type='grpo' with importance='sequence'." * (loss_type == "gspo")
        raise ConfigError(f"loss_type={loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}.{gspo}")
    if not kl_coef >= 0:
        raise ConfigError(f"kl_coef={kl_coef!r}: expected a number of at least 0.")
    if loss_type != "cispo":
        check_clip(clip_low, clip_high, delta)
    elif delta is not None:
        raise ConfigError(
            f"delta={delta!r} means nothing to cispo: its ratio has a single bound, clip_high. Leave delta out."
        )
    elif clip_high is not None and not clip_high > 0:
        raise ConfigError(f"clip_high={clip_high!r}: for CISPO it is the largest ratio, a number above 0 such as 5.0.")


def token_weights(
    loss_type: LossType,
    lengths: Tensor,
    *,
    total_sequences: int | Tensor,
    total_tokens: int | Tensor,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Weight of each token of a completion in the loss of an optimizer step.

    For `S` completions and `T` unmasked tokens in the whole step:

    - ``dapo``, ``cispo``: ``1 / T``, the mean over tokens (https://arxiv.org/abs/2503.14476).
    - ``grpo``: ``1 / (length * S)``, the mean over completions of means over tokens (https://arxiv.org/abs/2402.03300).
    - ``rloo``: as ``grpo``. Since each token has the ratio of the whole completion, this is the mean over completions.
    - ``dr_grpo``: ``1 / (max_new_tokens * S)``, independent of the length (https://arxiv.org/abs/2503.20783).
    - ``bnpo``: the mean over the tokens of the micro-batch, weighted by its share of `S`
      (https://arxiv.org/abs/2506.02864).

    They equal TRL's if all micro-batches hold the same number of completions. If the last one is shorter, TRL still
    weights all micro-batches equally; here the normalizers span the step, so that only ``bnpo``, by its definition,
    depends on how the step is divided. For ``dapo`` and ``cispo`` TRL divides the number of tokens of all its rollouts
    by the number of steps in which they are used; here `total_tokens` is counted in the step itself.

    Args:
        loss_type: One of `POLICY_LOSSES`.
        lengths: Number of unmasked tokens of each completion in the micro-batch, ``int64 [s]``.
        total_sequences: Number of completions `S` over all micro-batches and ranks, including masked ones.
        total_tokens: Number of unmasked tokens `T` over all micro-batches and ranks.
        max_new_tokens: Largest number of tokens per completion; only used by ``dr_grpo``.

    Returns:
        ``[s]``; finite, though without effect, for a completion without unmasked tokens.

    Raises:
        ConfigError: If the loss is unknown, or `max_new_tokens` is missing for ``dr_grpo``.

    Example:
        >>> lengths = torch.tensor([2, 8])
        >>> token_weights("grpo", lengths, total_sequences=2, total_tokens=10)
        tensor([0.2500, 0.0625])
        >>> token_weights("dapo", lengths, total_sequences=2, total_tokens=10)
        tensor([0.1000, 0.1000])
    """
    sequences = torch.as_tensor(total_sequences, device=lengths.device).clamp(min=1)
    match loss_type:
        case "grpo" | "rloo":
            return 1 / (lengths.clamp(min=1) * sequences)
        case "dapo" | "cispo":
            tokens = torch.as_tensor(total_tokens, device=lengths.device).clamp(min=1)
            return (1 / tokens).expand(len(lengths))
        case "dr_grpo":
            if max_new_tokens is None or max_new_tokens < 1:
                raise ConfigError(
                    f"dr_grpo needs max_new_tokens, by which it divides: expected at least 1, got {max_new_tokens!r}."
                )
            return (1 / (max_new_tokens * sequences)).expand(len(lengths))
        case "bnpo":
            return (len(lengths) / (lengths.sum().clamp(min=1) * sequences)).expand(len(lengths))
        case _:
            raise ConfigError(f"loss_type={loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}.")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    sequences: Tensor,
    *,
    weights: Tensor,
    mask: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    loss_type: LossType = "dapo",
    level: Level | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
    bias_corrected_kl: bool = True,
    correction: Tensor | None = None,
) -> PolicyLoss:
    """Loss of a micro-batch: a surrogate plus ``kl_coef`` times k3 against the reference, weighted per token.

    For RLOO and PPO the KL penalty belongs in the rewards: leave `kl_coef` at 0. PPO uses the weights of ``dapo``.

    Args:
        logprobs: Log-probabilities under the current policy, in nats, ``[n]``.
        old_logprobs: Log-probabilities under the sampling policy, ``[n]``. None if the policy hasn't changed since:
            `logprobs` without gradient takes their place.
        advantages: Advantage of each completion, ``[s]``, or of each token, ``[n]``.
        sequences: Index of the completion each token belongs to, ``int64 [n]``, from 0 to s - 1, never decreasing.
        weights: Weight of the tokens of each completion, from :func:`token_weights`, ``[s]``.
        mask: Which tokens count, ``bool [n]``; None means all. The values of the others, including NaN, have no effect.
            Use it to leave out truncated completions.
        ref_logprobs: Log-probabilities under the reference, ``[n]``; None means no KL term.
        kl_coef: Weight of the KL term, beta in TRL. At 0 the KL is only measured.
        loss_type: One of `POLICY_LOSSES`. All but ``cispo`` use the clipped surrogate.
        level: Level of the ratio, see :func:`importance_ratio`; None means ``sequence_sum`` for ``rloo`` and ``token``
            for the others.
        clip_low: Distance of the ratio's lower bound from 1; not used by ``cispo``.
        clip_high: Distance of the ratio's upper bound from 1, by default `clip_low`. For ``cispo`` it is the bound
            itself, by default `CISPO_CLIP` (in TRL the default is 0.2 for ``cispo`` as well).
        delta: Largest ratio of tokens whose advantage is negative, see :func:`clipped_surrogate`.
        bias_corrected_kl: Whether to multiply the KL term by the importance ratio, which makes its gradient that of the
            KL divergence (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556). This is TRL's default.
        correction: Factor of each token's surrogate, but not of its KL term, ``[n]``: the weights of
            :func:`lightning_ft.losses.sampling_correction.sampling_correction`. None means 1.

    Returns:
        The loss, and metrics to log.

    Raises:
        ConfigError: As in :func:`check_policy_loss`; if `kl_coef` is set without `ref_logprobs`; if shapes don't match.

    Example:
        >>> logprobs = torch.tensor([-1.0, -2.0, -1.5], requires_grad=True)
        >>> sequences = torch.tensor([0, 0, 1])
        >>> weights = token_weights("dapo", torch.tensor([2, 1]), total_sequences=2, total_tokens=3)
        >>> result = policy_loss(logprobs, None, torch.tensor([1.0, -1.0]), sequences, weights=weights)
        >>> result.loss.backward()
        >>> result.per_token.tolist(), logprobs.grad
        ([-1.0, -1.0, 1.0], tensor([-0.3333, -0.3333,  0.3333]))
    """
    check_policy_loss(loss_type, clip_low=clip_low, clip_high=clip_high, delta=delta, kl_coef=kl_coef)
    if kl_coef and ref_logprobs is None:
        raise ConfigError(f"kl_coef={kl_coef} needs ref_logprobs, got None. Compute them with the reference model.")
    num_sequences = len(weights)
    advantages = _per_token(advantages, sequences, num_sequences)  # [n]
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    tokens = torch.ones_like(sequences).sum()
    if mask is not None:
        # Masked tokens are set to 0, which makes each term below 0 there. Multiplying by the mask at the end instead
        # would turn gradients that aren't finite into NaN.
        check_mask(mask, logprobs)
        logprobs, old_logprobs, advantages = (_zero_masked(x, mask) for x in (logprobs, old_logprobs, advantages))
        ref_logprobs = None if ref_logprobs is None else _zero_masked(ref_logprobs, mask)
        tokens = mask.sum()

    level = level or ("sequence_sum" if loss_type == "rloo" else "token")
    ratio = importance_ratio(logprobs, old_logprobs, sequences, num_sequences, mask, level)
    if loss_type == "cispo":
        high = CISPO_CLIP if clip_high is None else clip_high
        per_token = cispo_loss(ratio, advantages, logprobs, high)
        low = torch.zeros_like(ratio, dtype=torch.bool)
        above = (ratio > high) & (advantages > 0)
    else:
        high = clip_low if clip_high is None else clip_high
        per_token = clipped_surrogate(ratio, advantages, clip_low, high, delta)
        low = (ratio < 1 - clip_low) & (advantages < 0)
        above = (ratio > 1 + high) & (advantages > 0)

    if correction is not None:
        per_token = per_token * (correction if mask is None else _zero_masked(correction, mask))
    kl = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        kl = k3(logprobs, ref_logprobs)
        kl = kl * ratio if bias_corrected_kl else kl
        if kl_coef:
            per_token = per_token + kl_coef * kl
    return PolicyLoss(
        loss=(weights.to(per_token)[sequences] * per_token).sum(),
        per_token=per_token,
        ratio=ratio.detach(),
        clipped_low=low.sum(),
        clipped_high=above.sum(),
        kl=kl.detach().sum(),
        approx_kl=k3(old_logprobs, logprobs.detach()).sum(),
        tokens=tokens,
    )


def _zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0)


def _per_token(advantages: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    n = sequences.numel()
    if advantages.shape not in ((n,), (num_sequences,)):
        raise ConfigError(
            f"advantages has shape {tuple(advantages.shape)} for {num_sequences} completions with {n} tokens in all: "
            "expected one for each completion, or one for each token."
        )
    if n != num_sequences:
        return advantages if len(advantages) == n else advantages[sequences]
    if not torch.equal(sequences, torch.arange(n, device=sequences.device)):
        raise ConfigError(
            f"Got {n} advantages for {n} completions with {n} tokens in all, some of them without tokens: they "
            "could belong to the completions or to the tokens. Leave out completions without tokens."
        )
    return advantages
