"""Direct preference optimization, and the losses that are used like it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.layout import Example
from lightning_ft.distributed import rank_zero_warn, summed_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.losses.kto import kto_kl, kto_loss
from lightning_ft.losses.preference import (
    PREFERENCE_LOSSES,
    SequenceLogProbs,
    check_preference_losses,
    implicit_rewards,
    weighted_preference_loss,
)
from lightning_ft.modules.adapted import per_completion
from lightning_ft.modules.preferences import Judged, PreferenceLearning
from lightning_ft.modules.ref_logprobs import ReferenceLogProbs

KTO = "kto"


class DPO(PreferenceLearning):
    """Learn from preferences without a reward model (https://arxiv.org/abs/2305.18290).

    The reference is the model as training finds it: the adapter switched off where it is new, a frozen copy of it where
    one is continued, a frozen copy of the weights for full fine-tuning.

    Args:
        model: Hub name, local folder, or a loaded model; mostly one that was fine-tuned on pairs before.
        loss: ``sigmoid`` (DPO), ``ipo``, ``hinge``, ``robust``, ``simpo``, ``orpo``, ``sft`` or ``kto``, or a dict of
            several with their weights, such as ``{"sigmoid": 0.8, "sft": 0.2}``. Rows that were judged one by one
            (``{prompt, completion, label}``) need ``kto``.
        beta: Strength of the KL constraint; for SimPO the scale of its reward, for ORPO the weight of its odds ratio.
        label_smoothing: Share of pairs whose label is taken to be wrong (``sigmoid``, ``robust``, ``simpo``).
        gamma: SimPO's margin.
        desirable_weight: Of KTO's desirable completions.
        undesirable_weight: Of KTO's undesirable completions.
        precompute_reference: Compute the reference's log-probabilities of all rows once before training and keep them
            on disk by content, so that no step runs the reference. It needs a PreferenceDataModule; not for ``kto``,
            which compares with completions of other rows.
        cache_dir: Where those are kept; by default beside tokenised rows, in the `datasets` library's cache.
        options: Of `AdaptedFineTuning` (`lora`, `learning_rate`, `dtype`, ...) and `FineTuning`.

    Raises:
        ConfigError: For settings that contradict each other.

    Example:
        >>> module = DPO("Qwen/Qwen3-0.6B", lora=True, beta=0.2)  # no weights are loaded yet
        >>> module.hparams["loss"], module.hparams["learning_rate"]
        ({'sigmoid': 1.0}, 1e-05)
    """

    default_learning_rate: ClassVar[float] = 1e-6
    default_dtype: ClassVar[str] = "float32"

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        loss: str | dict[str, float] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        precompute_reference: bool = False,
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if not isinstance(loss, (str, dict)):
            raise ConfigError(f"loss={loss!r}: expected a name, or a dict of names with their weights.")
        self.losses = {loss: 1.0} if isinstance(loss, str) else {name: float(weight) for name, weight in loss.items()}
        """Weight of each loss."""
        self.beta, self.label_smoothing, self.gamma = float(beta), float(label_smoothing), float(gamma)
        self._paired_losses = {name: weight for name, weight in self.losses.items() if name != KTO}
        if self._paired_losses or not self.losses:
            check_preference_losses(self._paired_losses, beta=beta, label_smoothing=label_smoothing)
        elif beta <= 0 or label_smoothing:
            raise ConfigError(
                f"beta={beta}, label_smoothing={label_smoothing}: kto needs the one above 0, the other 0."
            )
        self.needs_reference = any(name == KTO or PREFERENCE_LOSSES[name] for name in self.losses)
        """Whether any loss compares with the reference."""
        if precompute_reference and KTO in self.losses:
            raise ConfigError(
                "precompute_reference=True: kto compares with completions of other rows of a batch, which aren't known "
                "beforehand."
            )
        self._hyper |= {
            "loss": self.losses,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "gamma": self.gamma,
            "desirable_weight": float(desirable_weight),
            "undesirable_weight": float(undesirable_weight),
            "precompute_reference": precompute_reference,
            "cache_dir": cache_dir,
        }
        self._ref: ReferenceLogProbs | None = None
        self.save_hyperparameters(dict(self._hyper))

    def configure_model(self) -> None:
        """As in `FineTuning`, and keep the reference while the weights are the original ones."""
        if self.model is None:
            super().configure_model()
            if self.needs_reference:
                self._ref = ReferenceLogProbs(self.new_reference(), folder=self._hyper["cache_dir"])

    def on_fit_start(self) -> None:
        """As in `FineTuning`; compute the reference's log-probabilities where that is asked for."""
        super().on_fit_start()
        if self._ref is not None and self._hyper["precompute_reference"]:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self._ref.precompute(data, self._score_beforehand, self.device, precision=str(self.trainer.precision))

    # ---------------------------------------------------------------- the losses of a batch

    def judge(self, batch: PreferenceBatch) -> Judged:
        """Losses of pairs, or of single completions, by their log-probabilities under policy and reference."""
        if not batch.paired and set(self.losses) != {KTO}:
            raise ConfigError(
                f"loss={self.losses}: rows of {{prompt, completion, label}} have no pairs; they need loss='kto'."
            )
        mismatched = KTO in self.losses
        completions = with_mismatched(batch.completions) if mismatched else batch.completions
        tokens = self.lay_out(batch.prompts, completions)
        scored = self.score(tokens, entropy=True)
        every = sum(map(len, completions))
        logprobs = per_completion(scored.logprobs, tokens, every)  # [c], or [2 c] with the mismatched ones
        lengths = per_completion(torch.ones_like(scored.logprobs), tokens, every)
        reference = None
        if self._ref is not None:
            found = self._ref.lookup(batch, *self._source()) if self._trainer is not None else None
            reference = found if found is not None else self._reference_logprobs(batch)
            reference = reference.to(logprobs)
        own, other = own_and_mismatched(batch.completions) if mismatched else (None, None)
        parts = [part if own is None or part is None else part[own] for part in (logprobs, reference, lengths)]
        judged = SequenceLogProbs(parts[0], parts[1], parts[2])  # type: ignore[arg-type]
        entropy = scored.entropy if own is None else scored.entropy[torch.isin(tokens.groups, own.to(tokens.groups))]
        figures: dict[str, Tensor] = {"entropy": entropy}
        kl = None
        if mismatched and reference is not None:
            if len(batch) == 1:
                rank_zero_warn(
                    "KTO estimates its KL from completions of other prompts of a batch, and a batch of one has none: "
                    "it takes 0, or what other ranks found. Give the DataModule a batch_size of 2 or more."
                )
            kl = kto_kl(_over_ranks((logprobs - reference)[other].detach()))
            figures["kl"] = kl.expand(len(batch))
        return self._judge_completions(batch, judged, kl, figures)

    def _judge_completions(
        self, batch: PreferenceBatch, scores: SequenceLogProbs, kl: Tensor | None, figures: dict[str, Tensor]
    ) -> Judged:
        good, bad = (self._side(scores, which) for which in (batch.labels, ~batch.labels))
        rewards = implicit_rewards(scores, beta=self.beta).detach()
        figures |= {
            "rewards/chosen": rewards[batch.labels],
            "rewards/rejected": rewards[~batch.labels],
            "logps/chosen": good.logprobs.detach(),
            "logps/rejected": bad.logprobs.detach(),
        }
        losses = scores.logprobs.new_zeros(())
        if kl is not None:
            singly = kto_loss(
                scores.logratios,
                batch.labels,
                kl,
                beta=self.beta,
                desirable_weight=self._hyper["desirable_weight"],
                undesirable_weight=self._hyper["undesirable_weight"],
            )
            losses = losses + self.losses[KTO] * (singly.view(-1, 2).mean(1) if batch.paired else singly)
        pairs = rewards.view(-1, 2) if batch.paired else rewards.new_zeros(0, 2)
        margins = pairs[:, 0] - pairs[:, 1]  # also of no pairs: a rank with an empty batch can't tell which kind it is
        figures |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).float()}
        if self._paired_losses:
            losses = losses + weighted_preference_loss(
                self._paired_losses,
                good,
                bad,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                gamma=self.gamma,
            )
        return Judged(losses, figures)

    @staticmethod
    def _side(scores: SequenceLogProbs, which: Tensor) -> SequenceLogProbs:
        ref = scores.ref_logprobs
        return SequenceLogProbs(scores.logprobs[which], None if ref is None else ref[which], scores.lengths[which])

    # ---------------------------------------------------------------- the reference

    def _source(self) -> tuple[Any, str]:
        """The DataModule that batches come from now, and which of its splits."""
        split = "train" if self.trainer.training else ("test" if self.trainer.testing else "validation")
        return self.trainer.datamodule, split  # type: ignore[attr-defined]

    def _score_beforehand(self, batch: PreferenceBatch) -> Tensor:
        """In the Trainer's precision, as the policy is in a step; Lightning sets it around steps only."""
        with self.trainer.precision_plugin.forward_context():
            return self._reference_logprobs(batch)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PreferenceBatch) -> Tensor:
        """Summed log-probabilities of the completions under the reference."""
        assert self._ref is not None
        completions = with_mismatched(batch.completions) if KTO in self.losses else batch.completions
        tokens = self.lay_out(batch.prompts, completions)
        with self._ref.reference.to(self.device).use() as model:
            scored = self._required_logprob_model()(model, tokens)
        return per_completion(scored.logprobs, tokens, sum(map(len, completions)))


def _over_ranks(values: Tensor) -> Tensor:
    """The mean of all ranks' values, ``[1]``; 0 where there are none."""
    both = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
    total, count = summed_over_ranks(both, values.device).to(values.device)
    mean: Tensor = total / count.clamp(min=1.0)
    return mean[None]


Completions = Sequence[tuple[Example, ...]]


def with_mismatched(completions: Completions) -> list[tuple[Example, ...]]:
    """Each prompt's completions and behind them those of the prompt before it, which KTO estimates its KL from.

    A single prompt has none before it.

    Example:
        >>> a, b = (Example(torch.tensor([t]), torch.tensor([True])) for t in (7, 8))
        >>> [[int(e.input_ids) for e in row] for row in with_mismatched([(a,), (b,)])]
        [[7, 8], [8, 7]]
    """
    return [(*own, *other) for own, other in zip(completions, _mismatched(completions), strict=True)]


def _mismatched(completions: Completions) -> Completions:
    return [completions[i - 1] if len(completions) > 1 else () for i in range(len(completions))]


def own_and_mismatched(completions: Completions) -> tuple[Tensor, Tensor]:
    """Places of a batch's own completions, and of the mismatched ones, among those of :func:`with_mismatched`.

    Example:
        >>> a = Example(torch.tensor([7]), torch.tensor([True]))
        >>> own_and_mismatched([(a, a), (a, a)])
        (tensor([0, 1, 4, 5]), tensor([2, 3, 6, 7]))
    """
    both = zip(completions, _mismatched(completions), strict=True)
    marks = list(chain.from_iterable([True] * len(own) + [False] * len(other) for own, other in both))
    every = torch.tensor(marks, dtype=torch.bool)
    return every.nonzero().flatten(), (~every).nonzero().flatten()
