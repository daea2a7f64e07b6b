"""Group relative policy optimization and its variants, and RLOO."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

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
from lightning_ft.modules.policy import PolicyOptimization
from lightning_ft.modules.rollout_batch import PolicyBatch, RolloutBatch

Advantage = Literal["group", "leave_one_out"]


class GRPO(PolicyOptimization):
    """Learn from rewards of several completions to each prompt, without a critic (https://arxiv.org/abs/2402.03300).

    Args:
        model: Hub name, local folder, or a loaded model; mostly one that was fine-tuned on pairs before.
        rewards: What judges completions: functions with TRL's signature, reward models, import paths, or a list.
        loss_type: How tokens are weighted: ``dapo`` (a mean over tokens, the default as in TRL), ``grpo`` (over
            completions first), ``dr_grpo``, ``bnpo``, ``cispo``, or ``rloo``
            (https://arxiv.org/abs/2402.14740: ratios of whole completions, and with it by default
            ``advantage="leave_one_out"`` and the KL inside the reward).
        advantage: ``group``: less the group's mean, scaled; ``leave_one_out``: less the mean of the others. By default
            as `loss_type` has it.
        scale_rewards: Divide advantages by the standard deviation of the ``group``, of the ``batch``, or ``none``; for
            ``leave_one_out`` ``batch`` normalises them and the others don't.
        importance: Likelihood ratios of each ``token``, or of the ``sequence`` (GSPO, https://arxiv.org/abs/2507.18071).
            By default as `loss_type` has it.
        clip_low: How far below 1 a ratio may fall.
        clip_high: How far above 1 it may rise, by default `clip_low`; for ``cispo`` the largest ratio.
        delta: Largest ratio of tokens with a negative advantage (two-sided clipping); None for no limit.
        kl_coef: Weight of the KL divergence from the reference; TRL's beta.
        kl_in: Where it counts: in the ``loss`` (k3, by token) or in the ``reward`` (k1, by completion). By default in
            the loss, but for ``rloo``.
        bias_corrected_kl: Multiply the KL in the loss by the importance ratio, so that its gradient is the KL's.
        options: Of `PolicyOptimization` (`epochs_per_rollout`, `steps_per_rollout`, `micro_batch_size`, ...),
            `SampledCompletions` (`num_completions`, `max_new_tokens`, `temperature`, ...), `AdaptedFineTuning` (`lora`,
            `learning_rate`, ...) and `FineTuning`.

    Raises:
        ConfigError: For settings that contradict each other.
        RewardError: For rewards that can't be found.

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
        rewards: Any,
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
        **options: Any,
    ) -> None:
        super().__init__(model, rewards=rewards, kl_coef=kl_coef, **options)
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
            raise ConfigError(f"importance={importance!r}: RLOO's ratio is that of the whole completion; leave it out.")
        if self._hyper["num_completions"] < 2:
            raise ConfigError("num_completions=1: a group of one has no advantage over itself; take at least 2.")
        self.needs_old_logprobs = self.kl_in == "reward" and self.kl_coef > 0
        self._level: Level | None = importance
        self._hyper |= {
            "loss_type": loss_type,
            "advantage": advantage,
            "scale_rewards": scale_rewards,
            "importance": importance,
            "clip_low": float(clip_low),
            "clip_high": clip_high,
            "delta": delta,
            "kl_in": kl_in,
            "bias_corrected_kl": bias_corrected_kl,
        }
        self.save_hyperparameters(dict(self._hyper))

    def estimate_advantages(self, rollout_batch: RolloutBatch) -> None:
        """Compare each completion with the others to its prompt."""
        rewards, count = rollout_batch.rewards, rollout_batch.num_completions
        if self.needs_old_logprobs:
            pairs = zip(rollout_batch.old_logprobs or (), rollout_batch.ref_logprobs or (), strict=True)
            kl = [float(k1(old, ref).sum()) for old, ref in pairs]
            rewards = rewards - self.kl_coef * torch.tensor(kl)
        by_batch = self._hyper["scale_rewards"] == "batch"
        if self.advantage == "leave_one_out":
            differences = leave_one_out_differences(rewards, count)
            moments = self._moments(differences) if by_batch else None
            advantages = leave_one_out_advantages(rewards, count, normalize=by_batch, moments=moments)
        else:
            std = self._moments(rewards)[1] if by_batch else None
            advantages = group_advantages(rewards, count, scale=self._hyper["scale_rewards"], batch_std=std)
        rollout_batch.advantages = list(advantages[:, None].float())

    def rollout_metrics(self, rollout_batch: RolloutBatch) -> dict[str, float]:
        """As in `SampledCompletions`, with the share of prompts whose completions teach nothing."""
        advantages = torch.cat(rollout_batch.advantages) if rollout_batch.advantages else torch.zeros(0)
        without = groups_without_signal(advantages, rollout_batch.num_completions).float()
        share = self._means({"no_signal_fraction": power_sums(without)})
        return {**super().rollout_metrics(rollout_batch), **{f"train/{name}": value for name, value in share.items()}}

    def loss(self, batch: PolicyBatch) -> PolicyLoss | Tensor:
        """The clipped surrogate, or CISPO's, and the KL where it counts in the loss."""
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
            clip_low=self._hyper["clip_low"],
            clip_high=self._hyper["clip_high"],
            delta=self._hyper["delta"],
            bias_corrected_kl=self._hyper["bias_corrected_kl"],
        )
