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
from lightning_ft.distributed import rank_zero_info
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that results can be written to the folder.

        Raises:
            ConfigError: If the path or one of its parents is a file, or isn't writable.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.undefined = self.unwritten = None
            check_results_folder(results_folder(trainer, self.output_dir, self.name), type(self).__name__)

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
        from lightning_ft.callbacks.measuring import report_at_end

        self.attempt("The report was not written", lambda: report_at_end(trainer, self))

    def with_prefix(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics with their logged names, ``name/key``."""
        return {f"{self.name}/{key}": value for key, value in metrics.items()}

    def log_metrics(self, trainer: TrainerOrFabric | None, metrics: Mapping[str, float], step: int | None) -> None:
        """Add metrics to `callback_metrics`, where they can be monitored, and log them.

        `log_dict` isn't used, since it skips steps between those of `log_every_n_steps`.

        Args:
            trainer: The Trainer, or Fabric.
            metrics: Metrics by their logged names.
            step: Number of optimizer steps so far.
        """
        if is_trainer(trainer):
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
        if metrics:
            log_to_loggers(trainer, metrics, step)

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

    _measurement: Any = None
    """Has `has_before`, `state_dict` and `load_state_dict`; None before it is prepared."""
    _loaded: dict[str, Any] | None = None
    """State of a checkpoint, until the start of training."""

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
