"""Learning from the policy's own completions: roll out, reward, measure, and take steps, all in one training step.

A rollout never outlives its training step, so a checkpoint between two steps resumes exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_ft._lightning import _pl
from lightning_ft.console import WARNINGS_OF_OWN_STEPS, hide_warnings
from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import max_over_ranks, sum_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.losses.kl import k1, k3
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.losses.policy import LossType, PolicyLoss, token_weights
from lightning_ft.losses.sampling_correction import CorrectionMode
from lightning_ft.losses.statistics import mean_and_std, power_sums
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM
from lightning_ft.models.reference import Reference
from lightning_ft.modules.engine_correction import EngineCorrection
from lightning_ft.modules.nonfinite import whole_norm
from lightning_ft.modules.options import SamplingOptions, Unpack
from lightning_ft.modules.rollout_batch import PolicyBatch, RolloutBatch, concatenated
from lightning_ft.modules.sampled import SampledCompletions
from lightning_ft.modules.step_metrics import MeanMetrics
from lightning_ft.modules.trainer_checks import check_checkpoints_by_step
from lightning_ft.rewards.logged import means_over_ranks

LogProbsAndValues = Callable[[TokenBatch], "tuple[SelectedLogProbs, Tensor | None]"]
"""Log-probabilities of a batch's tokens and, with a critic, their values."""


class PolicyOptimization(SampledCompletions):
    """Base of the policy-gradient modules; a subclass computes advantages and a loss.

    A training step takes a batch of prompts, samples `num_completions` of each, computes their rewards, and takes
    ``epochs_per_rollout * steps_per_rollout`` optimizer steps on them.

    Args:
        model: Hub name, local folder, or a loaded model; usually one that was fine-tuned on pairs before.
        epochs_per_rollout: Number of passes over the completions of a rollout.
        steps_per_rollout: Number of optimizer steps per pass. Prompts with all of their completions are distributed
            over them, or single completions where there are fewer prompts than steps.
        micro_batch_size: Number of completions per forward and backward pass on a rank; None for as many as have 8,192
            tokens with their prompts. Smaller ones take less memory and give the same step (except for ``bnpo``, which
            by its definition depends on them).
        max_grad_norm: Norm that gradients are clipped to; None for no clipping. (The Trainer's ``gradient_clip_val``
            and ``accumulate_grad_batches`` don't work with modules that take their own steps.)
        mask_truncated: Leave completions that `max_new_tokens` stopped out of the loss.
        kl_coef: Weight of the KL divergence from the reference.
        sampling_correction: Weighting of tokens that corrects for an engine whose probabilities differ from the
            model's: the ratio of each ``token`` or of the whole ``sequence``, where ratios out of bounds are set to the
            bound (``truncate``) or leave the tokens out (``mask``). ``auto`` is ``sequence_mask`` with `vllm`,
            `continuous_batching`, `merge_adapter` or `engine`, as far as they report log-probabilities, and none with
            the built-in engine as it is, which samples with the model itself. None for no correction.
        sampling_ratio_max: Upper bound of those ratios; None for no bound.
        sampling_ratio_min: Lower bound of those ratios; None for no bound.
        options: Arguments of `SampledCompletions`, `AdaptedFineTuning` and `FineTuning`.
    """

    loss_type: LossType = "dapo"
    """Weighting of the tokens of a step, see `lightning_ft.losses.policy.token_weights`."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        epochs_per_rollout: int = 1,
        steps_per_rollout: int = 1,
        micro_batch_size: int | None = None,
        max_grad_norm: float | None = 1.0,
        mask_truncated: bool = False,
        kl_coef: float = 0.0,
        sampling_correction: CorrectionMode | Literal["auto"] | None = "auto",
        sampling_ratio_max: float | None = 3.0,
        sampling_ratio_min: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> None:
        super().__init__(model, **options)
        self.automatic_optimization = False
        self.kl_coef = float(kl_coef)
        counts = {"epochs_per_rollout": epochs_per_rollout, "steps_per_rollout": steps_per_rollout}
        for name, count in {**counts, "micro_batch_size": 1 if micro_batch_size is None else micro_batch_size}.items():
            if count < 1:
                raise ConfigError(f"{name}={count}: expected at least 1.")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ConfigError(f"max_grad_norm={max_grad_norm}: expected more than 0, or None.")
        if self.sampling.greedy:
            raise ConfigError(
                "temperature=0: greedy completions of a prompt are all the same, so there is nothing to learn. Set a "
                "temperature above 0."
            )
        self.epochs_per_rollout, self.steps_per_rollout = epochs_per_rollout, steps_per_rollout
        self.micro_batch_size, self.max_grad_norm = micro_batch_size, max_grad_norm
        self.mask_truncated = mask_truncated
        self.correction = EngineCorrection.of(
            sampling_correction,
            sampling_ratio_max,
            sampling_ratio_min,
            renormalizing="vLLM" if self._vllm else "continuous batching" if self._continuous_batching else None,
            differs=self._merge_adapter or self._engine_argument[0] is not None,
            filters=self.sampling.filters,
        )
        """How tokens are weighted to correct for the engine that sampled."""
        self.record_arguments(
            {
                **counts,
                "micro_batch_size": micro_batch_size,
                "max_grad_norm": max_grad_norm,
                "mask_truncated": mask_truncated,
                "kl_coef": self.kl_coef,
                "sampling_correction": sampling_correction,
                "sampling_ratio_max": sampling_ratio_max,
                "sampling_ratio_min": sampling_ratio_min,
            }
        )
        self.needs_reference = bool(self.kl_coef)
        self._reference: Reference | None = None
        self._step_metrics = MeanMetrics()
        self._batch_idx = 0
        self._step_loss = torch.zeros(())
        self._unusable: str | None = None

    # ---------------------------------------------------------------- for subclasses

    needs_old_logprobs: bool = False
    """Whether advantages need log-probabilities or values, which must be computed before them."""

    def estimate_advantages(self, rollout_batch: RolloutBatch) -> None:
        """Set `rollout_batch.advantages` from its rewards, before the first step."""
        raise NotImplementedError

    def compute_loss(self, batch: PolicyBatch) -> PolicyLoss | Tensor:
        """A micro-batch's share of the loss of its optimizer step; a loss of one's own goes here.

        Returns:
            A scalar with gradient, alone or with metrics to log.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- setup

    def configure_callbacks(self) -> list[Any]:
        """Refuse settings of the Trainer that have another name here, before Lightning refuses them.

        Raises:
            ConfigError: For ``gradient_clip_val``, ``accumulate_grad_batches``, `GradientAccumulationScheduler`,
                `LearningRateFinder` and ``ModelCheckpoint(train_time_interval=...)``.
        """
        trainer = cast(Any, self.trainer)
        refused = f"doesn't work with {type(self).__name__}, which takes several steps per batch"
        if limit := trainer.gradient_clip_val:
            raise ConfigError(
                f"Trainer(gradient_clip_val={limit}) {refused}: pass max_grad_norm={limit} to the module instead."
            )
        if (count := trainer.accumulate_grad_batches) != 1:
            raise ConfigError(
                f"Trainer(accumulate_grad_batches={count}) {refused}: use a DataModule with a {count} times larger "
                "batch_size, and micro_batch_size of the module for what fits into memory."
            )
        for callback in trainer.callbacks:
            if isinstance(callback, _pl.callbacks.GradientAccumulationScheduler):
                raise ConfigError(
                    f"{type(callback).__name__} {refused}: change micro_batch_size of the module instead."
                )
            if isinstance(callback, _pl.callbacks.LearningRateFinder):
                raise ConfigError(
                    f"{type(callback).__name__} reads the loss of a batch, which says nothing of the reward that "
                    f"{type(self).__name__} trains for: compare runs at several values of learning_rate instead."
                )
        if trainer.state.fn == "fit":
            check_checkpoints_by_step(trainer, type(self).__name__, self._steps_of_batch)
        return super().configure_callbacks()

    def configure_model(self) -> None:
        """As in `FineTuning`, and keep the reference while the weights are the original ones.

        With an adapter it takes no memory, so validation always measures the KL divergence; all weights are copied
        only where the KL divergence is part of the training.
        """
        if self.model is None:
            super().configure_model()
            if self.needs_reference or self._adaptation.mode != "full":
                self._reference = self.new_reference()

    def on_fit_start(self) -> None:
        """As in `FineTuning`; give each rank a random stream of its own."""
        super().on_fit_start()
        hide_warnings(WARNINGS_OF_OWN_STEPS)
        self._check_steps_per_rollout()
        if self._reference is not None:
            self._reference.to(self.device)
        self.seed_by_rank()

    def _check_steps_per_rollout(self) -> None:
        """Refuse more optimizer steps than a rollout has completions: the others would be empty."""
        steps, data = self.steps_per_rollout, self._row_data()
        if data is None:
            return
        completions = data.hparams["batch_size"] * self.num_completions * self.trainer.world_size
        if steps > completions:
            raise ConfigError(
                f"steps_per_rollout={steps} exceeds the {completions} completions of a rollout (batch_size times "
                "num_completions over all ranks), so some steps would have nothing to learn from. Lower it to "
                f"{completions} at most, or raise num_completions or the DataModule's batch_size."
            )

    @property
    def _steps_of_batch(self) -> int:
        return self.epochs_per_rollout * self.steps_per_rollout

    def _steps_of_epoch(self, batches: int, epoch: int) -> int:
        return batches * self._steps_of_batch

    # ---------------------------------------------------------------- one training step

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, and learn from the completions."""
        started = time.perf_counter()
        self._batch_idx = batch_idx
        rollout_batch = self.roll_out(batch)
        self.measure(rollout_batch)
        self.estimate_advantages(rollout_batch)
        rollout_batch.check_advantages()
        self.last_rollout = self.record(rollout_batch)
        rolled_out = time.perf_counter()
        rate = cast(Any, self.optimizers()).param_groups[0]["lr"]
        self.learn(rollout_batch)
        self.close_window()
        metrics = {f"train/{name}": mean for name, mean in self._step_metrics.reduce(self.device).items()}
        self.correction.warn(metrics)
        metrics |= self.rollout_metrics(rollout_batch)
        metrics |= {f"train/{name}": count for name, count in self.skipped_metrics().items()}
        metrics["train/learning_rate"] = rate  # of the first step
        metrics["train/rollout_seconds"] = rolled_out - started
        metrics["train/train_seconds"] = time.perf_counter() - rolled_out
        assert rollout_batch.rewards is not None, "roll_out() computes them"
        own = [name.removeprefix("train/") for name in metrics]
        logged = means_over_ranks(rollout_batch.rewards.logged, own)
        metrics |= {f"train/{name}": mean for name, mean in logged.items()}
        for name in ("train/loss", "train/reward"):
            if name in metrics:  # without a reward that applies to any completion there is none
                self.log(name, metrics.pop(name), prog_bar=True, batch_size=1)
        self.log_dict(metrics, batch_size=1)

    def measure(self, rollout_batch: RolloutBatch) -> None:
        """Compute log-probabilities of the completions under the policy and the reference, where they are needed.

        Under the policy: where it moves before all completions are used. Under the reference: where the KL divergence
        from it is part of the training, since it takes a forward pass.
        """
        if self._steps_of_batch > 1 or self.needs_old_logprobs:
            with evaluating(self.model):
                rollout_batch.old_logprobs, rollout_batch.values = self._measured(rollout_batch, self.policy_logprobs)
        if self._reference is not None and self.kl_coef:
            with self._reference.use() as reference:
                rollout_batch.ref_logprobs = self._measured(rollout_batch, self._logprobs_under(reference))[0]

    def policy_logprobs(self, tokens: TokenBatch) -> tuple[SelectedLogProbs, Tensor | None]:
        """Log-probabilities of a micro-batch under the policy and, with a critic, its values, ``[n]`` each."""
        return self.compute_logprobs(tokens, entropy=True, temperature=self.sampling.temperature), None

    def _logprobs_under(self, model: CausalLM) -> LogProbsAndValues:
        def compute(tokens: TokenBatch) -> tuple[SelectedLogProbs, None]:
            return self._required_logprob_model()(model, tokens, temperature=self.sampling.temperature), None

        return compute

    @torch.no_grad()
    def _measured(
        self, rollout_batch: RolloutBatch, compute: LogProbsAndValues
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Log-probability of every token, ``[t]`` per completion, and with a critic its value."""
        logprobs: dict[int, Tensor] = {}
        values: dict[int, Tensor] | None = None
        for micro_batch in self._micro_batches(rollout_batch, rollout_batch.groups()):
            computed, critic = compute(self.lay_out(*rollout_batch.rows(micro_batch)))
            logprobs.update(zip(micro_batch, rollout_batch.split(computed.logprobs, micro_batch), strict=True))
            if critic is not None:  # also on a rank that has no completions
                values = values or {}
                values.update(zip(micro_batch, rollout_batch.split(critic, micro_batch), strict=True))
        order = range(len(rollout_batch.completions))
        return [logprobs[c] for c in order], None if values is None else [values[c] for c in order]

    def _statistics(self, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the completions, or tokens, of all ranks."""
        return mean_and_std(sum_over_ranks(power_sums(values, mask), self.device))

    def _further_sums(self, rollout_batch: RolloutBatch) -> dict[str, Tensor]:
        if self._reference is None:
            return {}
        with evaluating(self.model):
            logprobs = self._measured(rollout_batch, self.policy_logprobs)[0]
        with self._reference.use() as reference:
            ref_logprobs = self._measured(rollout_batch, self._logprobs_under(reference))[0]
        kl = [k1(policy, reference).sum() for policy, reference in zip(logprobs, ref_logprobs, strict=True)]
        return {"kl_completion": power_sums(torch.stack(kl) if kl else torch.zeros(0))}

    def _micro_batches(self, rollout_batch: RolloutBatch, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """Micro-batches of the groups, the same number on every rank so that ranks run in step; some may be empty."""
        micro_batches = RolloutBatch.micro_batches(groups, self.micro_batch_size or rollout_batch.micro_batch_size())
        return micro_batches + [[]] * (max_over_ranks(len(micro_batches), self.device) - len(micro_batches))

    def learn(self, rollout_batch: RolloutBatch) -> None:
        """Take the optimizer steps of a rollout, until `max_steps` is reached."""
        steps = self.steps_per_rollout
        for _ in range(self.epochs_per_rollout):
            groups = rollout_batch.groups(steps)
            count = len(groups)
            order = torch.randperm(count).tolist() if steps > 1 else list(range(count))
            for step in range(steps):
                if 0 <= self.trainer.max_steps <= self.trainer.global_step:
                    return
                part = order[step * count // steps : (step + 1) * count // steps]
                if count > len(rollout_batch.prompts):
                    part = sorted(part)  # completions of a prompt next to each other, so that they share it
                self._take_step(rollout_batch, [groups[i] for i in part])

    def _take_step(self, rollout_batch: RolloutBatch, groups: Sequence[Sequence[int]]) -> None:
        """Take an optimizer step on groups of completions, unless no rank has any (in a short last batch)."""
        optimizer = cast(Any, self.optimizers())
        micro_batches = self._micro_batches(rollout_batch, groups)
        kept = ~rollout_batch.truncated if self.mask_truncated else torch.ones_like(rollout_batch.truncated)
        lengths = rollout_batch.lengths * kept
        chosen = [c for micro_batch in micro_batches for c in micro_batch]
        totals = sum_over_ranks(torch.stack([torch.tensor(len(chosen)), lengths[chosen].sum()]), self.device)
        if not totals[0]:
            return
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        optimizer.zero_grad()
        whole = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, micro_batch in enumerate(micro_batches):
            weights = token_weights(
                self.loss_type,
                lengths[micro_batch],
                total_sequences=totals[0],
                total_tokens=totals[1],
                max_new_tokens=self.max_new_tokens,
            )
            with nullcontext() if number == len(micro_batches) - 1 else block():
                batch = self._policy_batch(rollout_batch, micro_batch, kept, weights)
                result = self.compute_loss(batch)
                loss = result.loss if isinstance(result, PolicyLoss) else result
                self.manual_backward(loss * self.trainer.world_size)  # strategies average over ranks; weights span them
            whole += loss.detach()
            self._count(batch, result)
        self._step_metrics.add({"loss": whole}, {"loss": 1 / self.trainer.world_size})
        self.note_loss(self._batch_idx, whole)
        self._step_loss, self._unusable = whole, rollout_batch.nonfinite
        optimizer.step()
        torch.clear_autocast_cache()  # which may have copies of the weights before the step, as in Lightning 2.5
        self._step_schedulers("step")

    def _step_schedulers(self, interval: str) -> None:
        """Step the schedulers of an interval, ``step`` or ``epoch``, as often as their configuration says."""
        trainer = cast(Any, self.trainer)
        count = trainer.global_step if interval == "step" else trainer.current_epoch + 1
        for config in trainer.lr_scheduler_configs:
            if config.interval != interval or count % config.frequency:
                continue
            if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                # Lightning drops `monitor` from the configuration of a module that takes its own steps.
                monitor, metrics = getattr(config.scheduler, "monitor", None), trainer.callback_metrics
                if monitor not in metrics:
                    lacks = f"monitors {monitor!r}, which isn't logged" if monitor else "has no metric to monitor"
                    raise ConfigError(
                        f"ReduceLROnPlateau {lacks} when {type(self).__name__} steps it, once per {interval}. Use "
                        "pytorch_lightning.cli.ReduceLROnPlateau(optimizer, monitor), "
                        f"with one of {', '.join(sorted(metrics))}."
                    )
                config.scheduler.step(metrics[monitor])
            else:
                config.scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Step schedulers whose interval is the epoch."""
        super().on_train_epoch_end()
        self._step_schedulers("epoch")

    def _policy_batch(
        self, rollout_batch: RolloutBatch, micro_batch: Sequence[int], kept: Tensor, weights: Tensor
    ) -> PolicyBatch:
        computed, values = self.policy_logprobs(self.lay_out(*rollout_batch.rows(micro_batch)))
        logprobs = computed.logprobs
        lengths = rollout_batch.lengths[list(micro_batch)].to(logprobs.device)
        sequences = torch.arange(len(micro_batch), device=logprobs.device).repeat_interleave(lengths)  # [n]
        advantages = {c: rollout_batch.advantages[c].expand(len(rollout_batch.completions[c])) for c in micro_batch}
        old = logprobs.detach()
        if rollout_batch.old_logprobs is not None:
            old = cast(Tensor, concatenated(rollout_batch.old_logprobs, micro_batch, logprobs))
        mask = kept[list(micro_batch)].to(logprobs.device)[sequences]
        return PolicyBatch(
            logprobs=logprobs,
            old_logprobs=old,
            ref_logprobs=concatenated(rollout_batch.ref_logprobs, micro_batch, logprobs),
            advantages=cast(Tensor, concatenated(advantages, micro_batch, logprobs)),
            sequences=sequences,
            mask=mask,
            weights=weights.to(logprobs),
            entropy=cast(Tensor, computed.entropy),
            values=values,
            old_values=concatenated(rollout_batch.values, micro_batch, logprobs),
            returns=concatenated(rollout_batch.returns, micro_batch, logprobs),
            correction=self.correction.weights(
                rollout_batch, micro_batch, old, sequences, mask, kept, self._step_metrics
            ),
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients, which are already unscaled and summed over ranks."""
        gradients = [p for p in self.parameters() if p.grad is not None]
        limit = self.max_grad_norm
        norm = whole_norm(torch.nn.utils.clip_grad_norm_(gradients, float("inf") if limit is None else limit)).detach()
        self._step_metrics.add({"grad_norm": norm[None]})
        self.check_step(optimizer, norm, self._step_loss, unusable=self._unusable)

    def _count(self, batch: PolicyBatch, result: PolicyLoss | Tensor) -> None:
        """Add a micro-batch to the metrics of the training step."""
        tokens = float(batch.mask.sum())
        sums = {"entropy": (batch.entropy * batch.mask).sum()}
        counts = {"entropy": tokens}
        if batch.ref_logprobs is not None:
            logprobs = batch.logprobs.detach()
            sums["kl"] = (k3(logprobs, batch.ref_logprobs) * batch.mask).sum()
            sums["kl_completion"] = (k1(logprobs, batch.ref_logprobs) * batch.mask).sum()
            counts |= {"kl": tokens, "kl_completion": float(len(batch.sequences[batch.mask].unique()))}
        if isinstance(result, PolicyLoss):
            sums |= {"clip_fraction/low": result.clipped_low, "clip_fraction/high": result.clipped_high}
            sums["policy_kl"] = result.approx_kl
            counts |= dict.fromkeys(("clip_fraction/low", "clip_fraction/high", "policy_kl"), tokens)
        self._step_metrics.add(sums, counts)
