"""Checkpoints of a loop of one's own, with Fabric or without: trainable weights only, resumed bit for bit."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ft.checkpoint_file import read_checkpoint, write_checkpoint
from lightning_ft.data.resumable_loader import before_fabric
from lightning_ft.distributed import on_rank_zero, rank_and_world_size
from lightning_ft.errors import CheckpointError, ConfigError
from lightning_ft.models.numerics import nonfinite
from lightning_ft.models.unwrap import unwrapped
from lightning_ft.modules.resume import RngState, own_rng_state, set_rng_state

_OPTIMIZER, _LOADERS, _RNG, _VALUES, _BUFFERS = "optimizer", "loaders", "rng", "values", "buffers"


class Positioned(Protocol):
    """A loader whose position can be saved: that of a DataModule of this package, or a `ResumableLoader`."""

    def state_dict(self) -> Any:
        """The position."""

    def load_state_dict(self, state_dict: Any) -> None:
        """Begin the next iteration at a position."""


def save_loop(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    loader: Positioned | None = None,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Save a loop after an optimizer step. Every rank must call it; rank 0 writes.

    The file has the trainable weights, the model's buffers (such as the running statistics of a batch norm), the
    optimizer, the position of the loader, and the random states of Python, NumPy and PyTorch on every rank. Frozen
    weights are left out: load or initialize them in the same way before `load_loop`. Gradients are left out, too: a
    file that is written inside an accumulation window loses those of its micro-batches.

    Args:
        path: File to write; an existing one is replaced once the new one is complete.
        model: Model, or what Fabric or DDP made of it.
        optimizer: Optimizer, or Fabric's wrapper of it.
        loader: Loader of the training batches; it must be a `ResumableLoader` or that of a DataModule of this package.
        values: Tensors and plain values of your own, such as the step or a scheduler's ``state_dict()``.

    Raises:
        ConfigError: If nothing is trainable, the weights are sharded, the loader can't tell its position, or a value
            isn't a tensor or plain, so that `load_loop` would refuse it.
        FileWriteError: On every rank, if the file can't be written.
    """
    module = _unwrapped(model)
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not weights:
        raise ConfigError(f"save_loop: no weight of {type(module).__name__} is trainable, so there is nothing to save.")
    _check_loader(loader, "save_loop")
    _check_plain(values or {})

    def write(states: list[tuple[Any, RngState]]) -> list[None]:
        positions, rng = zip(*states, strict=True)
        own = {
            _BUFFERS: _buffers(module),
            _OPTIMIZER: optimizer.state_dict(),
            _LOADERS: list(positions),
            _RNG: list(rng),
        }
        write_checkpoint({"state_dict": weights, **own, _VALUES: dict(values or {})}, Path(path))
        return [None] * len(states)

    on_rank_zero(write, (None if loader is None else loader.state_dict(), own_rng_state()))


def load_loop(
    path: str | Path, model: nn.Module, optimizer: Optimizer, loader: Positioned | None = None
) -> dict[str, Any]:
    """Restore what :func:`save_loop` saved. Every rank must call it.

    After the last batch of an epoch the position of the loader is the beginning of the next one, so a loop over epochs
    starts at ``loader.state_dict()["epoch"]``, before the first epoch as well as after `load_loop`.

    Args:
        path: Path or URL of the checkpoint.
        model: Model, or what Fabric or DDP made of it, with the same trainable weights.
        optimizer: Optimizer over the same weights.
        loader: Loader of the same batches.

    Returns:
        The values of your own that were saved.

    Raises:
        CheckpointError: If it can't be read, wasn't written by `save_loop`, has other weights than are trainable here
            or weights that aren't finite, is of another optimizer, or of another number of ranks with a loader.
        ConfigError: If the weights are sharded, or the loader can't be set to a position.
    """
    checkpoint, module = read_checkpoint(path), _unwrapped(model)
    _check_loader(loader, "load_loop")
    if missing := {_OPTIMIZER, _LOADERS, _RNG, _VALUES} - checkpoint.keys():
        raise CheckpointError(
            f"The checkpoint {str(path)!r} wasn't written by save_loop: it has no {', '.join(sorted(missing))}. A "
            "Trainer's checkpoint is resumed with ckpt_path=."
        )
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    weights = checkpoint["state_dict"]
    other = {name for name, w in weights.items() if name in trainable and w.shape != trainable[name].shape}
    if unfit := sorted((trainable.keys() ^ weights.keys()) | other):
        raise CheckpointError(
            f"The checkpoint {str(path)!r} doesn't fit {type(module).__name__}: {len(unfit)} weights are trainable "
            f"in only one of them or have another shape (first: {unfit[:2]}). Build the model as in the run that "
            "wrote it."
        )
    if broken := nonfinite(weights.items()):
        raise CheckpointError(
            f"The checkpoint {str(path)!r} has {len(broken)} weights with values that aren't finite (first: "
            f"{broken[0]}): the run had diverged when it was saved. Load an earlier one."
        )
    rank, ranks = rank_and_world_size()
    positions = checkpoint[_LOADERS]
    if loader is not None:
        if positions[0] is None:
            raise CheckpointError(f"The checkpoint {str(path)!r} has no position of a loader: pass it to save_loop.")
        if len(positions) != ranks:
            raise CheckpointError(
                f"The checkpoint {str(path)!r} is of {len(positions)} ranks, and there are {ranks} now, which read "
                "other batches. Start as many, or leave the loader out to begin an epoch."
            )
    try:
        optimizer.load_state_dict(checkpoint[_OPTIMIZER])  # first, so that nothing changes if it does not fit
    except ValueError as error:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} doesn't fit {type(optimizer).__name__}: {error}. Build the optimizer as in "
            "the run that wrote it."
        ) from error
    own = _buffers(module)
    buffers = {name: value for name, value in checkpoint.get(_BUFFERS, {}).items() if name in own}
    module.load_state_dict({**weights, **buffers}, strict=False)
    if loader is not None:
        loader.load_state_dict(positions[rank])
    set_rng_state(checkpoint[_RNG], rank)
    values: dict[str, Any] = checkpoint[_VALUES]
    return values


def _unwrapped(model: nn.Module) -> nn.Module:
    module = unwrapped(model)
    assert isinstance(module, nn.Module)
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ConfigError(
            "The weights are sharded, and a checkpoint of a loop holds whole ones: use fabric.save and fabric.load."
        )
    return module


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to a module's state, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach()
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


def _check_plain(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # of pickle, or of what refuses to be pickled
            raise ConfigError(
                f"save_loop: values[{name!r}] is a {type(value).__name__} or contains something that isn't a tensor or "
                "a plain value, so load_loop would refuse it. Convert it, as float() and str() do."
            ) from error


def _check_loader(loader: object, caller: str) -> None:
    if loader is None or (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        return
    within = before_fabric(loader)
    remedy = (
        f"Pass the {type(within).__name__} that fabric.setup_dataloaders was called with, which can."
        if hasattr(within, "state_dict")
        else "Wrap the DataLoader in ResumableLoader, read batches from that (fabric.to_device moves them, instead of "
        "fabric.setup_dataloaders), and pass it."
    )
    raise ConfigError(f"{caller}: a {type(loader).__name__} can't tell its position. {remedy}")
