"""What callbacks that measure share: where their figures go, and the report at the end of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_ft._lightning import Callback
from lightning_ft.callbacks.host import is_trainer


class MeasuringCallback(Callback):
    """Base of the callbacks that measure something."""

    reports = True
    """Its results go into the report that is written when training ends."""
    name: str
    """Before the names of what is logged, and of the folder."""
    output_dir: str | Path | bool | None

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the report, if this is the last callback that measures."""
        from lightning_ft.report.fit import report_at_end

        report_at_end(trainer, self)

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
        for logger in getattr(host, "loggers", []):
            logger.log_metrics(dict(figures), step=step)
