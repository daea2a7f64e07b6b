"""Token-weighted gradient accumulation in any LightningModule."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.callbacks.base import is_trainer
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import base_of
from lightning_ft.models.unwrap import model_of
from lightning_ft.modules.base import FineTuning
from lightning_ft.modules.token_mean import TokenCount, TokenMean, check_defined, supervised_labels, supervised_tokens


class TokenMeanAccumulation(Callback):
    """Makes the loss of an optimizer step the mean over its supervised tokens, in any LightningModule.

    With a plain mean over micro-batches, a token in a short row counts more than one in a long row, so that the
    gradient depends on how rows are split into micro-batches and over ranks. With this callback 8 micro-batches of one
    row give the gradient of one batch of 8. The module's `training_step` returns the mean loss over the supervised
    tokens of its batch, as transformers' models do, and optimization is automatic.

    Args:
        count: Function from a batch to its number of supervised tokens. By default labels other than -100: with a
            causal language model, which shifts them, without the first of each row.

    Raises:
        ConfigError: For manual optimization, for batches whose tokens can't be counted, and with Fabric.

    Example:
        >>> callback = TokenMeanAccumulation(count=lambda batch: len(batch))
    """

    def __init__(self, count: TokenCount | None = None) -> None:
        super().__init__()
        self.count = count
        self._mean = TokenMean()
        self._tokens = 0

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
        """Start with an empty accumulation window.

        Raises:
            ConfigError: With Fabric, which doesn't call a callback before a backward pass or an optimizer step.
        """
        if not is_trainer(trainer):
            raise ConfigError(
                "TokenMeanAccumulation needs a Trainer: Fabric calls no callback before a backward pass, so losses "
                "would not be weighted. In a loop of your own, use lightning_ft.modules.token_mean.TokenMean."
            )
        self._mean = TokenMean(self.count or _count_for(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the tokens of a micro-batch."""
        self._tokens = self._mean.count(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Turn the mean over the micro-batch's tokens into a sum.

        Raises:
            ConfigError: If no token is supervised and the loss isn't a number.
        """
        check_defined(loss, self._tokens)
        self._mean.add(self._tokens)
        loss.mul_(float(self._tokens))

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Divide the gradients by the tokens of the whole step, on all ranks."""
        self._mean.divide(optimizer, trainer.accumulate_grad_batches)


def _count_for(module: LightningModule) -> TokenCount:
    """How the labels of a module's batches are counted: those that its model's loss is the mean over."""
    model = model_of(module)
    if model is None:
        return supervised_tokens
    base = base_of(model)
    # a model with code of its own may have no `generate`, and shift its labels
    causal = base.can_generate() or type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return supervised_tokens if causal and not base.config.is_encoder_decoder else supervised_labels
