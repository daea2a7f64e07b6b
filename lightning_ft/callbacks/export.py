"""Exports the weights at the end of training as folders that transformers and PEFT can load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, Trainer
from lightning_ft.callbacks.base import EndOfTraining, first_over_ranks
from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError, ExportError
from lightning_ft.models.adapter_export import check_adapter_is_whole_update
from lightning_ft.models.export import ExportFormat, check_export, check_folder, export
from lightning_ft.models.gguf_export import GGUFType
from lightning_ft.models.shard import is_sharded
from lightning_ft.models.unwrap import required_model
from lightning_ft.modules.base import FineTuning


class ExportModel(EndOfTraining):
    """Export the final weights to ``last/`` and those of the best checkpoint to ``best/``.

    The final weights are those after weight averaging, whatever the order of the callbacks. The best checkpoint is that
    of the Trainer's ModelCheckpoint; without a ``monitor`` there is none. If an export fails, the error is raised after
    all other work at the end of training is done.

    Args:
        output: Folder to write exports to; ``export/`` in the logger's folder by default.
        merge: Whether to merge the adapter into the base weights; refused if this would change greedy output.
        best: Whether to export the best checkpoint too.
        overwrite: Whether to write into folders that aren't empty.
        format: ``safetensors``, or ``gguf`` for a ``model.gguf`` of llama.cpp, into which an adapter is merged.
        gguf_dtype: Type of the matrices in it: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        tokenizer: Tokenizer to export with the model of a module that isn't this package's; by default the module's
            `tokenizer`.

    Raises:
        ConfigError: Before training, for a module without a transformers or PEFT model as its `model`, or without a
            tokenizer.
        ExportError: Before training, if a folder isn't empty or the adapter can't be exported with these options;
            after training, if an export failed.

    Example:
        >>> ExportModel("out", merge=True).merge
        True
    """

    finish_order: ClassVar[int] = 1

    def __init__(
        self,
        output: str | None = None,
        *,
        merge: bool = False,
        best: bool = True,
        overwrite: bool = False,
        format: ExportFormat = "safetensors",
        gguf_dtype: GGUFType = "f16",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.output, self.merge, self.best, self.overwrite = output, merge, best, overwrite
        self.tokenizer, self.format, self.gguf_dtype = tokenizer, format, gguf_dtype
        self.exported: dict[str, Path] = {}
        self.error: ExportError | None = None
        """Error of the first export that failed; None if none failed."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before training that the exports are possible."""
        if isinstance(pl_module, FineTuning):
            pl_module.check_export(merge=self.merge, format=self.format)
        else:
            model = required_model(pl_module, "ExportModel", ConfigError)
            check_export(model, merge=self.merge, format=self.format)
            if isinstance(model, PeftModel) and not self.merge and self.format == "safetensors":
                check_adapter_is_whole_update(model)
            self._tokenizer(pl_module)
        self.error = None
        folder, reason = self._folder(trainer), None
        if trainer.is_global_zero:
            try:
                for part in ("last", "best"):
                    check_folder(folder / part, overwrite=self.overwrite)
            except ExportError as error:
                reason = str(error)
        if (
            reason := first_over_ranks(reason)
        ) is not None:  # raised on all ranks, since the others would wait for this one
            raise ExportError(reason)

    def finish(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the final weights, while they are still on their devices."""
        self._try(trainer, "last", lambda: self._export(trainer, pl_module, "last"))

    def finish_fit(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the best checkpoint, after every ModelCheckpoint has saved its last one."""
        checkpoint = trainer.checkpoint_callback
        path = getattr(checkpoint, "best_model_path", "") if getattr(checkpoint, "monitor", None) else ""
        if not self.best or not path:
            return
        if is_sharded(pl_module):
            rank_zero_info(
                f"The best checkpoint of a sharded model isn't exported. Run `lightning-ft export` with {path}"
            )
            return
        self._try(trainer, "best", lambda: self._export_best(trainer, pl_module, path))

    def _try(self, trainer: Trainer, part: str, work: Callable[[], None]) -> None:
        what = f"The {part} weights were not exported to {self._folder(trainer) / part}"
        if (reason := self.attempt(what, work)) is not None and self.error is None:
            self.error = ExportError(f"{what}: {reason}")

    def _export_best(self, trainer: Trainer, module: LightningModule, path: str) -> None:
        if not trainer.is_global_zero:
            return
        final = {n: p.detach().cpu().clone() for n, p in module.named_parameters() if p.requires_grad}
        best = read_checkpoint(path)["state_dict"]
        try:
            module.load_state_dict(best, strict=False)
            self._export(trainer, module, "best")
        finally:
            module.load_state_dict(final, strict=False)

    def _export(self, trainer: Trainer, module: LightningModule, part: str) -> None:
        folder = self._folder(trainer) / part
        options: dict[str, Any] = {
            "merge": self.merge,
            "overwrite": self.overwrite,
            "format": self.format,
            "gguf_dtype": self.gguf_dtype,
        }
        if isinstance(module, FineTuning):
            self.exported[part] = module.export(folder, **options)
        else:
            self.exported[part] = export(
                required_model(module, "ExportModel", ConfigError),
                self._tokenizer(module),
                folder,
                write=trainer.is_global_zero,
                **options,
            )
        rank_zero_info(f"Exported the {part} weights to {folder}")

    def _tokenizer(self, module: LightningModule) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer if self.tokenizer is not None else getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(
                f"ExportModel found no tokenizer in {type(module).__name__}: pass tokenizer=, or assign it to the "
                "module's `tokenizer` attribute, since an exported folder needs one."
            )
        return tokenizer

    def _folder(self, trainer: Trainer) -> Path:
        if self.output is not None:
            return Path(self.output)
        return Path(trainer.log_dir or trainer.default_root_dir) / "export"
