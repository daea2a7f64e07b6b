"""Surrogate losses of the policy gradient: importance ratios, PPO's clipped loss and CISPO's loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.kl import LOG_RATIO_LIMIT

Level = Literal["token", "sequence", "sequence_sum"]
LEVELS = ("token", "sequence", "sequence_sum")


def importance_ratio(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sequences: Tensor,
    num_sequences: int,
    mask: Tensor | None = None,
    level: Level = "token",
) -> Tensor:
    """Ratio of the probabilities under the current policy and the sampling policy: ``exp(logprobs - old_logprobs)``.

    The exponent is clamped to ``±LOG_RATIO_LIMIT``, beyond which the gradient is 0: a ratio above 5e8 estimates nothing
    useful, and an infinite one would make the gradient of the step NaN.

    Args:
        logprobs: Log-probabilities under the current policy, in nats, ``[n]``.
        old_logprobs: Log-probabilities under the sampling policy, ``[n]``.
        sequences: Index of the completion each token belongs to, ``int64 [n]``.
        num_sequences: Number of completions `s`, including those without tokens.
        mask: Which tokens count, ``bool [n]``; None means all. At token level the ratio of the others is 1.
        level: What the ratio is taken over. ``token``: each token (PPO, GRPO). ``sequence``: the geometric mean over
            the tokens of the completion, repeated at each of them (GSPO, https://arxiv.org/abs/2507.18071).
            ``sequence_sum``: the whole completion, that is the product over its tokens (RLOO).

    Returns:
        ``[n]``.

    Raises:
        ConfigError: If `level` is unknown, or `mask` isn't ``bool [n]``.

    Example:
        >>> new, old = torch.tensor([0.5, 0.4, 0.1]).log(), torch.tensor([0.25, 0.1, 0.1]).log()
        >>> sequences = torch.tensor([0, 0, 1])
        >>> [importance_ratio(new, old, sequences, 2, level=level).tolist() for level in ("token", "sequence_sum")]
        [[2.0, 4.0, 1.0], [8.0, 8.0, 1.0]]
        >>> importance_ratio(new, old, sequences, 2, level="sequence")
        tensor([2.8284, 2.8284, 1.0000])
    """
    if level not in LEVELS:
        raise ConfigError(f"level={level!r}, expected one of {', '.join(LEVELS)}.")
    log_ratio = logprobs - old_logprobs
    if mask is not None:
        check_mask(mask, logprobs)
        log_ratio = log_ratio.masked_fill(~mask, 0.0)
    if level != "token":
        log_ratio = log_ratio.new_zeros(num_sequences).index_add(0, sequences, log_ratio)  # [s]
        if level == "sequence":
            counted = torch.ones_like(sequences) if mask is None else mask.to(sequences.dtype)
            lengths = sequences.new_zeros(num_sequences).index_add(0, sequences, counted)
            log_ratio = log_ratio / lengths.clamp(min=1)
        log_ratio = log_ratio[sequences]  # [n]
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """PPO's clipped loss: ``-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)``.

    See https://arxiv.org/abs/1707.06347. A higher upper bound comes from DAPO (https://arxiv.org/abs/2503.14476), which
    uses 0.28.

    Args:
        ratio: Importance ratio of each token, ``[n]``.
        advantages: Advantage of each token, ``[n]``.
        clip_low: Distance of the ratio's lower bound from 1; limits tokens whose advantage is negative.
        clip_high: Distance of the ratio's upper bound from 1; limits tokens whose advantage is positive. None means the
            value of `clip_low`.
        delta: Largest ratio of tokens whose advantage is negative, above ``1 + clip_high``. Without it the loss of such
            tokens has no upper bound (INTELLECT-2, https://arxiv.org/abs/2505.07291). None means no bound.

    Returns:
        ``[n]``.

    Raises:
        ConfigError: If a bound is out of its range.

    Example:
        >>> ratio, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> clipped_surrogate(ratio, advantages)
        tensor([-1.2000,  1.5000, -0.5000,  0.8000])
    """
    clip_high = check_clip(clip_low, clip_high, delta)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.min(ratio * advantages, clipped * advantages)


def cispo_loss(ratio: Tensor, advantages: Tensor, logprobs: Tensor, clip_high: float) -> Tensor:
    """CISPO: ``-min(ratio, clip_high) * A * logprob``, without gradient through the ratio.

    Every token keeps a gradient, weighted by its clipped ratio. See https://arxiv.org/abs/2506.13585.

    Args:
        ratio: Importance ratio of each token, ``[n]``.
        advantages: Advantage of each token, ``[n]``.
        logprobs: Log-probabilities under the current policy, in nats, ``[n]``.
        clip_high: Largest ratio (not its distance from 1); 5 in https://arxiv.org/abs/2510.13786.

    Returns:
        ``[n]``.

    Raises:
        ConfigError: If `clip_high` isn't above 0.

    Example:
        >>> cispo_loss(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 1.0]), torch.tensor([-1.0, -1.0]), clip_high=5.0)
        tensor([2., 5.])
    """
    if not clip_high > 0:
        raise ConfigError(f"clip_high={clip_high!r}: for CISPO it is the largest ratio, a number above 0 such as 5.0.")
    return -ratio.clamp(max=clip_high).detach() * advantages * logprobs


def check_clip(clip_low: float, clip_high: float | None = None, delta: float | None = None) -> float:
    """Check the bounds of :func:`clipped_surrogate`.

    Args:
        clip_low: Distance of the lower bound from 1.
        clip_high: Distance of the upper bound from 1; None means the value of `clip_low`.
        delta: Largest ratio of tokens whose advantage is negative.

    Returns:
        `clip_high`, or `clip_low` if that is None.

    Raises:
        ConfigError: If `clip_low` is outside ``[0, 1]``, `clip_high` is below 0, or `delta` isn't above
            ``1 + clip_high``.

    Example:
        >>> check_clip(0.2), check_clip(0.2, 0.28)
        (0.2, 0.28)
    """
    high = clip_low if clip_high is None else clip_high
    if not 0 <= clip_low <= 1:
        raise ConfigError(f"clip_low={clip_low!r}: expected a number from 0 to 1, such as 0.2.")
    if not high >= 0:
        raise ConfigError(f"clip_high={clip_high!r}: expected a number of at least 0, such as 0.28.")
    if delta is not None and not delta > 1 + high:
        raise ConfigError(f"delta={delta!r}: expected a ratio above 1 + clip_high = {1 + high:g}.")
    return high


def check_mask(mask: Tensor, tokens: Tensor) -> None:
    """Check that a mask is ``bool`` and has the shape of the tokens.

    Args:
        mask: Which tokens count.
        tokens: Any tensor with one entry per token, ``[n]``.

    Raises:
        ConfigError: If the mask has another type or shape.
    """
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise ConfigError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(tokens.shape)}.")
