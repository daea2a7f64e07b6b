"""Weight averaging by Lightning's callbacks, for modules that load their weights late and train few of them.

`WeightAveraging` (its EMA too) and `StochasticWeightAveraging` copy a whole module, frozen base and all, average every
weight of the copy, and keep it in checkpoints. That goes wrong here in three ways. Averaging a frozen weight with
itself, ``0.999 w + 0.001 w``, rounds at every step, so the base drifts from the one that an adapter fits. Checkpoints
of these modules hold trained weights only. And `StochasticWeightAveraging` copies the module before `configure_model`,
when there is nothing to average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import Tensor

from lightning_ft._lightning import LightningModule


class AveragedWeights(LightningModule):
    """Base of `FineTuning`: its frozen weights are neither averaged nor kept in checkpoints of averages."""

    model: Any
    _swapped = False  # whether a validation runs, for which `WeightAveraging` has swapped the weights and their average

    def setup(self, stage: str) -> None:
        """Let a callback that copied this module while it was empty copy it again."""
        super().setup(stage)
        self._swapped = False
        for callback, copied in self._averages() if stage == "fit" else ():
            if copied.model is None:
                self.configure_model()
                callback.setup(self.trainer, self, stage)

    def on_train_start(self) -> None:
        """Exclude frozen weights from averaging."""
        super().on_train_start()
        self._share_frozen()

    def on_train_epoch_start(self) -> None:
        """Repeat it: `StochasticWeightAveraging` has moved its copy to another device."""
        super().on_train_epoch_start()
        self._share_frozen()

    def on_validation_epoch_start(self) -> None:
        """Remember that weights and average are swapped; callbacks come before the module."""
        super().on_validation_epoch_start()
        self._swapped = True

    def on_validation_epoch_end(self) -> None:
        """Remember that they are swapped back."""
        super().on_validation_epoch_end()
        self._swapped = False

    def _share_frozen(self) -> None:
        """Let averages hold this module's own frozen weights, in shared memory where they are on one device."""
        for callback, copied in self._averages():
            frozen = set()
            for theirs, ours in zip(copied.parameters(), self.parameters(), strict=True):
                if not ours.requires_grad:
                    if theirs.device == ours.device:
                        theirs.data = ours.data
                    frozen.add(theirs.data_ptr())
            _leave_out(callback, frozen)

    def _averages(self) -> Iterator[tuple[Any, AveragedWeights]]:
        """Callbacks that average weights, with their copies of this module."""
        for callback in cast(Any, self.trainer).callbacks:
            average = getattr(callback, "_average_model", None)
            copied = getattr(average, "module", average)
            if isinstance(copied, type(self)):
                yield callback, copied

    def drop_frozen_averages(self, checkpoint: dict[str, Any], kept: set[str]) -> None:
        """Keep only trained weights of what averaging callbacks put into a checkpoint, each under its own name.

        Args:
            checkpoint: Checkpoint that the callbacks have written to; changed in place.
            kept: Names of the trained weights.
        """
        for state, key in _averaged_states(checkpoint):
            state[key] = {name: value for name, value in state[key].items() if name in kept}
        if self._swapped and "current_model_state" in checkpoint:  # on an exception or a signal within a validation
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint.update(state_dict=average, current_model_state=current)

    def fill_frozen_averages(self, checkpoint: dict[str, Any]) -> None:
        """Add this module's own frozen weights where averaging callbacks expect whole modules.

        Args:
            checkpoint: Checkpoint that the callbacks will load from; changed in place.
        """
        own = None
        for state, key in _averaged_states(checkpoint):
            own = self.state_dict() if own is None else own
            state[key] = {**own, **state[key]}
        if own is not None and "averaging_state" in checkpoint:
            checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}


def _averaged_states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Parts of a checkpoint that hold weights of whole modules, other than ``state_dict``."""
    if "current_model_state" in checkpoint:  # of WeightAveraging: ``state_dict`` is the average then
        yield checkpoint, "current_model_state"
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            yield state, "average_model_state"


def _leave_out(callback: Any, frozen: set[int]) -> None:
    """Let a callback's averaging function return frozen weights unchanged."""
    for holder, name in ((callback._average_model, "avg_fn"), (callback, "_avg_fn")):
        average = getattr(holder, name, None)
        if average is None or isinstance(holder, LightningModule):
            continue
        average = getattr(average, "of_trained", average)

        def of_trained_only(
            averaged: Tensor, current: Tensor, count: object, average: Callable[..., Tensor] = average
        ) -> Tensor:
            return averaged if averaged.data_ptr() in frozen else average(averaged, current, count)

        of_trained_only.of_trained = average  # type: ignore[attr-defined]
        setattr(holder, name, of_trained_only)
