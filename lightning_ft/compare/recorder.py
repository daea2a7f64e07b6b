"""Measures a run on its way: quality on validation rows, with what training took so far, and a checkpoint with each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_ft._lightning import Callback
from lightning_ft.callbacks.compute import ComputeMeter
from lightning_ft.compare.run_files import CHECKPOINT
from lightning_ft.evaluation.comparison.result import CurvePoint
from lightning_ft.modules.base import FineTuning


class RunRecorder(Callback):
    """Takes a run's curve. It must stand behind the other callbacks, so that none of its time counts as training.

    Args:
        folder: Where the checkpoint is kept from which a killed run goes on.
        meter: Counts what training takes.
        quality: Mean score of a model on the validation rows.
        evaluations: How many measurements to spread over the run.
        config_hash: Names the configuration of the run, so that its checkpoint says of which it is.
    """

    def __init__(
        self,
        folder: Path,
        meter: ComputeMeter,
        quality: Callable[[Any], float],
        evaluations: int,
        config_hash: str = "",
    ) -> None:
        super().__init__()
        self.config_hash = config_hash
        self.folder, self.meter, self.quality, self.evaluations = folder, meter, quality, evaluations
        self.curve: list[CurvePoint] = []
        self.earlier_seconds = 0.0
        """Time that the run took before it was killed, up to the checkpoint that it goes on from."""
        self._started = time.perf_counter()
        self._places: set[int] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Spread the measurements over the run's steps."""
        total = pl_module._total_steps() if isinstance(pl_module, FineTuning) else None
        count = self.evaluations
        self._places = set() if total is None else {math.ceil(total * (i + 1) / count) for i in range(count)}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure after the steps that are due."""
        if trainer.global_step in self._places and not self._measured(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure after every epoch where the number of steps isn't known."""
        if not self._places and not self._measured(trainer.global_step):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the final weights."""
        if not self._measured(trainer.global_step):
            self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The curve so far."""
        return {
            "curve": [[p.step, p.flops, p.seconds, p.quality] for p in self.curve],
            "seconds": self.earlier_seconds + time.perf_counter() - self._started,
            "config_hash": self.config_hash,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curve of the run that is resumed."""
        self.curve = [CurvePoint(*point) for point in state_dict["curve"]]
        self.earlier_seconds = state_dict["seconds"]

    def _measured(self, step: int) -> bool:
        return any(point.step == step for point in self.curve)

    def _measure(self, trainer: Any, module: Any) -> None:
        so_far = self.meter.so_far()
        quality = self.quality(module.model)
        self.curve.append(CurvePoint(trainer.global_step, so_far.flops, so_far.train_seconds, quality))
        print(f"step {trainer.global_step}: quality {quality:.4f} on validation rows", flush=True)
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)
