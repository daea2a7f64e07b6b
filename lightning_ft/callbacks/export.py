"""Exports the weights at the end of training as folders that transformers and PEFT can load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, Trainer
from lightning_ft.callbacks.base import EndOfTraining, callbacks_of, first_over_ranks, is_dev_run, is_trainer
from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError, ExportError
from lightning_ft.models.adapter_export import check_adapter_is_whole_update
from lightning_ft.models.card_facts import CardFacts, TrainingRecord
from lightning_ft.models.export import ExportFormat, card_text, check_export, check_folder, export, write_card
from lightning_ft.models.gguf_export import GGUFType
from lightning_ft.models.hub import check_hub, upload_export, warn_of_local_base
from lightning_ft.models.shard import is_sharded
from lightning_ft.models.unwrap import known_tokenizer, required_model, required_tokenizer
from lightning_ft.modules.base import FineTuning
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.training_record import RECORD, facts_of_run
from lightning_ft.run_checkpoints import by_metric, run_folder


class ExportModel(EndOfTraining):
    """Export the final weights to ``last/`` and those of the best checkpoint to ``best/``.

    The final weights are those after weight averaging, whatever the order of the callbacks. The best checkpoint is that
    of the Trainer's ModelCheckpoint with a ``monitor``; without one there is none. If an export fails, the error is
    raised after all other work at the end of training is done. The model card has what TokenSavings and Retention
    measured with the exported weights. With `fast_dev_run`, exports go to a temporary folder that is removed, and
    nothing is uploaded.

    With Fabric, pass `output` and `tokenizer`, put it after the callbacks that measure, and call
    ``fabric.call("on_train_start", fabric, model)`` before the loop and ``fabric.call("on_train_end", fabric, model)``
    after it. The final weights are exported; if that fails, a warning says so and `error` is set.

    Args:
        output: Folder to write exports to; ``export/`` in the logger's folder by default.
        merge: Whether to merge the adapter into the base weights; refused if this would change greedy output.
        best: Whether to export the best checkpoint too.
        overwrite: Whether to write into folders that aren't empty.
        format: ``safetensors``, or ``gguf`` for a ``model.gguf`` of llama.cpp, into which an adapter is merged.
        gguf_dtype: Type of the matrices in it: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        tokenizer: Tokenizer to export with the model of a module that isn't this package's; by default the module's
            `tokenizer`.
        push_to_hub: Repository on the Hugging Face hub, such as ``organization/name``, to which the best weights are
            uploaded, or the final ones if there are no best ones; None for no upload. If the upload fails, a warning
            says so, and the exports stay where they are.
        private: Whether the repository is private; an existing public one is refused.
        hub_overwrite: Whether to commit over the files of a repository that isn't empty.

    Raises:
        ConfigError: Before training, for a module without a transformers or PEFT model as its `model`, or without a
            tokenizer, for ModelCheckpoints that monitor different metrics, each of which has a best checkpoint, and for
            two ExportModel callbacks with one folder.
        ExportError: Before training, if a folder isn't empty or the adapter can't be exported with these options;
            after training, if an export failed.
        HubError: Before training, if an upload would be refused: offline, no token, or a repository with files.

    Example:
        >>> ExportModel("out", merge=True).merge
        True
    """

    finish_order: ClassVar[int] = 1

    def __init__(
        self,
        output: str | Path | None = None,
        *,
        merge: bool = False,
        best: bool = True,
        overwrite: bool = False,
        format: ExportFormat = "safetensors",
        gguf_dtype: GGUFType = "f16",
        tokenizer: PreTrainedTokenizerBase | None = None,
        push_to_hub: str | None = None,
        private: bool = True,
        hub_overwrite: bool = False,
    ) -> None:
        super().__init__()
        if output is not None and not isinstance(output, (str, Path)):
            raise ConfigError(f"ExportModel: output={output!r}: expected the path of a folder.")
        self.push_to_hub, self.private, self.hub_overwrite = push_to_hub, private, hub_overwrite
        self.output, self.merge, self.best, self.overwrite = output, merge, best, overwrite
        self.tokenizer, self.format, self.gguf_dtype = tokenizer, format, gguf_dtype
        self.exported: dict[str, Path] = {}
        self.uploaded: str | None = None
        """Address of the repository after an upload."""
        self.error: ExportError | None = None
        """Error of the first export that failed; None if none failed."""
        self._hub_cards: dict[str, str] = {}
        self._dev_folder: TemporaryDirectory[str] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before training that the exports are possible."""
        self._check(trainer, pl_module)

    def on_train_start(self, trainer: Any = None, pl_module: Any = None) -> None:
        """With Fabric, check that the export is possible; a Trainer has called `on_fit_start`.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            ConfigError: With Fabric, for a missing `output` or `tokenizer`, and for `push_to_hub`.
        """
        if is_trainer(trainer):
            return
        if self.output is None or self.push_to_hub is not None:
            raise ConfigError(
                "With Fabric, ExportModel exports the final weights to a folder: pass output=, and no push_to_hub=. "
                "lightning_ft.models.hub.upload_export uploads the folder."
            )
        self._check(trainer, pl_module)

    def _check(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(pl_module, FineTuning):
            pl_module.check_export(merge=self.merge, format=self.format, gguf_dtype=self.gguf_dtype)
        else:
            model = self._model(pl_module)
            tokenizer = self._tokenizer(pl_module)
            check_export(model, merge=self.merge, format=self.format, tokenizer=tokenizer, gguf_dtype=self.gguf_dtype)
            if isinstance(model, PeftModel) and not self.merge and self.format == "safetensors":
                check_adapter_is_whole_update(model)
        if is_trainer(trainer):
            self._refuse_shared_folder(trainer)
            if self.best:
                _refuse_several_metrics(trainer)
        self.error, self.uploaded = None, None
        self._forget()
        folder, reason, refused = self._folder(trainer), None, ExportError
        if trainer.is_global_zero:
            try:
                for part in ("last", "best"):
                    check_folder(folder / part, overwrite=self.overwrite)
                if self.push_to_hub is not None:
                    check_hub(self.push_to_hub, private=self.private, overwrite=self.hub_overwrite, format=self.format)
                    warn_of_local_base(self._model(pl_module), self.push_to_hub, merge=self.merge)
            except ExportError as error:
                reason, refused = str(error), type(error)
        if (
            reason := first_over_ranks(reason)
        ) is not None:  # raised on all ranks, since the others would wait for this one
            raise refused(reason)

    def finish(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the final weights, while they are still on their devices."""
        self._try(trainer, "last", lambda folder: self._export(trainer, pl_module, folder))

    def after_measurements(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the card of the final weights again, with what was measured of them."""
        if "last" not in self.exported or self.format != "safetensors":
            return
        self.attempt(
            f"The model card in {self.exported['last']} lacks the results",
            lambda: self._write_card(trainer, pl_module),
        )

    def finish_fit(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the best checkpoint, after every ModelCheckpoint has saved its last one, and upload."""
        path = next((path for each in _monitoring(trainer) if (path := getattr(each, "best_model_path", ""))), "")
        if self.best and path and is_sharded(pl_module):
            rank_zero_info(
                f"The best checkpoint of a sharded model isn't exported. Run `lightning-ft export` with {path}"
            )
        elif self.best and path:
            self._try(trainer, "best", lambda folder: self._export_best(trainer, pl_module, folder, path))
        if is_dev_run(trainer):
            self._forget()
        elif self.push_to_hub is not None and self.exported and self.error is None:
            self.attempt(f"There was no upload to {self.push_to_hub!r}", lambda: self._upload(trainer))

    def _try(self, trainer: Trainer, part: str, work: Callable[[Path], None]) -> None:
        folder = self._folder(trainer) / part  # ranks communicate for it, and rank 0 alone exports the best weights
        if is_dev_run(trainer):
            self._dev_folder = self._dev_folder or TemporaryDirectory()
            folder = Path(self._dev_folder.name) / part
        what = f"The {part} weights were not exported to {folder}"
        if (reason := self.attempt(what, lambda: work(folder))) is not None and self.error is None:
            self.error = ExportError(f"{what}: {reason}")
        if reason is not None:
            self.exported.pop(part, None)  # only the rank that writes may have failed: the others would wait for it

    def _forget(self) -> None:
        """Forget the exports of this fit or an earlier one, and remove those of `fast_dev_run`."""
        if self._dev_folder is not None:
            self._dev_folder.cleanup()
        self._dev_folder, self.exported = None, {}

    def _export_best(self, trainer: Trainer, module: LightningModule, folder: Path, path: str) -> None:
        if not trainer.is_global_zero:
            return
        best = read_checkpoint(path)
        final = {n: v.detach().cpu().clone() for n, v in module.state_dict().items() if n in best["state_dict"]}
        try:
            module.load_state_dict(best["state_dict"], strict=False)
            facts = facts_of_run(module, trainer)
            record = best.get(STATE, {}).get(RECORD)  # None where the steps of these weights aren't known
            facts = replace(facts, training=None if record is None else TrainingRecord.from_dict(record))
            self._export(trainer, module, folder, facts)
        finally:
            module.load_state_dict(final, strict=False)

    def _export(self, trainer: Trainer, module: LightningModule, folder: Path, facts: CardFacts | None = None) -> None:
        part, facts = folder.name, facts or facts_of_run(module, trainer)
        options: dict[str, Any] = {
            "merge": self.merge,
            "overwrite": self.overwrite,
            "format": self.format,
            "gguf_dtype": self.gguf_dtype,
            "facts": facts,
        }
        self._keep_hub_card(module, part, facts)  # all ranks communicate for it; one that can't write doesn't later
        if isinstance(module, FineTuning):
            self.exported[part] = module.export(folder, **options)
        else:
            self.exported[part] = export(
                self._model(module), self._tokenizer(module), folder, write=trainer.is_global_zero, **options
            )
        rank_zero_info(f"Exported the {part} weights to {folder}")

    def _write_card(self, trainer: Trainer, module: LightningModule) -> None:
        facts = facts_of_run(module, trainer)
        self._keep_hub_card(module, "last", facts)
        card = self._card(module, "last", facts)
        if trainer.is_global_zero:
            write_card(self.exported["last"], card)

    def _keep_hub_card(self, module: LightningModule, part: str, facts: CardFacts) -> None:
        """Keep the card of the weights that the module has now, with the repository's name, for the upload."""
        if self.push_to_hub is not None:
            self._hub_cards[part] = self._card(module, self.push_to_hub, facts)

    def _card(self, module: LightningModule, name: str, facts: CardFacts) -> str:
        base_options = module.model_options.card_options() if isinstance(module, FineTuning) else None
        model, tokenizer = self._model(module), self._tokenizer(module)
        return card_text(name, model, tokenizer, merge=self.merge, base_options=base_options, facts=facts)

    def _upload(self, trainer: Trainer) -> None:
        part = "best" if "best" in self.exported else "last"
        if not trainer.is_global_zero or self.push_to_hub is None:
            return
        self.uploaded = upload_export(
            self.exported[part],
            self.push_to_hub,
            card=self._hub_cards[part],
            private=self.private,
            overwrite=self.hub_overwrite,
        )
        rank_zero_info(f"Uploaded the {part} weights to {self.uploaded}")

    def _model(self, module: LightningModule) -> PreTrainedModel | PeftModel:
        return required_model(module, "ExportModel", ConfigError)

    def _tokenizer(self, module: LightningModule) -> PreTrainedTokenizerBase:
        if known_tokenizer(self.tokenizer, module) is None:
            raise ConfigError(
                f"ExportModel found no tokenizer in {type(module).__name__}: pass tokenizer=, or assign it to the "
                "module's `tokenizer` attribute, since an exported folder needs one."
            )
        return required_tokenizer(self.tokenizer, module, "ExportModel", ConfigError)

    def _refuse_shared_folder(self, trainer: Trainer) -> None:
        """Refuse another ExportModel with the same folder, whose export would replace this one's."""
        folder = self._folder(trainer).absolute()
        others = [each for each in callbacks_of(trainer) if isinstance(each, ExportModel) and each is not self]
        if any(each._folder(trainer).absolute() == folder for each in others):
            raise ConfigError(
                f"Two ExportModel callbacks export to {str(self._folder(trainer))!r}, and one would replace the files "
                "of the other. Pass a different output= to each."
            )

    def _folder(self, trainer: Trainer) -> Path:
        if self.output is not None:
            return Path(self.output)
        return run_folder(trainer) / "export"


def _monitoring(trainer: Any) -> list[Any]:
    """ModelCheckpoints with a ``monitor``; others, such as those to resume from, know no best checkpoint."""
    return by_metric(trainer.checkpoint_callbacks, lambda each: getattr(each, "monitor", None))


def _refuse_several_metrics(trainer: Any) -> None:
    """Refuse ModelCheckpoints whose best checkpoints are best by different metrics."""
    metrics = dict.fromkeys(each.monitor for each in _monitoring(trainer))
    if len(metrics) > 1:
        raise ConfigError(
            "ExportModel exports one best checkpoint, but the ModelCheckpoints monitor "
            f"{' and '.join(map(repr, metrics))}: leave out all but one, or pass best=False to export the final "
            "weights only."
        )
