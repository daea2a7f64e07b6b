"""Folders that plain transformers and PEFT load, written when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.errors import ConfigError
from lightning_ft.models.export import check_folder
from lightning_ft.models.shard import is_sharded
from lightning_ft.modules.base import FineTuning


class ExportModel(Callback):
    """Export the final weights to ``last/`` and those of the best checkpoint to ``best/``.

    Which checkpoint is best is what the Trainer's ModelCheckpoint monitors; without ``monitor`` there is none.

    Args:
        output: Folder for both; by default ``export/`` in the logger's folder.
        merge: Fold an adapter into the base weights; refused where greedy output would change.
        best: Export the best checkpoint too.
        overwrite: Write into folders that aren't empty.

    Raises:
        ConfigError: Before training, for a module that can't be exported.
        ExportError: Before training, if a folder isn't empty or the adapter can't be exported like this.

    Example:
        >>> ExportModel("out", merge=True).merge
        True
    """

    def __init__(
        self, output: str | None = None, *, merge: bool = False, best: bool = True, overwrite: bool = False
    ) -> None:
        super().__init__()
        self.output, self.merge, self.best, self.overwrite = output, merge, best, overwrite
        self.exported: dict[str, Path] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what would fail after it."""
        if not isinstance(pl_module, FineTuning):
            raise ConfigError(
                f"ExportModel can't export {type(pl_module).__name__}: it isn't a module of lightning_ft."
            )
        pl_module.check_export(merge=self.merge)
        folder = self._folder(trainer)
        for part in ("last", "best"):
            if trainer.is_global_zero:
                check_folder(folder / part, overwrite=self.overwrite)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the final weights, while they are still on their devices."""
        self._export(trainer, pl_module, "last")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the best checkpoint, after every ModelCheckpoint has saved its last one."""
        checkpoint: Any = trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") if getattr(checkpoint, "monitor", None) else ""
        if not self.best or not path or not trainer.is_global_zero:
            return
        if is_sharded(pl_module):
            rank_zero_info(f"The best checkpoint of a sharded model is exported with `lightning-ft export`: {path}")
            return
        final = {n: p.detach().cpu().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        best = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        try:
            pl_module.load_state_dict(best, strict=False)
            self._export(trainer, pl_module, "best")
        finally:
            pl_module.load_state_dict(final, strict=False)

    def _export(self, trainer: Trainer, module: FineTuning, part: str) -> None:
        folder = self._folder(trainer) / part
        self.exported[part] = module.export(folder, merge=self.merge, overwrite=self.overwrite)
        rank_zero_info(f"Exported the {part} weights to {folder}")

    def _folder(self, trainer: Trainer) -> Path:
        if self.output is not None:
            return Path(self.output)
        return Path(trainer.log_dir or trainer.default_root_dir) / "export"
