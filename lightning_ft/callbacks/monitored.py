"""What in a Trainer decides by a logged metric: callbacks such as EarlyStopping, and learning rate schedulers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_ft.callbacks.base import callbacks_of
from lightning_ft.errors import ConfigError


@dataclass(frozen=True)
class Monitor:
    """A callback or learning rate scheduler that monitors a metric.

    Args:
        name: Name of its class.
        metric: Logged name of the metric.
        every_n_epochs: Number of epochs between its decisions.
        at_epoch_end: Whether it decides when a training epoch ends, rather than after a validation.
    """

    name: str
    metric: str
    every_n_epochs: int = 1
    at_epoch_end: bool = True


def monitors(trainer: Any, names: str | tuple[str, ...]) -> Iterator[Monitor]:
    """Find what monitors the metrics of a measurement.

    Args:
        trainer: The Trainer.
        names: Beginnings of their logged names.
    """
    for callback in callbacks_of(trainer):
        metric = getattr(callback, "monitor", None)
        if isinstance(metric, str) and metric.startswith(names):
            every = getattr(callback, "_every_n_epochs", None) or 1
            yield Monitor(type(callback).__name__, metric, every, _at_epoch_end(callback, trainer))
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.monitor, str) and config.monitor.startswith(names):
            every = config.frequency if config.interval == "epoch" else 1
            yield Monitor(type(config.scheduler).__name__, config.monitor, every)


def check_monitors(trainer: Any, names: tuple[str, ...], measuring: str, every_n_epochs: int | None) -> None:
    """Refuse what would decide by a metric of another epoch, or by one that isn't measured yet.

    Args:
        trainer: The Trainer.
        names: Beginnings of the logged names of the metrics.
        measuring: Name of the callback's class that measures them at the end of epochs.
        every_n_epochs: Number of epochs between its measurements; None if it measures after training only.

    Raises:
        ConfigError: For the first such callback or learning rate scheduler.
    """
    for monitor in monitors(trainer, names):
        who = f"{monitor.name} monitors {monitor.metric}"
        if every_n_epochs is None:
            raise ConfigError(
                f"{who}, which {measuring} measures when training has ended. Pass every_n_epochs=1 to {measuring}, or "
                "monitor another metric."
            )
        if monitor.every_n_epochs % every_n_epochs:
            often = "in every epoch" if monitor.every_n_epochs == 1 else f"every {monitor.every_n_epochs} epochs"
            raise ConfigError(
                f"{who} {often}, and {measuring} measures it every {every_n_epochs}: an "
                f"old value would count again. Pass every_n_epochs={monitor.every_n_epochs} to {measuring}."
            )
        if not monitor.at_epoch_end:
            option = "check_on_train_epoch_end" if "Stopping" in monitor.name else "save_on_train_epoch_end"
            raise ConfigError(
                f"{who} after validations, and {measuring} measures it later, when an epoch ends. Pass {option}=True "
                f"to {monitor.name}."
            )


def _at_epoch_end(callback: Any, trainer: Any) -> bool:
    """Whether a callback decides at the end of training epochs; Lightning has settled that by the start of training."""
    saves = getattr(callback, "_should_save_on_train_epoch_end", None)
    if callable(saves):
        return bool(saves(trainer))
    return getattr(callback, "_check_on_train_epoch_end", None) is not False
