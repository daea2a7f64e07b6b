"""What learning from judged completions shares, whatever the loss: the step, its weighting, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.distributed import summed_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.modules.adapted import AdaptedFineTuning
from lightning_ft.modules.step_metrics import MeanMetrics


class Judged(NamedTuple):
    """What a module makes of a batch.

    Args:
        losses: One for each example, ``[k]``, with gradient. An example is a pair, or where completions were judged by
            themselves a completion.
        figures: What to log the means of, ``[any]`` each; the same names for every batch.
    """

    losses: Tensor
    figures: Mapping[str, Tensor]


class PreferenceLearning(AdaptedFineTuning):
    """Trains on `PreferenceBatch`es; a subclass says what the losses are.

    The loss of an optimizer step is the mean over the examples of the whole step: all its micro-batches on all ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window = MeanMetrics()
        self._examples = 0

    def judge(self, batch: PreferenceBatch) -> Judged:
        """Losses of a batch, and figures to log; an empty batch gives empty ones that hang on the parameters.

        A loss of your own goes here.
        """
        raise NotImplementedError

    def on_train_start(self) -> None:
        """As in `FineTuning`, and start counting."""
        super().on_train_start()
        self._window, self._examples = MeanMetrics(), 0

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """Sum of the losses; `on_before_optimizer_step` divides by the examples of the whole step."""
        judged = self._judge(batch)
        self._window.add({"loss": judged.losses, **judged.figures})
        self._examples += judged.losses.numel()
        loss = judged.losses.sum()
        self.note_loss(batch_idx, loss)
        return loss

    def _judge(self, batch: Any) -> Judged:
        if not isinstance(batch, PreferenceBatch):
            raise ConfigError(
                f"{type(self).__name__} trains on preferences, and got {type(batch).__name__}: give the Trainer a "
                "PreferenceDataModule."
            )
        return self.judge(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Turn the sum of the step's gradients into their mean over examples, before they are clipped."""
        examples = summed_over_ranks(torch.tensor(float(self._examples)), self.device)
        self._examples = 0
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(1.0, examples.item())
        gradients = self.scale_gradients(factor)
        means = self._window.reduce(self.device)
        loss = means.pop("loss")
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log_dict({f"train/{name}": mean for name, mean in means.items()}, batch_size=1)
        self.log_optimizer(optimizer, gradients, loss)

    def add_evaluation(self, sums: MeanMetrics | None, batch: PreferenceBatch, batch_idx: int) -> MeanMetrics:
        """Add up the figures of a batch."""
        judged = self._judge(batch)
        window = sums if sums is not None else MeanMetrics()
        window.add({"loss": judged.losses, **judged.figures})
        return window

    def evaluation_metrics(self, sums: MeanMetrics) -> dict[str, float]:
        """The mean of each figure over all examples of all batches and ranks."""
        return sums.reduce(self.device)
