"""Optimizer and schedule of a module, and the learning rate that others set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import CausalLM
from lightning_ft.models.optim import (
    ExtendableLambdaLR,
    make_optimizer,
    parameter_groups,
    set_first_rate,
    set_peak_rates,
)
from lightning_ft.modules.nonfinite import FiniteSteps

if TYPE_CHECKING:
    from lightning_ft._lightning import OptimizerLRScheduler


class OptimizedModule(FiniteSteps):
    """Base of `FineTuning`: AdamW with warm-up and a schedule, at the learning rate in `hparams`."""

    model: CausalLM
    _factor: Callable[[int], float]

    def on_train_start(self) -> None:
        """Check that the schedule knows its end, and set the rate of the first step."""
        super().on_train_start()
        schedulers: list[Any] = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for scheduler in schedulers:
            if self._factor not in getattr(scheduler, "lr_lambdas", ()):
                continue
            if self._total_steps() is None:
                self._refuse_unknown_end()
            set_first_rate(scheduler)

    def _refuse_unknown_end(self) -> None:
        """Refuse a schedule whose end isn't known, and warn of a warm-up that isn't made."""
        options = self.optimizer_options
        if options.lr_schedule != "constant":
            epochs = self.trainer.max_epochs
            if epochs is None or epochs < 0:
                remedy = "set max_steps or max_epochs in the Trainer (max_steps where the data has no length)"
            else:
                remedy = f"max_epochs={epochs} doesn't say it, since the rows of an epoch aren't counted. Set max_steps"
            raise ConfigError(
                f"lr_schedule={options.lr_schedule!r} needs the length of the training: {remedy}, or "
                "lr_schedule='constant'. Rows of a file or a dataset are counted with streaming=False."
            )
        if options.warmup_ratio:
            rank_zero_warn(
                f"warmup_ratio={options.warmup_ratio} is a share of all optimizer steps, whose number isn't known, so "
                "the learning rate starts at its peak. Set max_steps in the Trainer, or warmup_ratio=0."
            )

    def on_train_epoch_start(self) -> None:
        """Follow a learning rate that `LearningRateFinder` has set after the optimizer was built."""
        super().on_train_epoch_start()
        before = self.optimizer_options.learning_rate
        if not self._follow_learning_rate():
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler = cast(Any, config.scheduler)
            if self._factor in getattr(scheduler, "lr_lambdas", ()):
                rates = [group["lr"] for group in self._optimizer().param_groups]  # not all groups scale with it
                if len(rates) != len(scheduler.base_lrs):  # a callback has added groups of its own
                    rates = [rate * self.optimizer_options.learning_rate / before for rate in scheduler.base_lrs]
                set_peak_rates(scheduler, rates)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer of all trainable parameters, those of a subclass's own layers too, with warm-up and schedule.

        Norms and biases don't decay.

        Raises:
            ConfigError: For layers of a subclass with an optimizer that trains an adapter alone.
        """
        self._follow_learning_rate()
        optimizer = self._optimizer()
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        left_out = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in trained]
        if left_out:
            raise ConfigError(
                f"optimizer={self.optimizer_options.optimizer!r} trains the adapter alone, and would leave "
                f"{left_out[0]} as it is ({len(left_out)} such parameters): use optimizer='adamw', override "
                "configure_optimizers, or freeze them with requires_grad_(False)."
            )
        scheduler = ExtendableLambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _follow_learning_rate(self) -> bool:
        """Take the learning rate from `hparams`, where Lightning's Tuner sets it; True if it is another one."""
        rate = float(self.hparams["learning_rate"])
        changed = rate != self.optimizer_options.learning_rate
        self.optimizer_options = replace(self.optimizer_options, learning_rate=rate)
        return changed

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self, self.optimizer_options.weight_decay)
        options = self.optimizer_options
        return make_optimizer(options.optimizer, groups, options.learning_rate, options.betas)
