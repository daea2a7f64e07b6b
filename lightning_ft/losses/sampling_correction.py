"""Importance weights that correct a policy gradient for completions that another implementation sampled.

An engine with other kernels or another precision samples from a distribution that differs from that of the model in
training, so a gradient that ignores the difference is biased. Each token's loss is weighted by the ratio of the two
probabilities instead, bounded because such a ratio has a large variance: truncated importance sampling (Ionides 2008,
Journal of Computational and Graphical Statistics 17(2)), or masked, where a ratio out of bounds leaves tokens out. The
names and defaults of the modes are those of TRL's `GRPOConfig.vllm_importance_sampling_mode`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError
from lightning_ft.losses.surrogate import importance_ratio

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
CORRECTION_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class SamplingCorrection(NamedTuple):
    """Weights of the tokens of a micro-batch.

    Args:
        weights: Factor of each token's loss, without gradient, ``float32 [n]``.
        out_of_bounds: Whether the ratio of each token exceeded a bound, ``bool [n]``.
    """

    weights: Tensor
    out_of_bounds: Tensor


def check_correction(mode: str, largest: float | None, smallest: float | None) -> None:
    """Check the settings of :func:`sampling_correction`.

    Args:
        mode: One of `CORRECTION_MODES`.
        largest: Upper bound of the ratio.
        smallest: Lower bound of the ratio.

    Raises:
        ConfigError: For an unknown mode, or bounds that no ratio of 1 fits into.
    """
    if mode not in CORRECTION_MODES:
        raise ConfigError(f"sampling_correction={mode!r}: expected one of {', '.join(map(repr, CORRECTION_MODES))}.")
    if largest is not None and not largest >= 1:
        raise ConfigError(f"sampling_ratio_max={largest!r}: expected a number of at least 1, or None.")
    if smallest is not None and not 0 <= smallest <= 1:
        raise ConfigError(f"sampling_ratio_min={smallest!r}: expected a number from 0 to 1, or None.")


def sampling_correction(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    sequences: Tensor,
    num_sequences: int,
    mask: Tensor | None = None,
    *,
    mode: CorrectionMode = "sequence_mask",
    largest: float | None = 3.0,
    smallest: float | None = None,
) -> SamplingCorrection:
    """Weight of each token: the ratio of its probability under the model in training to that under the engine.

    Args:
        old_logprobs: Log-probabilities under the model in training at the time of the rollout, nats, ``[n]``.
        sampling_logprobs: Log-probabilities under the engine that sampled, nats, ``[n]``.
        sequences: Index of the completion each token belongs to, ``int64 [n]``.
        num_sequences: Number of completions.
        mask: Which tokens count, ``bool [n]``; None means all.
        mode: Whether the ratio is that of each ``token`` or of the whole ``sequence``, and whether a ratio outside the
            bounds is set to the bound (``truncate``) or to 0, which leaves the tokens out (``mask``).
        largest: Upper bound of the ratio; None for no bound.
        smallest: Lower bound of the ratio; None for no bound.

    Returns:
        The weights, and which ratios were out of bounds.

    Raises:
        ConfigError: As in :func:`check_correction`.

    Example:
        >>> old, sampled = torch.tensor([0.5, 0.4, 0.9]).log(), torch.tensor([0.25, 0.1, 0.9]).log()
        >>> sequences = torch.tensor([0, 0, 1])
        >>> sampling_correction(old, sampled, sequences, 2, mode="token_truncate").weights
        tensor([2., 3., 1.])
        >>> sampling_correction(old, sampled, sequences, 2).weights  # the first completion has a ratio of 8
        tensor([0., 0., 1.])
    """
    check_correction(mode, largest, smallest)
    level: Literal["token", "sequence_sum"] = "token" if mode.startswith("token") else "sequence_sum"
    ratio = importance_ratio(
        old_logprobs.detach().float(), sampling_logprobs.detach().float(), sequences, num_sequences, mask, level
    )
    bounded = largest is not None or smallest is not None
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if largest is not None:
        outside |= ratio > largest
    if smallest is not None:
        outside |= ratio < smallest
    weights = ratio.clamp(smallest, largest) if mode.endswith("truncate") and bounded else ratio
    if mode.endswith("mask"):
        weights = weights.masked_fill(outside, 0.0)
    return SamplingCorrection(weights, outside)
