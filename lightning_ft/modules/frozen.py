"""Supervised steps that begin at the lowest trained layer, the output of those below being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.module import RowDataModule
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import input_device
from lightning_ft.modules.supervised import SupervisedFineTuning
from lightning_ft.modules.trunk import TrunkCache, TrunkReader
from lightning_ft.rank_zero import rank_zero_info


class FrozenTrunkFineTuning(SupervisedFineTuning):
    """Keeps what the frozen layers give for each row, where a subclass is asked to.

    In a loop of one's own `training_step` does the same as under a Trainer; call `on_train_epoch_end` at the end of an
    epoch to write what is still in memory.
    """

    _trunk_cache: TrunkCache | None = None
    _reader: TrunkReader | None = None

    @property
    def trunk_flops(self) -> int:
        """Operations that computing the frozen layers' output took so far, beside those of the training steps."""
        return 0 if self._reader is None else self._reader.flops

    def on_train_start(self) -> None:
        """As in `SupervisedFineTuning`, and say what will be written to disk.

        Raises:
            ModelError: Where what the frozen layers give isn't the same every time.
            ConfigError: Where it takes more room than there is.
        """
        super().on_train_start()
        if self._trunk_cache is None:
            return
        if getattr(self, "_device_mesh", None) is not None:
            raise ConfigError("trunk_cache: a sharded model can't pass over layers; use DDP, or train without it.")
        with self.trainer.precision_plugin.forward_context():
            reader = self._trunk_reader(self._trunk_cache)
        data = getattr(self.trainer, "datamodule", None)
        report = data.report.get("train") if isinstance(data, RowDataModule) else None
        reader.announce(None if report is None else sum(report.lengths))

    def _trunk_reader(self, cache: TrunkCache) -> TrunkReader:
        if self._reader is None:
            if self._own_loss.router:
                raise ConfigError(
                    "trunk_cache passes over layers whose routers are part of the router's loss that the model asks "
                    "for: set output_router_logits=False in its configuration, or train without trunk_cache."
                )
            scorer, kind = self._required_scorer(), input_device(self.model).type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self._reader = TrunkReader(self.model, cache, scorer, autocast=autocast)
        return self._reader

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """As in `SupervisedFineTuning`, from the lowest trained layer on where the others' output is kept."""
        if self._trunk_cache is None:
            return super().training_step(batch, batch_idx)
        with self._trunk_reader(self._trunk_cache).around(batch):
            return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Write what was kept in memory, so that other ranks and later runs find it."""
        if self._reader is not None:
            self._reader.flush()
            if self._trainer is not None:
                self.trainer.strategy.barrier()  # all ranks have written by the time that one looks
            self._reader.end_epoch(self.current_epoch)

    def on_train_end(self) -> None:
        """Write what was kept in memory, and say how often it was read."""
        if self._reader is not None:
            self._reader.flush()
            rank_zero_info(
                f"Frozen trunk: {self._reader.read:,} rows were read, {self._reader.computed:,} had to be computed."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `SupervisedFineTuning`; states are written too, so that a resumed run finds them."""
        super().on_save_checkpoint(checkpoint)
        if self._reader is not None:
            self._reader.flush()
