"""Whether a checkpoint is of the run that continues from it.

A checkpoint's position is a number of batches. It means the same rows only for the same rows in the same order, and its
optimizer belongs to the loss that it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ft import __all__ as PUBLIC_NAMES
from lightning_ft.data.module import RowDataModule
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import CheckpointError
from lightning_ft.models.card_facts import TrainingRecord
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.training_record import RECORD

_ORDER = ("shuffle", "seed", "mixing", "shuffle_buffer")
"""Arguments of a DataModule that decide which rows a batch has, besides its size."""
_HASH = "hash of the tokenized rows"


def refuse_other_method(module: Any, record: TrainingRecord) -> None:
    """Refuse to continue a run of another method, whose weights may have the same names.

    Optimizer state, schedule and position would be those of another loss and other data, and the reference of a policy
    would be the base without what that run has trained. Methods that aren't of this package are not refused.

    Args:
        module: Module that is about to be trained.
        record: Record of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is of another method.
    """
    if (method := _other_method(type(module), record)) is None:
        return
    name = type(module).__name__
    raise CheckpointError(
        f"The checkpoint is of a run of {method}, which {name} can't continue: its optimizer, schedule and position "
        f"belong to another loss. To start from its weights, export them and pass the folder as model= to {name}, and "
        "fit without ckpt_path."
    )


def refuse_other_class(cls: type, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to build a module of this package from a checkpoint of another one, whose arguments are others.

    Args:
        cls: Class of the module.
        checkpoint: The checkpoint.

    Raises:
        CheckpointError: If the checkpoint is of another class of this package.
    """
    record = checkpoint.get(STATE, {}).get(RECORD)
    if not isinstance(record, Mapping) or (method := _other_method(cls, TrainingRecord.from_dict(record))) is None:
        return
    raise CheckpointError(
        f"The checkpoint is of a run of {method}: load it with {method}.load_from_checkpoint. To start {cls.__name__} "
        f"from its weights, export them and pass the folder as model= to {cls.__name__}."
    )


def _other_method(cls: type, record: TrainingRecord) -> str | None:
    """The method of a record, if it is one of this package, and neither the class nor one that it extends."""
    method = str(record.settings.get("method"))
    return method if method in PUBLIC_NAMES and method not in {base.__name__ for base in cls.__mro__} else None


def warn_of_other_rows(data: Any, ranks: int, record: TrainingRecord, saved: Mapping[str, Any]) -> None:
    """Warn if the batches that a checkpoint counted were of other rows than those of the run that continues.

    Args:
        data: DataModule of the run; nothing is known of the rows of others.
        ranks: Number of ranks of the run.
        record: Record of the checkpoint.
        saved: Arguments of the DataModule in the checkpoint; empty if they aren't known.
    """
    if not isinstance(data, RowDataModule):
        return
    rows, _ = data.training_rows()
    changed = [
        f"{name}={saved[name]!r} is now {data.hparams[name]!r}"
        for name in _ORDER
        if name in saved and saved[name] != data.hparams[name]
    ]
    size, saved_ranks = saved.get("batch_size"), record.settings.get("ranks")
    if isinstance(size, int) and isinstance(saved_ranks, int) and size * saved_ranks != data.batch_size * ranks:
        before = f"batch_size={size} on {saved_ranks} rank{'s' * (saved_ranks > 1)}"
        changed.insert(0, f"{before} is now {data.batch_size} on {ranks}")
    if _HASH in record.data and _HASH in rows and record.data[_HASH] != rows[_HASH]:
        counts = [f"{found.get('training rows', 'unknown')}" for found in (record.data, rows)]
        changed.insert(0, f"{counts[0]} training rows are now {counts[1]} others or with other tokens")
    if changed:
        rank_zero_warn(
            f"The checkpoint is of a run with other batches ({'; '.join(changed)}). Its position counts those, so in "
            "this epoch some of the present rows may be left out or trained on twice. To train its weights on other "
            "rows from their start, call load_checkpoint() of the module and fit without ckpt_path."
        )
