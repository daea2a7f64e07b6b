"""What learning from preferences shares: the step, its weighting, its metrics, and log-probabilities of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ft._lightning import active_datamodule
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.layout import Example
from lightning_ft.data.preference_rows import Preferences
from lightning_ft.data.row_types import RowType
from lightning_ft.distributed import sum_over_ranks
from lightning_ft.losses.preference import SequenceLogProbs, implicit_rewards
from lightning_ft.modules.adapted import AdaptedFineTuning, per_completion
from lightning_ft.modules.ref_logprobs import ReferenceLogProbs
from lightning_ft.modules.step_metrics import MeanMetrics, with_mean_value

Completions = Sequence[tuple[Example, ...]]
"""The completions of each prompt."""


class BatchLosses(NamedTuple):
    """Losses of a batch.

    Args:
        losses: Loss of each example, ``[k]``, with gradient. An example is a pair, or a single labeled completion.
        metrics: Values whose means are logged, by name, ``[any]`` each; every batch has the same names.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor]


class PreferenceLearning(AdaptedFineTuning):
    """Trains on `PreferenceBatch`es; a subclass computes the losses.

    The loss of an optimizer step is the mean over the examples of the whole step: all its micro-batches on all ranks.
    Its arguments are those of `AdaptedFineTuning`.
    """

    row_type: ClassVar[type[RowType[Any]] | None] = Preferences
    purpose: ClassVar[str] = "trains on preferences"

    def setup(self, stage: str) -> None:
        """Refuse rows of another type, and pairs or labels that a subclass can't learn from, before weights are loaded.

        Raises:
            ConfigError: For them.
        """
        super().setup(stage)
        data = self._row_data()
        if stage != "predict" and data is not None and isinstance(data.row_type, Preferences):
            parts = [part for name in ("train", "validation", "test") for part in data.splits.rows.get(name, ())]
            for row in (part[0] for part in parts if len(part)):
                self.check_paired(len(row.labels) > 1)

    def check_paired(self, paired: bool) -> None:
        """Refuse pairs, or completions with a label, in a subclass that can't learn from them.

        Args:
            paired: Whether the rows are pairs.
        """

    def on_train_start(self) -> None:
        """As in `FineTuning`, and start counting."""
        super().on_train_start()
        self._step_metrics, self._examples = MeanMetrics(), 0

    def compute_loss(self, batch: PreferenceBatch) -> BatchLosses:
        """Losses of a batch, and metrics to log; a loss of one's own goes here.

        For an empty batch, with which a rank takes part in a step, they are empty and attached to the parameters.
        """
        raise NotImplementedError

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Mean loss of the examples, with the gradients of the sum.

        `on_before_optimizer_step` divides these by the number of examples of the whole step.
        """
        result = self._checked_loss(batch)
        self._step_metrics.add({"loss": result.losses, **result.metrics})
        self._examples += result.losses.numel()
        loss = result.losses.sum()
        self.note_loss(batch_idx, loss)
        return with_mean_value(loss, result.losses.numel())

    def _checked_loss(self, batch: object) -> BatchLosses:
        if not isinstance(batch, PreferenceBatch):
            raise self.wrong_data(type(batch).__name__)
        return self.compute_loss(batch)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the sum of the step's gradients into their mean over examples, before they are clipped."""
        examples = sum_over_ranks(torch.tensor(float(self._examples)), self.device)
        self._examples = 0
        gradients = self.average_gradients(examples.item())
        means = self._step_metrics.reduce(self.device)
        loss = means.pop("loss")
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log_dict({f"train/{name}": mean for name, mean in means.items()}, batch_size=1)
        self.log_optimizer(optimizer, gradients, loss)

    def add_evaluation(self, sums: MeanMetrics | None, batch: PreferenceBatch, batch_idx: int) -> MeanMetrics:
        """Add the losses and metrics of a batch."""
        result = self._checked_loss(batch)
        sums = sums if sums is not None else MeanMetrics()
        sums.add({"loss": result.losses, **result.metrics})
        return sums

    def evaluation_metrics(self, sums: MeanMetrics) -> dict[str, float]:
        """The mean of each metric over all examples of all batches and ranks."""
        return sums.reduce(self.device)


class LogRatioLearning(PreferenceLearning):
    """Losses of the completions' log-probabilities under the policy and, where needed, under a reference."""

    _ref: ReferenceLogProbs | None = None
    _cache_dir: str | None = None

    def configure_model(self) -> None:
        """As in `FineTuning`, and keep the reference while the weights are the original ones."""
        if self.model is None:
            super().configure_model()
            if self.needs_reference:
                self._ref = ReferenceLogProbs(self.new_reference(), folder=self._cache_dir)

    def completions_of(self, batch: PreferenceBatch) -> Completions:
        """The completions of each prompt whose log-probabilities the loss needs."""
        return batch.completions

    def sequence_logprobs(self, batch: PreferenceBatch) -> tuple[SequenceLogProbs, Tensor, Tensor]:
        """Summed log-probabilities of each of `completions_of` under policy and reference.

        Returns:
            The log-probabilities of the `c` completions; the entropy of each of their `n` tokens, nats, ``[n]``; and
            which completion each token belongs to, ``int64 [n]``.
        """
        completions = self.completions_of(batch)
        tokens = self.lay_out(batch.prompts, completions)
        scored = self.compute_logprobs(tokens, entropy=True)
        count = sum(map(len, completions))
        logprobs = per_completion(scored.logprobs, tokens, count)  # [c]
        assert scored.entropy is not None
        lengths = per_completion(torch.ones_like(scored.logprobs), tokens, count)
        reference = None
        if self._ref is not None:
            cached = self._ref.lookup(batch, *self._data_source()) if self._trainer is not None else None
            reference = (self._reference_logprobs(batch) if cached is None else cached).to(logprobs)
        return SequenceLogProbs(logprobs, reference, lengths), scored.entropy, tokens.groups

    def _data_source(self) -> tuple[object, str]:
        """The DataModule of the current batch, None for another loader, and the name of its split."""
        split = "train" if self.trainer.training else ("test" if self.trainer.testing else "validation")
        return active_datamodule(self.trainer), split

    @torch.no_grad()
    def _reference_logprobs(self, batch: PreferenceBatch) -> Tensor:
        """Summed log-probabilities of the completions under the reference, ``[c]``."""
        assert self._ref is not None
        completions = self.completions_of(batch)
        tokens = self.lay_out(batch.prompts, completions)
        with self._ref.reference.to(self.device).use() as model:
            scored = self._required_logprob_model()(model, tokens)
        return per_completion(scored.logprobs, tokens, sum(map(len, completions)))


def select(logprobs: SequenceLogProbs, completions: Tensor) -> SequenceLogProbs:
    """Log-probabilities of some of the completions.

    Args:
        logprobs: Log-probabilities of `c` completions.
        completions: Mask, ``bool [c]``, or indices, ``int64 [k]``.
    """
    ref = logprobs.ref_logprobs
    return SequenceLogProbs(
        logprobs.logprobs[completions], None if ref is None else ref[completions], logprobs.lengths[completions]
    )


def reward_metrics(logprobs: SequenceLogProbs, batch: PreferenceBatch, *, beta: float) -> dict[str, Tensor]:
    """Implicit rewards and log-probabilities of chosen and rejected completions, as metrics.

    Args:
        logprobs: Log-probabilities of the batch's own completions, ``[c]``.
        batch: The batch.
        beta: Strength of the KL constraint.
    """
    rewards = implicit_rewards(logprobs, beta=beta).detach()
    values = logprobs.logprobs.detach()
    pairs = rewards.view(-1, 2) if batch.paired else rewards.new_zeros(0, 2)
    margins = pairs[:, 0] - pairs[:, 1]  # also without pairs: a rank with an empty batch can't tell whether it has any
    return {
        "rewards/chosen": rewards[batch.labels],
        "rewards/rejected": rewards[~batch.labels],
        "logps/chosen": values[batch.labels],
        "logps/rejected": values[~batch.labels],
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }
