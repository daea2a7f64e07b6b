"""Estimators of the KL divergence from the reference, and an adaptive coefficient that keeps it near a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_ft.errors import ConfigError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to plus and minus this before ``exp`` (e^20 is 5e8), so no single token gives an infinity."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k1 estimate of KL(policy || reference) at each sampled token: ``log p - log p_ref``.

    It is unbiased if the tokens were sampled from the policy, but negative at about half of them. PPO and RLOO subtract
    it from their rewards. See http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: Log-probabilities of the tokens under the policy, in nats, ``[n]``.
        ref_logprobs: Log-probabilities under the reference, ``[n]``.

    Returns:
        Estimates in nats, ``[n]``.

    Example:
        >>> import torch
        >>> k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([ 0.5000, -1.0000])
    """
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) at each sampled token: ``r - 1 - log r`` with ``r = p_ref / p``.

    It is unbiased if the tokens were sampled from the policy, never negative, and has a lower variance than `k1`. GRPO
    adds it to its loss. See http://joschu.net/blog/kl-approx.html. ``log r`` is clamped to ``±LOG_RATIO_LIMIT``, beyond
    which the gradient is 0.

    Args:
        logprobs: Log-probabilities of the tokens under the policy, in nats, ``[n]``.
        ref_logprobs: Log-probabilities under the reference, ``[n]``.

    Returns:
        Estimates in nats, ``[n]``.

    Example:
        >>> import torch
        >>> k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([0.1065, 0.7183])
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient that rises while the divergence is above its target, and falls while it is below.

    The proportional controller of Ziegler et al. 2019, section 2.2 (https://arxiv.org/abs/1909.08593):
    ``coef *= 1 + clip(kl / target - 1, -clip, clip) * steps / horizon``. All fields are plain numbers, so
    ``dataclasses.asdict`` gives its state for a checkpoint.

    Args:
        coef: Current value of the coefficient.
        target: Divergence to stay near, in the unit of the values passed to `update`; nats per completion in the paper.
        horizon: Number of steps over which a relative error of `clip` changes the coefficient by about that share.
        clip: Largest relative error that is taken into account.

    Raises:
        ConfigError: If the coefficient, target, horizon or clip isn't a finite number above 0.

    Example:
        >>> kl = AdaptiveKL(coef=0.2, target=6.0, horizon=1000)
        >>> [round(kl.update(measured, steps=100).coef, 6) for measured in (12.0, 6.0, 0.0)]
        [0.204, 0.2, 0.196]
    """

    coef: float = 0.2
    target: float = 6.0
    horizon: int = 10_000
    clip: float = 0.2

    def __post_init__(self) -> None:
        for name in ("coef", "target", "horizon", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"AdaptiveKL: {name}={getattr(self, name)!r}, expected a number above 0.")

    def update(self, kl: float, steps: int) -> AdaptiveKL:
        """The controller updated with a measured divergence.

        Args:
            kl: Measured mean divergence over all ranks.
            steps: Number of completions it was measured on, over all ranks.

        Raises:
            ConfigError: If `kl` isn't a finite number, or if this number of steps could turn the coefficient negative.
        """
        if not math.isfinite(kl):
            raise ConfigError(f"AdaptiveKL.update: kl={kl}, expected a finite number. The policy has diverged.")
        if not 0 <= steps * self.clip < self.horizon:
            raise ConfigError(
                f"AdaptiveKL.update: steps={steps} with clip={self.clip} and horizon={self.horizon} could turn the "
                f"coefficient negative. Pass a horizon above {steps * self.clip:g}."
            )
        error = min(max(kl / self.target - 1, -self.clip), self.clip)
        return replace(self, coef=self.coef * (1 + error * steps / self.horizon))
