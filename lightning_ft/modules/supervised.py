"""The supervised step and its evaluation, weighted by token."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

from torch import Tensor

from lightning_ft.data.layout import TokenBatch
from lightning_ft.functional.logprobs import SelectedLogProbs
from lightning_ft.models.router import RouterLoss
from lightning_ft.modules.evaluation import EvaluatedFineTuning
from lightning_ft.modules.resume import STATE
from lightning_ft.modules.window import MeanWindow, TokenWindow


class SupervisedFineTuning(EvaluatedFineTuning):
    """Trains on the supervised tokens of `TokenBatch`es.

    The loss of an optimizer step is the mean over the supervised tokens of the whole step: all its micro-batches on all
    ranks. A mixture of experts whose configuration asks for it adds its router's loss, with the coefficient given
    there: that of each forward pass over all of its tokens, a pass weighing as much as it has supervised tokens.
    """

    trains_router_loss: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._window = TokenWindow()
        self._router_window = MeanWindow()

    def on_train_start(self) -> None:
        """As in `FineTuning`, and start counting."""
        super().on_train_start()
        self._window.start()
        self._router_window = MeanWindow()

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Summed negative log-likelihood; `on_before_optimizer_step` divides by the tokens of the whole step."""
        if not self._own_loss.router:
            scored = self.score(batch, "sum")
            loss = -scored.logprobs
            self.note_loss(batch_idx, loss)
            self._window.add(loss, scored.correct, batch)
            return cast(Tensor, loss)
        scored, router_loss = self._score_with_router(batch)
        loss = -scored.logprobs
        self._window.add(loss, scored.correct, batch)
        weighted = router_loss * batch.num_targets
        self._router_window.add({"router_loss": weighted}, {"router_loss": batch.num_targets})
        loss = loss + self._own_loss.router * weighted.to(loss.device)
        self.note_loss(batch_idx, loss)
        return loss

    def _score_with_router(self, batch: TokenBatch) -> tuple[SelectedLogProbs, Tensor]:
        """Log-probabilities as `score` gives them, and the router's loss over the same forward pass."""
        scorer = self._required_scorer()
        batch = scorer.arranged(self.model, batch)
        with RouterLoss(self.model).recorded() as recorded:
            scored = self.score(batch, "sum")
        return scored, recorded.value(batch)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Turn the sum of the step's gradients into their token-weighted mean, before they are clipped.

        Lightning divided each micro-batch by `accumulate_grad_batches` (also in a short last window) and DDP averaged
        over ranks.
        """
        totals = self._window.reduce(self.device)
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / max(1, totals.targets)
        gradients = self.scale_gradients(factor)
        figures: dict[str, Any] = {"train/loss": totals.loss, "train/token_accuracy": totals.accuracy}
        self.log_dict(figures, prog_bar=True, batch_size=1)
        self.log_dict(
            {
                "train/tokens_seen": float(totals.tokens_seen),
                "train/tokens_per_second": totals.tokens_per_second,
                "train/padding_fraction": totals.padding_fraction,
            },
            batch_size=1,
        )
        for name, mean in self._router_window.reduce(self.device).items():
            self.log(f"train/{name}", mean, batch_size=1)
        self.log_optimizer(optimizer, gradients, totals.loss)

    def add_evaluation(self, sums: TokenWindow | None, batch: TokenBatch, batch_idx: int) -> TokenWindow:
        """Sum the log-likelihood of a batch."""
        scored = self.score(batch, "sum")
        window = sums if sums is not None else TokenWindow()
        window.add(-scored.logprobs, scored.correct, batch)
        return window

    def evaluation_figures(self, sums: TokenWindow) -> dict[str, float]:
        """Loss, perplexity and token accuracy, each weighted by token over all batches and ranks."""
        totals = sums.reduce(self.device)
        return {
            "loss": totals.loss,
            "perplexity": math.exp(min(totals.loss, 700.0)),
            "token_accuracy": totals.accuracy,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the count of tokens."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE]["tokens_seen"] = self._window.tokens_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in `FineTuning`, with the count of tokens."""
        super().on_load_checkpoint(checkpoint)
        self._window.tokens_seen = int(checkpoint.get(STATE, {}).get("tokens_seen", 0))
