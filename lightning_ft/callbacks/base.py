"""Work at the end of training, done so that nothing is lost by it.

Callbacks of Lightning change weights when training ends: weight averaging installs its average in `on_train_end`. A
measurement or export before that would use other weights than the user ends with, so this work runs after the
`on_train_end` of all callbacks, checkpoints included, in whatever order they were passed. Exports come first. A failure
doesn't stop what follows: by then the weights hold all of the training, perhaps a night of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from lightning_ft._lightning import Callback
from lightning_ft.distributed import all_gather_objects, rank_zero_warn
from lightning_ft.errors import ConfigError, LightningFTError
from lightning_ft.printable import printable


def is_trainer(host: Any) -> bool:
    """Whether it is a Trainer, of whichever Lightning; Fabric isn't one."""
    return hasattr(host, "callback_metrics")


def precision_of(host: Any) -> AbstractContextManager[Any]:
    """The numerics that the run validates with."""
    if is_trainer(host):
        context: AbstractContextManager[Any] = host.precision_plugin.forward_context()
        return context
    return host.autocast() if hasattr(host, "autocast") else nullcontext()  # type: ignore[no-any-return]


def shows_progress(host: Any, wanted: bool | None) -> bool:
    """Whether to show progress bars: as it was asked for, else as the Trainer does; Fabric has none to go by."""
    if wanted is not None:
        return wanted
    return getattr(host, "progress_bar_callback", None) is not None if is_trainer(host) else True


def results_folder(host: Any, output_dir: str | Path | bool | None, name: str) -> Path | None:
    """Where a callback writes its results. Every rank must ask: the first one tells the others.

    Args:
        host: The Trainer, or Fabric.
        output_dir: The folder; None or True for `name` in the logger's folder (or `default_root_dir`), False for none.
        name: Name of the callback.

    Returns:
        The folder; None where nothing is to be written, as with Fabric unless it is given.
    """
    if output_dir is False:
        return None
    if output_dir is not None and output_dir is not True:
        return Path(output_dir)
    return Path(host.log_dir or host.default_root_dir) / name if is_trainer(host) else None


def check_results_folder(folder: Path | None, name: str) -> None:
    """Refuse before training a folder that can't be written to after it.

    Args:
        folder: See `results_folder`.
        name: Name of the callback's class, for the message.

    Raises:
        ConfigError: If a file is in its way, or the user may not write there.
    """
    if folder is None:
        return
    there = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()), Path("/"))
    if not there.is_dir():
        raise ConfigError(f"{name} can't write its results into {str(folder)!r}: {str(there)!r} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} can't write its results into {str(folder)!r}: {str(there)!r} isn't writable.")


_log = logging.getLogger(__name__)


class EndOfTraining(Callback):
    """Base of callbacks that work on the final weights.

    A subclass does so in :meth:`finish`. With a Trainer that is called after the `on_train_end` of every callback, with
    Fabric in this callback's own.
    """

    finishes_first: ClassVar[bool] = False
    """Whether it comes before the others, so that even a killed measurement can't take it along."""
    failures: tuple[str, ...] = ()
    """What failed without stopping the run, in words; the command line exits with a status other than 0 then."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See to it that :meth:`finish` comes last."""
        if stage == "fit":
            self.failures = ()
            earlier = [c for c in trainer.callbacks if isinstance(c, RunsLast)]
            others = [c for c in trainer.callbacks if not isinstance(c, RunsLast)]
            # a new list: the Trainer is iterating over the old one
            trainer.callbacks = [*others, *(earlier or [RunsLast()])]

    def on_train_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """With Fabric, do what is done at the end.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.
        """
        if not (is_trainer(trainer) and any(isinstance(c, RunsLast) for c in trainer.callbacks)):
            self.finish(trainer, pl_module)

    def finish(self, trainer: Any, pl_module: Any) -> None:
        """Do what is done at the end; on all ranks. What fails in it is kept, not raised.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.
        """
        raise NotImplementedError

    def finish_fit(self, trainer: Any, pl_module: Any) -> None:
        """Do what is done when all else is done and weights have left their devices; likewise.

        Args:
            trainer: The Trainer.
            pl_module: The module.
        """

    def attempt(self, what: str, work: Callable[[], Any]) -> str | None:
        """Do something whose failure must not stop the run; every rank must call it.

        Ranks agree on the outcome: where one fails, all have failed.

        Args:
            what: What it means if it fails, for the warning.
            work: Does it.

        Returns:
            The reason for which it failed, None where it didn't.
        """
        reason = None
        try:
            work()
        except Exception as error:  # other callbacks still have work to do; KeyboardInterrupt passes through
            _log.debug("%s", what, exc_info=True)
            reason = described(error)
        reason = first_over_ranks(reason)
        if reason is not None:
            self.failures = (*self.failures, f"{what}: {reason}")
            rank_zero_warn(self.failures[-1])
        return reason


class RunsLast(Callback):
    """Comes after all callbacks of a Trainer, ModelCheckpoint too, and lets those of this package do their work."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Exports first, then measurements, each kind in the order of the callbacks."""
        for callback in _in_order(trainer):
            callback.finish(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """What comes after the Trainer's own clean-up; an export that failed is raised when all is done."""
        for callback in _in_order(trainer):
            callback.finish_fit(trainer, pl_module)
        for callback in _in_order(trainer):
            if (error := getattr(callback, "error", None)) is not None:
                raise error


def described(error: BaseException) -> str:
    """An error in one line, with its type where that isn't a word of this package."""
    text = printable(str(error))
    return text if isinstance(error, LightningFTError) and text else f"{type(error).__name__}: {text}"


def first_over_ranks(reason: str | None) -> str | None:
    """What the first rank that has something to say says; every rank must call it."""
    return next((found for found in all_gather_objects(reason) if found is not None), None)


def _in_order(trainer: Any) -> list[EndOfTraining]:
    ours = [callback for callback in trainer.callbacks if isinstance(callback, EndOfTraining)]
    return sorted(ours, key=lambda callback: not callback.finishes_first)
