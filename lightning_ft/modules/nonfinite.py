"""Optimizer steps are taken only if they are finite: one NaN in a gradient would spread to every weight.

The decision is made once per step, just before the weights would move, from the loss and the norm of the gradients, on
all ranks together. Nothing is read from a device before that.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_ft.data.loader import TokenLoader, name_rows
from lightning_ft.data.stream_loader import StreamLoader
from lightning_ft.distributed import all_gather_objects, is_distributed, rank_zero_warn, sum_over_ranks
from lightning_ft.errors import ModelError, NonFiniteError
from lightning_ft.models.numerics import first_nonfinite
from lightning_ft.modules.checks import CheckedRows
from lightning_ft.modules.options import OptimizerOptions
from lightning_ft.modules.resume import STATE, ResumableModule
from lightning_ft.modules.step_metrics import mean_factor
from lightning_ft.rewards.function import OnNonFinite

_SKIPPED = "skipped_steps"


class FiniteSteps(ResumableModule, CheckedRows):
    """Base of `FineTuning`: refuses or skips optimizer steps whose loss or gradients are not finite.

    A subclass records the loss of each micro-batch with :meth:`note_loss`, and calls :meth:`check_step` in
    `on_before_optimizer_step`.
    """

    optimizer_options: OptimizerOptions
    skipped_steps: int = 0
    """Number of optimizer steps that were skipped because their loss or gradients were not finite."""

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[tuple[int, Tensor]] = []

    @property
    def _on_nonfinite(self) -> OnNonFinite:
        return self.optimizer_options.on_nonfinite

    def note_loss(self, batch_idx: int, loss: Tensor) -> None:
        """Record the loss of a micro-batch until its optimizer step, so that an error can name its rows.

        Args:
            batch_idx: Number of the batch in its epoch.
            loss: Loss of the batch, ``[]``; it stays on its device.
        """
        self._recorded.append((batch_idx, loss.detach()))

    def average_gradients(self, count: float) -> list[Tensor]:
        """Turn the gradients of a step's sum of losses into those of their mean, in place, and return them.

        Args:
            count: Number of tokens or examples of the step over all ranks.
        """
        trainer = self.trainer
        factor = mean_factor(count, micro_batches=trainer.accumulate_grad_batches, ranks=trainer.world_size)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor)
        return gradients

    def log_optimizer(self, optimizer: Optimizer, gradients: list[Tensor], loss: float) -> None:
        """Check the step, and log the learning rate and the norm of the gradients before clipping.

        Args:
            optimizer: The optimizer whose step is next.
            gradients: Gradients of the whole step.
            loss: Loss of the whole step, over all ranks.

        Raises:
            NonFiniteError: See :meth:`check_step`.
        """
        norm = whole_norm(torch.nn.utils.get_total_norm(gradients))
        self.check_step(optimizer, norm, torch.tensor(loss, dtype=torch.float32))
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"], batch_size=1)
        every = int(cast(Any, self.trainer).log_every_n_steps)  # 0 if nothing is logged, as with barebones=True
        if every and (self.trainer.global_step + 1) % every == 0:
            self.log("train/grad_norm", norm, batch_size=1)
        for name, count in self.skipped_metrics().items():
            self.log(f"train/{name}", count, batch_size=1)

    def skipped_metrics(self) -> dict[str, float]:
        """Number of skipped steps by logged name; empty where none can be skipped and none was."""
        logged = self._on_nonfinite == "skip" or self.skipped_steps
        return {_SKIPPED: float(self.skipped_steps)} if logged else {}

    # ---------------------------------------------------------------- the decision

    def check_step(self, optimizer: Optimizer, norm: Tensor, loss: Tensor, *, unusable: str | None = None) -> None:
        """Refuse or skip the next optimizer step if its loss or gradients are not finite on any rank.

        To skip a step its gradients are dropped, so that no weight and no optimizer state changes and nothing decays.
        Gradients that overflow under a gradient scaler are no error: it lowers its scale, which starts at 65,536. At a
        scale of 1 the overflow has another cause.

        Args:
            optimizer: The optimizer whose step is next.
            norm: Norm of all gradients, ``[]``.
            loss: Loss of the step on this rank, or on all, ``[]``.
            unusable: Why nothing can be learned from the step, whatever its loss; None if it is usable.

        Raises:
            NonFiniteError: With ``on_nonfinite="error"``; names step, rows, loss and gradient norm.
        """
        recorded, self._recorded = self._recorded, []
        flags = torch.stack([~loss.to(norm.device).isfinite(), ~norm.isfinite(), norm.new_tensor(unusable is not None)])
        bad_loss, bad_norm, bad_data = sum_over_ranks(flags.float(), self.device).tolist()
        if not (bad_loss or bad_norm or bad_data):
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and not bad_loss and not bad_data and scaler.get_scale() > 1:
            self._drop_gradients(optimizer, scaler)
            return
        values = f"loss {float(loss):.4g}, gradient norm {float(norm):.4g}"
        step = self.trainer.global_step
        problem = f"Optimizer step {step + 1} is not finite ({values}). {self._where(recorded, unusable)} "
        if (name := self._first_nonfinite_weight()) is not None:
            raise NonFiniteError(
                f"{problem}The weights were not finite before it, the first of them {name}: use an earlier checkpoint."
            )
        if self._on_nonfinite == "error":
            raise NonFiniteError(
                f"{problem}The weights are unchanged since step {step}. Look at these rows, lower learning_rate "
                f"({optimizer.param_groups[0]['lr']:.3g} in this step), clip gradients, or skip such steps with "
                "on_nonfinite='skip'."
            )
        self._drop_gradients(optimizer, scaler)
        if self.skipped_steps & (self.skipped_steps - 1) == 0:  # the first, second, fourth, eighth, ...
            rank_zero_warn(f"{problem}It is skipped (on_nonfinite='skip'), {self.skipped_steps} so far.")

    def _drop_gradients(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """Skip the next step; a gradient scaler already knows whether to lower its scale."""
        self.skipped_steps += 1
        if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.zero_grad(set_to_none=True)  # (the scaler checks other optimizers' gradients in their step)

    def _where(self, recorded: list[tuple[int, Tensor]], unusable: str | None) -> str:
        """Batches and rows of the step on all ranks; only those with a non-finite loss, if that is known."""
        wrong = [batch for batch, loss in recorded if not math.isfinite(loss)]
        mine = (wrong, list(dict.fromkeys(batch for batch, _ in recorded)), unusable)
        ranks = all_gather_objects(mine)
        any_wrong = any(wrong for wrong, _, _ in ranks)
        chosen = list(dict.fromkeys(wrong if any_wrong else mine[1]))
        names = [f"{batch}{': ' + rows if rows else ''}" for batch, rows in map(self._named, chosen)]
        if is_distributed():
            by_rank = all_gather_objects(names)
            names = [f"rank {rank}, {name}" for rank, names in enumerate(by_rank) for name in names]
        reasons = dict.fromkeys(reason for _, _, reason in ranks if reason is not None)
        return " ".join(
            [*(f"{reason}." for reason in reasons), f"It is made of {'; '.join(names)}."] if names else reasons
        )

    def _named(self, batch: int) -> tuple[str, str]:
        loader, data = self.trainer.train_dataloader, self._row_data()
        rows = ""
        if isinstance(loader, StreamLoader):
            rows = loader.row_names(self.trainer.current_epoch, batch)
        elif isinstance(loader, TokenLoader) and data is not None:
            rows = name_rows(loader, data.splits, "train", self.trainer.current_epoch, batch)
        return f"batch {batch} of epoch {self.trainer.current_epoch}", rows

    # ---------------------------------------------------------------- weights

    def _first_nonfinite_weight(self) -> str | None:
        return first_nonfinite((n, p) for n, p in self.named_parameters() if p.requires_grad)

    def refuse_nonfinite_weights(self) -> None:
        """Refuse to write weights that are not finite; call it on all ranks.

        Raises:
            NonFiniteError: With the first such weight.
        """
        if (name := self._first_nonfinite_weight()) is not None:
            raise NonFiniteError(
                f"No checkpoint is written: {name} holds values that are not finite. Continue from the last checkpoint "
                "with a lower learning_rate."
            )

    # ---------------------------------------------------------------- resuming

    def resume_state(self) -> dict[str, object]:
        """As in `ResumableModule`, with the count of skipped steps."""
        return {**super().resume_state(), _SKIPPED: self.skipped_steps}

    def load_resume_state(self, checkpoint: dict[str, Any]) -> None:
        """As in `ResumableModule`, with the count of skipped steps.

        Raises:
            ModelError: If weights of the checkpoint are not finite.
        """
        if (name := first_nonfinite(checkpoint.get("state_dict", {}).items())) is not None:
            raise ModelError(
                f"The checkpoint's weight {name} holds values that are not finite, so every output would be NaN: use "
                "an earlier checkpoint."
            )
        super().load_resume_state(checkpoint)
        self.skipped_steps = int(checkpoint.get(STATE, {}).get(_SKIPPED, 0))


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over all shards, ``[]``."""
    return cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm
