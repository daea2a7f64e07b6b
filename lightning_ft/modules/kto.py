"""Kahneman-Tversky optimization: learning from completions that are labeled good or bad one by one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.arguments import check_nonnegative
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.layout import Example
from lightning_ft.distributed import rank_zero_warn, sum_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.losses.kto import kto_kl, kto_loss
from lightning_ft.modules.options import AdaptedOptions, Unpack
from lightning_ft.modules.preferences import BatchLosses, Completions, LogRatioLearning, reward_metrics, select


class KTO(LogRatioLearning):
    """Learn from labels of single completions, without pairs (https://arxiv.org/abs/2402.01306).

    Rows are ``{prompt, completion, label}``; rows of pairs count as one desirable and one undesirable completion. The
    reference is chosen as in `DPO`. The KL divergence that the loss compares with is estimated from mismatched
    completions: each prompt is followed by the completions of the prompt before it in the batch.

    Args:
        model: Hub name, local folder, or a loaded model; usually one that was fine-tuned on pairs before.
        beta: Strength of the KL constraint.
        desirable_weight: Weight of the loss of desirable completions.
        undesirable_weight: Weight of the loss of undesirable completions.

    Raises:
        ConfigError: For settings that contradict each other.

    Example:
        >>> module = KTO("Qwen/Qwen3-0.6B", lora=True, undesirable_weight=0.5)  # no weights are loaded yet
        >>> module.hparams["beta"], module.hparams["undesirable_weight"]
        (0.1, 0.5)
    """

    default_learning_rate: ClassVar[float] = 1e-6
    default_dtype: ClassVar[str] = "float32"
    needs_reference = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Unpack[AdaptedOptions],
    ) -> None:
        super().__init__(model, **options)
        if not beta > 0:
            raise ConfigError(f"beta={beta}: expected a number above 0.")
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, weight in weights.items():
            check_nonnegative(name, weight, ConfigError)
        if not any(weights.values()):
            raise ConfigError(
                "desirable_weight=0 and undesirable_weight=0: nothing would be learned. Raise one of them."
            )
        self.beta = float(beta)
        self.desirable_weight, self.undesirable_weight = float(desirable_weight), float(undesirable_weight)
        self.record_arguments(
            {
                "beta": self.beta,
                "desirable_weight": self.desirable_weight,
                "undesirable_weight": self.undesirable_weight,
            }
        )

    def completions_of(self, batch: PreferenceBatch) -> Completions:
        """The batch's completions, each prompt's followed by the mismatched ones."""
        return with_mismatched(batch.completions)

    def compute_loss(self, batch: PreferenceBatch) -> BatchLosses:
        """Losses of single completions, from their log-probabilities under policy and reference."""
        every, entropy, groups = self.sequence_logprobs(batch)
        own, mismatched = own_and_mismatched(batch.completions)
        if len(batch) == 1:
            rank_zero_warn(
                "KTO estimates its KL divergence from completions of other prompts in the batch, and a batch of one "
                "has none: the estimate is 0, or that of the other ranks. Set batch_size to 2 or more in the "
                "DataModule, and to one that leaves no single row at the end of an epoch."
            )
        kl = kto_kl(_mean_over_ranks(every.logratios[mismatched].detach()))
        logprobs = select(every, own)
        losses = kto_loss(
            logprobs.logratios,
            batch.labels,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        metrics = {
            "entropy": entropy[torch.isin(groups, own.to(groups))],
            "kl": kl.expand(len(batch)),
            **reward_metrics(logprobs, batch, beta=self.beta),
        }
        return BatchLosses(losses.view(-1, 2).mean(1) if batch.paired else losses, metrics)


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of the values of all ranks, ``[1]``; 0 where there are none."""
    both = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
    total, count = sum_over_ranks(both, values.device).to(values.device)
    mean: Tensor = total / count.clamp(min=1.0)
    return mean[None]


def with_mismatched(completions: Completions) -> list[tuple[Example, ...]]:
    """Completions of each prompt, followed by those of the prompt before it; a single prompt has none before it.

    Example:
        >>> a, b = (Example(torch.tensor([t]), torch.tensor([True])) for t in (7, 8))
        >>> [[int(e.input_ids) for e in row] for row in with_mismatched([(a,), (b,)])]
        [[7, 8], [8, 7]]
    """
    return [(*own, *other) for own, other in zip(completions, _mismatched(completions), strict=True)]


def _mismatched(completions: Completions) -> Sequence[tuple[Example, ...]]:
    return [completions[i - 1] if len(completions) > 1 else () for i in range(len(completions))]


def own_and_mismatched(completions: Completions) -> tuple[Tensor, Tensor]:
    """Indices of a batch's own completions, and of the mismatched ones, in the order of :func:`with_mismatched`.

    Example:
        >>> a = Example(torch.tensor([7]), torch.tensor([True]))
        >>> own_and_mismatched([(a, a), (a, a)])
        (tensor([0, 1, 4, 5]), tensor([2, 3, 6, 7]))
    """
    both = zip(completions, _mismatched(completions), strict=True)
    marks = list(chain.from_iterable([True] * len(own) + [False] * len(other) for own, other in both))
    is_own = torch.tensor(marks, dtype=torch.bool)
    return is_own.nonzero().flatten(), (~is_own).nonzero().flatten()
