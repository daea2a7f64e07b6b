"""Exact resume: the position of a run, its random streams, and a repair of Lightning's counters.

A checkpoint is the state after its last optimizer step. Micro-batches of an accumulation window that was open when it
was written are trained on again, with the random numbers that they had.

Lightning 2.6 resumes by counters of its loops that are ambiguous where it matters: they don't distinguish a checkpoint
of the last batch of an epoch from one of the epoch's end, count an epoch twice that was resumed at its end, count an
epoch that `max_steps` cut short as complete, and skip a validation that was due; and the loader's iterator is created
before the epoch is set. So these modules keep the position themselves, write it into the counters before Lightning
loads them, and lead the loop through its first batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from lightning_ft._lightning import LightningModule, _pl
from lightning_ft.distributed import all_gather_objects, rank_zero_info, rank_zero_warn
from lightning_ft.modules.hooks import refuse_replaced_hooks


class RngState(TypedDict):
    """State of the random streams of a process, in types that `torch.load(weights_only=True)` can load.

    Args:
        torch: State of PyTorch's generator for the CPU.
        cuda: States of its generators for the GPUs.
        python: Version, internal state and next Gaussian of Python's generator.
        numpy: Name, keys and counters of NumPy's generator.
    """

    torch: Tensor
    cuda: list[Tensor]
    python: list[Any]
    numpy: list[Any]


class _Optional(TypedDict, total=False):
    plateau: bool
    stopped: bool


class Position(_Optional):
    """Position of a training loop in its data.

    Args:
        epoch: Index of the epoch.
        batch: Number of its batches that are in the weights.
        last: Whether the last of them ends the epoch.
        opened: Whether the loop is inside an accumulation window, whose micro-batches are not in the weights.
        half: Whether only some of a batch's optimizer steps were taken.
        then: What the loop does next: ``"start"``, ``"batch_end"`` or ``"validation_end"``.
        metrics: The Trainer's `callback_metrics`.
        plateau: Whether `ReduceLROnPlateau` schedulers haven't taken the step at the end of the previous epoch yet;
            only between two epochs.
        stopped: Whether something has ended training early.
    """

    epoch: int
    batch: int
    last: bool
    opened: bool
    half: bool
    then: str
    metrics: dict[str, float]


class _Window(TypedDict):
    """An accumulation window: its first batch, and the optimizer steps and random streams before it."""

    batch: int
    step: int
    rng: RngState


def own_rng_state() -> RngState:
    """State of the random streams of this process: PyTorch, Python and NumPy."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def rng_state(world_size: int = 1, own: RngState | None = None) -> list[RngState]:
    """State of the random streams of every rank, in order; all ranks must call it.

    Args:
        world_size: Number of ranks.
        own: State of this rank; the current one by default.
    """
    own = own_rng_state() if own is None else own
    return [own] if world_size == 1 else all_gather_objects(own)


def set_rng_state(states: Sequence[RngState], rank: int) -> None:
    """Restore what :func:`rng_state` returned; ranks beyond those saved keep their streams."""
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))


STATE = "lightning_ft"
"""Key of these modules' own state in a checkpoint."""


class ResumableModule(LightningModule):
    """Base of `FineTuning` and of `ExactResume`: tracks which batches are in the weights, and resumes after them.

    A subclass calls :meth:`close_window` once the weights include all batches that were started; with automatic
    optimization this happens by itself.
    """

    _opened: _Window | None = None  # the open accumulation window: its first batch, and the state before it
    _begun = 0  # batches of this epoch that were started
    _validated = False  # whether the running validation has seen all of its batches
    _resumed_at: dict[str, Any] | None = None
    _resumed = False
    _first_epoch = 0  # another fit with a Trainer continues its epochs and steps, with an optimizer of its own
    _first_step = 0

    def setup(self, stage: str) -> None:
        """Start a fit without the state of a checkpoint; the one that it resumes from is read after this.

        A checkpoint that was read before, to start from its weights or to evaluate them, is of another run.
        """
        super().setup(stage)
        if stage == "fit":
            self._resumed, self._resumed_at = False, None
            self._first_epoch, self._first_step = self.trainer.current_epoch, self.trainer.global_step

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Refuse hooks that replace those of this package.

        Raises:
            ConfigError: For a hook that doesn't call `super()`.
        """
        super().__init_subclass__(**kwargs)
        refuse_replaced_hooks(cls)

    # ---------------------------------------------------------------- what is in the weights

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Open an accumulation window, where none is open."""
        result: int | None = super().on_train_batch_start(batch, batch_idx)
        if self._resumed_at is not None and self._resumed_at["opened"]:
            self._restore_rng()
        if self._opened is None:
            self._opened = {"batch": batch_idx, "step": self.trainer.global_step, "rng": own_rng_state()}
        self._begun, self._validated = batch_idx + 1, False
        return result

    def close_window(self) -> None:
        """Close the accumulation window: all batches started so far are in the weights."""
        self._opened = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As in Lightning; then the accumulation window is closed."""
        super().optimizer_step(*args, **kwargs)
        self.close_window()

    def on_train_epoch_start(self) -> None:
        """Count batches from the first one of the epoch."""
        super().on_train_epoch_start()
        self._begun = 0

    def on_validation_epoch_end(self) -> None:
        """Mark the validation as complete."""
        super().on_validation_epoch_end()
        self._validated = True

    # ---------------------------------------------------------------- saving

    def resume_state(self) -> dict[str, object]:
        """Position and random streams for a checkpoint; all ranks must call it."""
        trainer = self._trainer
        if trainer is None:
            return {"rng": rng_state()}
        position = self._position()
        opened = self._opened["rng"] if position["opened"] and self._opened is not None else None
        first = [self._first_epoch, self._first_step]
        return {"rng": rng_state(trainer.world_size, own=opened), "position": position, "first": first}

    def _position(self) -> Position:
        """Epoch, number of its batches that are in the weights, and what the loop has still to do.

        ``then`` is ``batch_end`` where the validation after the last batch is due, ``validation_end`` where that was
        made, and ``start`` where the next batch is due.
        """
        trainer = cast(Any, self.trainer)
        epochs, progress = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
        batches = progress.current
        position: Position = {
            "epoch": max(epochs.started - 1, 0),
            "batch": 0,
            "last": False,
            "opened": False,
            "half": False,
            "then": "start",
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "stopped": trainer.should_stop,
        }
        if epochs.started == epochs.processed and (progress.is_last_batch or not epochs.started):
            plateau = epochs.completed < epochs.processed  # saved at the epoch's end, before such schedulers step
            return {**position, "epoch": epochs.started, "batch": 0, "plateau": plateau}
        if self._opened is not None and trainer.global_step == self._opened["step"]:
            return {**position, "batch": self._opened["batch"], "opened": True}
        half = self._opened is not None  # of several optimizer steps of one batch, some were taken
        done = max(self._begun, batches.processed)
        due = batches.completed < done or (trainer.validating and not self._validated)
        last = progress.is_last_batch and done == batches.ready
        made = trainer.validating or (last and epochs.processed < epochs.started)
        then = "batch_end" if due else "validation_end" if made else "start"
        return {**position, "batch": done, "last": last, "half": half, "then": then}

    # ---------------------------------------------------------------- loading

    def load_resume_state(self, checkpoint: dict[str, Any]) -> None:
        """Take the position from a checkpoint of a Trainer, and put its counters right before they are loaded."""
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        state = checkpoint.get(STATE, {})
        self._resumed = True
        self._resumed_at = {"rng": state.get("rng"), "opened": True}
        self._first_epoch, self._first_step = state.get("first", (0, 0))
        loop = checkpoint.get("loops", {}).get("fit_loop")
        position: Position | None = state.get("position")
        if position is None or loop is None:
            return
        self._resumed_at |= position
        _set_counters(loop, position)
        if position.get("stopped"):
            self._stop_again(checkpoint.get("callbacks", {}))
        if position["half"]:
            rank_zero_warn(
                f"The checkpoint was written between the optimizer steps of batch {position['batch'] - 1} of epoch "
                f"{position['epoch']}: training continues with the next batch, which the uninterrupted run would have "
                "reached with other weights. An earlier checkpoint resumes exactly."
            )

    def _stop_again(self, states: dict[str, dict[str, Any]]) -> None:
        """Take no more steps in a run that `EarlyStopping` had stopped: Lightning would train until its next check.

        Args:
            states: States of the callbacks in the checkpoint. A Timer checks by itself whether time is left.
        """
        for callback in cast(Any, self.trainer).callbacks:
            state = states.get(callback.state_key, {}) if isinstance(callback, _pl.callbacks.EarlyStopping) else {}
            decided = state.get("stopping_reason") or state.get("stopped_epoch")  # the first one since Lightning 2.6
            if decided or ("wait_count" in state and state["wait_count"] >= state["patience"]):
                self.trainer.should_stop = True
                rank_zero_info(
                    f"The checkpoint is of a run that {type(callback).__name__}(monitor={callback.monitor!r}) has "
                    "stopped, so no more steps are taken. To train on, leave that callback out."
                )

    def on_train_start(self) -> None:
        """Lead the loop of a resumed run to the position of the checkpoint."""
        super().on_train_start()
        position = self._resumed_at
        if position is None or "epoch" not in position:
            return
        trainer = cast(Any, self.trainer)
        # Lightning calls such callbacks only at the start of an epoch.
        trainer.accumulate_grad_batches = self._accumulation(position["epoch"])
        trainer._logger_connector._callback_metrics.update(
            {name: torch.tensor(value) for name, value in position["metrics"].items()}
        )
        if position.get("plateau"):
            self._step_plateau_schedulers(position["epoch"])
        loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop]
        loop = loops[1]

        def first(fetcher: object) -> None:
            del loop.advance  # the loop's own method from now on
            for each in loops:
                each._restarting = False
            if not position["opened"]:
                self._restore_rng()
            self._begun = position["batch"]
            if position["then"] == "start":
                loop.advance(fetcher)
            else:  # the loop continues after the batch
                loop._skip_next_val = position["then"] == "validation_end"

        loop.advance = first

    def seed_by_rank(self) -> None:
        """Let each rank sample other tokens than the others; a resumed run has its random states already."""
        if self.global_rank and not self._resumed:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def _restore_rng(self) -> None:
        assert self._resumed_at is not None
        if self._resumed_at["rng"] is not None:
            set_rng_state(self._resumed_at["rng"], self.global_rank)
        self._resumed_at = None

    def _total_steps(self) -> int | None:
        """Optimizer steps of this fit, None if unknown; `estimated_stepping_batches` would rewind a loader."""
        if self._trainer is None:
            return None
        trainer = self.trainer
        batches = trainer.num_training_batches
        limits = [trainer.max_steps - self._first_step] if trainer.max_steps != -1 else []
        if trainer.max_epochs not in (None, -1) and not math.isinf(batches):
            epochs = range(self._first_epoch, trainer.max_epochs)
            limits.append(sum(self._steps_of_epoch(int(batches), epoch) for epoch in epochs))
        return min(limits) if limits else None

    def _steps_of_epoch(self, batches: int, epoch: int) -> int:
        """Number of optimizer steps in an epoch of `batches` batches."""
        return math.ceil(batches / self._accumulation(epoch))

    def _accumulation(self, epoch: int) -> int:
        """Micro-batches per optimizer step in an epoch; a GradientAccumulationScheduler changes it between epochs."""
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(getattr(callback, "scheduling", None), dict):
                return int(callback.get_accumulate_grad_batches(epoch))
        return int(self.trainer.accumulate_grad_batches)

    def _step_plateau_schedulers(self, epoch: int) -> None:
        """Take the schedulers' step at the end of the previous epoch, which comes after checkpoints are written."""
        trainer = cast(Any, self.trainer)
        for config in trainer.lr_scheduler_configs if self.automatic_optimization else ():
            metric = trainer.callback_metrics.get(config.monitor)
            due = config.reduce_on_plateau and config.interval == "epoch" and epoch % config.frequency == 0
            if due and metric is not None:
                self.lr_scheduler_step(config.scheduler, metric)


def _set_counters(loop: dict[str, Any], position: Position) -> None:
    """Write a position into the saved state of a fit loop, as if it had stopped between two batches."""
    epoch, batch = position["epoch"], position["batch"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    fresh = batch == 0 and position["then"] == "start" and not position["opened"]
    before = batches["total"]["ready"] - (0 if fresh else batches["current"]["ready"])
    for counts, number in ((batches["current"], batch), (batches["total"], before + batch)):
        counts.update(dict.fromkeys(("ready", "started", "processed", "completed"), number))
    batches["is_last_batch"] = position["last"]
    for counts in (epochs["current"], epochs["total"]):
        counts.update(dict.fromkeys(("processed", "completed"), epoch))
        counts.update(dict.fromkeys(("ready", "started"), epoch if fresh else epoch + 1))
    loaders = loop["state_dict"].get("combined_loader", [])
    for state in loaders:
        if state.keys() >= {"epoch", "batch"}:
            if position["last"]:  # also of an epoch that is shorter than the loader (limit_train_batches)
                state.update(epoch=epoch + 1, batch=0, **({"rng": None} if "rng" in state else {}))
            elif len(loaders) == 1 or position["opened"]:  # several loaders may be at positions of their own
                state.update(epoch=epoch, batch=batch)
        elif position["opened"]:
            rank_zero_warn(
                "The checkpoint was written inside an accumulation window, whose first micro-batches are not in the "
                "weights, and the training DataLoader can't return to them: they are skipped. Use a DataModule of "
                "lightning_ft, or save at multiples of accumulate_grad_batches."
            )
