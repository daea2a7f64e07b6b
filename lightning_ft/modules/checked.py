"""When it is asked whether rows, tokenizer and model fit each other: before the first step, or else in every batch."""

from __future__ import annotations

from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lightning_ft._lightning import LightningModule
from lightning_ft.data.module import RowDataModule
from lightning_ft.errors import TokenizerError
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import load_tokenizer
from lightning_ft.models.vocabulary import check_special_tokens
from lightning_ft.modules.checks import (
    check_batch,
    check_prompts,
    check_rows,
    tell_other_vocabulary,
    tell_untrained,
)


class CheckedRows(LightningModule):
    """Base of `FineTuning`: refuses rows that its model can't read, see `lightning_ft.modules.checks`.

    The rows of a DataModule of this package are all looked at when a run starts; of another loader each batch is.
    """

    model: Any
    _hyper: dict[str, Any]
    _checked: Any = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What rows are encoded with."""
        raise NotImplementedError

    def _base_name(self) -> str:
        raise NotImplementedError

    @property
    def _generation(self) -> dict[str, Any]:
        """How `predict` answers."""
        return {"max_new_tokens": 64, "do_sample": False, **(self._hyper["generation"] or {})}

    @property
    def _new_tokens(self) -> int:
        """Most tokens that training samples after each row."""
        return 0

    def _row_data(self) -> RowDataModule | None:
        data = None if self._trainer is None else cast(Any, self._trainer).datamodule
        return data if isinstance(data, RowDataModule) else None

    def _check_rows(self, model: CausalLM) -> None:
        """Refuse a tokenizer and rows that the model can't read, before anything is computed from them."""
        check_special_tokens(model, self.tokenizer)
        data = self._row_data()
        seen = None if data is None else (data, frozenset(data.splits.encoded))
        if data is not None and seen != self._checked:
            check_rows(model, data.tokenizer, data.splits, new_tokens=self._new_tokens)
            self._checked = seen

    def _tell_misfits(self) -> None:
        """Warn of a tokenizer that isn't the model's, and of tokens that nothing trains."""
        name = self._base_name() or getattr(base_of(self.model).config, "_name_or_path", None)
        try:
            own = load_tokenizer(name, trust_remote_code=self._hyper["trust_remote_code"]) if name else None
        except TokenizerError:  # a checkpoint without one
            own = None
        tell_other_vocabulary(self.model, self.tokenizer, own)
        if (data := self._row_data()) is not None:
            tell_untrained(self.model, data.tokenizer, data.splits, own=own)

    def _check_batch(self, batch: Any) -> None:
        if self._row_data() is None:
            check_batch(self.model, self.tokenizer, batch, new_tokens=self._new_tokens)

    def on_validation_start(self) -> None:
        """Refuse rows that the model can't read."""
        self._check_rows(self.model)

    def on_test_start(self) -> None:
        """Refuse rows that the model can't read."""
        self._check_rows(self.model)

    def on_predict_start(self) -> None:
        """Refuse rows that leave no room for their answers, all before the first one is answered."""
        if (data := self._row_data()) is not None:
            new_tokens = int(self._generation.get("max_new_tokens") or 0)
            check_prompts(self.model, self.tokenizer, data.splits, "predict", new_tokens=new_tokens)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse what the model can't read, in a batch of another loader than a DataModule's."""
        self._check_batch(batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse what the model can't read, in a batch of another loader than a DataModule's."""
        self._check_batch(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse what the model can't read, in a batch of another loader than a DataModule's."""
        self._check_batch(batch)
