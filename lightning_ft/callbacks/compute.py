"""Measures the cost of a training run: FLOPs, time and memory of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_ft.callbacks.base import TrainerOrFabric, describe_error, log_to_loggers
from lightning_ft.callbacks.measuring import MeasuringCallback
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.evaluation.compute.arithmetic import ComputeResult
from lightning_ft.evaluation.compute.measurement import ComputeMeasurement
from lightning_ft.models.unwrap import unwrapped
from lightning_ft.report.collect import COMPUTE

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_LOGGED = ("flops", "flops_per_token", "tokens_per_second", "peak_memory_bytes", "mfu")


class ComputeMeter(MeasuringCallback):
    """Measures FLOPs, tokens per second, peak memory and model FLOPs utilization (MFU) of training.

    Metrics are logged as ``compute/...``; the result is printed and written to ``compute.json`` in a folder. Trained
    weights are bit-for-bit the same as without this callback. Sums are saved in checkpoints and continued in a resumed
    run; work that was done after the checkpoint and lost is not included.

    Time is measured from this callback's `on_train_batch_start` to its `on_train_batch_end`, so data loading,
    validation and checkpoints are excluded. It includes the `on_train_batch_start` of callbacks after this one and the
    `on_train_batch_end` of callbacks before it, so pass this callback first if others do long work at the end of a
    batch. GRPO and PPO roll out inside their training step, so rollouts, rewards and the reference model are included.
    `lightning_ft.evaluation.compute.arithmetic.ComputeResult` describes each metric. Metrics that are logged during
    training are those of rank 0; `tokens_per_second` is measured since it was last logged, the others since the start.

    With Fabric, call ``fabric.call("on_train_start", fabric, model)`` before the loop,
    ``fabric.call("on_train_batch_start", fabric, model, batch, index)`` and
    ``fabric.call("on_train_batch_end", fabric, model, None, batch, index)`` around each micro-batch, and
    ``fabric.call("on_train_end", fabric, model)`` after the loop. If a micro-batch fails and the program continues,
    call ``fabric.call("on_exception", fabric, model, error)``. Without Trainer or Fabric, use
    `lightning_ft.evaluation.compute.measurement.ComputeMeasurement`.

    Args:
        every_n_steps: Number of micro-batches between measurements of FLOPs, in addition to micro-batches 1, 8, 64, ...
        peak_flops: Peak FLOPs per second of one device. By default the known value of the device; CPUs have none.
        log_every_n_steps: Number of optimizer steps between logged metrics; the Trainer's value by default. With Fabric
            the default is to log at the end only.
        output_dir: Folder of the file. None for `name` in the logger's folder or in `default_root_dir` (with Fabric, no
            file is written), False for no file.
        name: Prefix of the logged names, and name of the folder.

    Raises:
        ConfigError: For numbers out of range; before training, for a compiled model whose FLOPs can't be computed by
            formula.

    Example:
        >>> meter = ComputeMeter(every_n_steps=100)
    """

    title = "Compute"
    files = (COMPUTE,)

    def __init__(
        self,
        *,
        every_n_steps: int = 200,
        peak_flops: float | None = None,
        log_every_n_steps: int | None = None,
        output_dir: str | Path | bool | None = None,
        name: str = "compute",
    ) -> None:
        super().__init__()
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ConfigError(f"log_every_n_steps={log_every_n_steps}: expected at least 1.")
        self._options: dict[str, Any] = {"every_n_steps": every_n_steps, "peak_flops": peak_flops}
        ComputeMeasurement(**self._options)  # raises an error for numbers out of range
        self.log_every_n_steps, self.output_dir, self.name = log_every_n_steps, output_dir, name
        self.result: ComputeResult | None = None
        """Result of the whole run, after training."""
        self._measurement: ComputeMeasurement | None = None
        self._loaded: dict[str, Any] | None = None
        self._logged_at = 0
        self._memory_read = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints; it differs between callbacks with different names."""
        return f"ComputeMeter({self.name!r})"

    # ---------------------------------------------------------------- hooks, in call order

    def on_train_start(self, trainer: TrainerOrFabric | None = None, pl_module: Any = None) -> None:
        """Start the measurement, from the sums of a checkpoint if one was loaded.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            ConfigError: For a compiled model whose FLOPs can't be computed by formula.
        """
        self.result = None
        if self._measurement is None or self._loaded is not None or getattr(trainer, "global_step", 0) == 0:
            self._measurement = ComputeMeasurement(**self._options)
        if self._loaded is not None:
            self._measurement.load_state_dict(self._loaded)
            self._loaded = None
        self._logged_at = self._measurement.steps
        self._measurement.start(pl_module, dtype=_AUTOCAST.get(str(getattr(trainer, "precision", ""))))

    def on_train_batch_start(
        self,
        trainer: TrainerOrFabric | None = None,
        pl_module: nn.Module | None = None,
        batch: object = None,
        batch_idx: int = 0,
    ) -> None:
        """Start measuring a micro-batch."""
        self._memory_read = False
        self._started().begin_step()

    def on_train_batch_end(
        self,
        trainer: TrainerOrFabric | None = None,
        pl_module: nn.Module | None = None,
        outputs: object = None,
        batch: object = None,
        batch_idx: int = 0,
    ) -> None:
        """Finish measuring the micro-batch, and log if it is due."""
        measurement = self._started()
        measurement.end_step(batch, getattr(unwrapped(pl_module), "last_rollout", None))
        every = self.log_every_n_steps or getattr(trainer, "log_every_n_steps", None)
        if every and measurement.steps // every > self._logged_at // every:
            self._logged_at = measurement.steps
            measurement.read_memory()
            metrics = measurement.result().metrics()
            if (recent := measurement.recent_tokens_per_second()) is not None:
                metrics["tokens_per_second"] = recent
            logged = self.with_prefix({name: metrics[name] for name in _LOGGED if name in metrics})
            try:
                log_to_loggers(trainer, logged, self._step(trainer))
            except Exception as error:  # of one rank alone, so ranks don't agree on it: training continues
                self._log_failed(error)

    def _log_failed(self, error: Exception) -> None:
        """Record that a logger failed, once."""
        what = "Compute was not logged during training"
        if not any(earlier.startswith(what) for earlier in self.failures):
            self.failures = (*self.failures, f"{what}: {describe_error(error)}")
            rank_zero_warn(f"{self.failures[-1]}. Training continues.")

    def on_validation_start(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Discard an unfinished micro-batch: a module may skip the rest of an epoch within one."""
        self._abandon()

    def on_train_epoch_end(self, trainer: TrainerOrFabric | None = None, pl_module: nn.Module | None = None) -> None:
        """Read the peak memory before other callbacks evaluate the model at the end of training."""
        self._abandon()
        if self._measurement is not None:
            self._measurement.read_memory()
            self._memory_read = True

    def on_exception(
        self,
        trainer: TrainerOrFabric | None = None,
        pl_module: nn.Module | None = None,
        exception: BaseException | None = None,
    ) -> None:
        """Discard the micro-batch that failed."""
        self._abandon()

    def measure(self, trainer: TrainerOrFabric | None, pl_module: nn.Module | None) -> dict[str, float]:
        """Compute the result over all ranks.

        Raises:
            ConfigError: If there was no training step.
        """
        self.result = self._started().stop(read_memory=not self._memory_read)
        return self.with_prefix(self.result.metrics())

    def show(self, folder: Path | None) -> None:
        """Log the headline and write the file."""
        assert self.result is not None
        rank_zero_info(self.result.headline)
        if folder is not None:
            self.report_written(self.result.save(folder))

    def so_far(self) -> ComputeResult:
        """Result of this process up to now, during training.

        Raises:
            ConfigError: Before the first step.
        """
        return self._started().result()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far, as JSON types."""
        return self._loaded or {} if self._measurement is None else self._measurement.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the sums of a checkpoint for the start of training."""
        self._loaded = state_dict or None

    # ---------------------------------------------------------------- helpers

    def _started(self) -> ComputeMeasurement:
        if self._measurement is None:
            raise ConfigError("ComputeMeter hasn't been started. Call its on_train_start before the first step.")
        return self._measurement

    def _abandon(self) -> None:
        if self._measurement is not None:
            self._measurement.abandon_step()

    def _step(self, trainer: TrainerOrFabric | None) -> int:
        return int(getattr(trainer, "global_step", self._started().steps))
