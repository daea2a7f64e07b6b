"""Resuming a run exactly: where it stood, its random streams, and Lightning's counters, which are put right.

A checkpoint is the state after its last optimizer step. Micro-batches of an accumulation window that was open when it
was written are trained on again, with the random numbers that they had.

Lightning 2.6 resumes by counters of its loops that are ambiguous where they matter: it can't tell a checkpoint of the
last batch of an epoch from one of the epoch's end, counts an epoch that it resumed at its end twice, takes an epoch
that `max_steps` cut short for a whole one, skips a validation that was due, and makes the loader's iterator before it
names the epoch. So these modules keep the position themselves, write it into the counters before they are loaded, and
lead the loop through its first batch.
"""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch

from lightning_ft.distributed import gathered, rank_zero_warn
from lightning_ft.modules.checks import CheckedRows


def own_rng_state() -> dict[str, Any]:
    """The state of this process: torch's streams, Python's and NumPy's."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
    }


def rng_state(world_size: int = 1, own: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The state of every rank, in order; all ranks must call it.

    Args:
        world_size: Number of ranks.
        own: State to keep for this rank, by default the present one.
    """
    own = own_rng_state() if own is None else own
    return [own] if world_size == 1 else gathered(own)


def set_rng_state(states: Any, rank: int) -> None:
    """Put back what :func:`rng_state` returned; ranks beyond those saved keep the stream they have."""
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
"""Key of what these modules keep in a checkpoint."""


class ResumableModule(CheckedRows):
    """Base of `FineTuning`: knows which batches are in the weights, and resumes after them.

    A subclass calls :meth:`close_window` when the weights have moved by all batches that were begun; with automatic
    optimization it is called for it.
    """

    _opened: dict[str, Any] | None = None  # the open window: its first batch, and what was so before it
    _begun = 0  # batches of this epoch that were begun
    _validated = False  # whether the validation that runs has seen all of its batches
    _resumed_at: dict[str, Any] | None = None
    _resumed = False

    # ---------------------------------------------------------------- what is in the weights

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Open a window, where none is open."""
        super().on_train_batch_start(batch, batch_idx)
        if self._resumed_at is not None and self._resumed_at["opened"]:
            self._restore_rng()
        if self._opened is None:
            self._opened = {"batch": batch_idx, "step": self.trainer.global_step, "rng": own_rng_state()}
        self._begun, self._validated = batch_idx + 1, False

    def close_window(self) -> None:
        """Say that all batches begun so far are in the weights."""
        self._opened = None

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; then the window is over."""
        super().optimizer_step(*args, **kwargs)
        self.close_window()

    def on_train_epoch_start(self) -> None:
        """Count from the epoch's first batch."""
        self._begun = 0

    def on_validation_epoch_end(self) -> None:
        """Say that validation has seen all of its batches."""
        self._validated = True

    # ---------------------------------------------------------------- saving

    def resume_state(self) -> dict[str, Any]:
        """Position and random streams for a checkpoint; all ranks must call it."""
        trainer = self._trainer
        if trainer is None:
            return {"rng": rng_state()}
        position = self._position()
        opened = self._opened["rng"] if position["opened"] and self._opened is not None else None
        return {"rng": rng_state(trainer.world_size, own=opened), "position": position}

    def _position(self) -> dict[str, Any]:
        """Epoch and number of its batches that are in the weights, and what of the loop is still to be done.

        ``then`` is ``batch_end`` where the validation after the last batch is due, ``validation_end`` where that was
        made, and ``start`` where the next batch is due.
        """
        trainer = cast(Any, self.trainer)
        epochs, progress = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
        batches = progress.current
        found = {"epoch": max(epochs.started - 1, 0), "last": False, "opened": False, "half": False, "then": "start"}
        found["metrics"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if epochs.started == epochs.processed and (progress.is_last_batch or not epochs.started):
            plateau = epochs.completed < epochs.processed  # saved at the epoch's end, before such schedulers step
            return found | {"epoch": epochs.started, "batch": 0, "plateau": plateau}
        if self._opened is not None and trainer.global_step == self._opened["step"]:
            return found | {"batch": self._opened["batch"], "opened": True}
        half = self._opened is not None  # of several optimizer steps of one batch, some were taken
        done = max(self._begun, batches.processed)
        due = batches.completed < done or (trainer.validating and not self._validated)
        last = progress.is_last_batch and done == batches.ready
        made = trainer.validating or (last and epochs.processed < epochs.started)
        then = "batch_end" if due else "validation_end" if made else "start"
        return found | {"batch": done, "last": last, "half": half, "then": then}

    # ---------------------------------------------------------------- loading

    def load_resume_state(self, checkpoint: dict[str, Any]) -> None:
        """Take the position from a checkpoint of a Trainer, and put its counters right before they are loaded."""
        state = checkpoint.get(STATE, {})
        self._resumed = True
        self._resumed_at = {"rng": state.get("rng"), "opened": True}
        loop = checkpoint.get("loops", {}).get("fit_loop")
        position = state.get("position")
        if position is None or loop is None or self._trainer is None or self._trainer.state.fn != "fit":
            return
        self._resumed_at |= position
        _set_counters(loop, position)
        if position["half"]:
            rank_zero_warn(
                f"The checkpoint was written in the middle of the optimizer steps of batch {position['batch'] - 1} of "
                f"epoch {position['epoch']}: training goes on with the next batch, which the uninterrupted run would "
                "have reached with other weights. An earlier checkpoint resumes exactly."
            )

    def on_train_start(self) -> None:
        """Lead the loop of a resumed run to where the run stood."""
        super().on_train_start()
        position = self._resumed_at
        if position is None or "epoch" not in position:
            return
        trainer = cast(Any, self.trainer)
        # Lightning asks callbacks at the start of an epoch only.
        trainer.accumulate_grad_batches = self._accumulation(position["epoch"])
        trainer._logger_connector._callback_metrics.update(
            {name: torch.tensor(value) for name, value in position["metrics"].items()}
        )
        if position.get("plateau"):
            self._step_plateau_schedulers(position["epoch"])
        loops = [trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.val_loop]
        loop = loops[1]

        def first(fetcher: Any) -> None:
            del loop.advance  # from now on the loop's own
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

    def _restore_rng(self) -> None:
        assert self._resumed_at is not None
        if self._resumed_at["rng"] is not None:
            set_rng_state(self._resumed_at["rng"], self.global_rank)
        self._resumed_at = None

    def _accumulation(self, epoch: int) -> int:
        """Micro-batches of an optimizer step in an epoch; a GradientAccumulationScheduler changes it between epochs."""
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(getattr(callback, "scheduling", None), dict):
                return int(callback.get_accumulate_grad_batches(epoch))
        return int(self.trainer.accumulate_grad_batches)

    def _step_plateau_schedulers(self, epoch: int) -> None:
        """The step at the end of the epoch before, which comes after checkpoints are written."""
        trainer = cast(Any, self.trainer)
        for config in trainer.lr_scheduler_configs if self.automatic_optimization else ():
            metric = trainer.callback_metrics.get(config.monitor)
            due = config.reduce_on_plateau and config.interval == "epoch" and epoch % config.frequency == 0
            if due and metric is not None:
                self.lr_scheduler_step(config.scheduler, metric)


def _set_counters(loop: dict[str, Any], position: dict[str, Any]) -> None:
    """Write a position into the saved state of a fit loop, as of a loop that was stopped between two batches."""
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
    for state in loop["state_dict"].get("combined_loader", []):
        if state.keys() == {"epoch", "batch"}:
            state.update(epoch=epoch, batch=batch)
        elif position["opened"]:
            rank_zero_warn(
                "The checkpoint was written inside an accumulation window, whose first micro-batches are not in the "
                "weights, and the training DataLoader can't go back to them: they are left out. Use a DataModule of "
                "lightning_ft, or save every multiple of accumulate_grad_batches."
            )
