"""Validation and test: what is added up over batches, by dataloader, and logged once over all of them and all ranks."""

from __future__ import annotations

from typing import Any

from lightning_ft.modules.base import FineTuning

_SHOWN = ("loss", "perplexity", "token_accuracy", "accuracy", "reward")
"""Figures that a progress bar has room for."""


class EvaluatedFineTuning(FineTuning):
    """Base of the modules; a subclass says what a batch adds, and what the sums mean."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[int, Any] = {}

    def add_evaluation(self, sums: Any, batch: Any, batch_idx: int) -> Any:
        """Add a batch to the sums of its dataloader.

        Args:
            sums: Those so far; None for the first batch.
            batch: The batch.
            batch_idx: Its number.

        Returns:
            The sums with the batch.
        """
        raise NotImplementedError

    def evaluation_metrics(self, sums: Any) -> dict[str, float]:
        """What to log of the sums of a dataloader, over all ranks, each of which calls it."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a validation batch."""
        self._sums[dataloader_idx] = self.add_evaluation(self._sums.get(dataloader_idx), batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a test batch."""
        self._sums[dataloader_idx] = self.add_evaluation(self._sums.get(dataloader_idx), batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._sums = {}

    def on_test_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._sums = {}

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all batches."""
        super().on_validation_epoch_end()
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the figures of all batches."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        for index, sums in sorted(self._sums.items()):
            suffix = "" if len(self._sums) == 1 else f"/dataloader_{index}"
            for name, value in self.evaluation_metrics(sums).items():
                self.log(f"{split}/{name}{suffix}", value, prog_bar=name in _SHOWN)
