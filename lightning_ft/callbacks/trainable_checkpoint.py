"""Checkpoints that contain trained weights only, for any LightningModule."""

from __future__ import annotations

from typing import Any

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.callbacks.base import callbacks_of, is_trainer
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import CheckpointError, ConfigError

_KEY = "lightning_ft_trainable"
"""Key under which a checkpoint names the weights that it leaves out."""


class TrainableCheckpoint(Callback):
    """Leaves frozen weights out of a module's checkpoints, and loads such checkpoints for a resumed run.

    A checkpoint of a LoRA adapter is then as large as the adapter, not as the model: the frozen weights are those that
    the module loads anyway. Buffers are kept, and so are weights that were trained first and frozen later. It works in
    any LightningModule; the modules of this package do it by themselves. Outside of a Trainer, pass ``strict=False``:
    ``MyModule.load_from_checkpoint(path, strict=False)``.

    Raises:
        CheckpointError: For a checkpoint that lacks a weight that is trained now.
        ConfigError: If nothing of the module is frozen, and with Fabric.

    Example:
        >>> callback = TrainableCheckpoint()
    """

    def __init__(self) -> None:
        super().__init__()
        self._trained: set[str] = set()
        """Names of weights that have required a gradient, or were in a loaded checkpoint, also if they are frozen."""

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
        if not _names(pl_module) - _trainable_names(pl_module):
            raise ConfigError(
                f"TrainableCheckpoint: no weight of {type(pl_module).__name__} is frozen, so there is nothing to leave "
                "out. Freeze the base (requires_grad_(False)) before training, or leave the callback out."
            )
        left_out = self._left_out(pl_module)
        size = sum(p.numel() * p.element_size() for name, p in pl_module.named_parameters() if name in left_out)
        rank_zero_info(f"Checkpoints leave out {len(left_out):,} frozen weights, {size / 2**20:,.1f} MiB.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse Fabric, whose checkpoints callbacks don't see.

        Raises:
            ConfigError: With Fabric.
        """
        if not is_trainer(trainer):
            raise ConfigError(
                "TrainableCheckpoint needs a Trainer: fabric.save would write all weights. In a loop of your own, use "
                "save_loop and load_loop of lightning_ft.modules.loop_checkpoint."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Remember the weights that this step may change: some may be frozen later."""
        self._trained |= _trainable_names(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Remember the trained weights of modules whose own optimizer steps Lightning doesn't see."""
        self._trained |= _trainable_names(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remove weights that were never trained from the checkpoint."""
        left_out = self._left_out(pl_module)
        weights = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if name not in left_out}
        checkpoint[_KEY] = sorted(left_out & set(weights))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has every trainable weight, and none that the module doesn't know.

        Raises:
            CheckpointError: If it doesn't fit.
        """
        # the next checkpoint needs them too, since the module can't load them from elsewhere
        self._trained |= _names(pl_module) - set(checkpoint.get(_KEY, ()))
        weights = set(checkpoint.get("state_dict", {}))
        if not weights:  # a sharding strategy loads them itself
            return
        own = set(pl_module.state_dict())
        missing, unknown = sorted((_trainable_names(pl_module) & own) - weights), sorted(weights - own)
        if missing or unknown:
            raise CheckpointError(
                f"The checkpoint doesn't fit {type(pl_module).__name__}: it lacks {len(missing)} weights that are "
                f"trained (first: {missing[:2]}), and {len(unknown)} of its weights don't exist here (first: "
                f"{unknown[:2]}). Build the module as in the run that wrote it."
            )

    def _left_out(self, module: LightningModule) -> set[str]:
        """Names of the weights that were never trained."""
        return _names(module) - _trainable_names(module) - self._trained


def _names(module: LightningModule) -> set[str]:
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


def _trainable_names(module: LightningModule) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
