"""Quality of generated answers after each validation, in any LightningModule, for EarlyStopping and ModelCheckpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, Trainer, active_datamodule
from lightning_ft.arguments import check_integer
from lightning_ft.callbacks.base import (
    RecordsFailures,
    TrainerOrFabric,
    callbacks_of,
    is_trainer,
    precision_of,
    shows_progress,
    validation_requests,
)
from lightning_ft.callbacks.monitored import monitors
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError, SavingsError
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import MeasurementPlan, answer_plan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.scorers import Scorer
from lightning_ft.models.head import base_of
from lightning_ft.models.load import context_length
from lightning_ft.models.unwrap import check_causal, model_of, required_model, required_tokenizer, tokenizer_is_late
from lightning_ft.rollout.structured import StructuredOutputs
from lightning_ft.types import Request


class AnswerQuality(RecordsFailures):
    """Answers requests greedily after each validation, grades the answers, and logs the mean score as ``val/quality``.

    A loss per token says little about whether answers are right. The logged metric can be monitored by EarlyStopping
    and ModelCheckpoint, whatever the order of the callbacks. It works in any LightningModule with a transformers or
    PEFT model as its `model`, and needs no prompt to compare with; `TokenSavings` measures that at the end of a run. If
    the module has no validation, answers are measured after each training epoch.

    If the answers of an epoch can't be measured, for example since the scorer fails on one of them, the metric is
    missing in that epoch, `failures` says why, and training continues; but if EarlyStopping, ModelCheckpoint or a
    learning rate scheduler monitors the metric, training stops with an error, since they would decide without it.

    With Fabric, pass `tokenizer` and `requests`, call ``fabric.call("on_validation_epoch_end", fabric, model)``, and
    read `result`.

    Args:
        scorer: Name or function that grades an answer against its reference, see `TokenSavings`.
        every_n_epochs: Number of epochs between measurements. Where EarlyStopping or ModelCheckpoint monitors the
            metric, leave it out and set the Trainer's `check_val_every_n_epoch`.
        requests: Requests with reference answers; by default the validation rows of the Trainer's DataModule.
        max_requests: Largest number of requests, sampled with `seed` if there are more; None for all.
        max_new_tokens: Largest number of tokens per answer.
        structured_outputs: Format of the answers, see `TokenSavings`.
        batch_size: Number of answers generated at a time.
        tokenizer: Tokenizer of the model; by default the `tokenizer` of the module.
        name: Logged name.
        progress: Whether to show progress bars; by default if the Trainer does.
        seed: Seed of the sample of requests.

    Raises:
        SavingsError: Before training, for requests that can't be measured; during training, for a failed measurement
            whose metric is monitored.

    Example:
        >>> AnswerQuality("exact", every_n_epochs=2, max_requests=200).name
        'val/quality'
    """

    def __init__(
        self,
        scorer: str | Scorer = "normalized",
        *,
        every_n_epochs: int = 1,
        requests: list[Request] | None = None,
        max_requests: int | None = None,
        max_new_tokens: int = 128,
        structured_outputs: StructuredOutputs | bool = False,
        batch_size: int = 32,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "val/quality",
        progress: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for argument, value in (("every_n_epochs", every_n_epochs), ("batch_size", batch_size)):
            check_integer(argument, value, 1, SavingsError)
        self.every_n_epochs, self.requests, self.tokenizer = every_n_epochs, requests, tokenizer
        self.name, self.progress = name, progress
        self._batch_size = batch_size
        self._options: dict[str, Any] = {
            "scorer": scorer,
            "max_requests": max_requests,
            "max_new_tokens": max_new_tokens,
            "structured_outputs": structured_outputs,
            "seed": seed,
        }
        self.result: ArmRecords | None = None
        """Answers and scores of the last measurement; None before the first, and if it failed."""
        self._plan: MeasurementPlan | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the requests before weights are loaded, and come before callbacks that monitor the metric.

        Raises:
            SavingsError: For problems that can be found without the model.
            ConfigError: If another AnswerQuality logs the same name.
        """
        if any(isinstance(c, AnswerQuality) and c is not self and c.name == self.name for c in callbacks_of(trainer)):
            raise ConfigError(
                f"Two AnswerQuality callbacks log {self.name!r}, of which Lightning would log the mean. Pass a "
                "different name= to each."
            )
        if stage == "validate" and self.requests is None and active_datamodule(trainer) is None:
            self._plan = None
            rank_zero_warn(f"{self.name} isn't measured in a validation of loaders: pass requests= to AnswerQuality.")
        elif stage in ("fit", "validate"):
            late = stage == "fit" and tokenizer_is_late(self.tokenizer, pl_module)
            self._plan = None if late else self._new_plan(trainer, pl_module)
        if stage == "fit":
            self.failures = ()
            others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
            trainer.callbacks = [self, *others]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the requests fit the model, and that what monitors the metric doesn't look more often.

        Raises:
            SavingsError: For the first request that doesn't fit, and for a model that isn't a causal language model.
            ConfigError: If a callback monitors the metric, which isn't measured in every epoch.
        """
        if self.every_n_epochs > 1 and (monitoring := self._monitoring(trainer)):
            raise ConfigError(
                f"{monitoring} monitors {self.name} in every epoch, and AnswerQuality measures it every "
                f"{self.every_n_epochs} epochs: an old value would count again. Leave out every_n_epochs, and set "
                f"check_val_every_n_epoch={self.every_n_epochs} in the Trainer instead."
            )
        self._plan = self._plan or self._new_plan(trainer, pl_module)
        if (model := model_of(pl_module)) is not None:
            check_causal(model, "AnswerQuality", SavingsError)
            self._plan.check_context(context_length(base_of(model)))

    def on_train_start(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Check that the module has a model, which it may make after `on_fit_start`.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            SavingsError: If it has none.
        """
        if is_trainer(trainer):
            required_model(pl_module, "AnswerQuality", SavingsError)

    def on_validation_epoch_end(
        self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None
    ) -> None:
        """Measure after a validation of every `every_n_epochs`-th epoch.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            SavingsError: If the measurement failed and its metric is monitored, or outside of training.
        """
        if not is_trainer(trainer):
            self._plan = self._plan or self._new_plan(trainer, pl_module)
            self.attempt(f"{self.name} is undefined", lambda: self.measure(trainer, pl_module))
        elif not trainer.sanity_checking and self._is_due(trainer):
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Measure after a training epoch, if there is no validation; with Fabric, `on_validation_epoch_end` measures.

        Raises:
            SavingsError: If the measurement failed and its metric is monitored.
        """
        if is_trainer(trainer) and not sum(trainer.num_val_batches) and self._is_due(trainer):
            self._log(trainer, pl_module)

    def measure(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> float:
        """Answer the requests with the model as it is, on all ranks.

        Args:
            trainer: The Trainer, or Fabric; None without either.
            pl_module: The module or the model.

        Returns:
            Mean score of the answers.

        Raises:
            SavingsError: If the scorer fails on an answer.
        """
        self.result = None
        plan = self._plan = self._plan or self._new_plan(trainer, pl_module)
        model = required_model(pl_module, "AnswerQuality", SavingsError)
        check_causal(model, "AnswerQuality", SavingsError)
        with precision_of(trainer):
            self.result = run_arm(
                "tuned",
                model,
                self._tokenizer(pl_module),
                plan,
                timed_requests=0,
                batch_size=self._batch_size,
                progress=shows_progress(trainer, self.progress),
            )
        return self.result.quality

    # ---------------------------------------------------------------- helpers

    def _is_due(self, trainer: Any) -> bool:
        if trainer.state.fn != "fit":
            return self._plan is not None
        return bool((trainer.current_epoch + 1) % self.every_n_epochs == 0)

    def _log(self, trainer: Any, module: Any) -> None:
        """Measure and log. After a failure, training continues unless something would decide by the metric."""
        quality: list[float] = []
        what = f"{self.name} after epoch {trainer.current_epoch} is undefined"
        reason = self.attempt(what, lambda: quality.append(self.measure(trainer, module)))
        if reason is None:
            module.log(self.name, quality[0], prog_bar=True, rank_zero_only=False, batch_size=1)
            return
        trainer.callback_metrics.pop(self.name, None)  # that of an earlier epoch, which would count again
        if trainer.state.fn != "fit":  # no training is lost
            raise SavingsError(f"{self.name} is undefined: {reason}")
        if monitoring := self._monitoring(trainer):
            raise SavingsError(
                f"{what}, and {monitoring} monitors it, so training stops here. {reason.rstrip('.')}. Correct what "
                "failed (a scorer can return 0 for an answer that it can't read), and resume from the last checkpoint."
            )

    def _monitoring(self, trainer: Any) -> str:
        """Name of the first callback or learning rate scheduler that monitors the metric; empty if there is none."""
        return next((each.name for each in monitors(trainer, self.name) if each.metric == self.name), "")

    def _new_plan(self, trainer: TrainerOrFabric | None, module: nn.Module | None) -> MeasurementPlan:
        requests = validation_requests(self.requests, trainer, "AnswerQuality", SavingsError)
        return answer_plan(self._tokenizer(module), requests, **self._options)

    def _tokenizer(self, module: nn.Module | None) -> PreTrainedTokenizerBase:
        return required_tokenizer(self.tokenizer, module, "AnswerQuality", SavingsError)
