"""Learning from completions that the policy itself wrote: roll out, judge, measure, and step, inside one training step.

Rollouts never outlive the training step that they were made in, so a checkpoint between two steps resumes exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import largest_over_ranks, summed_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.losses.kl import k1, k3
from lightning_ft.losses.logprobs import SelectedLogProbs
from lightning_ft.losses.policy import LossType, PolicyLoss, token_weights
from lightning_ft.losses.statistics import mean_and_std, power_sums
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM
from lightning_ft.models.reference import Reference
from lightning_ft.modules.nonfinite import whole_norm
from lightning_ft.modules.rollout_batch import PolicyBatch, RolloutBatch, picked
from lightning_ft.modules.sampled import SampledCompletions
from lightning_ft.modules.step_metrics import MeanMetrics

Score = Callable[[TokenBatch], "tuple[SelectedLogProbs, Tensor | None]"]


class PolicyOptimization(SampledCompletions):
    """Base of the policy-gradient modules; a subclass gives advantages, and a loss.

    A training step takes a batch of prompts, samples `num_completions` to each, has them judged, and takes
    ``epochs_per_rollout * steps_per_rollout`` optimizer steps on them.

    Args:
        model: Hub name, local folder, or a loaded model; mostly one that was fine-tuned on pairs before.
        epochs_per_rollout: How often the completions of a rollout are gone through.
        steps_per_rollout: Into how many optimizer steps each time: prompts with all of their completions are dealt out
            over them, or single completions where there are fewer prompts than steps.
        micro_batch_size: Completions of one forward and backward pass on a rank; None for all of a step at once.
            Smaller ones take less memory and give the same step.
        max_grad_norm: Gradients are clipped to this norm; None for not at all. (The Trainer's ``gradient_clip_val`` and
            ``accumulate_grad_batches`` don't work with modules that take their own steps.)
        mask_truncated: Learn nothing from completions that were stopped by `max_new_tokens`.
        kl_coef: Weight of the KL divergence from the reference.
        options: Of `SampledCompletions`, `AdaptedFineTuning` and `FineTuning`.
    """

    loss_type: LossType = "dapo"
    """How the tokens of a step are weighted, see `lightning_ft.losses.policy.token_weights`."""

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
        **options: Any,
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
                "temperature=0: greedy completions of a prompt are all the same; there is nothing to learn."
            )
        self._hyper |= {
            **counts,
            "micro_batch_size": micro_batch_size,
            "max_grad_norm": max_grad_norm,
            "mask_truncated": mask_truncated,
            "kl_coef": self.kl_coef,
        }
        self.needs_reference = bool(self.kl_coef)
        self._reference: Reference | None = None
        self._window = MeanMetrics()
        self._batch_idx = 0
        self._step_loss = torch.zeros(())
        self._left_out: str | None = None

    # ---------------------------------------------------------------- for subclasses

    needs_old_logprobs: bool = False
    """Whether advantages are made of log-probabilities or values, so that there must be some beforehand."""

    def estimate_advantages(self, rollout_batch: RolloutBatch) -> None:
        """Set `rollout_batch.advantages` from its rewards, before any step is taken."""
        raise NotImplementedError

    def loss(self, batch: PolicyBatch) -> PolicyLoss | Tensor:
        """The share of a micro-batch in the loss of its optimizer step; a loss of your own goes here.

        Returns:
            A scalar with gradient, or the same with figures to log.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- setup

    def configure_model(self) -> None:
        """As in `FineTuning`, and keep the reference while the weights are the original ones.

        With an adapter it takes no memory, so that validation can always measure the KL; a copy of all weights is made
        only where the KL counts.
        """
        if self.model is None:
            super().configure_model()
            if self.needs_reference or self._adaptation.kind != "full":
                self._reference = self.new_reference()

    def on_fit_start(self) -> None:
        """As in `FineTuning`; let ranks sample from streams of their own."""
        super().on_fit_start()
        self._check_steps_per_rollout()
        if self._reference is not None:
            self._reference.to(self.device)
        if self.global_rank and not self._resumed:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def _check_steps_per_rollout(self) -> None:
        """Refuse more optimizer steps than there are completions to deal out over them: the others would be empty."""
        steps, data = self._hyper["steps_per_rollout"], self._row_data()
        if data is None:
            return
        completions = data.hparams["batch_size"] * self._hyper["num_completions"] * self.trainer.world_size
        if steps > completions:
            raise ConfigError(
                f"steps_per_rollout={steps}: a rollout has {completions} completions (batch_size times "
                "num_completions over all ranks), so some of its steps would have nothing to learn from. Lower it to "
                f"{completions} at most, or raise num_completions or the DataModule's batch_size."
            )

    @property
    def _steps_of_batch(self) -> int:
        return int(self._hyper["epochs_per_rollout"] * self._hyper["steps_per_rollout"])

    def _steps_of_epoch(self, batches: int, epoch: int) -> int:
        return batches * self._steps_of_batch

    # ---------------------------------------------------------------- one training step

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Roll out, and learn from it."""
        started = time.perf_counter()
        self._batch_idx = batch_idx
        rollout_batch = self.roll_out(batch)
        self.measure(rollout_batch)
        self.estimate_advantages(rollout_batch)
        self.last_rollout = self.record(rollout_batch)
        rolled_out = time.perf_counter()
        rate = cast(Any, self.optimizers()).param_groups[0]["lr"]
        self.learn(rollout_batch)
        self.close_window()
        figures = {f"train/{name}": mean for name, mean in self._window.reduce(self.device).items()}
        figures |= self.rollout_metrics(rollout_batch)
        figures |= {f"train/{name}": count for name, count in self.skipped_metrics().items()}
        figures["train/learning_rate"] = rate  # of the first step
        figures["train/rollout_seconds"] = rolled_out - started
        figures["train/train_seconds"] = time.perf_counter() - rolled_out
        for name in ("train/loss", "train/reward"):
            if name in figures:  # there is none where no reward applied to any completion
                self.log(name, figures.pop(name), prog_bar=True, batch_size=1)
        self.log_dict(figures, batch_size=1)

    def measure(self, rollout_batch: RolloutBatch) -> None:
        """Score the completions under the policy, where it moves before they are used up, and under the reference.

        The reference only where the divergence from it counts: it takes a forward pass.
        """
        if self._steps_of_batch > 1 or self.needs_old_logprobs:
            with evaluating(self.model):
                rollout_batch.old_logprobs, rollout_batch.values = self._scored(rollout_batch, self.score_tokens)
        if self._reference is not None and self.kl_coef:
            with self._reference.use() as reference:
                rollout_batch.ref_logprobs = self._scored(rollout_batch, self._scored_by(reference))[0]

    def _scored_by(self, model: CausalLM) -> Score:
        def score(tokens: TokenBatch) -> tuple[SelectedLogProbs, None]:
            return self._required_logprob_model()(model, tokens, temperature=self.sampling.temperature), None

        return score

    @torch.no_grad()
    def _scored(self, rollout_batch: RolloutBatch, score: Score) -> tuple[list[Tensor], list[Tensor] | None]:
        """Log-probabilities of every token, ``[t]`` for each completion, and where there is a critic its values."""
        logprobs: dict[int, Tensor] = {}
        values: dict[int, Tensor] | None = None
        for piece in self._pieces(rollout_batch.groups()):
            scored, critic = score(self.lay_out(*rollout_batch.rows(piece)))
            logprobs.update(zip(piece, rollout_batch.split(scored.logprobs, piece), strict=True))
            if critic is not None:  # there is one also on a rank that has no completions
                values = values or {}
                values.update(zip(piece, rollout_batch.split(critic, piece), strict=True))
        order = range(len(rollout_batch.completions))
        return [logprobs[c] for c in order], None if values is None else [values[c] for c in order]

    def _moments(self, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the completions, or tokens, of all ranks."""
        return mean_and_std(summed_over_ranks(power_sums(values, mask), self.device))

    def _further_sums(self, rollout_batch: RolloutBatch) -> dict[str, Tensor]:
        if self._reference is None:
            return {}
        with evaluating(self.model):
            logprobs = self._scored(rollout_batch, self.score_tokens)[0]
        with self._reference.use() as reference:
            ref_logprobs = self._scored(rollout_batch, self._scored_by(reference))[0]
        kl = [k1(ours, theirs).sum() for ours, theirs in zip(logprobs, ref_logprobs, strict=True)]
        return {"kl_completion": power_sums(torch.stack(kl) if kl else torch.zeros(0))}

    def _pieces(self, groups: Sequence[Sequence[int]]) -> list[list[int]]:
        """What one pass takes each; as many on every rank, so that ranks run in step, some of them empty."""
        pieces = RolloutBatch.pieces(groups, self._hyper["micro_batch_size"])
        return pieces + [[]] * (largest_over_ranks(len(pieces), self.device) - len(pieces))

    def learn(self, rollout_batch: RolloutBatch) -> None:
        """Take the optimizer steps of a rollout, until `max_steps` is reached."""
        steps = self._hyper["steps_per_rollout"]
        for _ in range(self._hyper["epochs_per_rollout"]):
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
        """Take an optimizer step on groups of completions; none where no rank has any, in a short last batch."""
        optimizer, scheduler = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        pieces = self._pieces(groups)
        kept = ~rollout_batch.truncated if self._hyper["mask_truncated"] else torch.ones_like(rollout_batch.truncated)
        lengths = rollout_batch.lengths * kept
        chosen = [c for piece in pieces for c in piece]
        totals = summed_over_ranks(torch.stack([torch.tensor(len(chosen)), lengths[chosen].sum()]), self.device)
        if not totals[0]:
            return
        block = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)
        optimizer.zero_grad()
        whole = torch.zeros((), device=self.device)
        for number, piece in enumerate(pieces):
            weights = token_weights(
                self.loss_type,
                lengths[piece],
                total_sequences=totals[0],
                total_tokens=totals[1],
                max_new_tokens=self._hyper["max_new_tokens"],
            )
            with nullcontext() if number == len(pieces) - 1 else block():
                batch = self._policy_batch(rollout_batch, piece, kept, weights)
                result = self.loss(batch)
                loss = result.loss if isinstance(result, PolicyLoss) else result
                self.manual_backward(loss * self.trainer.world_size)  # strategies average over ranks; weights span them
            whole += loss.detach()
            self._count(piece, batch, result)
        self._window.add({"loss": whole}, {"loss": 1 / self.trainer.world_size})
        self.note_loss(self._batch_idx, whole)
        self._step_loss, self._left_out = whole, rollout_batch.nonfinite
        optimizer.step()
        if scheduler is not None:
            scheduler.step()

    def _policy_batch(
        self, rollout_batch: RolloutBatch, piece: Sequence[int], kept: Tensor, weights: Tensor
    ) -> PolicyBatch:
        scored, values = self.score_tokens(self.lay_out(*rollout_batch.rows(piece)))
        like = scored.logprobs
        lengths = rollout_batch.lengths[list(piece)].to(like.device)
        sequences = torch.arange(len(piece), device=like.device).repeat_interleave(lengths)  # [n]
        advantages = {c: rollout_batch.advantages[c].expand(len(rollout_batch.completions[c])) for c in piece}
        old = like.detach() if rollout_batch.old_logprobs is None else picked(rollout_batch.old_logprobs, piece, like)
        known = all(len(rollout_batch.sampling_logprobs[c]) for c in piece)  # not every engine says
        sampled = cast(Tensor, picked(rollout_batch.sampling_logprobs, piece if known else [], like))
        gap = cast(Tensor, old) - sampled if known else sampled
        self._window.add({"sampling_gap": gap.abs()})
        return PolicyBatch(
            logprobs=like,
            old_logprobs=cast(Tensor, old),
            ref_logprobs=picked(rollout_batch.ref_logprobs, piece, like),
            advantages=cast(Tensor, picked(advantages, piece, like)),
            sequences=sequences,
            mask=kept[list(piece)].to(like.device)[sequences],
            weights=weights.to(like),
            entropy=cast(Tensor, scored.entropy),
            values=values,
            old_values=picked(rollout_batch.values, piece, like),
            returns=picked(rollout_batch.returns, piece, like),
        )

    def score_tokens(self, tokens: TokenBatch) -> tuple[SelectedLogProbs, Tensor | None]:
        """Log-probabilities of a micro-batch under the policy, and where there is a critic its values, ``[n]`` each."""
        return self.score(tokens, entropy=True, temperature=self.sampling.temperature), None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradients, which are unscaled and summed over ranks by now."""
        gradients = [p for p in self.parameters() if p.grad is not None]
        limit = self._hyper["max_grad_norm"]
        norm = whole_norm(torch.nn.utils.clip_grad_norm_(gradients, float("inf") if limit is None else limit)).detach()
        self._window.add({"grad_norm": norm[None]})
        self.check_step(optimizer, norm, self._step_loss, left_out=self._left_out)

    def _count(self, piece: Sequence[int], batch: PolicyBatch, result: PolicyLoss | Tensor) -> None:
        """Add what a micro-batch showed to the figures of the training step."""
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
        self._window.add(sums, counts)
