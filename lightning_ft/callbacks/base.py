"""Base class of callbacks that measure or export the final weights, and helpers for Trainer and Fabric.

Callbacks of Lightning may change the weights when training ends: weight averaging installs the average in
`on_train_end`. A measurement or export before that would not use the weights that the user ends up with. Work on the
final weights therefore runs after the `on_train_end` of all callbacks, ModelCheckpoint included, in whatever order they
were passed; exports run first. A failure doesn't stop the work that follows, since the weights may be the result of a
long training run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeGuard

from lightning_ft._lightning import Callback, LightningModule, Trainer, active_datamodule
from lightning_ft.arguments import CheckedArguments
from lightning_ft.atomic_files import unwritable
from lightning_ft.distributed import all_gather_objects, rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError, LightningFTError
from lightning_ft.printable import printable
from lightning_ft.run_checkpoints import run_folder
from lightning_ft.types import Request

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

TrainerOrFabric: TypeAlias = "Trainer | Fabric"
"""Type of the object that calls the hooks of a callback."""


def is_trainer(trainer: object) -> TypeGuard[Trainer]:
    """Whether the object that calls a callback is a Trainer, of either Lightning package, rather than Fabric."""
    return hasattr(trainer, "callback_metrics")


def is_dev_run(trainer: object) -> bool:
    """Whether a Trainer only tries out a run (`fast_dev_run`), of which no results may be left."""
    return bool(getattr(trainer, "fast_dev_run", False))


def callbacks_of(trainer: Any) -> list[Callback]:
    """Callbacks of a Trainer, an attribute that Lightning sets without declaring it."""
    callbacks: list[Callback] = trainer.callbacks
    return callbacks


def precision_of(trainer: object) -> AbstractContextManager[object]:
    """Return the context in which a Trainer or Fabric runs forward passes in its precision."""
    if is_trainer(trainer):
        return trainer.precision_plugin.forward_context()
    return trainer.autocast() if hasattr(trainer, "autocast") else nullcontext()  # type: ignore[no-any-return]


def shows_progress(trainer: object, progress: bool | None) -> bool:
    """Whether to show progress bars.

    Args:
        trainer: The Trainer, or Fabric.
        progress: User's option; None to show them if the Trainer has a progress bar, and always with Fabric.
    """
    if progress is not None:
        return progress
    return getattr(trainer, "progress_bar_callback", None) is not None if is_trainer(trainer) else True


def log_to_loggers(trainer: object, metrics: Mapping[str, float], step: int | None) -> None:
    """Log metrics with every logger, also if an earlier one fails; the first failure is raised when all are done.

    Args:
        trainer: The Trainer, or Fabric.
        metrics: Metrics by their logged names.
        step: Number of optimizer steps so far.
    """
    failed: Exception | None = None
    for logger in getattr(trainer, "loggers", []):
        try:
            logger.log_metrics(dict(metrics), step=step)
        except Exception as error:  # of whatever server or file system
            failed = failed or error
    if failed is not None:
        raise failed


def results_folder(trainer: object, output_dir: str | Path | bool | None, name: str) -> Path | None:
    """Return the folder that a callback writes its results to. Every rank must call it, since it is broadcast.

    Args:
        trainer: The Trainer, or Fabric.
        output_dir: Path of the folder; None or True for `name` in the logger's folder (or `default_root_dir`), False
            for none.
        name: Name of the callback.

    Returns:
        The folder; None if no results are written, as with Fabric and no explicit folder.

    Raises:
        ConfigError: If the name is empty, or a path that leads out of the logger's folder.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(
            f"name={name!r} is the prefix of logged metrics and a folder within the logger's; expected a name such as "
            "'refunds'. To write results elsewhere, set output_dir."
        )
    if output_dir is False:
        return None
    if output_dir is not None and output_dir is not True:
        return Path(output_dir)
    return run_folder(trainer) / name if is_trainer(trainer) else None


def check_results_folder(folder: Path | None, name: str) -> None:
    """Check before training that results can be written after it.

    Args:
        folder: Folder returned by :func:`results_folder`.
        name: Name of the callback's class, for the error message.

    Raises:
        ConfigError: If the path or one of its parents is a file, or isn't writable.
    """
    if folder is None:
        return
    if (reason := unwritable(folder)) is not None:
        raise ConfigError(
            f"{name} can't write its results into {str(folder)!r}: {reason}. Set output_dir to another folder."
        )


def validation_requests(
    requests: list[Request] | None, trainer: object, name: str, error: type[LightningFTError]
) -> list[Request]:
    """Return the requests that were passed, or the validation rows of the Trainer's DataModule.

    Args:
        requests: Requests that were passed to the callback; None for those rows.
        trainer: The Trainer, or Fabric.
        name: Name of the callback's class, for the message.
        error: Class of the error to raise.

    Raises:
        LightningFTError: An `error`, if there are neither.
    """
    if requests is not None:
        return requests
    data = active_datamodule(trainer)
    if not hasattr(data, "requests"):
        raise error(
            f"{name} has no requests. Pass requests=, a list of lightning_ft.types.Request, or a PairDataModule with "
            "validation rows to the Trainer."
        )
    rows: list[Request] = data.requests("validation")
    return rows


_log = logging.getLogger(__name__)


class RecordsFailures(CheckedArguments, Callback):
    """Base class of callbacks whose failures are recorded and don't stop the run."""

    failures: tuple[str, ...] = ()
    """Descriptions of failures that did not stop the run; with any, the command line exits with a nonzero status."""

    def attempt(self, what: str, work: Callable[[], object]) -> str | None:
        """Call a function whose failure must not stop the run. Every rank must call it.

        Ranks agree on the outcome: if the function fails on one rank, it has failed on all of them.

        Args:
            what: Consequence of a failure, the beginning of the warning.
            work: Function to call.

        Returns:
            Reason of the failure; None if the function succeeded.
        """
        reason = None
        try:
            work()
        except Exception as error:  # other callbacks still have work to do; KeyboardInterrupt passes through
            _log.debug("%s", what, exc_info=True)
            reason = describe_error(error)
        reason = first_over_ranks(reason)
        if reason is not None:
            self.failures = (*self.failures, f"{what}: {reason}")
            rank_zero_warn(self.failures[-1])
        return reason


class EndOfTraining(RecordsFailures):
    """Base class of callbacks that work on the final weights.

    A subclass overrides :meth:`finish`. A Trainer calls it after the `on_train_end` of all callbacks; with Fabric, this
    callback's own `on_train_end` calls it.
    """

    finish_order: ClassVar[int] = 2
    """When :meth:`finish` runs: 0 chooses the final weights, 1 exports them, so that this is done even if a measurement
    is killed, and 2 measures them."""

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Make :meth:`finish` run after all other callbacks."""
        if stage == "fit":
            self.failures = ()
            earlier = [c for c in trainer.callbacks if isinstance(c, RunsLast)]
            others = [c for c in trainer.callbacks if not isinstance(c, RunsLast)]
            if is_dev_run(trainer) and not earlier:
                rank_zero_info("fast_dev_run: results and exports are tried out and not kept, and nothing is uploaded.")
            # a new list, since the Trainer is iterating over the old one
            trainer.callbacks = [*others, *(earlier or [RunsLast()])]

    def on_train_end(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Call :meth:`finish` with Fabric; with a Trainer, :class:`RunsLast` calls it.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.
        """
        if not (is_trainer(trainer) and any(isinstance(c, RunsLast) for c in callbacks_of(trainer))):
            self.finish(trainer, pl_module)

    def finish(self, trainer: Any, pl_module: Any) -> None:
        """Work on the final weights, on all ranks. Failures are recorded in `failures`, see :meth:`attempt`.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.
        """
        raise NotImplementedError

    def finish_restored(self, trainer: Trainer, pl_module: Any) -> None:
        """Work on the final weights of a run whose checkpoint was written after its last step.

        Such a fit has nothing left to train, so a Trainer calls neither `on_train_start` nor `on_train_end`.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """
        what = f"{type(self).__name__} didn't work on the final weights"
        if self.attempt(what, lambda: self.on_train_start(trainer, pl_module)) is None:
            self.finish(trainer, pl_module)

    def after_measurements(self, trainer: Trainer, pl_module: Any) -> None:
        """Work on the final weights, on all ranks, when everything has been measured; failures are recorded likewise.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """

    def finish_fit(self, trainer: Trainer, pl_module: Any) -> None:
        """Work after the Trainer's teardown, when weights have left their devices; failures are recorded likewise.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """


class RunsLast(Callback):
    """Runs after all other callbacks of a Trainer, ModelCheckpoint included, and calls those of this package."""

    _restored = False
    """Whether this fit continues a checkpoint."""
    _ended = False
    """Whether training has ended in this fit."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit of the same Trainer."""
        self._restored = self._ended = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember that this fit continues a checkpoint."""
        self._restored = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose weights, export them, then measure them, each in the order of the callbacks."""
        self._ended = True
        for callback in _in_order(trainer):
            callback.finish(trainer, pl_module)
        for callback in _in_order(trainer):
            callback.after_measurements(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the fit after the Trainer's teardown, then raise the error of a failed export."""
        if self._restored and not self._ended and _has_trained(trainer):
            self._finish_restored(trainer, pl_module)
        for callback in _in_order(trainer):
            callback.finish_fit(trainer, pl_module)
        for callback in _in_order(trainer):
            if (error := getattr(callback, "error", None)) is not None:
                raise error

    def _finish_restored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what `on_train_end` does for a run that ended, or was killed, after its last checkpoint."""
        rank_zero_info(
            "The checkpoint is of a run that has taken all its steps: its weights are exported and measured."
        )
        device = pl_module.device
        trainer.strategy.model_to_device()  # the Trainer's teardown has moved it to the CPU
        for callback in callbacks_of(trainer):  # weight averaging installs the average when training ends
            if getattr(callback, "_average_model", None) is not None:
                callback.on_train_end(trainer, pl_module)
        for ours in _in_order(trainer):
            ours.finish_restored(trainer, pl_module)
        for ours in _in_order(trainer):
            ours.after_measurements(trainer, pl_module)
        if pl_module.device != device:
            pl_module.to(device)


def describe_error(error: BaseException) -> str:
    """Message of an error, preceded by its type unless it is an error of this package."""
    text = printable(str(error))
    return text if isinstance(error, LightningFTError) and text else f"{type(error).__name__}: {text}"


def first_over_ranks(reason: str | None) -> str | None:
    """Return the reason of the first rank that has one, None if none has. Every rank must call it."""
    return next((each for each in all_gather_objects(reason) if each is not None), None)


def _has_trained(trainer: Any) -> bool:
    """Whether the weights are those of a training run, rather than of a fit without any steps to take."""
    limits = (trainer.limit_train_batches, trainer.num_training_batches, trainer.max_epochs, trainer.max_steps)
    return trainer.global_step > 0 and 0 not in limits and not trainer.fast_dev_run


def _in_order(trainer: Trainer) -> list[EndOfTraining]:
    ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, EndOfTraining)]
    return sorted(ours, key=lambda callback: callback.finish_order)
