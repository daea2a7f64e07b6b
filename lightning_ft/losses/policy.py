"""The loss of a policy on sampled completions: GRPO and its variants, RLOO, PPO.

All per-token tensors are flat: ``[n]`` over the tokens of `s` completions, `sequences` naming the completion of each.
The loss of an optimizer step is ``sum(weights[sequences] * per_token * mask)`` over all its micro-batches and ranks, so
how a step is cut doesn't matter, as long as gradients are added up over ranks, not averaged.
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
"""CISPO's largest ratio where `clip_high` is None; a bound near 1, as the others have, would undo its idea."""


class PolicyLoss(NamedTuple):
    """The loss of a micro-batch, and sums that add up over micro-batches and ranks.

    Args:
        loss: Its share of the loss of the step, ``[]``; carries the gradient, as `per_token` does.
        per_token: The loss of each token before weighting, KL term included, 0 where masked, ``[n]``.
        ratio: Importance ratio of each token, without gradient, ``[n]``.
        clipped_low: Tokens held back by the lower bound, ``[]``.
        clipped_high: Tokens held back by the upper bound, ``[]``.
        kl: Sum of the KL terms (k3 against the reference, times the ratio if corrected), nats, ``[]``; 0 without a
            reference.
        approx_kl: Sum of k3 estimates of KL(old policy || policy), nats, ``[]``; what an early stop of PPO looks at.
        tokens: Tokens that count, ``[]``: what to divide the four sums by.
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
    """Refuse what :func:`policy_loss` would refuse, before anything is sampled.

    Args:
        loss_type: One of `POLICY_LOSSES`.
        clip_low: As in :func:`policy_loss`.
        clip_high: As in :func:`policy_loss`.
        delta: As in :func:`policy_loss`.
        kl_coef: As in :func:`policy_loss`.

    Raises:
        ConfigError: For an unknown loss, or a number out of its range.
    """
    if loss_type not in POLICY_LOSSES:
        raise ConfigError(f"loss_type={loss_type!r}, expected one of {', '.join(POLICY_LOSSES)}.")
    if not kl_coef >= 0:
        raise ConfigError(f"kl_coef={kl_coef!r}: expected a number of at least 0.")
    if loss_type != "cispo":
        check_clip(clip_low, clip_high, delta)
    elif delta is not None:
        raise ConfigError(f"delta={delta!r} means nothing to cispo, whose ratio has one bound, clip_high.")
    elif clip_high is not None and not clip_high > 0:
        raise ConfigError(f"clip_high={clip_high!r}: CISPO's is the largest ratio, a number above 0 such as 5.0.")


def token_weights(
    loss_type: LossType,
    lengths: Tensor,
    *,
    total_sequences: int | Tensor,
    total_tokens: int | Tensor,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Weight of each token of a completion in the loss of an optimizer step.

    With `S` completions and `T` unmasked tokens in the whole step:

    - ``dapo``, ``cispo``: ``1 / T``, a mean over tokens (https://arxiv.org/abs/2503.14476).
    - ``grpo``: ``1 / (length * S)``, a mean over completions of means over tokens (https://arxiv.org/abs/2402.03300).
    - ``rloo``: the same; with the ratio of the whole completion at each token it is a mean over completions.
    - ``dr_grpo``: ``1 / (max_new_tokens * S)``, without regard to length (https://arxiv.org/abs/2503.20783).
    - ``bnpo``: a mean over the tokens of the micro-batch, weighted by its share of `S`
      (https://arxiv.org/abs/2506.02864).

    These are TRL's, where all micro-batches hold equally many completions. Where they don't (a short last one), TRL
    weights each micro-batch alike; here normalizers span the step, so none but ``bnpo``, by its definition, depends on
    how it is cut. For ``dapo`` and ``cispo`` TRL takes the tokens of all its rollouts, divided by the number of steps
    that they are used for; here `total_tokens` are the step's own.

    Args:
        loss_type: One of `POLICY_LOSSES`.
        lengths: Unmasked tokens of the micro-batch's completions, ``int64 [s]``.
        total_sequences: `S`, over all micro-batches and ranks, masked completions included.
        total_tokens: `T`, likewise.
        max_new_tokens: Of the rollouts; only for ``dr_grpo``.

    Returns:
        ``[s]``; of no consequence for a completion without unmasked tokens, but finite.

    Raises:
        ConfigError: For an unknown loss, or ``dr_grpo`` without `max_new_tokens`.

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
                raise ConfigError(f"dr_grpo needs max_new_tokens, the length it divides by, got {max_new_tokens!r}.")
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
) -> PolicyLoss:
    """Loss of a micro-batch: a surrogate, plus ``kl_coef`` times k3 against the reference, weighted by token.

    With RLOO the KL belongs into the rewards instead: leave `kl_coef` at 0, as for PPO, whose weights are ``dapo``'s.

    Args:
        logprobs: Under the policy, nats, ``[n]``.
        old_logprobs: Under the policy that sampled, ``[n]``; None: `logprobs` themselves, without gradient, where the
            policy hasn't moved since.
        advantages: Of each completion, ``[s]``, or of each token, ``[n]``.
        sequences: Which completion each token belongs to, ``int64 [n]``, from 0 to s - 1, never decreasing.
        weights: Of the tokens of each completion, from :func:`token_weights`, ``[s]``.
        mask: Which tokens count, ``bool [n]``; None: all. Nothing of the others matters, NaN included. Leave out
            truncated completions with it.
        ref_logprobs: Under the reference, ``[n]``; None: no KL.
        kl_coef: Weight of the KL term, TRL's beta. At 0 it is only measured.
        loss_type: ``cispo`` or, with any other name, the clipped surrogate.
        level: Of the ratio, see :func:`importance_ratio`; None: ``sequence_sum`` for ``rloo``, else ``token``.
        clip_low: Distance of the ratio's lower bound from 1; not CISPO's.
        clip_high: Distance of its upper bound from 1, by default `clip_low`. For ``cispo`` the bound itself, by default
            `CISPO_CLIP` (TRL's default is 0.2 there too).
        delta: Largest ratio of tokens whose advantage is negative, see :func:`clipped_surrogate`.
        bias_corrected_kl: Whether the KL term is multiplied by the importance ratio, which makes its gradient that of
            the KL itself (DeepSeek-V3.2, https://arxiv.org/abs/2512.02556; TRL's default).

    Returns:
        The loss and figures to log.

    Raises:
        ConfigError: As :func:`check_policy_loss`, for ``kl_coef`` without `ref_logprobs`, or shapes that don't fit.

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
        raise ConfigError(f"kl_coef={kl_coef} needs ref_logprobs, got None. Score the tokens with the reference.")
    num_sequences = len(weights)
    advantages = _per_token(advantages, sequences, num_sequences)  # [n]
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    tokens = torch.ones_like(sequences).sum()
    if mask is not None:
        # Zeros in place of masked tokens: each term below is 0 there. Multiplying by the mask at the end would make NaN
        # of gradients that aren't finite.
        check_mask(mask, logprobs)
        logprobs, old_logprobs, advantages = (_fill(x, mask) for x in (logprobs, old_logprobs, advantages))
        ref_logprobs = None if ref_logprobs is None else _fill(ref_logprobs, mask)
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


def _fill(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0)


def _per_token(advantages: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    n = sequences.numel()
    if advantages.shape not in ((n,), (num_sequences,)):
        raise ConfigError(
            f"advantages of shape {tuple(advantages.shape)} for {num_sequences} completions of {n} tokens: expected "
            "one for each completion, or one for each token."
        )
    if n != num_sequences:
        return advantages if len(advantages) == n else advantages[sequences]
    if not torch.equal(sequences, torch.arange(n, device=sequences.device)):
        raise ConfigError(
            f"{n} advantages for {n} completions of {n} tokens in all, some without any: they could be one for each of "
            "either. Leave the completions without tokens out."
        )
    return advantages
