"""Records the training curve of a run: quality on validation rows against FLOPs and time, with checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft._lightning import Callback, LightningModule, Trainer
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.compare.run_files import CHECKPOINT
from lightning_ft.evaluation.comparison.result import CurvePoint
from lightning_ft.modules.base import FineTuning

if TYPE_CHECKING:
    from lightning_ft.models.head import CausalLM


class RunRecorder(Callback):
    """Records the training curve of a run. It must be the last callback, so that its time isn't counted as training.

    Args:
        folder: Folder of the checkpoint that a killed run resumes from.
        meter: Meter of the FLOPs and time of training.
        quality: Function that returns the mean score of a model on the validation rows.
        evaluations: Number of measurements, spread evenly over the run.
        config_hash: Hash of the run's configuration, saved in the checkpoint to identify it.
    """

    def __init__(
        self,
        folder: Path,
        meter: ComputeMeter,
        quality: Callable[[CausalLM], float],
        evaluations: int,
        config_hash: str = "",
    ) -> None:
        super().__init__()
        self.config_hash = config_hash
        self.folder, self.meter, self.quality, self.evaluations = folder, meter, quality, evaluations
        self.curve: list[CurvePoint] = []
        self.earlier_seconds = 0.0
        """Duration of the run up to the checkpoint that it was resumed from, in seconds."""
        self._started = time.perf_counter()
        self._planned_steps: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spread the measurements over the steps of the run."""
        total = pl_module._total_steps() if isinstance(pl_module, FineTuning) else None
        count = self.evaluations
        self._planned_steps = set() if total is None else {math.ceil(total * (i + 1) / count) for i in range(count)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure if the step is one of those planned."""
        if trainer.global_step in self._planned_steps and not self._measured(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after each epoch if the number of steps isn't known in advance."""
        if not self._planned_steps and not self._measured(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, unless the last step was measured."""
        if not self._measured(trainer.global_step):
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far, and what identifies the run."""
        return {
            "curve": [[p.step, p.flops, p.seconds, p.quality] for p in self.curve],
            "seconds": self.earlier_seconds + time.perf_counter() - self._started,
            "config_hash": self.config_hash,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curve of the resumed run."""
        self.curve = [CurvePoint(*point) for point in state_dict["curve"]]
        self.earlier_seconds = state_dict["seconds"]

    def _measured(self, step: int) -> bool:
        return any(point.step == step for point in self.curve)

    def _measure(self, trainer: Trainer, module: Any) -> None:
        so_far = self.meter.so_far()
        quality = self.quality(module.model)
        self.curve.append(CurvePoint(trainer.global_step, so_far.flops, so_far.train_seconds, quality))
        print(f"step {trainer.global_step}: quality {quality:.4f} on validation rows", flush=True)
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
