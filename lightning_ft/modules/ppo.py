"""Proximal policy optimization with a critic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import summed_over_ranks
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
from lightning_ft.models.optim import parameter_groups
from lightning_ft.modules.adapted import without_dropout
from lightning_ft.modules.policy import PolicyOptimization
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.rollout_batch import PolicyBatch, RolloutBatch


class PPO(PolicyOptimization):
    """Learn from rewards with a critic that says what each token is worth (https://arxiv.org/abs/1707.06347).

    As for language models in https://arxiv.org/abs/2203.02155: the reward of a token is minus the KL from the reference
    there, and the completion's score is added at its last token.

    Args:
        model: Hub name, local folder, or a loaded model; mostly one that was fine-tuned on pairs before.
        rewards: What judges completions: functions with TRL's signature, reward models, import paths, or a list.
        critic: ``shared`` for a value head on the policy's trunk; ``adapter`` for one on a second LoRA adapter over the
            same base, so that learning values doesn't move the policy (needs `lora`).
        value_coef: Weight of the critic's loss.
        value_clip: How far a value may move from where it was at the rollout; None for anywhere.
        value_learning_rate: Of what only the critic has; None for the policy's.
        gamma: Discount a token.
        lam: Of generalized advantage estimation.
        clip_low: How far below 1 a likelihood ratio may fall.
        clip_high: How far above 1 it may rise; by default `clip_low`.
        kl_coef: Weight of the KL in the rewards, at first.
        kl_target: Nats a completion that the KL is to be kept near by moving `kl_coef`
            (https://arxiv.org/abs/1909.08593); None keeps the coefficient.
        kl_horizon: Completions over which the coefficient moves.
        whiten_advantages: Shift and scale advantages to mean 0 and variance 1 over the whole rollout.
        whiten_rewards: Scale token rewards to variance 1.
        missing_eos_penalty: Subtracted from the score of a completion that was stopped by `max_new_tokens`.
        num_completions: Completions to each prompt.
        epochs_per_rollout: How often the completions of a rollout are gone through.
        options: Of `PolicyOptimization` (`steps_per_rollout`, `micro_batch_size`, ...), `SampledCompletions`
            (`max_new_tokens`, `temperature`, ...), `AdaptedFineTuning` (`lora`, `learning_rate`, ...) and `FineTuning`.

    Raises:
        ConfigError: For settings that contradict each other.
        RewardError: For rewards that can't be found.

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
        rewards: Any,
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
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            rewards=rewards,
            kl_coef=kl_coef,
            num_completions=num_completions,
            epochs_per_rollout=epochs_per_rollout,
            **options,
        )
        check_policy_loss("dapo", clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef)
        if critic not in ("shared", "adapter"):
            raise ConfigError(f"critic={critic!r}: expected 'shared' or 'adapter'.")
        if critic == "adapter" and self._adaptation.kind == "full":
            raise ConfigError(
                "critic='adapter' puts a second adapter beside the policy's: pass lora=True, or 'shared'."
            )
        for name, share in (("gamma", gamma), ("lam", lam)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}={share}: expected a number from 0 to 1.")
        if value_clip is not None and value_clip <= 0:
            raise ConfigError(f"value_clip={value_clip}: expected more than 0, or None.")
        if kl_target is not None and not kl_coef:
            raise ConfigError("kl_target moves kl_coef by shares of itself, so it must start above 0.")
        self.kl_controller = None if kl_target is None else AdaptiveKL(self.kl_coef, kl_target, kl_horizon)
        """Moves `kl_coef` after each rollout; None where it stays."""
        self.critic: Critic | None = None
        self._hyper |= {
            "critic": critic,
            "value_coef": float(value_coef),
            "value_clip": value_clip,
            "value_learning_rate": value_learning_rate,
            "gamma": float(gamma),
            "lam": float(lam),
            "clip_low": float(clip_low),
            "clip_high": clip_high,
            "kl_target": kl_target,
            "kl_horizon": kl_horizon,
            "whiten_advantages": whiten_advantages,
            "whiten_rewards": whiten_rewards,
            "missing_eos_penalty": missing_eos_penalty,
        }
        self.save_hyperparameters(dict(self._hyper))

    def configure_model(self) -> None:
        """As in `PolicyOptimization`, and make the critic."""
        if self.model is None:
            super().configure_model()
            self.critic = Critic(cast(Any, self.model), self._hyper["critic"], seed=self._hyper["seed"])
            if self._hyper["disable_dropout"]:
                without_dropout(cast(Any, self.model))  # its adapter is a new one
            mesh = getattr(self, "_device_mesh", None)
            if mesh is not None:
                raise ConfigError(
                    "PPO's critic can't be sharded yet: use DDP, or GRPO, which has none, with ModelParallelStrategy."
                )

    def _optimizer(self) -> torch.optim.Optimizer:
        critic = cast(Critic, self.critic)
        own = {id(parameter) for parameter in critic.own_parameters(self.model)}
        rate = self._hyper["learning_rate"]
        rates = {True: self._hyper["value_learning_rate"] or rate, False: rate}
        groups = [
            {**group, "params": chosen, "lr": rates[which]}
            for group in parameter_groups(torch.nn.ModuleList([self.model, critic]), self._hyper["weight_decay"])
            for which in (False, True)
            if (chosen := [parameter for parameter in group["params"] if (id(parameter) in own) == which])
        ]
        return self._adamw(groups, rate)

    def score_tokens(self, tokens: TokenBatch) -> tuple[SelectedLogProbs, Tensor | None]:
        """Log-probabilities of a micro-batch under the policy, and the critic's values, ``[n]`` each."""
        critic = cast(Critic, self.critic)
        shared = critic.trunk == "shared"
        scored = self.score(tokens, entropy=True, temperature=self.sampling.temperature, states=shared)
        return scored, critic(self.model, tokens, scored.states)

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
        scores = rollout_batch.rewards - (self._hyper["missing_eos_penalty"] or 0.0) * rollout_batch.truncated
        judged = ~scores.isnan()[sequences]  # a completion that no reward applied to teaches nothing
        rewards = token_rewards(scores.nan_to_num(0.0), self.kl_coef * kl, sequences)
        if self._hyper["whiten_rewards"]:
            rewards = whiten(rewards, judged, shift_mean=False, moments=self._moments(rewards, judged))
        advantages, returns = gae(rewards, values, sequences, self._hyper["gamma"], self._hyper["lam"])
        if self._hyper["whiten_advantages"]:
            advantages = whiten(advantages, judged, moments=self._moments(advantages, judged))
        advantages = advantages.masked_fill(~judged, 0.0)
        returns = torch.where(judged, returns, values)
        rollout_batch.advantages = list(advantages.split(lengths.tolist()))
        rollout_batch.returns = list(returns.split(lengths.tolist()))
        fit = explained_variance(summed_over_ranks(value_sums(returns, values, judged), self.device))
        figures = {"explained_variance": float(fit.nan_to_num(0.0)), "kl_coef": self.kl_coef}
        self.log_dict({f"train/{name}": value for name, value in figures.items()}, batch_size=1)
        self._move_coefficient(float(kl.sum()), len(lengths))

    def _move_coefficient(self, kl: float, completions: int) -> None:
        if self.kl_controller is not None:
            total, count = summed_over_ranks(torch.tensor([kl, float(completions)]), self.device).tolist()
            if not math.isfinite(total):  # nor are the losses of its steps, which are refused or skipped
                return
            self.kl_controller = self.kl_controller.update(total / max(1.0, count), int(count))
            self.kl_coef = self.kl_controller.coef

    # ---------------------------------------------------------------- loss

    def loss(self, batch: PolicyBatch) -> PolicyLoss | Tensor:
        """The clipped surrogate of the policy and the clipped loss of the critic."""
        policy = policy_loss(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.sequences,
            weights=batch.weights,
            mask=batch.mask,
            clip_low=self._hyper["clip_low"],
            clip_high=self._hyper["clip_high"],
        )
        old_values, returns = cast(Tensor, batch.old_values), cast(Tensor, batch.returns)
        errors = clipped_value_loss(cast(Tensor, batch.values), old_values, returns, self._hyper["value_clip"])
        errors = errors * batch.mask
        self._window.add({"value_loss": errors.sum()}, {"value_loss": float(batch.mask.sum())})
        value_loss = (batch.weights[batch.sequences] * errors).sum()
        return policy._replace(loss=policy.loss + self._hyper["value_coef"] * value_loss)

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
