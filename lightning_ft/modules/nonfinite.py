"""No optimizer step is taken on numbers that aren't finite: one NaN in a gradient would be in every weight after it.

Whether a step is taken is decided once, just before the weights would move, from its loss and the norm of its
gradients, and on all ranks together. Nothing is read from a device before that.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from lightning_ft.data.loader import TokenLoader, name_rows
from lightning_ft.distributed import gathered, rank_zero_warn, several_ranks, summed_over_ranks
from lightning_ft.errors import ConfigError, ModelError, NonFiniteError
from lightning_ft.models.numerics import first_nonfinite
from lightning_ft.modules.resume import STATE, ResumableModule
from lightning_ft.rewards.function import OnNonFinite

_SKIPPED = "skipped_steps"


class FiniteSteps(ResumableModule):
    """Base of `FineTuning`: refuses or skips optimizer steps whose loss or gradients aren't finite.

    A subclass notes the loss of each micro-batch with :meth:`note_loss`, and calls :meth:`check_step` in
    `on_before_optimizer_step`.
    """

    skipped_steps: int = 0
    """Optimizer steps that were left out because their loss or gradients weren't finite."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[int, Tensor]] = []

    @property
    def _on_nonfinite(self) -> OnNonFinite:
        return cast(OnNonFinite, self._hyper["on_nonfinite"])

    def note_loss(self, batch_idx: int, loss: Tensor) -> None:
        """Remember the loss of a micro-batch until its optimizer step is decided on, to say which rows it came from.

        Args:
            batch_idx: Number of the batch in its epoch.
            loss: Its loss, ``[]``; it stays on its device.
        """
        self._noted.append((batch_idx, loss.detach()))

    def scale_gradients(self, factor: float) -> list[Tensor]:
        """Multiply the gradients of all parameters in place, and give them back."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(factor)
        return gradients

    def log_optimizer(self, optimizer: Any, gradients: list[Tensor], loss: float) -> None:
        """Check the step, and log the learning rate and the norm of the gradients before they are clipped.

        Args:
            optimizer: The optimizer whose step is next.
            gradients: Gradients of the whole step.
            loss: Loss of the whole step, over all ranks.

        Raises:
            NonFiniteError: See :meth:`check_step`.
        """
        norm = whole_norm(torch.nn.utils.get_total_norm(gradients))
        self.check_step(optimizer, norm, torch.tensor(loss))
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"], batch_size=1)
        if (self.trainer.global_step + 1) % cast(Any, self.trainer).log_every_n_steps == 0:
            self.log("train/grad_norm", norm, batch_size=1)
        for name, count in self.skipped_metrics().items():
            self.log(f"train/{name}", count, batch_size=1)

    def skipped_metrics(self) -> dict[str, float]:
        """How many steps were skipped, by the name that it is logged under; nothing where none can be and none was."""
        wanted = self._on_nonfinite == "skip" or self.skipped_steps
        return {_SKIPPED: float(self.skipped_steps)} if wanted else {}

    # ---------------------------------------------------------------- the decision

    def check_step(self, optimizer: Any, norm: Tensor, loss: Tensor, *, left_out: str | None = None) -> None:
        """Refuse or skip the optimizer step that is next, if its loss or gradients aren't finite on any rank.

        To skip it the gradients are dropped, so that no weight and no moment moves and nothing decays. Gradients that
        overflow under a gradient scaler are no error: it lowers its scale, from 65,536 to where they don't. At a scale
        of 1 they aren't the scaling's.

        Args:
            optimizer: The optimizer whose step is next.
            norm: Norm of all gradients, ``[]``.
            loss: Loss of the step on this rank, or on all, ``[]``.
            left_out: Why the step can't be learnt from whatever its loss is; None if it can.

        Raises:
            NonFiniteError: With ``on_nonfinite="error"``; names step, rows, loss and gradient norm.
        """
        noted, self._noted = self._noted, []
        flags = torch.stack([~loss.to(norm.device).isfinite(), ~norm.isfinite(), norm.new_tensor(left_out is not None)])
        bad_loss, bad_norm, unusable = summed_over_ranks(flags.float(), self.device).tolist()
        if not (bad_loss or bad_norm or unusable):
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and not bad_loss and not unusable and scaler.get_scale() > 1:
            self._drop_gradients(optimizer, scaler)
            return
        found = f"loss {float(loss):.4g}, gradient norm {float(norm):.4g}"
        step = self.trainer.global_step
        problem = f"Optimizer step {step + 1} isn't finite ({found}). {self._where(noted, left_out)} "
        if (name := self._first_nonfinite_weight()) is not None:
            raise NonFiniteError(
                f"{problem}The weights weren't before it, the first being {name}: take an earlier checkpoint."
            )
        if self._on_nonfinite == "error":
            raise NonFiniteError(
                f"{problem}Nothing of it is in the weights, which are those after step {step}. Look at "
                f"these rows, lower learning_rate ({optimizer.param_groups[0]['lr']:.3g} in this step), clip "
                "gradients, or leave such steps out with on_nonfinite='skip'."
            )
        self._drop_gradients(optimizer, scaler)
        if self.skipped_steps & (self.skipped_steps - 1) == 0:  # the first, second, fourth, eighth, ...
            rank_zero_warn(f"{problem}It is skipped (on_nonfinite='skip'), {self.skipped_steps} in all so far.")

    def _drop_gradients(self, optimizer: Any, scaler: Any) -> None:
        """Leave out the step that is next; a gradient scaler knows by now whether it has to lower its scale."""
        self.skipped_steps += 1
        if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.zero_grad(set_to_none=True)  # such an optimizer's gradients the scaler looks at in its step only

    def _where(self, noted: list[tuple[int, Tensor]], left_out: str | None) -> str:
        """Which batches and rows of all ranks the step is of; those whose loss isn't finite, if that is known."""
        wrong = [batch for batch, loss in noted if not math.isfinite(loss)]
        mine = (wrong, list(dict.fromkeys(batch for batch, _ in noted)), left_out)
        ranks = gathered(mine)
        any_wrong = any(wrong for wrong, _, _ in ranks)
        chosen = list(dict.fromkeys(wrong if any_wrong else mine[1]))
        said = [f"{batch_name}{': ' + rows if rows else ''}" for batch_name, rows in map(self._named, chosen)]
        if several_ranks():
            said = [f"rank {rank}, {text}" for rank, texts in enumerate(gathered(said)) for text in texts]
        reasons = dict.fromkeys(reason for _, _, reason in ranks if reason is not None)
        return " ".join([*(f"{reason}." for reason in reasons), f"It is of {'; '.join(said)}."] if said else reasons)

    def _named(self, batch: int) -> tuple[str, str]:
        loader, data = self.trainer.train_dataloader, self._row_data()
        rows = ""
        if isinstance(loader, TokenLoader) and data is not None:
            rows = name_rows(loader, data.splits, "train", self.trainer.current_epoch, batch)
        return f"batch {batch} of epoch {self.trainer.current_epoch}", rows

    # ---------------------------------------------------------------- weights

    def _first_nonfinite_weight(self) -> str | None:
        return first_nonfinite((n, p) for n, p in self.named_parameters() if p.requires_grad)

    def refuse_nonfinite_weights(self) -> None:
        """Refuse to write weights that aren't finite; on all ranks.

        Raises:
            NonFiniteError: With the first such weight.
        """
        if (name := self._first_nonfinite_weight()) is not None:
            raise NonFiniteError(
                f"No checkpoint is written: {name} holds numbers that aren't finite. Go on from the last checkpoint "
                "that was written, with a lower learning_rate."
            )

    # ---------------------------------------------------------------- resuming

    def resume_state(self) -> dict[str, Any]:
        """As in `ResumableModule`, with the count of skipped steps."""
        return {**super().resume_state(), _SKIPPED: self.skipped_steps}

    def load_resume_state(self, checkpoint: dict[str, Any]) -> None:
        """As in `ResumableModule`, with the count of skipped steps.

        Raises:
            ModelError: If weights of the checkpoint aren't finite.
        """
        if (name := first_nonfinite(checkpoint.get("state_dict", {}).items())) is not None:
            raise ModelError(
                f"The checkpoint's weight {name} holds numbers that aren't finite, so every answer would be NaN: take "
                "an earlier checkpoint."
            )
        super().load_resume_state(checkpoint)
        self.skipped_steps = int(checkpoint.get(STATE, {}).get(_SKIPPED, 0))


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over all shards, ``[]``."""
    return cast(Any, norm).full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[no-any-return]


def check_on_nonfinite(on_nonfinite: str) -> None:
    """Refuse another choice than ``error`` and ``skip``.

    Raises:
        ConfigError: With the choices.
    """
    if on_nonfinite not in ("error", "skip"):
        raise ConfigError(f"on_nonfinite={on_nonfinite!r}: expected 'error' or 'skip'.")
