"""Validation and test: sums over the batches of each dataloader, logged once over all batches and ranks."""

from __future__ import annotations

from typing import Any

from lightning_ft._lightning import LightningModule

_IN_PROGRESS_BAR = ("loss", "perplexity", "token_accuracy", "accuracy", "reward")


class EvaluatedModule(LightningModule):
    """Base of `FineTuning`; a subclass says what a batch adds to the sums, and which metrics follow from them."""

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[int, Any] = {}  # of the evaluation that is running, by dataloader

    def add_evaluation(self, sums: Any, batch: Any, batch_idx: int) -> Any:
        """Add a validation or test batch to the sums of its dataloader.

        Args:
            sums: Sums so far; None for the first batch.
            batch: The batch.
            batch_idx: Number of the batch.

        Returns:
            The sums with the batch.
        """
        raise NotImplementedError

    def evaluation_metrics(self, sums: Any) -> dict[str, float]:
        """Metrics of the sums of a dataloader over all ranks; every rank calls it."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a validation batch."""
        self._sums[dataloader_idx] = self.add_evaluation(self._sums.get(dataloader_idx), batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a test batch."""
        self._sums[dataloader_idx] = self.add_evaluation(self._sums.get(dataloader_idx), batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Drop the sums of the previous evaluation."""
        super().on_validation_epoch_start()
        self._sums = {}

    def on_test_epoch_start(self) -> None:
        """Drop the sums of the previous evaluation."""
        self._sums = {}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each dataloader, over all batches and ranks."""
        super().on_validation_epoch_end()
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each dataloader, over all batches and ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        for index, sums in sorted(self._sums.items()):
            suffix = "" if len(self._sums) == 1 else f"/dataloader_{index}"
            for name, value in self.evaluation_metrics(sums).items():
                self.log(f"{split}/{name}{suffix}", value, prog_bar=name in _IN_PROGRESS_BAR)
