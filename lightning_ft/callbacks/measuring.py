"""Base class of the callbacks that measure: logs and writes their results, and the report at the end of a fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.atomic_files import write_json
from lightning_ft.callbacks.base import (
    EndOfTraining,
    TrainerOrFabric,
    callbacks_of,
    check_results_folder,
    is_dev_run,
    is_trainer,
    log_to_loggers,
    results_folder,
)
from lightning_ft.callbacks.monitored import monitors
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError
from lightning_ft.models.card_facts import MeasuredResult
from lightning_ft.report.collect import UNDEFINED, collect
from lightning_ft.report.write import FOLDER, write_files
from lightning_ft.run_checkpoints import run_folder


class MeasuringCallback(EndOfTraining):
    """Base class of the callbacks that measure something.

    If a measurement fails after training has started, its result is undefined, for a reason that is logged and
    written; the run continues.
    """

    title: ClassVar[str]
    """Name of the measurement in messages."""
    files: ClassVar[tuple[str, ...]]
    """Names of the files that the result is written to."""
    reports = True
    """Whether the results are part of the report that is written when training ends."""
    name: str
    """Prefix of the logged names, and name of the folder."""
    output_dir: str | Path | bool | None
    result: object
    undefined: str | None = None
    """Reason why there is no result, after training; None if there is one."""
    unwritten: str | None = None
    """Reason why the result could not be written, so that files in the folder may be of an earlier run."""
    _logged: tuple[str, ...] = ()
    """Names of the metrics of the last measurement."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that results can be written to the folder.

        Raises:
            ConfigError: If the path or one of its parents is a file, or isn't writable, or if another callback writes
                the same files there.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.undefined = self.unwritten = None
            folder = results_folder(trainer, self.output_dir, self.name)
            check_results_folder(folder, type(self).__name__)
            if folder is not None:
                self._refuse_shared_files(trainer, folder)

    def _refuse_shared_files(self, trainer: Trainer, folder: Path) -> None:
        """Refuse another callback whose results would replace this one's; with the default folder, names differ."""
        for other in callbacks_of(trainer):
            if other is self or not isinstance(other, MeasuringCallback) or not {*self.files} & {*other.files}:
                continue
            if isinstance(other.output_dir, (str, Path)) and Path(other.output_dir).resolve() == folder.resolve():
                raise ConfigError(
                    f"Two {type(self).__name__} callbacks, {self.name!r} and {other.name!r}, write the same files into "
                    f"{str(folder)!r}, of which the last ones would stay. Pass a different output_dir= to each."
                )

    def measure(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> dict[str, float]:
        """Measure the current weights and set `result`, on all ranks.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Returns:
            Metrics to log, by their logged names.
        """
        raise NotImplementedError

    def show(self, folder: Path | None) -> None:
        """Print the result and write it, on rank 0 only.

        Args:
            folder: Folder to write to; None to write no files.
        """
        raise NotImplementedError

    def for_card(self) -> MeasuredResult | None:
        """The result as a model card reports it; None if there is none, or cards don't report it."""
        return None

    def undefined_metrics(self) -> dict[str, float]:
        """Metrics to log if the result is undefined."""
        return {}

    @property
    def gate_failed(self) -> bool:
        """Whether the result exceeds a limit that makes the command line exit with a nonzero status."""
        return False

    def finish(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> None:
        """Measure the final weights, and log, print and write the result or the reason why there is none."""
        self._conclude(trainer, pl_module, lambda: self.measure(trainer, pl_module))

    def finish_restored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `finish`, after `on_train_start`, which takes the state of the checkpoint; its failure is a reason too."""

        def measure() -> dict[str, float]:
            self.on_train_start(trainer, pl_module)
            return self.measure(trainer, pl_module)

        self._conclude(trainer, pl_module, measure)

    def _conclude(
        self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None, measure: Callable[[], dict[str, float]]
    ) -> None:
        folder = results_folder(trainer, self.output_dir, self.name)  # a collective call, so before a rank may fail
        folder = None if is_dev_run(trainer) else folder
        metrics: dict[str, float] = {}
        self.undefined = self.attempt(f"{self.title} is undefined", lambda: metrics.update(measure()))
        if self.undefined is not None:
            self.result, metrics = None, self.with_prefix(self.undefined_metrics())
            self.forget_metrics(trainer)
        self.attempt(
            f"{self.title} was not logged",
            lambda: self.log_metrics(trainer, metrics, getattr(trainer, "global_step", None)),
        )
        show: Callable[[Path | None], None] = self.show if self.undefined is None else self._write_undefined
        is_global_zero = getattr(trainer, "is_global_zero", True)
        where = "" if folder is None else f" to {folder}"
        self.unwritten = self.attempt(
            f"{self.title} was not written{where}", lambda: show(folder) if is_global_zero else None
        )

    def finish_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report if this is the last callback that measures."""
        self.attempt("The report was not written", lambda: report_at_end(trainer, self))

    def with_prefix(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics with their logged names, ``name/key``."""
        return {f"{self.name}/{key}": value for key, value in metrics.items()}

    def log_metrics(self, trainer: TrainerOrFabric | None, metrics: Mapping[str, float], step: int | None) -> None:
        """Add metrics to `callback_metrics`, where they can be monitored, and log them.

        They replace those of an earlier measurement. `log_dict` isn't used, since it skips steps between those of
        `log_every_n_steps`.

        Args:
            trainer: The Trainer, or Fabric.
            metrics: Metrics by their logged names.
            step: Number of optimizer steps so far.
        """
        if not metrics:  # of weights that were measured before
            return
        self.forget_metrics(trainer)
        self._logged = tuple(metrics)
        if is_trainer(trainer):
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
        log_to_loggers(trainer, metrics, step)

    def forget_metrics(self, trainer: TrainerOrFabric | None) -> None:
        """Remove the metrics of an earlier measurement, which would count as those of the present weights.

        Args:
            trainer: The Trainer, or Fabric.
        """
        if is_trainer(trainer):
            for key in self._logged:
                trainer.callback_metrics.pop(key, None)
        self._logged = ()

    def report_written(self, *files: Path) -> None:
        """Log the paths of the written files, and remove what says that the result is undefined."""
        self._write_reason(files[0].parent, None)
        rank_zero_info(f"{self.title} written: {', '.join(map(str, files))}")

    def _write_undefined(self, folder: Path | None) -> None:
        """Write the reason why there is no result, and remove results of an earlier run."""
        if folder is None:
            return
        for name in self.files:
            (folder / name).unlink(missing_ok=True)
        self._write_reason(folder, self.undefined)

    def _write_reason(self, folder: Path, reason: str | None) -> None:
        """Write why this measurement has no result, or that it has one, next to those of others in the same folder."""
        file = folder / UNDEFINED
        reasons: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        reasons.pop(self.title, None)
        if reason is not None:
            reasons[self.title] = reason
        if reasons:
            write_json(file, reasons)
        else:
            file.unlink(missing_ok=True)


class ComparingCallback(MeasuringCallback):
    """Base class of the callbacks that compare the final weights with what was measured before the first step.

    That is part of checkpoints, so that a resumed run, whose weights are no longer the original ones, has it too.
    """

    metrics: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of the metrics that are also logged during training."""
    _measurement: Any = None
    """Has `has_before`, `state_dict` and `load_state_dict`; None before it is prepared."""
    _loaded: dict[str, Any] | None = None
    """State of a checkpoint, until the start of training."""
    _epochs = 0
    """Number of epochs of a loop with Fabric that have ended, which Fabric doesn't count."""

    def metric_names(self) -> tuple[str, ...]:
        """Beginnings of the logged names of the metrics that can be monitored."""
        return tuple(f"{self.name}/{metric}" for metric in self.metrics)

    def epoch_ended(self, trainer: TrainerOrFabric | None) -> int:
        """Number of epochs that have ended; call it once per epoch, when it ends.

        Args:
            trainer: The Trainer, or Fabric.
        """
        self._epochs = trainer.current_epoch + 1 if is_trainer(trainer) else self._epochs + 1
        return self._epochs

    def measure_during_training(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None, when: str) -> bool:
        """Measure and log. After a failure, training continues unless something would decide by a metric.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.
            when: Time of the measurement, for messages.

        Returns:
            Whether it succeeded.

        Raises:
            ConfigError: If the measurement failed and one of its metrics is monitored.
        """
        metrics: dict[str, float] = {}
        what = f"{self.title} {when}"
        reason = self.attempt(f"{what} is undefined", lambda: metrics.update(self.measure(trainer, pl_module)))
        if reason is None:
            step = getattr(trainer, "global_step", None)
            self.attempt(f"{what} was not logged", lambda: self.log_metrics(trainer, metrics, step))
            return True
        self.forget_metrics(trainer)
        monitor = next(monitors(trainer, self.metric_names()), None) if is_trainer(trainer) else None
        if monitor is not None:
            raise ConfigError(
                f"{what} is undefined, and {monitor.name} monitors {monitor.metric}, so training stops here. "
                f"{reason.rstrip('.')}. Correct what failed, and resume from the last checkpoint."
            )
        return False

    def keep_state(self, trainer: Any) -> None:
        """Keep what was measured before the first step, if the same Trainer continues; call it in `setup`."""
        if self._measurement is not None and trainer.global_step > 0:
            self._loaded = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured before the first step, which may include tensors."""
        if self._measurement is not None and self._measurement.has_before:
            state: dict[str, Any] = self._measurement.state_dict()
            return state
        return self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint for the start of training."""
        self._loaded = state_dict or None


def report_at_end(trainer: Trainer, callback: Callback) -> list[Path]:
    """Write the report of a fit, once, when it is called for the last of the callbacks that measure.

    Call it in ``on_fit_end``, on all ranks, when all results of the end of training have been written. The report
    contains what the callbacks wrote into the Trainer's folder, and ignores other files there.

    Args:
        trainer: The Trainer.
        callback: Callback that calls this function. Like every callback that measures, it has the attributes
            ``reports`` (True), ``name`` (its folder within the Trainer's) and ``output_dir`` (None unless its files are
            elsewhere), and optionally ``unwritten`` (the reason why it could not write them).

    Returns:
        Paths of the written files. Empty on ranks other than 0, for callbacks other than the last one, with
        `fast_dev_run`, and if no callback wrote results into the Trainer's folder.

    Raises:
        DataError: If a result file is invalid.
    """
    measuring: list[Any] = [other for other in callbacks_of(trainer) if getattr(other, "reports", False)]
    if not measuring or measuring[-1] is not callback or is_dev_run(trainer):
        return []
    folder = run_folder(trainer)  # a collective call
    if not trainer.is_global_zero or not folder.is_dir():
        return []
    # A callback that could not write its results may have files of an earlier run in its folder.
    written_to = [
        other for other in measuring if other.output_dir in (None, True) and not getattr(other, "unwritten", None)
    ]
    found = collect(folder, within=[other.name for other in written_to])
    if found.empty:
        return []
    written = write_files(found, folder / FOLDER)
    rank_zero_info(f"Report written: {written[0]}")
    return written
