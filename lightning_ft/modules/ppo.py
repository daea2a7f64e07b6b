"""Proximal policy optimization with a critic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.arguments import check_nonnegative
from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import sum_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.losses.gae import (
    clipped_value_loss,
    explained_variance,
    gae,
    token_rewards,
    value_sums,
    whiten,
)
from lightning_ft.losses.kl import AdaptiveKL, k1
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.losses.policy import PolicyLoss, check_policy_loss, policy_loss
from lightning_ft.models.critic import Critic
from lightning_ft.models.optim import make_optimizer, parameter_groups
from lightning_ft.modules.adapted import without_dropout
from lightning_ft.modules.options import CriticOptions, Unpack
from lightning_ft.modules.policy import PolicyOptimization
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.rollout_batch import PolicyBatch, RolloutBatch


class PPO(PolicyOptimization):
    """Learn from rewards with a critic that estimates the value of each token (https://arxiv.org/abs/1707.06347).

    As for language models in https://arxiv.org/abs/2203.02155: the reward of a token is minus the KL divergence from
    the reference there, and the reward of the completion is added at its last token.

    Args:
        model: Hub name, local folder, or a loaded model; usually one that was fine-tuned on pairs before.
        critic: Backbone of the critic: ``shared`` for a value head on the policy's hidden states; ``adapter`` for one
            on a second LoRA adapter over the same base, so that learning values doesn't move the policy (needs `lora`).
        value_coef: Weight of the critic's loss.
        value_clip: Largest change of a value since the rollout; None for no limit.
        value_learning_rate: Learning rate of the critic's own weights; None for that of the policy.
        gamma: Discount per token.
        lam: Lambda of generalized advantage estimation.
        clip_low: Largest distance of a likelihood ratio below 1.
        clip_high: Largest distance of a likelihood ratio above 1; by default `clip_low`.
        kl_coef: Weight of the KL divergence in the rewards, at the start.
        kl_target: KL divergence per completion, nats, that moving `kl_coef` holds (https://arxiv.org/abs/1909.08593);
            None keeps the coefficient.
        kl_horizon: Number of completions over which the coefficient moves.
        whiten_advantages: Shift and scale advantages to mean 0 and variance 1 over the whole rollout.
        whiten_rewards: Scale token rewards to variance 1.
        missing_eos_penalty: Amount subtracted from the reward of a completion that `max_new_tokens` stopped.
        num_completions: Number of completions per prompt.
        epochs_per_rollout: Number of passes over the completions of a rollout.

    Raises:
        ConfigError: For settings that contradict each other.
        RewardError: For reward functions that can't be found.

    Example:
        >>> def short(completions, **columns):
        ...     return [-float(len(text)) for text in completions]
        >>> module = PPO("Qwen/Qwen3-0.6B", rewards=short, lora=True, critic="adapter")  # no weights are loaded yet
        >>> module.hparams["critic"], module.hparams["epochs_per_rollout"]
        ('adapter', 4)
    """

    default_learning_rate: ClassVar[float] = 1e-6
    default_dtype: ClassVar[str] = "float32"
    needs_old_logprobs = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        critic: Literal["shared", "adapter"] = "shared",
        value_coef: float = 0.1,
        value_clip: float | None = 0.2,
        value_learning_rate: float | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        clip_low: float = 0.2,
        clip_high: float | None = None,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        missing_eos_penalty: float | None = None,
        num_completions: int = 1,
        epochs_per_rollout: int = 4,
        **options: Unpack[CriticOptions],
    ) -> None:
        super().__init__(
            model,
            kl_coef=kl_coef,
            num_completions=num_completions,
            epochs_per_rollout=epochs_per_rollout,
            **options,
        )
        check_policy_loss("dapo", clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
        if critic not in ("shared", "adapter"):
            raise ConfigError(f"critic={critic!r}: expected 'shared' or 'adapter'.")
        if critic == "adapter" and self._adaptation.mode == "full":
            raise ConfigError(
                "critic='adapter' adds a second adapter next to the policy's: pass lora=True, or critic='shared'."
            )
        for name, share in (("gamma", gamma), ("lam", lam)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}={share}: expected a number from 0 to 1.")
        if value_clip is not None and value_clip <= 0:
            raise ConfigError(f"value_clip={value_clip}: expected more than 0, or None.")
        if value_learning_rate is not None and not 0 < value_learning_rate < math.inf:
            raise ConfigError(f"value_learning_rate={value_learning_rate}: expected a finite number above 0, or None.")
        for name, weight in (("value_coef", value_coef), ("missing_eos_penalty", missing_eos_penalty)):
            if weight is not None:
                check_nonnegative(name, weight, ConfigError)
        if kl_target is not None and not kl_coef:
            raise ConfigError("kl_target multiplies kl_coef, so kl_coef must start above 0.")
        self.kl_controller = None if kl_target is None else AdaptiveKL(self.kl_coef, kl_target, kl_horizon)
        """Moves `kl_coef` after each rollout; None where it is constant."""
        self.critic: Critic | None = None
        self._critic_metrics: dict[str, float] = {}
        self.critic_mode, self.value_coef, self.value_clip = critic, float(value_coef), value_clip
        self.value_learning_rate, self.missing_eos_penalty = value_learning_rate, missing_eos_penalty
        self.gamma, self.lam = float(gamma), float(lam)
        self.clip_low, self.clip_high = float(clip_low), clip_high
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.record_arguments(
            {
                "critic": critic,
                "value_coef": self.value_coef,
                "value_clip": value_clip,
                "value_learning_rate": value_learning_rate,
                "gamma": self.gamma,
                "lam": self.lam,
                "clip_low": self.clip_low,
                "clip_high": clip_high,
                "kl_target": kl_target,
                "kl_horizon": kl_horizon,
                "whiten_advantages": whiten_advantages,
                "whiten_rewards": whiten_rewards,
                "missing_eos_penalty": missing_eos_penalty,
            }
        )

    def configure_model(self) -> None:
        """As in `PolicyOptimization`, and build the critic."""
        if self.model is None:
            super().configure_model()
            self.critic = Critic(cast(Any, self.model), self.critic_mode, seed=self.model_options.seed)
            if self.disable_dropout:
                without_dropout(cast(Any, self.model))  # its adapter is a new one
            self.checkpoint_names()
            if self.sharded:
                raise ConfigError(
                    "The critic of PPO can't be sharded yet: use DDP, or GRPO, which has none, with "
                    "ModelParallelStrategy."
                )

    def _optimizer(self) -> torch.optim.Optimizer:
        critic = cast(Critic, self.critic)
        own = {id(parameter) for parameter in critic.own_parameters(self.model)}
        rate = self.optimizer_options.learning_rate
        rates = {True: rate if self.value_learning_rate is None else self.value_learning_rate, False: rate}
        decayed = parameter_groups(self, self.optimizer_options.weight_decay)
        groups = [
            {**group, "params": chosen, "lr": rates[which]}
            for group in decayed
            for which in (False, True)
            if (chosen := [parameter for parameter in group["params"] if (id(parameter) in own) == which])
        ]
        return make_optimizer(self.optimizer_options.optimizer, groups, rate, self.optimizer_options.betas)

    def policy_logprobs(self, tokens: TokenBatch) -> tuple[SelectedLogProbs, Tensor | None]:
        """Log-probabilities of a micro-batch under the policy, and the critic's values, ``[n]`` each."""
        critic = cast(Critic, self.critic)
        shared = self.critic_mode == "shared"
        computed = self.compute_logprobs(tokens, entropy=True, temperature=self.sampling.temperature, states=shared)
        return computed, critic(self.model, tokens, computed.states)

    # ---------------------------------------------------------------- advantages

    def estimate_advantages(self, rollout_batch: RolloutBatch) -> None:
        """Token rewards, generalized advantage estimation and whitening, over the rollout of all ranks."""
        lengths = rollout_batch.lengths
        old, values = _flat(rollout_batch.old_logprobs), _flat(rollout_batch.values)
        sequences = torch.arange(len(lengths)).repeat_interleave(lengths)  # [n]
        kl = (
            k1(old, _flat(rollout_batch.ref_logprobs))
            if rollout_batch.ref_logprobs is not None
            else torch.zeros_like(old)
        )
        totals = rollout_batch.total_rewards - (self.missing_eos_penalty or 0.0) * rollout_batch.truncated
        rewarded = ~totals.isnan()[sequences]  # nothing is learned from a completion that no reward applies to
        rewards = token_rewards(totals.nan_to_num(0.0), self.kl_coef * kl, sequences)
        if self.whiten_rewards:
            rewards = whiten(rewards, rewarded, shift_mean=False, statistics=self._statistics(rewards, rewarded))
        advantages, returns = gae(rewards, values, sequences, self.gamma, self.lam)
        if self.whiten_advantages:
            advantages = whiten(advantages, rewarded, statistics=self._statistics(advantages, rewarded))
        advantages = advantages.masked_fill(~rewarded, 0.0)
        returns = torch.where(rewarded, returns, values)
        rollout_batch.advantages = list(advantages.split(lengths.tolist()))
        rollout_batch.returns = list(returns.split(lengths.tolist()))
        fit = explained_variance(sum_over_ranks(value_sums(returns, values, rewarded), self.device))
        self._critic_metrics = {"explained_variance": float(fit.nan_to_num(0.0)), "kl_coef": self.kl_coef}
        self._move_coefficient(float(kl.sum()), len(lengths))

    def rollout_metrics(self, rollout_batch: RolloutBatch) -> dict[str, float]:
        """As in `SampledCompletions`, with the critic's fit and the KL coefficient of this rollout."""
        own = {f"train/{name}": value for name, value in self._critic_metrics.items()}
        return {**super().rollout_metrics(rollout_batch), **own}

    def _move_coefficient(self, kl: float, completions: int) -> None:
        if self.kl_controller is not None:
            total, count = sum_over_ranks(
                torch.tensor([kl, float(completions)], dtype=torch.float32), self.device
            ).tolist()
            if not math.isfinite(total):  # nor are the losses of these steps, which are refused or skipped
                return
            self.kl_controller = self.kl_controller.update(total / max(1.0, count), int(count))
            self.kl_coef = self.kl_controller.coef

    # ---------------------------------------------------------------- loss

    def compute_loss(self, batch: PolicyBatch) -> PolicyLoss | Tensor:
        """The clipped surrogate of the policy and the clipped loss of the critic."""
        policy = policy_loss(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.sequences,
            weights=batch.weights,
            mask=batch.mask,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            correction=batch.correction,
        )
        old_values, returns = cast(Tensor, batch.old_values), cast(Tensor, batch.returns)
        errors = clipped_value_loss(cast(Tensor, batch.values), old_values, returns, self.value_clip)
        errors = errors * batch.mask
        self._step_metrics.add({"value_loss": errors.sum()}, {"value_loss": float(batch.mask.sum())})
        value_loss = (batch.weights[batch.sequences] * errors).sum()
        return policy._replace(loss=policy.loss + self.value_coef * value_loss)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the KL coefficient."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE]["kl_coef"] = self.kl_coef

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the KL coefficient."""
        super().on_load_checkpoint(checkpoint)
        if self.kl_controller is not None and "kl_coef" in checkpoint.get(STATE, {}):
            self.kl_controller = replace(self.kl_controller, coef=float(checkpoint[STATE]["kl_coef"]))
            self.kl_coef = self.kl_controller.coef


def _flat(values: list[Tensor] | None) -> Tensor:
    return torch.cat([value.cpu() for value in values]) if values else torch.zeros(0)
