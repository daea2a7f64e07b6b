"""Reading and writing checkpoints in a Trainer: files are whole or absent, and never run code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from lightning_ft._lightning import TorchCheckpointIO, restricted_classmethod
from lightning_ft.atomic_files import is_temporary_path
from lightning_ft.checkpoint_file import (
    checked_file,
    local_file,
    local_path,
    refuse_pickle,
    write_checkpoint,
)
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import CheckpointError, ConfigError
from lightning_ft.modules.casting import CastModule
from lightning_ft.modules.continued_run import refuse_other_class
from lightning_ft.modules.sharded_strategy import ShardedStrategy, refuse_other_shapes
from lightning_ft.sharded_checkpoint import (
    ShardedCheckpoint,
    as_file,
    is_sharded_checkpoint,
    open_sharded_checkpoint,
    read_any_checkpoint,
)

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION as MapLocation

    from lightning_ft._lightning import CheckpointIO

Content = TypeVar("Content", dict[str, Any], ShardedCheckpoint, dict[str, Any] | ShardedCheckpoint)
_PASSED_BY_CALLER: ContextVar[frozenset[str] | None] = ContextVar("_PASSED_BY_CALLER", default=None)
"""Arguments that the caller of `load_from_checkpoint` passed; None outside it."""


def refuse_code_of_checkpoint(argument: str, name: str | None, detail: str = "") -> None:
    """Refuse the name of code that a constructor got from `load_from_checkpoint` and not from its caller.

    Args:
        argument: Argument of the constructor.
        name: What its value would import; None if it would import nothing.
        detail: Text that describes the name in the message.

    Raises:
        ConfigError: If there is a name, and the caller of `load_from_checkpoint` did not pass the argument.
    """
    passed = _PASSED_BY_CALLER.get()
    if name is not None and passed is not None and argument not in passed:
        raise ConfigError(
            f"The checkpoint names {argument}={name!r}{detail}, and a checkpoint doesn't decide which code runs. Pass "
            f"{argument}= to load_from_checkpoint: that of the run, if you trust it, or another."
        )


class WholeCheckpointIO(TorchCheckpointIO):
    """Replaces Lightning's `TorchCheckpointIO`.

    That one writes through a temporary folder, which is not one atomic step where it is on another file system; it
    doesn't compare checksums; and it unpickles what it gets from a URL.

    Args:
        trainer: Trainer, whose callbacks know where the other checkpoints of a run are.
        inner: Plugin that the user passed to the Trainer; it reads and writes, and is asked to read data only.
    """

    def __init__(self, trainer: Any, inner: CheckpointIO | None = None) -> None:
        super().__init__()
        self._trainer, self._inner = trainer, inner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint.

        Raises:
            FileWriteError: If it can't be written; an earlier one of its name is still there.
        """
        local = local_path(path)
        if self._inner is not None:
            self._inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        elif local is None or storage_options is not None:  # object stores show a file when it is complete
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)
        else:
            write_checkpoint(checkpoint, local)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        if self._inner is None:
            super().remove_checkpoint(path)
        else:
            self._inner.remove_checkpoint(path)

    def load_checkpoint(
        self, path: str | Path, map_location: MapLocation = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; in place of a damaged last one of the run, its newest whole one.

        Raises:
            CheckpointError: If it can't be read.
            ConfigError: For ``weights_only=False``.
        """
        refuse_pickle(weights_only)
        if self._inner is not None:
            checkpoint: dict[str, Any] = self._inner.load_checkpoint(path, **_data_only(self._inner))
            return checkpoint
        return self.whole(path, lambda path: read_any_checkpoint(path, map_location, from_trainer=True))[1]

    def whole(self, path: str | Path, read: Callable[[str | Path], Content]) -> tuple[str | Path, Content]:
        """The path of a checkpoint, or of another in its place, and its content.

        Args:
            path: Path or URL of the checkpoint.
            read: Function that reads it.

        Raises:
            CheckpointError: If neither it nor another can be read.
        """
        try:
            return path, self._read(path, read)
        except CheckpointError as error:
            for other in self._others(path):
                try:
                    checkpoint = self._read(other, read)
                except CheckpointError:
                    continue
                rank_zero_warn(f"{error} The newest whole checkpoint of the run is used instead: {str(other)!r}.")
                return other, checkpoint
            raise

    def _read(self, path: str | Path, read: Callable[[str | Path], Content]) -> Content:
        checkpoint = read(path)
        content = checkpoint.rest if isinstance(checkpoint, ShardedCheckpoint) else checkpoint
        if self._trainer.state.fn == "fit" and not _is_resumable(content):
            raise CheckpointError(
                f"The checkpoint {str(path)!r} contains weights only (save_weights_only=True), or an incomplete state "
                "of a run, so training can't resume from it: load it with load_checkpoint() of the module, and fit "
                "without ckpt_path."
            )
        return checkpoint

    def _others(self, path: str | Path) -> Iterator[Path]:
        """Checkpoints next to the last one of a run, the newest first.

        ``ckpt_path="last"`` is already a path here. So it counts as a last checkpoint if a callback of the Trainer
        writes such files into its folder.
        """
        broken = local_path(path)
        if broken is None or not (broken.is_file() or is_sharded_checkpoint(broken)):
            return
        for callback in self._trainer.callbacks:
            folder = getattr(callback, "dirpath", None)
            if folder is None or local_path(folder) is None or Path(folder).resolve() != broken.parent.resolve():
                continue
            last = re.escape(getattr(callback, "CHECKPOINT_NAME_LAST", "last"))
            if re.match(rf"{last}(-|$)", broken.stem) or broken.stem == getattr(callback, "filename", None):
                others = [p for p in broken.parent.glob("*.ckpt") if p.is_file() or is_sharded_checkpoint(p)]
                others = [p for p in others if not is_temporary_path(p) and not p.samefile(broken)]
                yield from sorted(others, key=lambda p: (p.stat().st_mtime, p.name), reverse=True)
                return


def _is_resumable(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the state of the optimizer and of the loop."""
    optimizers, schedulers = (checkpoint.get(name) for name in ("optimizer_states", "lr_schedulers"))
    return (
        isinstance(optimizers, Sequence)
        and len(optimizers) > 0
        and all(isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys() for state in optimizers)
        and isinstance(schedulers, Sequence)
        and isinstance(checkpoint.get("loops", {}).get("fit_loop"), Mapping)
    )


def _data_only(plugin: CheckpointIO) -> dict[str, bool]:
    """The argument that makes a plugin read data only, where it has one: Lightning had none before 2.6."""
    parameters = inspect.signature(plugin.load_checkpoint).parameters
    takes = "weights_only" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"weights_only": True} if takes else {}


def use_atomic_files(trainer: Any) -> None:
    """Let a Trainer read and write checkpoints with :class:`WholeCheckpointIO`.

    Args:
        trainer: The Trainer; a checkpoint plugin of the user stays in use, inside or outside of ours.
    """
    strategy = trainer.strategy
    outer, io = None, strategy.checkpoint_io
    while hasattr(io, "checkpoint_io"):  # a plugin around another, such as AsyncCheckpointIO
        outer, io = io, io.checkpoint_io
    if isinstance(io, WholeCheckpointIO):
        return
    ours = WholeCheckpointIO(trainer, None if type(io) is TorchCheckpointIO else io)
    if outer is None:
        strategy.checkpoint_io = ours
    else:
        outer._checkpoint_io = ours  # its setter ignores a second plugin
    reads_itself = isinstance(strategy, ShardedStrategy) or type(io) is TorchCheckpointIO
    if strategy.restore_checkpoint_after_setup and reads_itself:
        _check_before_loading(strategy, ours)


def _check_before_loading(strategy: Any, io: WholeCheckpointIO) -> None:
    """Let a strategy that loads sharded weights, bypassing its plugin, load only a checked file or folder."""
    load = strategy.load_checkpoint

    def read(path: str | Path) -> dict[str, Any] | ShardedCheckpoint:
        if isinstance(strategy, ShardedStrategy) and is_sharded_checkpoint(path):
            return open_sharded_checkpoint(path, together=True)
        return read_any_checkpoint(path, from_trainer=True)

    def checked(checkpoint_path: str | Path, weights_only: bool | None = None) -> object:
        refuse_pickle(weights_only)
        path, checkpoint = io.whole(strategy.broadcast(checkpoint_path), read)
        if isinstance(checkpoint, ShardedCheckpoint):
            return strategy.load_sharded(checkpoint)
        refuse_other_shapes(strategy.lightning_module, {n: w.shape for n, w in checkpoint["state_dict"].items()})
        with local_file(path) as file:
            return load(file)

    strategy.load_checkpoint = checked


class CheckpointedModule(CastModule):
    """A module whose checkpoints are written whole and read without running anything."""

    def setup(self, stage: str) -> None:
        """Take over the reading and writing of checkpoints, before the first is read."""
        super().setup(stage)
        use_atomic_files(self.trainer)

    @restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build a module from the arguments and weights of a checkpoint.

        Args:
            checkpoint_path: Path, URL or open file of the checkpoint; a folder if a sharded model wrote it.
            map_location: Device of the weights, as in `torch.load`.
            hparams_file: YAML or CSV file with arguments of the module, which override the checkpoint's.
            strict: Not used: a checkpoint must have all of the module's trainable weights, and none that it hasn't.
            weights_only: Only None and True are allowed: a checkpoint is never unpickled.
            kwargs: Arguments of the module that override those of the checkpoint. ``trust_remote_code`` is taken from
                here only: a file doesn't decide whether code of a repository runs.

        Raises:
            CheckpointError: If it can't be read, or is of another class of this package.
            ConfigError: For ``weights_only=False``, and if it names a loss or a reward function that would have to be
                imported, and that argument isn't passed.
        """
        options: dict[str, Any] = {
            "kept": "hyper_parameters",
            "required": "model" if hparams_file is None else None,
            "arguments": kwargs,
        }
        check = partial(refuse_other_class, cls)
        with (
            as_file(checkpoint_path) as source,
            checked_file(source, weights_only, **options, check=check) as file,
        ):
            token = _PASSED_BY_CALLER.set(frozenset(kwargs))
            try:
                return super().load_from_checkpoint(file, map_location, hparams_file, strict, **kwargs)
            finally:
                _PASSED_BY_CALLER.reset(token)
