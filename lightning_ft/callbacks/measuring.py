"""What callbacks that measure share: when they measure, where their figures go, and the report at the end of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_ft.atomic_files import write_json
from lightning_ft.callbacks.base import EndOfTraining, check_results_folder, is_trainer, results_folder
from lightning_ft.distributed import rank_zero_info
from lightning_ft.report.collect import UNDEFINED, collect
from lightning_ft.report.write import FOLDER, write_files


class MeasuringCallback(EndOfTraining):
    """Base of the callbacks that measure something.

    A measurement that fails once training has begun is undefined, and says why; the run goes on.
    """

    title: ClassVar[str]
    """What is measured, in words."""
    files: ClassVar[tuple[str, ...]]
    """Names of the files that a result is written to."""
    reports = True
    """Its results go into the report that is written when training ends."""
    name: str
    """Before the names of what is logged, and of the folder."""
    output_dir: str | Path | bool | None
    result: Any
    undefined: str | None = None
    """Why there is no result, once training has ended."""
    unwritten: str | None = None
    """Why the files in its folder may be those of an earlier run."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a folder that can't be written to.

        Raises:
            ConfigError: If a file is in its way, or the user may not write there.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.undefined = self.unwritten = None
            check_results_folder(results_folder(trainer, self.output_dir, self.name), type(self).__name__)

    def measure(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Set `result` to that of the final weights; on all ranks.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Returns:
            What is logged, by the names that it is logged under.
        """
        raise NotImplementedError

    def show(self, folder: Path | None) -> None:
        """Print the result and write it; on the first rank only.

        Args:
            folder: Where to write; None for nowhere.
        """
        raise NotImplementedError

    def undefined_metrics(self) -> dict[str, float]:
        """What is logged where the result is undefined."""
        return {}

    @property
    def gate_failed(self) -> bool:
        """Whether the result broke a limit at which the user wants to be stopped."""
        return False

    def finish(self, trainer: Any, pl_module: Any) -> None:
        """Measure the final weights, log, print and write the result, or why there is none."""
        folder = results_folder(trainer, self.output_dir, self.name)  # asked on all ranks, and before one may fail
        figures: dict[str, float] = {}
        self.undefined = self.attempt(
            f"{self.title} is undefined", lambda: figures.update(self.measure(trainer, pl_module))
        )
        if self.undefined is not None:
            self.result, figures = None, self.named(self.undefined_metrics())
        self.attempt(
            f"{self.title} was not logged",
            lambda: self.publish(trainer, figures, getattr(trainer, "global_step", None)),
        )
        show: Callable[[Path | None], None] = self.show if self.undefined is None else self._write_undefined
        first = getattr(trainer, "is_global_zero", True)
        where = "" if folder is None else f" to {folder}"
        self.unwritten = self.attempt(f"{self.title} was not written{where}", lambda: show(folder) if first else None)

    def finish_fit(self, trainer: Any, pl_module: Any) -> None:
        """Write the report, if this is the last callback that measures."""
        from lightning_ft.callbacks.measuring import report_at_end

        self.attempt("The report was not written", lambda: report_at_end(trainer, self))

    def named(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Figures as they are logged."""
        return {f"{self.name}/{key}": value for key, value in figures.items()}

    def publish(self, host: Any, figures: Mapping[str, float], step: int | None) -> None:
        """Give figures to `callback_metrics`, to be monitored, and to the loggers.

        Not by `log_dict`, which passes over steps that `log_every_n_steps` doesn't name.

        Args:
            host: The Trainer, or Fabric.
            figures: By the names that they are logged under.
            step: Optimizer step.
        """
        if is_trainer(host):
            host.callback_metrics.update({key: torch.tensor(value) for key, value in figures.items()})
        for logger in getattr(host, "loggers", []) if figures else ():
            logger.log_metrics(dict(figures), step=step)

    def wrote(self, *files: Path) -> None:
        """Say where the result is; an earlier word that there is none is taken back."""
        (files[0].parent / UNDEFINED).unlink(missing_ok=True)
        rank_zero_info(f"{self.title} written: {', '.join(map(str, files))}")

    def _write_undefined(self, folder: Path | None) -> None:
        """Write why there is no result; one of an earlier run must not be taken for this one's."""
        if folder is None:
            return
        for name in self.files:
            (folder / name).unlink(missing_ok=True)
        write_json(folder / UNDEFINED, {"measurement": self.title, "reason": self.undefined})


def report_at_end(trainer: Any, callback: Any) -> list[Path]:
    """Write the report of a fit once, when the last of its measuring callbacks is through.

    Call it in ``on_fit_end``, on all ranks: results are written at the end of training, so they are all there. What is
    reported is what the callbacks wrote into the Trainer's folder, nothing else that may lie there.

    Args:
        trainer: The Trainer.
        callback: The one that calls. Like every callback that measures it has the attributes ``reports``, True,
            ``name``, its folder in that of the Trainer, and ``output_dir``, None unless its files are somewhere else;
            ``unwritten``, why it could not write them, is optional.

    Returns:
        The files written; empty on other ranks than the first, for other callbacks than the last, and where no
        callback wrote results into the Trainer's folder.

    Raises:
        DataError: If a file isn't what its name says.
    """
    measuring = [other for other in trainer.callbacks if getattr(other, "reports", False)]
    if not measuring or measuring[-1] is not callback:
        return []
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on all ranks: the first one tells the others
    if not trainer.is_global_zero or not folder.is_dir():
        return []
    # What could not be written leaves an earlier run's files in its folder.
    ours = [other for other in measuring if other.output_dir in (None, True) and not getattr(other, "unwritten", None)]
    found = collect(folder, within=[other.name for other in ours])
    if found.empty:
        return []
    written = write_files(found, folder / FOLDER)
    rank_zero_info(f"Report written: {written[0]}")
    return written
