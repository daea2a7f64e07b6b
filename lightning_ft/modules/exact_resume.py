"""Exact resumption for any LightningModule."""

from __future__ import annotations

from typing import Any

from lightning_ft.modules.resume import STATE, ResumableModule


class ExactResume(ResumableModule):
    """Mixin with which a LightningModule resumes as if it had not been interrupted, bit for bit.

    Put it before LightningModule among the bases. A checkpoint then has the random states of Python, NumPy and PyTorch,
    and the batch that comes next, wherever Lightning writes it: after a step, inside an accumulation window (whose
    micro-batches are run again), around a validation, at the end of an epoch. The training data come from a
    `lightning_ft.data.resumable_loader.ResumableLoader` around a DataLoader, or from a DataModule of this package. The
    modules of this package are built from the same part. Gradients aren't saved: under manual optimization, save where
    no optimizer has accumulated any.

    Example:
        >>> from lightning_ft._lightning import LightningModule
        >>> class MyModule(ExactResume, LightningModule):
        ...     pass
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position and the random states."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[STATE] = {**checkpoint.get(STATE, {}), **self.resume_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the position and the random states."""
        super().on_load_checkpoint(checkpoint)
        self.load_resume_state(checkpoint)
