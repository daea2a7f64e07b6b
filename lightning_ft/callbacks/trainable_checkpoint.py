"""Checkpoints that contain trainable weights only, for any LightningModule."""

from __future__ import annotations

from typing import Any

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.callbacks.base import callbacks_of
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import CheckpointError, ConfigError

_KEY = "lightning_ft_trainable"
"""Key under which a checkpoint names the weights that it leaves out."""


class TrainableCheckpoint(Callback):
    """Leaves frozen weights out of a module's checkpoints, and loads such checkpoints for a resumed run.

    A checkpoint of a LoRA adapter is then as large as the adapter, not as the model: the frozen weights are those that
    the module loads anyway. Buffers are kept. It works in any LightningModule; the modules of this package do it by
    themselves. Outside of a Trainer, pass ``strict=False``: ``MyModule.load_from_checkpoint(path, strict=False)``.

    Raises:
        CheckpointError: For a checkpoint that lacks a weight that is trained now.
        ConfigError: If nothing of the module is frozen.

    Example:
        >>> callback = TrainableCheckpoint()
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning load checkpoints that lack weights; this callback checks which ones."""
        pl_module.strict_loading = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without frozen weights, whose checkpoints would not become smaller.

        Raises:
            ConfigError: If nothing is frozen, and for weight averaging.
        """
        if any(type(c).__name__.endswith("WeightAveraging") for c in callbacks_of(trainer)):
            raise ConfigError(
                "TrainableCheckpoint can't be used with WeightAveraging, which saves and loads all weights: leave one "
                "of them out, or use a module of this package, whose checkpoints average trainable weights only."
            )
        frozen = _frozen_names(pl_module)
        if not frozen:
            raise ConfigError(
                f"TrainableCheckpoint: no weight of {type(pl_module).__name__} is frozen, so there is nothing to leave "
                "out. Freeze the base (requires_grad_(False)) before training, or leave the callback out."
            )
        left_out = sum(p.numel() * p.element_size() for p in pl_module.parameters() if not p.requires_grad)
        rank_zero_info(f"Checkpoints leave out {len(frozen):,} frozen weights, {left_out / 2**20:,.1f} MiB.")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remove frozen weights from the checkpoint."""
        frozen = _frozen_names(pl_module)
        weights = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if name not in frozen}
        checkpoint[_KEY] = sorted(frozen & set(weights))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has every trainable weight, and none that the module doesn't know.

        Raises:
            CheckpointError: If it doesn't fit.
        """
        weights = set(checkpoint.get("state_dict", {}))
        if not weights:  # a sharding strategy loads them itself
            return
        trained = {name for name, p in pl_module.named_parameters(remove_duplicate=False) if p.requires_grad}
        own = set(pl_module.state_dict())
        missing, unknown = sorted((trained & own) - weights), sorted(weights - own)
        if missing or unknown:
            raise CheckpointError(
                f"The checkpoint doesn't fit {type(pl_module).__name__}: it lacks {len(missing)} weights that are "
                f"trained (first: {missing[:2]}), and {len(unknown)} of its weights don't exist here (first: "
                f"{unknown[:2]}). Build the module as in the run that wrote it."
            )


def _frozen_names(module: LightningModule) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
