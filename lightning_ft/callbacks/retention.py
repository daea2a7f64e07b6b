"""Measures forgetting in a training run, between the base weights before the first step and the tuned ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, Trainer, active_datamodule
from lightning_ft.callbacks.base import TrainerOrFabric, is_trainer, precision_of, shows_progress
from lightning_ft.callbacks.measuring import ComparingCallback
from lightning_ft.callbacks.monitored import check_monitors
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, RetentionError
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.retention.card import retention_for_card
from lightning_ft.evaluation.retention.choices import ChoiceQuestion
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement
from lightning_ft.models.card_facts import MeasuredResult
from lightning_ft.models.card_sections import FORGETTING
from lightning_ft.models.unwrap import (
    model_of,
    required_model,
    required_tokenizer,
    tokenizer_is_late,
    weights_fingerprint,
)
from lightning_ft.report.collect import RETENTION
from lightning_ft.types import Request


class Retention(ComparingCallback):
    """Measures how far training moves a model on general text: KL from the base, perplexity, and top-1 agreement.

    The base to compare with is determined before the first step: with ``adapter_off`` the model without its adapter,
    with ``step_0`` the distributions of the model at that time. It is saved in checkpoints, so that a resumed run
    compares with the original weights. Metrics are logged, and added to `callback_metrics`, as ``retention/...``; the
    result is written to a folder as JSON. If a PairDataModule has validation rows, the divergence on their answers is
    measured too.

    With Fabric, pass `tokenizer`, and call ``fabric.call("on_train_start", fabric, model)`` before the loop and
    ``fabric.call("on_train_end", fabric, model)`` after it. Without Trainer or Fabric, use
    `lightning_ft.evaluation.retention.measurement.RetentionMeasurement`.

    Args:
        texts: General texts, not the training data: path of a JSONL file whose rows have a ``text``, path of a ``.txt``
            file with a blank line between texts, or a list of texts.
        choices: Multiple-choice questions, answered by likelihood before and after training: path of a JSONL file whose
            rows have ``input``, ``choices``, ``answer`` (the index of the correct one) and optionally ``set``, or a
            list of `ChoiceQuestion`.
        max_texts: Largest number of texts to use, from the first.
        max_tokens: Largest number of tokens per text; longer texts are truncated.
        base: Weights to compare with: ``adapter_off`` (exact), ``step_0`` (the model at the start of training, of whose
            distributions the `top_k` most probable tokens per position are kept, so that divergences are lower bounds),
            or ``auto``: the former for a new adapter; the latter for full fine-tuning, a continued adapter, or one that
            changed the base (PiSSA, OLoRA) or is trained with weights of it (LoRA's ``bias="all"``).
        top_k: Number of tokens per position whose base probabilities are kept.
        every_n_epochs: Number of epochs between measurements during training; None for no such measurements.
        every_n_steps: Number of optimizer steps between measurements during training; None for no such measurements.
        max_kl: Largest allowed KL divergence on the general texts, in nats per token; the point estimate is compared.
        max_ppl_ratio: Largest allowed ratio of the tuned model's perplexity to the base's.
        min_top1_agreement: Smallest allowed share of positions with the same most probable token.
        on_breach: Response to an exceeded limit: ``warn``, or ``stop`` training after a warning. With Fabric, stop your
            loop if `breached` isn't empty.
        batch_size: Number of texts per forward pass.
        output_dir: Folder of the file. None for ``retention`` in the logger's folder or in `default_root_dir` (with
            Fabric, no file is written), False for no file.
        tokenizer: Tokenizer of the model; the module's by default.
        name: Prefix of the logged names, and name of the folder.
        progress: Whether to show progress bars; by default if the Trainer does.
        task: Requests with reference answers that replace the DataModule's validation rows.
        max_task_rows: Largest number of validation rows (or requests in `task`) to use, from the first; 0 for none.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        RetentionError: For a measurement that would compare with the wrong weights; raised before training if possible.

    Example:
        >>> retention = Retention(["It was a bright cold day in April."], max_kl=0.1, on_breach="stop")
    """

    title = "Retention"
    files = (RETENTION,)
    metrics = ("kl_", "ppl_ratio", "top1_agreement", "choices")

    def __init__(
        self,
        texts: str | list[str] | None = None,
        *,
        choices: str | list[ChoiceQuestion] | None = None,
        max_texts: int = 64,
        max_tokens: int = 256,
        base: Literal["auto", "adapter_off", "step_0"] = "auto",
        top_k: int = 64,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        max_kl: float | None = None,
        max_ppl_ratio: float | None = None,
        min_top1_agreement: float | None = None,
        on_breach: Literal["warn", "stop"] = "warn",
        batch_size: int = 8,
        output_dir: str | Path | bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "retention",
        progress: bool | None = None,
        task: list[Request] | None = None,
        max_task_rows: int = 64,
        resamples: int = 9999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if texts is None:
            raise RetentionError(
                "Retention needs general texts on which to measure forgetting. Pass texts=: a JSONL file whose rows "
                'have a "text", a .txt file with a blank line between texts, or a list. About 64 texts of 256 tokens '
                "are enough."
            )
        for argument, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise RetentionError(f"{argument}={value}: expected at least 1.")
        if on_breach not in ("warn", "stop"):
            raise RetentionError(f"on_breach={on_breach!r}: expected 'warn' or 'stop'.")
        for argument, limit, maximum in (
            ("max_kl", max_kl, math.inf),
            ("max_ppl_ratio", max_ppl_ratio, math.inf),
            ("min_top1_agreement", min_top1_agreement, 1.0),
        ):
            if limit is not None and not 0 <= limit <= maximum:
                raise RetentionError(
                    f"{argument}={limit}: expected a number {'from 0 to 1' if maximum == 1 else 'of at least 0'}."
                )
        self.texts, self.tokenizer, self.task, self.max_task_rows = texts, tokenizer, task, max_task_rows
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.max_kl, self.max_ppl_ratio, self.min_top1_agreement = max_kl, max_ppl_ratio, min_top1_agreement
        self.on_breach, self.output_dir, self.progress, self.name = on_breach, output_dir, progress, name
        self._options: dict[str, Any] = {
            "choices": choices,
            "max_texts": max_texts,
            "max_tokens": max_tokens,
            "base": base,
            "top_k": top_k,
            "batch_size": batch_size,
            "resamples": resamples,
            "seed": seed,
        }
        self.result: RetentionResult | None = None
        """The last result; None before the first measurement."""
        self.breached: tuple[str, ...] = ()
        """Descriptions of the limits that the last result exceeds."""
        self._measurement: RetentionMeasurement | None = None
        self._measured: tuple[float, ...] = ()
        self._last_step = 0
        self._stopped: list[tuple[str, float, int]] | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints; it differs between callbacks with different names."""
        return f"Retention({self.name!r})"

    # ---------------------------------------------------------------- hooks, in call order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read texts and rows before weights are loaded.

        Raises:
            RetentionError: For problems that can be found without the model.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._stopped = None
            self.keep_state(trainer)
            late = tokenizer_is_late(self.tokenizer, pl_module)
            self._measurement = None if late else self._new_measurement(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the texts fit the model; take no more steps in a run that the same limits had stopped.

        Raises:
            RetentionError: If a text doesn't fit the model, or it isn't a causal language model.
        """
        if self.on_breach == "stop" and self._stopped == self._limits():
            trainer.should_stop = True
            rank_zero_info(
                "The checkpoint is of a run that Retention has stopped, so no more steps are taken. To train on, raise "
                "the limit, or pass on_breach='warn'."
            )
        measurement = self._measurement = self._measurement or self._new_measurement(trainer, pl_module)
        if (model := model_of(pl_module)) is not None:
            measurement.check_model(model)

    def on_train_start(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Determine the base to compare with, unless it was loaded from a checkpoint.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            RetentionError: If training has already changed the weights, the loaded base is that of another model, or
                optimizer steps would have to be counted with Fabric.
            ConfigError: If something monitors a metric in epochs in which it isn't measured.
        """
        self.result, self._measured, self.breached, self._epochs = None, (), (), 0
        if not is_trainer(trainer) and self.every_n_steps is not None:
            raise RetentionError(
                f"every_n_steps={self.every_n_steps} needs a Trainer, which counts optimizer steps. In a loop of your "
                "own, leave it out and call measure(fabric, model) after the steps at which to measure."
            )
        if is_trainer(trainer) and self.every_n_steps is None:
            check_monitors(trainer, self.metric_names(), "Retention", self.every_n_epochs)
        self._last_step = getattr(trainer, "global_step", 0)
        measurement = (
            self._measurement if is_trainer(trainer) else None
        )  # that of an earlier Fabric loop would be stale
        self._measurement = measurement = measurement or self._new_measurement(trainer, pl_module)
        if self._loaded:
            measurement.load_state_dict(self._loaded)
            self._loaded = None
        if not measurement.has_before:
            with precision_of(trainer):
                trained = is_trainer(trainer) and trainer.global_step > 0
                measurement.before(required_model(pl_module, "Retention", RetentionError), trained=trained)

    def on_train_batch_end(
        self, trainer: TrainerOrFabric, pl_module: nn.Module, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure every `every_n_steps` optimizer steps."""
        step, every = getattr(trainer, "global_step", None), self.every_n_steps
        if step is None:  # Fabric doesn't count steps
            return
        # a batch may take no optimizer step (accumulation) or several (GRPO, PPO)
        if every is not None and step // every > self._last_step // every:
            self._report(trainer, pl_module, f"at step {step:,}")
        self._last_step = step

    def on_train_epoch_end(self, trainer: Any = None, pl_module: nn.Module | None = None) -> None:
        """Measure every `every_n_epochs` epochs; with Fabric, calls of this hook are counted."""
        epochs = self.epoch_ended(trainer)
        if self.every_n_epochs is not None and epochs % self.every_n_epochs == 0:
            self._report(trainer, pl_module, f"after epoch {epochs - 1}")

    def measure(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> dict[str, float]:
        """Measure the tuned model, unless these weights were the last measured, and compare with the limits.

        Raises:
            RetentionError: If `on_train_start` didn't run, or the weights contain NaN.
        """
        earlier = self.result, self.breached
        self.result, self.breached = None, self._breaches_if_undefined()
        if self._measurement is None:
            raise RetentionError(
                "Retention has no base to compare with. Call its on_train_start before the first step."
            )
        step = getattr(trainer, "global_step", None)
        model = required_model(pl_module, "Retention", RetentionError)
        weights = weights_fingerprint(model)
        if earlier[0] is not None and (earlier[0].step, weights) == (step, self._measured):
            self.result, self.breached = earlier
            return {}  # the metrics were logged then
        with precision_of(trainer):
            self.result = self._measurement.after(model, step=step)
        self._measured, self.breached = weights, self._breaches(self.result)
        return self.with_prefix(self.result.metrics())

    def show(self, folder: Path | None) -> None:
        """Log the headline, warn about exceeded limits, and write the file."""
        assert self.result is not None
        if self.breached:
            rank_zero_warn(self._breach_message(self.result))
        rank_zero_info(f"Retention. {self.result.headline}")
        if folder is not None:
            self.report_written(self.result.save(folder))

    def for_card(self) -> MeasuredResult | None:
        """The last result, or its failure, as a model card reports it; None if nothing was measured."""
        if self.undefined is not None:
            return MeasuredResult(FORGETTING, failed=True)
        return None if self.result is None else retention_for_card(self.result)

    @property
    def gate_failed(self) -> bool:
        """Whether a limit is exceeded and `on_breach` is ``stop``."""
        return self.on_breach == "stop" and bool(self.breached)

    def state_dict(self) -> dict[str, Any]:
        """As in the base class, and the limits at which training was stopped, if it was."""
        return {**super().state_dict(), **({} if self._stopped is None else {"stopped": self._stopped})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the base class, and the limits at which training was stopped."""
        state = dict(state_dict)
        self._stopped = state.pop("stopped", None)
        super().load_state_dict(state)

    # ---------------------------------------------------------------- helpers

    def _new_measurement(self, trainer: TrainerOrFabric | None, module: nn.Module | None) -> RetentionMeasurement:
        tokenizer = required_tokenizer(self.tokenizer, module, "Retention", RetentionError)
        rows = self._task_rows(trainer)
        return RetentionMeasurement(
            tokenizer, self.texts, rows, progress=shows_progress(trainer, self.progress), **self._options
        )

    def _task_rows(self, trainer: TrainerOrFabric | None) -> list[Request]:
        rows = self.task
        data: object = active_datamodule(trainer)
        if rows is None and self.max_task_rows and hasattr(data, "requests"):
            try:
                rows = data.requests("validation")
            except ConfigError:  # no validation rows, so the divergence on the task isn't measured
                rows = None
        return (rows or [])[: self.max_task_rows]

    def _report(self, trainer: TrainerOrFabric | None, module: nn.Module | None, when: str) -> None:
        """Measure during training, log, and stop if a limit is exceeded and `on_breach` is ``stop``."""
        if not self.measure_during_training(trainer, module, when):
            return
        assert self.result is not None
        stop = is_trainer(trainer) and self.on_breach == "stop" and bool(self.breached)
        if is_trainer(trainer):  # ranks must agree, even though they measure the same
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            trainer.should_stop = trainer.should_stop or stop
            self._stopped = self._limits() if stop else None
        if self.breached:
            rank_zero_warn(f"{self._breach_message(self.result)}{' Training stops.' if stop else ''}")

    def _breach_message(self, result: RetentionResult) -> str:
        at = "" if result.step is None else f" at step {result.step:,}"
        return f"Retention{at}: {'; '.join(self.breached)}."

    def _breaches_if_undefined(self) -> tuple[str, ...]:
        """Describe every limit as exceeded, since an undefined result satisfies none."""
        return tuple(
            f"{metric} is undefined, {'at most' if sign > 0 else 'at least'} {limit:g} was allowed"
            for metric, limit, sign in self._limits()
        )

    def _breaches(self, result: RetentionResult) -> tuple[str, ...]:
        """Describe the limits that a result exceeds."""
        values = {metric: getattr(result, metric).value for metric, _, _ in self._limits()}
        return tuple(
            f"{metric} is {values[metric]:.4g}, {'at most' if sign > 0 else 'at least'} {limit:g} was allowed"
            for metric, limit, sign in self._limits()
            if sign * values[metric] > sign * limit
        )

    def _limits(self) -> list[tuple[str, float, int]]:
        """Return each configured limit as metric, limit, and 1 for a maximum or -1 for a minimum."""
        limits = (
            ("kl_general", self.max_kl, 1),
            ("ppl_ratio", self.max_ppl_ratio, 1),
            ("top1_agreement", self.min_top1_agreement, -1),
        )
        return [(metric, limit, sign) for metric, limit, sign in limits if limit is not None]
