"""What a training run makes its model forget: the base before the first step, the tuned model after the last."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_ft.callbacks.base import is_trainer, precision_of, shows_progress
from lightning_ft.callbacks.measuring import MeasuringCallback
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, RetentionError
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.retention.measurement import RetentionMeasurement
from lightning_ft.models.unwrap import model_of, required_model, unwrapped, weights_fingerprint
from lightning_ft.report.collect import RETENTION
from lightning_ft.types import Request


class Retention(MeasuringCallback):
    """Measures how far training moves a model on general text: KL from the base, perplexity, and agreement with it.

    What to compare with is settled before the first step and kept in checkpoints, so that a resumed run compares with
    the original weights. Results go to the Trainer's loggers and `callback_metrics` as ``retention/...``, and as JSON
    into a folder. With a PairDataModule that has validation rows, the divergence on their answers is measured too.

    With Fabric, call ``fabric.call("on_train_start", fabric, model)`` before the loop and
    ``fabric.call("on_train_end", fabric, model)`` after it, with `tokenizer` given here. Without either, use
    `lightning_ft.evaluation.retention.measurement.RetentionMeasurement`.

    Args:
        texts: General texts, not the training data: a JSONL file whose rows have a ``text``, a ``.txt`` file with a
            blank line between texts, or a list.
        max_texts: Number of texts to read, from the first.
        max_tokens: Largest number of tokens per text; the rest of a text is left out.
        base: Weights to compare with: ``adapter_off`` (exact), ``step_0`` (the model as training starts from it, of
            which `top_k` tokens per position are kept: the divergences are lower bounds), or ``auto``: the first for a
            new adapter, the second for full fine-tuning, a continued adapter, or one that changed the base (PiSSA,
            OLoRA).
        top_k: Number of tokens to keep at each position.
        every_n_epochs: Number of epochs between measurements during training.
        every_n_steps: Number of optimizer steps between measurements during training.
        max_kl: Most nats a token on the general texts, of the figure itself and not its interval.
        max_ppl_ratio: Largest allowed ratio of perplexities.
        min_top1_agreement: Smallest share of places with the same most probable token.
        on_breach: Response to a limit that doesn't hold: ``warn``, or ``stop`` training too. With Fabric the loop
            is yours: look at `breached`.
        batch_size: Texts at a time.
        output_dir: Folder of the file; None for ``retention`` in the logger's folder (or `default_root_dir`; with
            Fabric none is written), False for none.
        tokenizer: By default the module's.
        name: Before the names of what is logged, and of the folder.
        progress: Show progress bars; by default as the Trainer does.
        task: Requests with their right answers, in place of the DataModule's validation rows.
        max_task_rows: Read the first so many of them; 0 for none.
        resamples: Draws of the bootstrap.
        seed: Seed of the random draws.

    Raises:
        RetentionError: For a measurement that would compare with the wrong weights, before training wherever it can be
            known.

    Example:
        >>> retention = Retention(["It was a bright cold day in April."], max_kl=0.1, on_breach="stop")
    """

    title = "Retention"
    files = (RETENTION,)

    def __init__(
        self,
        texts: str | list[str] | None = None,
        *,
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
                "Retention needs general texts to read, which the model should not forget: Retention(texts=...) with a "
                'JSONL file whose rows have a "text", a .txt file with a blank line between texts, or a list. About 64 '
                "texts of 256 tokens are enough."
            )
        for argument, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise RetentionError(f"{argument}={value}: expected at least 1.")
        if on_breach not in ("warn", "stop"):
            raise RetentionError(f"on_breach={on_breach!r}: expected 'warn' or 'stop'.")
        for argument, limit, most in (
            ("max_kl", max_kl, math.inf),
            ("max_ppl_ratio", max_ppl_ratio, math.inf),
            ("min_top1_agreement", min_top1_agreement, 1.0),
        ):
            if limit is not None and not 0 <= limit <= most:
                raise RetentionError(f"{argument}={limit}: expected a number from 0{' to 1' if most == 1 else ' on'}.")
        self.texts, self.tokenizer, self.task, self.max_task_rows = texts, tokenizer, task, max_task_rows
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.max_kl, self.max_ppl_ratio, self.min_top1_agreement = max_kl, max_ppl_ratio, min_top1_agreement
        self.on_breach, self.output_dir, self.progress, self.name = on_breach, output_dir, progress, name
        self._options: dict[str, Any] = {
            "max_texts": max_texts,
            "max_tokens": max_tokens,
            "base": base,
            "top_k": top_k,
            "batch_size": batch_size,
            "resamples": resamples,
            "seed": seed,
        }
        self.result: RetentionResult | None = None
        """The last result."""
        self.breached: tuple[str, ...] = ()
        """Which limits the last result broke, in words."""
        self._measurement: RetentionMeasurement | None = None
        self._loaded: dict[str, Any] | None = None
        self._measured: tuple[float, ...] = ()
        self._last_step = 0

    @property
    def state_key(self) -> str:
        """Names this callback's state in checkpoints, so that two with different names can stand side by side."""
        return f"Retention({self.name!r})"

    # ---------------------------------------------------------------- hooks, in the order in which they are called

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read texts and rows before weights are loaded.

        Raises:
            RetentionError: For everything that can be known without the model.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self._measurement is not None and trainer.global_step > 0:  # the same Trainer goes on
                self._loaded = self.state_dict()
            self._measurement = self._new_measurement(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the texts fit the model.

        Raises:
            RetentionError: If they don't, or it isn't a causal language model.
        """
        if self._measurement is not None and model_of(pl_module) is not None:
            self._measurement.check_model(required_model(pl_module, "Retention", RetentionError))

    def on_train_start(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Settle what to compare with, unless a checkpoint brought it.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            RetentionError: If training has already changed the weights, or the model isn't what it is compared with.
        """
        self.result, self._measured, self.breached = None, (), ()
        self._last_step = getattr(trainer, "global_step", 0)
        measurement = self._measurement if is_trainer(trainer) else None  # of another Fabric loop it would be stale
        self._measurement = measurement = measurement or self._new_measurement(trainer, pl_module)
        if self._loaded:
            measurement.load_state_dict(self._loaded)
            self._loaded = None
        if not measurement.has_before:
            with precision_of(trainer):
                trained = is_trainer(trainer) and trainer.global_step > 0
                measurement.before(required_model(pl_module, "Retention", RetentionError), trained=trained)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure where `every_n_steps` asks for it."""
        step, every = getattr(trainer, "global_step", None), self.every_n_steps
        if step is None:  # Fabric doesn't count steps
            return
        # a batch may take no step (accumulation) or several (policies)
        if every is not None and step // every > self._last_step // every:
            self._report(trainer, pl_module)
        self._last_step = step

    def on_train_epoch_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Measure where `every_n_epochs` asks for it."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._report(trainer, pl_module)

    def measure(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Measure the tuned model, unless these weights were measured last, and compare with the limits.

        Raises:
            RetentionError: If `on_train_start` didn't run, or the weights have become NaN.
        """
        earlier = self.result, self.breached
        self.result, self.breached = None, self._limits()
        if self._measurement is None:
            raise RetentionError("Nothing to compare with: on_train_start must run before the first step.")
        step = getattr(trainer, "global_step", None)
        model = required_model(pl_module, "Retention", RetentionError)
        weights = weights_fingerprint(model)
        if earlier[0] is not None and (earlier[0].step, weights) == (step, self._measured):
            self.result, self.breached = earlier
            return {}  # they were logged then
        with precision_of(trainer):
            self.result = self._measurement.after(model, step=step)
        self._measured, self.breached = weights, self._broken(self.result)
        return self.named(self.result.metrics())

    def show(self, folder: Path | None) -> None:
        """Say what was found and write the file."""
        assert self.result is not None
        if self.breached:
            rank_zero_warn(self._told(self.result))
        rank_zero_info(f"Retention. {self.result.headline}")
        if folder is not None:
            self.wrote(self.result.save(folder))

    @property
    def gate_failed(self) -> bool:
        """Whether a limit was broken at which the run was to stop."""
        return self.on_breach == "stop" and bool(self.breached)

    def state_dict(self) -> dict[str, Any]:
        """What is compared with, tensors among it."""
        if self._measurement is not None and self._measurement.has_before:
            return self._measurement.state_dict()
        return self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's until training starts."""
        self._loaded = state_dict or None

    # ---------------------------------------------------------------- what they do

    def _new_measurement(self, trainer: Any, module: Any) -> RetentionMeasurement:
        tokenizer = self.tokenizer if self.tokenizer is not None else getattr(unwrapped(module), "tokenizer", None)
        if tokenizer is None:
            raise RetentionError("Retention has no tokenizer: pass tokenizer=, or use it with a module that has one.")
        rows = self._task_rows(trainer)
        return RetentionMeasurement(
            tokenizer, self.texts, rows, progress=shows_progress(trainer, self.progress), **self._options
        )

    def _task_rows(self, trainer: Any) -> list[Request]:
        rows = self.task
        data: Any = getattr(trainer, "datamodule", None)
        if rows is None and self.max_task_rows and hasattr(data, "requests"):
            try:
                rows = data.requests("validation")
            except ConfigError:  # no validation rows: there is no divergence on the task then
                rows = None
        return (rows or [])[: self.max_task_rows]

    def _report(self, trainer: Any, module: Any) -> None:
        """Measure in the middle of training, log, and stop where a limit asks for it."""
        figures: dict[str, float] = {}
        step = getattr(trainer, "global_step", None)
        at = "" if step is None else f" at step {step:,}"
        if self.attempt(f"Retention{at} is undefined", lambda: figures.update(self.measure(trainer, module))):
            return
        self.attempt(f"Retention{at} was not logged", lambda: self.publish(trainer, figures, step))
        assert self.result is not None
        stop = is_trainer(trainer) and self.on_breach == "stop" and bool(self.breached)
        if is_trainer(trainer):  # all ranks or none, though they measure alike
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            trainer.should_stop = trainer.should_stop or stop
        if self.breached:
            rank_zero_warn(f"{self._told(self.result)}{' Training stops.' if stop else ''}")

    def _told(self, result: RetentionResult) -> str:
        at = "" if result.step is None else f" at step {result.step:,}"
        return f"Retention{at}: {'; '.join(self.breached)}."

    def _limits(self) -> tuple[str, ...]:
        """All limits, in words: what is undefined keeps none of them."""
        return tuple(
            f"{figure} is undefined, {'at most' if sign > 0 else 'at least'} {limit:g} was allowed"
            for figure, limit, sign in self._wanted()
        )

    def _broken(self, result: RetentionResult) -> tuple[str, ...]:
        values = {figure: getattr(result, figure).value for figure, _, _ in self._wanted()}
        return tuple(
            f"{figure} is {values[figure]:.4g}, {'at most' if sign > 0 else 'at least'} {limit:g} was allowed"
            for figure, limit, sign in self._wanted()
            if sign * values[figure] > sign * limit
        )

    def _wanted(self) -> list[tuple[str, float, int]]:
        limits = (
            ("kl_general", self.max_kl, 1),
            ("ppl_ratio", self.max_ppl_ratio, 1),
            ("top1_agreement", self.min_top1_agreement, -1),
        )
        return [(figure, limit, sign) for figure, limit, sign in limits if limit is not None]
