"""Measures what a training run costs: operations, time and memory of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_ft.callbacks.measuring import MeasuringCallback
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError
from lightning_ft.evaluation.compute.arithmetic import ComputeResult
from lightning_ft.evaluation.compute.measurement import ComputeMeasurement
from lightning_ft.models.unwrap import unwrapped
from lightning_ft.report.collect import COMPUTE

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_LOGGED = ("flops", "flops_per_token", "tokens_per_second", "peak_memory_bytes", "mfu")


class ComputeMeter(MeasuringCallback):
    """Measures operations, tokens a second, peak memory and use of the device in training.

    They go to the Trainer's loggers as ``compute/...``, to a line on the screen, and as ``compute.json`` into a folder.
    The weights that come out are the same, to the bit, as without it. Sums are kept in checkpoints, so that a resumed
    run goes on adding; work that was done after the checkpoint and lost isn't in them.

    Time runs from this callback's `on_train_batch_start` to its `on_train_batch_end`: loading of data, validation and
    checkpoints aren't in it. Of other callbacks, what those behind this one do in `on_train_batch_start` and those
    before it in `on_train_batch_end` is, so put it first where some of them work long at the end of a batch. GRPO and
    PPO roll out inside their training step, so rollouts, rewards and the reference are in time and operations. See
    `lightning_ft.evaluation.compute.arithmetic.ComputeResult` for what each figure is. While training goes on, they are
    the first rank's; `tokens_per_second` is that since it was last logged, the others since the start.

    With Fabric, call ``fabric.call("on_train_start", fabric, model)``, around each micro-batch
    ``fabric.call("on_train_batch_start", fabric, model, batch, index)`` and
    ``fabric.call("on_train_batch_end", fabric, model, None, batch, index)``, and
    ``fabric.call("on_train_end", fabric, model)``; where a micro-batch fails and the program goes on,
    ``fabric.call("on_exception", fabric, model, error)``. Without either, use
    `lightning_ft.evaluation.compute.measurement.ComputeMeasurement`.

    Args:
        every_n_steps: Number of micro-batches between counts of operations, besides the 1st, 8th, 64th, ...
        peak_flops: Peak operations per second of one device. None: the known value; there is none for CPUs.
        log_every_n_steps: Log once in so many optimizer steps; by default as the Trainer does. With Fabric only the end
            is logged unless it is given.
        output_dir: Folder of the file; None for `name` in the logger's folder (or `default_root_dir`; with Fabric none
            is written), False for none.
        name: Prefix of the logged names, and name of the folder.

    Raises:
        ConfigError: For numbers that can't be; before training for a compiled model that no formula fits.

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
        ComputeMeasurement(**self._options)  # refuse wrong numbers here
        self.log_every_n_steps, self.output_dir, self.name = log_every_n_steps, output_dir, name
        self.result: ComputeResult | None = None
        """The last result, once training has ended."""
        self._measurement: ComputeMeasurement | None = None
        self._loaded: dict[str, Any] | None = None
        self._logged_at = 0
        self._memory_read = False

    @property
    def state_key(self) -> str:
        """Names this callback's state in checkpoints, so that two with different names can stand side by side."""
        return f"ComputeMeter({self.name!r})"

    # ---------------------------------------------------------------- hooks, in the order in which they are called

    def on_train_start(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Get ready, with the sums of a checkpoint where there is one.

        Args:
            trainer: The Trainer, or Fabric.
            pl_module: The module, or with Fabric the model.

        Raises:
            ConfigError: For a compiled model that no formula fits.
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
        self, trainer: Any = None, pl_module: Any = None, batch: Any = None, batch_idx: int = 0
    ) -> None:
        """Begin a micro-batch."""
        self._memory_read = False
        self._started().begin_step()

    def on_train_batch_end(
        self, trainer: Any = None, pl_module: Any = None, outputs: Any = None, batch: Any = None, batch_idx: int = 0
    ) -> None:
        """End it, and log where it is time to."""
        measurement = self._started()
        measurement.end_step(batch, getattr(unwrapped(pl_module), "last_rollout", None))
        every = self.log_every_n_steps or getattr(trainer, "log_every_n_steps", None)
        if every and measurement.steps // every > self._logged_at // every:
            self._logged_at = measurement.steps
            measurement.read_memory()
            figures = measurement.result().metrics()
            if (recent := measurement.recent_tokens_per_second()) is not None:
                figures["tokens_per_second"] = recent
            logged = self.named({name: figures[name] for name in _LOGGED if name in figures})
            for logger in getattr(trainer, "loggers", []):
                logger.log_metrics(logged, step=self._step(trainer))

    def on_validation_start(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Let no micro-batch be open: a module may skip the rest of an epoch within one."""
        self._abandon()

    def on_train_epoch_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Take the peak of memory, before others evaluate at the end of training."""
        self._abandon()
        if self._measurement is not None:
            self._measurement.read_memory()
            self._memory_read = True

    def on_exception(self, trainer: Any = None, pl_module: Any = None, exception: BaseException | None = None) -> None:
        """Stop counting."""
        self._abandon()

    def measure(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """The result of all ranks.

        Raises:
            ConfigError: If there was no training step.
        """
        self.result = self._started().stop(read_memory=not self._memory_read)
        return self.named(self.result.metrics())

    def show(self, folder: Path | None) -> None:
        """Print the headline and write the file."""
        assert self.result is not None
        rank_zero_info(self.result.headline)
        if folder is not None:
            self.wrote(self.result.save(folder))

    def so_far(self) -> ComputeResult:
        """What this process has measured up to now, while training goes on.

        Raises:
            ConfigError: Before the first step.
        """
        return self._started().result()

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, as JSON types."""
        return self._loaded or {} if self._measurement is None else self._measurement.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the sums of a checkpoint until training starts."""
        self._loaded = state_dict or None

    # ---------------------------------------------------------------- what they do

    def _started(self) -> ComputeMeasurement:
        if self._measurement is None:
            raise ConfigError("ComputeMeter hasn't been started: on_train_start must run before the first step.")
        return self._measurement

    def _abandon(self) -> None:
        if self._measurement is not None:
            self._measurement.abandon_step()

    def _step(self, trainer: Any) -> int:
        return int(getattr(trainer, "global_step", self._started().steps))
