"""Exports of a module: folders for transformers and PEFT, their model cards, and uploads to the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule, active_datamodule
from lightning_ft.distributed import on_rank_zero
from lightning_ft.models.adapt import InitialAdapter
from lightning_ft.models.card_facts import CardFacts, TrainingRecord
from lightning_ft.models.export import ExportFormat, card_text, check_export, export, write_card
from lightning_ft.models.gguf_export import GGUFType
from lightning_ft.models.hub import check_hub, upload_export, warn_of_local_base
from lightning_ft.modules.continued_run import refuse_other_method, warn_of_other_rows
from lightning_ft.modules.options import ModelOptions
from lightning_ft.modules.training_record import RECORD, results_of_callbacks, training_record


class ExportedModule(LightningModule):
    """Base of `FineTuning`: exports, and how the weights were trained, which checkpoints keep for the model card."""

    model: Any
    model_options: ModelOptions
    _initial: InitialAdapter | None
    _loaded_record: TrainingRecord | None = None
    _loaded_after: tuple[Any, int] | None = None
    """Trainer, and its step, after which other weights were loaded than those that it had trained."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of exports."""
        raise NotImplementedError

    _fit_data: Any = None
    """DataModule of the last fit, also after a validation or test of other rows; None for loaders."""

    def setup(self, stage: str) -> None:
        """Keep the DataModule whose rows the weights are trained on."""
        super().setup(stage)
        if stage == "fit":
            self._fit_data = active_datamodule(self.trainer)

    def __getstate__(self) -> dict[str, Any]:
        """As in Lightning, which leaves the Trainer out; without its DataModule, too."""
        state: dict[str, Any] = super().__getstate__()
        state.pop("_fit_data", None)
        return state

    # ---------------------------------------------------------------- what the card says

    def record_state(self) -> dict[str, Any]:
        """How the weights have been trained so far, as a checkpoint keeps it; empty if that isn't known."""
        record = self._training_record()
        return {} if record is None else {RECORD: record.to_dict()}

    def load_record(self, state: Mapping[str, Any]) -> None:
        """Restore it from a checkpoint.

        Args:
            state: What a module of this package keeps in a checkpoint.
        """
        found = state.get(RECORD)
        self._loaded_record = TrainingRecord.from_dict(found) if isinstance(found, Mapping) else None
        self._loaded_after = None if self._trainer is None else (self._trainer, self._trainer.global_step)

    def check_continued(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that the run of a checkpoint, whose record is loaded, is the one that a fit is about to continue.

        Args:
            checkpoint: The checkpoint, which Lightning adds the arguments of the DataModule to.

        Raises:
            CheckpointError: In a fit, for a checkpoint of another method.
        """
        if self._trainer is None or self._trainer.state.fn != "fit" or self._loaded_record is None:
            return
        refuse_other_method(self, self._loaded_record)
        saved = checkpoint.get("datamodule_hyper_parameters", {})
        warn_of_other_rows(self._fit_data, self._trainer.world_size, self._loaded_record, saved)

    def _training_record(self) -> TrainingRecord | None:
        trainer = self._trainer
        if trainer is None or not trainer.global_step or self._loaded_after == (trainer, trainer.global_step):
            return self._loaded_record
        return training_record(self, trainer)

    def card_facts(self) -> CardFacts:
        """What a model card can say: how the weights were trained, and what the Trainer's callbacks measured."""
        if self._trainer is None:
            return CardFacts(self._loaded_record)
        return CardFacts(self._training_record(), results_of_callbacks(self._trainer))

    # ---------------------------------------------------------------- exports

    def export(
        self,
        folder: str | Path,
        *,
        merge: bool = False,
        overwrite: bool = False,
        format: ExportFormat = "safetensors",
        gguf_dtype: GGUFType = "f16",
        facts: CardFacts | None = None,
    ) -> Path:
        """Write a folder that plain transformers (and PEFT) load; on several ranks, call it on all of them.

        Args:
            folder: Folder to write.
            merge: Fold an adapter into the base weights; refused where greedy output would change.
            overwrite: Write into a folder that isn't empty.
            format: ``safetensors``, or ``gguf`` for a ``model.gguf`` of llama.cpp, into which an adapter is merged.
            gguf_dtype: Type of the matrices in it: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
            facts: What the model card says about training and measurements; by default :meth:`card_facts`.

        Returns:
            The folder.

        Raises:
            ExportError: If the export would give other output or could not be loaded over its base, or if the folder
                isn't empty.
        """
        self.configure_model()
        return export(
            self.model,
            self.tokenizer,
            folder,
            merge=merge,
            overwrite=overwrite,
            initial=self._initial,
            write=self._writes,
            base_options=self.model_options.card_options(),
            format=format,
            gguf_dtype=gguf_dtype,
            facts=self.card_facts() if facts is None else facts,
        )

    def check_export(
        self, *, merge: bool = False, format: ExportFormat = "safetensors", gguf_dtype: GGUFType = "f16"
    ) -> None:
        """Refuse an export that would fail, as far as that is known before training; call it on all ranks.

        Args:
            merge: Whether the adapter will be folded into the base weights.
            format: Format of the export, as in :meth:`export`.
            gguf_dtype: Type of the matrices in a ``model.gguf``.

        Raises:
            ExportError: With what to do instead.
        """
        self.configure_model()
        tokenizer = self.tokenizer if format == "gguf" else None
        check_export(
            self.model,
            merge=merge,
            initial=self._initial,
            format=format,
            tokenizer=tokenizer,
            gguf_dtype=gguf_dtype,
        )

    def write_card(self, folder: str | Path, *, merge: bool = False, facts: CardFacts | None = None) -> None:
        """Write the model card of an export again, when more has been measured; call it on all ranks.

        Args:
            folder: Folder of an export of these weights.
            merge: Whether an adapter was folded into the base weights.
            facts: What the card says about training and measurements; by default :meth:`card_facts`.
        """
        card = self.card_text(Path(folder).name, merge=merge, facts=facts)
        if self._writes:
            write_card(folder, card)

    def card_text(self, name: str, *, merge: bool = False, facts: CardFacts | None = None) -> str:
        """Text of the model card of an export of these weights; call it on all ranks.

        Args:
            name: Name or folder that the card's code loads the export from.
            merge: Whether an adapter was folded into the base weights.
            facts: What the card says about training and measurements; by default :meth:`card_facts`.
        """
        return card_text(
            name,
            self.model,
            self.tokenizer,
            merge=merge,
            base_options=self.model_options.card_options(),
            facts=self.card_facts() if facts is None else facts,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        merge: bool = False,
        private: bool = True,
        hub_overwrite: bool = False,
        facts: CardFacts | None = None,
    ) -> str:
        """Export to the Hugging Face hub, as safetensors, in one commit; on several ranks, call it on all of them.

        Args:
            repo_id: Repository, such as ``organization/name``; created if it doesn't exist.
            merge: Fold an adapter into the base weights; refused where greedy output would change.
            private: Whether the repository is private; an existing public one is refused.
            hub_overwrite: Commit over the files of a repository that isn't empty.
            facts: What the model card says about training and measurements; by default :meth:`card_facts`.

        Returns:
            Address of the repository; an empty string on ranks other than 0.

        Raises:
            HubError: If the upload is refused (offline, no token, a repository with files) or fails.
            ExportError: As :meth:`export`.
        """

        def check(ranks: list[None]) -> list[None]:
            check_hub(repo_id, private=private, overwrite=hub_overwrite)
            return ranks

        on_rank_zero(check, None)
        self.configure_model()
        # All ranks communicate for it, which they couldn't after a failure on one of them.
        card = self.card_text(repo_id, merge=merge, facts=facts)
        with TemporaryDirectory() as folder:
            path = self.export(Path(folder) / "export", merge=merge, facts=facts)
            return self._upload(path, repo_id, card, merge=merge, private=private, overwrite=hub_overwrite, kept=False)

    def upload(
        self,
        folder: str | Path,
        repo_id: str,
        *,
        merge: bool = False,
        private: bool = True,
        hub_overwrite: bool = False,
        facts: CardFacts | None = None,
    ) -> str:
        """Upload a folder that :meth:`export` wrote from these weights, with a card that names the repository.

        Args:
            folder: Folder of the export.
            repo_id: Repository; created if it doesn't exist.
            merge: Whether an adapter was folded into the base weights.
            private: Whether the repository is private; an existing public one is refused.
            hub_overwrite: Commit over the files of a repository that isn't empty.
            facts: What the model card says about training and measurements; by default :meth:`card_facts`.

        Returns:
            Address of the repository; an empty string on ranks other than 0.

        Raises:
            HubError: If the upload is refused or fails; the folder stays as it is.
        """
        card = self.card_text(repo_id, merge=merge, facts=facts)
        return self._upload(folder, repo_id, card, merge=merge, private=private, overwrite=hub_overwrite)

    def _upload(self, folder: str | Path, repo_id: str, card: str, *, merge: bool, **options: bool) -> str:
        if not self._writes:
            return ""
        warn_of_local_base(self.model, repo_id, merge=merge)
        return upload_export(folder, repo_id, card=card, **options)

    @property
    def _writes(self) -> bool:
        return self._trainer is None or self._trainer.is_global_zero
