"""Group relative policy optimization and its variants, and RLOO."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.errors import ConfigError
from lightning_ft.losses.advantages import (
    Scale,
    group_advantages,
    groups_without_signal,
    leave_one_out_advantages,
    leave_one_out_differences,
)
from lightning_ft.losses.kl import k1
from lightning_ft.losses.policy import LossType, PolicyLoss, check_policy_loss, policy_loss
from lightning_ft.losses.statistics import power_sums
from lightning_ft.losses.surrogate import Level
from lightning_ft.modules.options import PolicyOptions, Unpack
from lightning_ft.modules.policy import PolicyOptimization
from lightning_ft.modules.rollout_batch import PolicyBatch, RolloutBatch

Advantage = Literal["group", "leave_one_out"]


class GRPO(PolicyOptimization):
    """Learn from rewards of several completions per prompt, without a critic (https://arxiv.org/abs/2402.03300).

    Args:
        model: Hub name, local folder, or a loaded model; usually one that was fine-tuned on pairs before.
        loss_type: Weighting of tokens: ``dapo`` (a mean over tokens, the default as in TRL), ``grpo`` (a mean over the
            tokens of each completion, then over completions), ``dr_grpo``, ``bnpo``, ``cispo``, or ``rloo``
            (https://arxiv.org/abs/2402.14740: ratios of whole completions; by default with
            ``advantage="leave_one_out"`` and the KL divergence in the reward).
        advantage: Advantage of a completion: ``group`` subtracts the mean reward of its group and scales, as
            `scale_rewards` says; ``leave_one_out`` subtracts the mean of the others. The default follows `loss_type`.
        scale_rewards: Standard deviation that divides advantages: of the ``group``, of the ``batch``, or ``none``; with
            ``leave_one_out``, ``batch`` normalizes them and the others leave them unscaled.
        importance: Level of likelihood ratios: each ``token``, or the ``sequence`` (GSPO,
            https://arxiv.org/abs/2507.18071). The default follows `loss_type`.
        clip_low: Largest distance of a ratio below 1.
        clip_high: Largest distance of a ratio above 1, by default `clip_low`; for ``cispo`` the largest ratio.
        delta: Largest ratio of tokens with a negative advantage (two-sided clipping); None for no limit.
        kl_coef: Weight of the KL divergence from the reference; TRL's beta.
        kl_in: Where the KL divergence counts: in the ``loss`` (k3, per token) or in the ``reward`` (k1, per
            completion). The default is the loss, and the reward for ``rloo``.
        bias_corrected_kl: Multiply the KL term of the loss by the importance ratio, so that its gradient is that of the
            KL divergence.

    Raises:
        ConfigError: For settings that contradict each other.
        RewardError: For reward functions that can't be found.

    Example:
        >>> def short(completions, **columns):
        ...     return [-float(len(text)) for text in completions]
        >>> module = GRPO("Qwen/Qwen3-0.6B", rewards=short, lora=True)  # no weights are loaded yet
        >>> module.hparams["loss_type"], module.hparams["num_completions"], module.hparams["learning_rate"]
        ('dapo', 8, 1e-05)
    """

    default_learning_rate: ClassVar[float] = 1e-6
    default_dtype: ClassVar[str] = "float32"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        loss_type: LossType = "dapo",
        advantage: Advantage | None = None,
        scale_rewards: Scale = "group",
        importance: Literal["token", "sequence"] | None = None,
        clip_low: float = 0.2,
        clip_high: float | None = None,
        delta: float | None = None,
        kl_coef: float = 0.0,
        kl_in: Literal["loss", "reward"] | None = None,
        bias_corrected_kl: bool = True,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(model, kl_coef=kl_coef, **options)
        check_policy_loss(loss_type, clip_low=clip_low, clip_high=clip_high, delta=delta, kl_coef=kl_coef)
        rloo = loss_type == "rloo"
        self.loss_type = loss_type
        self.advantage = advantage or ("leave_one_out" if rloo else "group")
        self.kl_in = kl_in or ("reward" if rloo else "loss")
        for name, value, choices in (
            ("advantage", self.advantage, get_args(Advantage)),
            ("scale_rewards", scale_rewards, get_args(Scale)),
            ("importance", importance, (None, "token", "sequence")),
            ("kl_in", self.kl_in, ("loss", "reward")),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
        if rloo and importance is not None:
            raise ConfigError(
                f"importance={importance!r}: the ratio of RLOO is that of the whole completion; leave it out."
            )
        if self.num_completions < 2:
            raise ConfigError("num_completions=1: a group of one has no advantage over itself. Set it to 2 or more.")
        self.needs_old_logprobs = self.kl_in == "reward" and self.kl_coef > 0
        self._level: Level | None = importance
        self.scale_rewards, self.bias_corrected_kl = scale_rewards, bias_corrected_kl
        self.clip_low, self.clip_high, self.delta = float(clip_low), clip_high, delta
        self.record_arguments(
            {
                "loss_type": loss_type,
                "advantage": advantage,
                "scale_rewards": scale_rewards,
                "importance": importance,
                "clip_low": self.clip_low,
                "clip_high": clip_high,
                "delta": delta,
                "kl_in": kl_in,
                "bias_corrected_kl": bias_corrected_kl,
            }
        )

    def estimate_advantages(self, rollout_batch: RolloutBatch) -> None:
        """Compare each completion with the others of its prompt."""
        rewards, count = rollout_batch.total_rewards, rollout_batch.num_completions
        if self.needs_old_logprobs:
            pairs = zip(rollout_batch.old_logprobs or (), rollout_batch.ref_logprobs or (), strict=True)
            kl = [float(k1(old, ref).sum()) for old, ref in pairs]
            rewards = rewards - self.kl_coef * torch.tensor(kl, dtype=torch.float32)
        by_batch = self.scale_rewards == "batch"
        if self.advantage == "leave_one_out":
            differences = leave_one_out_differences(rewards, count)
            statistics = self._statistics(differences) if by_batch else None
            advantages = leave_one_out_advantages(rewards, count, normalize=by_batch, statistics=statistics)
        else:
            std = self._statistics(rewards)[1] if by_batch else None
            advantages = group_advantages(rewards, count, scale=self.scale_rewards, batch_std=std)
        rollout_batch.advantages = list(advantages[:, None].float())

    def rollout_metrics(self, rollout_batch: RolloutBatch) -> dict[str, float]:
        """As in `SampledCompletions`, with the share of prompts whose completions give no signal."""
        largest = [advantages.abs().max() for advantages in rollout_batch.advantages]  # those of tokens in a subclass
        advantages = torch.stack(largest) if largest else torch.zeros(0)
        without = groups_without_signal(advantages, rollout_batch.num_completions).float()
        share = self._means({"no_signal_fraction": power_sums(without)})
        return {**super().rollout_metrics(rollout_batch), **{f"train/{name}": value for name, value in share.items()}}

    def compute_loss(self, batch: PolicyBatch) -> PolicyLoss | Tensor:
        """The clipped surrogate, or that of CISPO, and the KL divergence where it counts in the loss."""
        return policy_loss(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.sequences,
            weights=batch.weights,
            mask=batch.mask,
            ref_logprobs=batch.ref_logprobs,
            kl_coef=self.kl_coef if self.kl_in == "loss" else 0.0,
            loss_type=self.loss_type,
            level=self._level,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            delta=self.delta,
            bias_corrected_kl=self.bias_corrected_kl,
            correction=batch.correction,
        )
