"""What a module's weights were trained on and how, for its checkpoints and for the card of its export."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_ft import __version__
from lightning_ft._lightning import NAMESPACE, active_datamodule
from lightning_ft.data.module import RowDataModule
from lightning_ft.models.card_facts import CardFacts, MeasuredResult, Setting, TrainingRecord, today

RECORD = "training_record"
"""Key of the record in what a module of this package keeps in a checkpoint."""
_NAMED = ("lr_schedule", "dtype", "loss_type", "advantage", "importance", "kl_in", "divergence", "answers", "critic")
"""Settings whose values are names from a list of this package. Other strings may be paths, prompts or addresses."""


def training_record(module: Any, trainer: Any) -> TrainingRecord:
    """Describe a training run up to now.

    Args:
        module: Module that is trained.
        trainer: Its Trainer.
    """
    data: dict[str, Setting] = {}
    datasets: tuple[str, ...] = ()
    source = _training_data(module, trainer)
    if isinstance(source, RowDataModule):
        rows, datasets = source.training_rows()
        data |= rows
    return TrainingRecord(
        data=data,
        settings={"method": type(module).__name__, **_run(module, trainer), **_numbers(module)},
        versions={
            "lightning-ft": __version__,
            **{name: _version(name) for name in ("torch", "transformers", "peft", NAMESPACE.replace("_", "-"))},
        },
        datasets=datasets,
        date=today(),
    )


def _training_data(module: Any, trainer: Any) -> Any:
    """DataModule of the training rows."""
    return module._fit_data if hasattr(module, "_fit_data") else active_datamodule(trainer)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # installed without metadata; a checkpoint doesn't depend on it
        return "unknown"


def _run(module: Any, trainer: Any) -> dict[str, Setting]:
    """Steps, batches, ranks and precision of a run."""
    found: dict[str, Setting] = {"optimizer steps": int(trainer.global_step)}
    batches = trainer.num_training_batches
    if module.automatic_optimization and math.isfinite(batches) and batches:
        per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        found["epochs"] = round(trainer.global_step / per_epoch, 2)
    size = getattr(_training_data(module, trainer), "batch_size", None)
    if isinstance(size, int):
        found["batch size per rank"] = size
    if trainer.accumulate_grad_batches > 1:
        found["batches accumulated per step"] = int(trainer.accumulate_grad_batches)
    return {**found, "ranks": int(trainer.world_size), "precision": str(trainer.precision)}


def _numbers(module: Any) -> dict[str, Setting]:
    """Numbers among the arguments of a module of this package, and names from lists of this package."""
    if not hasattr(module, "record_arguments"):
        return {}
    optimizer, found = module.hparams["optimizer"], dict[str, Setting]()
    unused = () if optimizer == "loraplus" else ("loraplus_lr_ratio",)
    for name, value in module.hparams.items():
        number = isinstance(value, (int, float)) and value is not False and name not in unused
        if number or (name in _NAMED and isinstance(value, str)):
            found[name] = value
    if isinstance(optimizer, str) and optimizer.isidentifier():  # not an import path
        found["optimizer"] = optimizer
    return found


def facts_of_run(module: Any, trainer: Any) -> CardFacts:
    """What is known about the weights of a module that a Trainer, or a loop with Fabric, trains or has trained.

    Args:
        module: The module, or with Fabric the model.
        trainer: Its Trainer; or Fabric, which knows nothing of data and steps.
    """
    record = training_record(module, trainer) if hasattr(trainer, "datamodule") else None
    return CardFacts(record, results_of_callbacks(trainer))


def results_of_callbacks(trainer: Any) -> tuple[MeasuredResult, ...]:
    """What the callbacks of a Trainer or Fabric measured, of whichever weights.

    Args:
        trainer: The Trainer, or Fabric.
    """
    found = trainer.callbacks if hasattr(trainer, "callbacks") else trainer._callbacks
    callbacks = [callback for callback in found if hasattr(callback, "for_card")]
    results: list[MeasuredResult | None] = [callback.for_card() for callback in callbacks]
    return tuple(result for result in results if result is not None)
