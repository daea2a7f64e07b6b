"""Checkpoints of earlier runs, by the folders that a Trainer's configuration writes to.

Lightning takes ``last`` and ``best`` to be checkpoints of the run that the Trainer has just done. A command is a
process of its own, and its logger starts a new version, so they are looked for in the versions that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_ft.atomic_files import is_temporary_path
from lightning_ft.checkpoint_file import local_path, read_checkpoint
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import CheckpointError, CheckpointNotFoundError
from lightning_ft.sharded_checkpoint import is_sharded_checkpoint, open_sharded_checkpoint

LAST, BEST = "last", "best"
_COUNTERS = ("step", "epoch", "global_step")
"""What a ModelCheckpoint monitors to keep the newest checkpoints, rather than the best by a metric."""
T = TypeVar("T")


def find_checkpoint(trainer: Any, name: str) -> Path:
    """Find the newest checkpoint of the newest run, or the one that it names as its best.

    Args:
        trainer: Trainer with the loggers and callbacks of the runs.
        name: ``last`` or ``best``.

    Raises:
        CheckpointNotFoundError: If there is none; the message names the folders.
        CheckpointError: If the newest one can't be read, or several metrics were monitored, each with a best one.
    """
    searched = searched_files(trainer)
    found = [path for root, pattern in searched for path in root.glob(pattern) if _is_checkpoint(path)]
    looked = ", ".join(repr(str(root / pattern)) for root, pattern in searched)
    if not found:
        raise CheckpointNotFoundError(
            f"ckpt_path={name!r}: no file matches {looked}. Train with the same `trainer` section first, or "
            "pass the path of a checkpoint."
        )
    last = max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return last if name == LAST else _best(last)


def searched_files(trainer: Any) -> list[tuple[Path, str]]:
    """Where checkpoints of earlier runs are, each as a folder and a pattern of files below it.

    Args:
        trainer: Trainer with the loggers and callbacks of the runs.
    """
    chosen = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders = [path for folder in chosen if folder is not None and (path := local_path(folder)) is not None]
    return [(folder, "*.ckpt") for folder in folders] or [_default(trainer)]


def run_folder(trainer: Any) -> Path:
    """Folder of a run: the one with ``checkpoints/`` of Lightning's `ModelCheckpoint`. Every rank must call it.

    Loggers of TensorBoard and CSV files have a folder per run, which is `trainer.log_dir`. Of others, such as those of
    MLflow and Weights & Biases, it is the folder that all runs share, so name and version of the run are added.

    Args:
        trainer: Trainer of the run.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None or getattr(logger, "log_dir", None) is not None:
        return Path(trainer.log_dir or trainer.default_root_dir)
    # the logger of rank 0 alone may know the run
    return Path(trainer.strategy.broadcast(str(_shared_folder(trainer) / _run_name(logger.version))))


def _shared_folder(trainer: Any) -> Path:
    """Folder of all runs of the first logger."""
    logger = trainer.loggers[0]
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def _run_name(version: int | str) -> str:
    """Name of a run's folder, as Lightning's `ModelCheckpoint` has it."""
    return version if isinstance(version, str) else f"version_{version}"


def _default(trainer: Any) -> tuple[Path, str]:
    """Where Lightning's `ModelCheckpoint` writes to by default, in any version of the logger."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir) / "checkpoints", "*.ckpt"
    root, version = _shared_folder(trainer), trainer.loggers[0].version
    folder = root / _run_name(version)
    if isinstance(version, str) or folder.exists():  # chosen by the user: a logger counts further
        return folder / "checkpoints", "*.ckpt"
    return root, "*/checkpoints/*.ckpt"


def _is_checkpoint(path: Path) -> bool:
    return (path.is_file() or is_sharded_checkpoint(path)) and not is_temporary_path(path)


def by_metric(checkpoints: Iterable[T], monitor: Callable[[T], str | None]) -> list[T]:
    """ModelCheckpoints, or states of them, that monitor a metric; those that monitor a counter if there are no others.

    Args:
        checkpoints: ModelCheckpoints or their states.
        monitor: Function that returns what one of them monitors, or None.

    Example:
        >>> by_metric(["val/loss", "step", None], lambda monitor: monitor)
        ['val/loss']
    """
    monitored = [each for each in checkpoints if monitor(each) is not None]
    return [each for each in monitored if monitor(each) not in _COUNTERS] or monitored


def _best(last: Path) -> Path:
    """The checkpoint that the run which wrote another one had found to be its best by then."""
    header = open_sharded_checkpoint(last).rest if is_sharded_checkpoint(last) else read_checkpoint(last)
    callbacks = header.get("callbacks", {}).values()
    states = [state for state in callbacks if isinstance(state, Mapping) and "best_model_path" in state]
    # a ModelCheckpoint without a monitor calls its newest checkpoint the best
    chosen = by_metric(states, lambda state: state.get("monitor")) or states
    found: dict[str | None, Path] = {}
    for state in chosen:
        if state["best_model_path"]:
            found.setdefault(state.get("monitor"), Path(state["best_model_path"]))
    if not found:
        raise CheckpointNotFoundError(
            f"ckpt_path='best': {str(last)!r} names no best checkpoint, since no ModelCheckpoint of its run had found "
            "one. Use ckpt_path='last', or pass the path of a checkpoint."
        )
    if len(found) > 1:
        named = ", ".join(f"{str(path)!r} by {monitor!r}" for monitor, path in found.items())
        raise CheckpointError(
            f"ckpt_path='best': the ModelCheckpoints of the run that wrote {str(last)!r} monitor several metrics, and "
            f"each names a best checkpoint: {named}. Pass the path of one of them."
        )
    monitor, best = next(iter(found.items()))
    for path in (best, last.parent / best.name):  # the folder may have been moved
        if _is_checkpoint(path):
            if monitor is None:
                rank_zero_warn(
                    f"ckpt_path='best': {str(path)!r} is the newest checkpoint of its run, since no ModelCheckpoint "
                    "monitored a metric. Give one a `monitor` to keep the best."
                )
            return path
    raise CheckpointNotFoundError(
        f"ckpt_path='best': {str(last)!r} names {str(best)!r} as the best checkpoint of its run, which doesn't exist. "
        "Use ckpt_path='last', or pass the path of a checkpoint."
    )


__all__ = ["BEST", "LAST", "find_checkpoint", "run_folder", "searched_files"]
