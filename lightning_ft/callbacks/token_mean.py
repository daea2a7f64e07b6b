"""Token-weighted gradient accumulation in any LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.distributed import sum_over_ranks
from lightning_ft.errors import ConfigError
from lightning_ft.modules.base import FineTuning
from lightning_ft.modules.step_metrics import mean_factor

TokenCount = Callable[[Any], int]
"""Function from a batch to its number of supervised tokens."""


def supervised_tokens(batch: object) -> int:
    """Number of supervised tokens of a batch: labels other than -100, the first of each row excluded.

    The first label of a row isn't a target, since models shift labels by one.

    Args:
        batch: A mapping with ``labels``, ``[b, s]``, or an object of this package with `num_targets`.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> supervised_tokens({"labels": torch.tensor([[-100, 5, 6], [7, 8, -100]])})
        3
    """
    if isinstance(count := getattr(batch, "num_targets", None), int):
        return count
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise ConfigError(
            f"TokenMeanAccumulation can't count the supervised tokens of a {type(batch).__name__} without labels: pass "
            "count=, a function from a batch to their number."
        )
    return int((labels[..., 1:] != -100).sum())


class TokenMeanAccumulation(Callback):
    """Makes the loss of an optimizer step the mean over its supervised tokens, in any LightningModule.

    With a plain mean over micro-batches, a token in a short row counts more than one in a long row, so that the
    gradient depends on how rows are split into micro-batches and over ranks. With this callback 8 micro-batches of one
    row give the gradient of one batch of 8. The module's `training_step` returns the mean loss over the supervised
    tokens of its batch, as transformers' models do, and optimization is automatic.

    Args:
        count: Function from a batch to its number of supervised tokens; by default that of `supervised_tokens`.

    Raises:
        ConfigError: For manual optimization, and for batches whose tokens can't be counted.

    Example:
        >>> callback = TokenMeanAccumulation(count=lambda batch: len(batch))
    """

    def __init__(self, count: TokenCount = supervised_tokens) -> None:
        super().__init__()
        self.count = count
        self._tokens = 0
        self._window = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse modules that take their own steps.

        Raises:
            ConfigError: For manual optimization, and for a module of this package, which weights its loss itself.
        """
        if isinstance(pl_module, FineTuning):
            raise ConfigError(
                f"{type(pl_module).__name__} weights its loss by token itself, so TokenMeanAccumulation would do it "
                "twice: leave the callback out."
            )
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"TokenMeanAccumulation needs automatic optimization, and {type(pl_module).__name__} takes its own "
                "optimizer steps: weight the losses there."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty accumulation window."""
        self._window = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the tokens of a micro-batch."""
        self._tokens = self.count(batch)
        self._window += self._tokens

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Turn the mean over the micro-batch's tokens into a sum."""
        loss.mul_(float(self._tokens))

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Divide the gradients by the tokens of the whole step, on all ranks."""
        total = float(sum_over_ranks(torch.tensor(float(self._window)), pl_module.device))
        self._window = 0
        factor = mean_factor(trainer, total)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
