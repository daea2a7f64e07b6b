"""Direct preference optimization, and the losses of pairs that are used like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft._lightning import active_datamodule
from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.errors import ConfigError
from lightning_ft.losses.preference import (
    PREFERENCE_LOSSES,
    WeightedLike,
    check_preference_losses,
    resolve_preference_losses,
    weighted_preference_loss,
)
from lightning_ft.modules.checkpoint_io import refuse_code_of_checkpoint
from lightning_ft.modules.options import AdaptedOptions, Unpack
from lightning_ft.modules.preferences import BatchLosses, LogRatioLearning, reward_metrics, select


class DPO(LogRatioLearning):
    """Learn from preferences without a reward model (https://arxiv.org/abs/2305.18290).

    The reference is the model before training: the adapter switched off where it is new, a frozen copy of it where one
    is continued, a frozen copy of the weights for full fine-tuning.

    Args:
        model: Hub name, local folder, or a loaded model; usually one that was fine-tuned on pairs before.
        loss: Loss of a pair: ``sigmoid`` (DPO), ``ipo``, ``hinge``, ``robust``, ``simpo``, ``orpo`` or ``sft``; a
            function of one's own or its import path, see `lightning_ft.losses.preference.PreferenceLoss`; or a dict of
            several with their weights, such as ``{"sigmoid": 0.8, "sft": 0.2}``.
        beta: Strength of the KL constraint; for SimPO the scale of its reward, for ORPO the weight of its odds ratio.
        label_smoothing: Share of pairs whose label is assumed to be wrong (``sigmoid``, ``robust``, ``simpo``).
        gamma: Margin of SimPO.
        precompute_reference: Compute the reference's log-probabilities of all rows once before training and keep them
            on disk by content, so that no step runs the reference. Needs a PreferenceDataModule. In a
            validation or test of loaders, each batch runs it.
        cache_dir: Folder of the precomputed log-probabilities; the default is next to tokenized rows, in the cache of
            the `datasets` library.

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
        loss: WeightedLike = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        precompute_reference: bool = False,
        cache_dir: str | None = None,
        **options: Unpack[AdaptedOptions],
    ) -> None:
        super().__init__(model, **options)
        if "kto" in ((loss,) if isinstance(loss, str) else loss if isinstance(loss, Mapping) else ()):
            raise ConfigError("KTO is a module of its own: use lightning_ft.KTO.")
        refuse_code_of_checkpoint("loss", _find_unregistered(loss), ", which is not a built-in loss")
        self.losses = resolve_preference_losses(loss)
        """Losses with their weights."""
        self.beta, self.label_smoothing, self.gamma = float(beta), float(label_smoothing), float(gamma)
        check_preference_losses(self.losses, beta=beta, label_smoothing=label_smoothing)
        self.needs_reference = any(one.needs_reference for one, _ in self.losses)
        """Whether any loss compares with the reference."""
        if precompute_reference and not self.needs_reference:
            names = ", ".join(one.name for one, _ in self.losses)
            raise ConfigError(
                f"precompute_reference=True has no meaning for {names}, which uses no reference. Leave it out."
            )
        self.precompute_reference, self._cache_dir = precompute_reference, cache_dir
        self.record_arguments(
            {
                "loss": {one.hparams_name: weight for one, weight in self.losses},
                "beta": self.beta,
                "label_smoothing": self.label_smoothing,
                "gamma": self.gamma,
                "precompute_reference": precompute_reference,
                "cache_dir": cache_dir,
            }
        )

    def on_fit_start(self) -> None:
        """As in `FineTuning`; precompute the reference's log-probabilities where that is configured."""
        super().on_fit_start()
        if self._ref is not None and self.precompute_reference:
            data = active_datamodule(self.trainer)
            self._ref.precompute(data, self._precomputed_logprobs, self.device, precision=str(self.trainer.precision))

    def check_paired(self, paired: bool) -> None:
        """Refuse completions with a label.

        Raises:
            ConfigError: If the rows aren't pairs.
        """
        if not paired:
            raise ConfigError(
                "DPO learns from pairs, and rows of {prompt, completion, label} have none: use lightning_ft.KTO."
            )

    def compute_loss(self, batch: PreferenceBatch) -> BatchLosses:
        """Losses of pairs, from their log-probabilities under policy and reference."""
        self.check_paired(batch.paired)
        logprobs, entropy, _ = self.sequence_logprobs(batch)
        losses = weighted_preference_loss(
            self.losses,
            select(logprobs, batch.labels),
            select(logprobs, ~batch.labels),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
        )
        return BatchLosses(losses, {"entropy": entropy, **reward_metrics(logprobs, batch, beta=self.beta)})

    def _precomputed_logprobs(self, batch: PreferenceBatch) -> Tensor:
        """The reference's log-probabilities in the Trainer's precision, which Lightning sets around steps only."""
        with self.trainer.precision_plugin.forward_context():
            return self._reference_logprobs(batch)


def _find_unregistered(loss: WeightedLike) -> str | None:
    """Find a name that isn't in the registry; a function comes from the code of a subclass, not from a checkpoint."""
    names = loss if isinstance(loss, Mapping) else (loss,)
    return next((name for name in names if isinstance(name, str) and name not in PREFERENCE_LOSSES), None)
