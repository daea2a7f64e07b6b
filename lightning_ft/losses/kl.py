"""Estimates of the KL divergence from the reference, and a coefficient that keeps it near a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_ft.errors import ConfigError

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are cut at plus and minus this before ``exp``, so that one absurd token gives no infinity: e^20 is 5e8."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token: ``log p - log p_ref``.

    Unbiased where the tokens were sampled from the policy, but negative at about every other token; the usual penalty
    inside rewards (PPO, RLOO). k1 of http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs: Of the tokens under the policy, nats, ``[n]``.
        ref_logprobs: Under the reference, ``[n]``.

    Returns:
        Nats, ``[n]``.

    Example:
        >>> import torch
        >>> k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([ 0.5000, -1.0000])
    """
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token: ``r - 1 - log r`` with ``r = p_ref / p``.

    Unbiased where the tokens were sampled from the policy, never negative, of less variance than `k1`; GRPO's term of
    the loss. k3 of http://joschu.net/blog/kl-approx.html. ``log r`` is cut at ``±LOG_RATIO_LIMIT``, beyond which there
    is no gradient.

    Args:
        logprobs: Of the tokens under the policy, nats, ``[n]``.
        ref_logprobs: Under the reference, ``[n]``.

    Returns:
        Nats, ``[n]``.

    Example:
        >>> import torch
        >>> k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
        tensor([0.1065, 0.7183])
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


@dataclass(frozen=True)
class AdaptiveKL:
    """A KL coefficient that rises while the divergence is above its target and falls while it is below.

    The proportional controller of Ziegler et al. 2019, section 2.2 (https://arxiv.org/abs/1909.08593):
    ``coef *= 1 + clip(kl / target - 1, -clip, clip) * steps / horizon``. All fields are plain numbers, so
    ``dataclasses.asdict`` is its state.

    Args:
        coef: The coefficient now.
        target: The divergence to stay near, in the unit of what `update` gets: nats per completion in the paper.
        horizon: Steps over which a coefficient that is `clip` off would be corrected by that share.
        clip: Largest relative error that counts.

    Raises:
        ConfigError: For a coefficient, target, horizon or clip that isn't above 0.

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
        """The controller after a measurement.

        Args:
            kl: Mean divergence measured, over all ranks.
            steps: Completions it was measured on, over all ranks.

        Raises:
            ConfigError: If `kl` isn't a finite number, or if so many steps could turn the coefficient negative.
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
