"""Lightning's weight averaging over modules that load their weights late and train few of them.

`WeightAveraging` (its EMA too) and `StochasticWeightAveraging` copy a whole module, frozen base and all, average every
weight of the copy, and keep it in checkpoints. Three things go wrong with that here. Averaging a frozen weight with
itself rounds, ``0.999 w + 0.001 w``, step after step, so that the base drifts from the one that an adapter fits.
Checkpoints of these modules hold trained weights only. And `StochasticWeightAveraging` makes its copy before
`configure_model`, when there is nothing to average.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor

from lightning_ft._lightning import LightningModule


class AveragedWeights(LightningModule):
    """A module whose frozen weights aren't averaged, and aren't kept in checkpoints of averages either."""

    def setup(self, stage: str) -> None:
        """Let a callback that copied this module while it was empty copy it again."""
        super().setup(stage)
        for callback, copied in self._averages() if stage == "fit" else ():
            if not any(True for _ in copied.parameters()):
                self.configure_model()
                callback.setup(self.trainer, self, stage)

    def on_train_start(self) -> None:
        """See to it that frozen weights aren't averaged."""
        super().on_train_start()
        self._share_frozen()

    def on_train_epoch_start(self) -> None:
        """Again: `StochasticWeightAveraging` has moved its copy to another device."""
        super().on_train_epoch_start()
        self._share_frozen()

    def _share_frozen(self) -> None:
        """Let averages hold this module's own frozen weights, in the same memory where they are on one device."""
        for callback, copied in self._averages():
            frozen = set()
            for theirs, ours in zip(copied.parameters(), self.parameters(), strict=True):
                if not ours.requires_grad:
                    if theirs.device == ours.device:
                        theirs.data = ours.data
                    frozen.add(theirs.data_ptr())
            _leave_out(callback, frozen)

    def _averages(self) -> Iterator[tuple[Any, Any]]:
        """Callbacks that average weights, and the copies of this module in which they do."""
        for callback in cast(Any, self.trainer).callbacks:
            average = getattr(callback, "_average_model", None)
            copied = getattr(average, "module", average)
            if isinstance(copied, type(self)):
                yield callback, copied

    def drop_frozen_averages(self, checkpoint: dict[str, Any], kept: set[str]) -> None:
        """Keep trained weights only of what averaging callbacks put into a checkpoint.

        Args:
            checkpoint: In which the callbacks have written; changed.
            kept: Names of the trained weights.
        """
        for state, key in _averaged_states(checkpoint):
            state[key] = {name: value for name, value in state[key].items() if name in kept}

    def fill_frozen_averages(self, checkpoint: dict[str, Any]) -> None:
        """Put this module's own frozen weights where averaging callbacks expect whole modules.

        Args:
            checkpoint: From which the callbacks will load; changed.
        """
        own = None
        for state, key in _averaged_states(checkpoint):
            own = self.state_dict() if own is None else own
            state[key] = {**own, **state[key]}
        if own is not None and "averaging_state" in checkpoint:
            checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}


def _averaged_states(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a checkpoint holds weights of whole modules besides ``state_dict``."""
    if "current_model_state" in checkpoint:  # of WeightAveraging: ``state_dict`` is the average then
        yield checkpoint, "current_model_state"
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            yield state, "average_model_state"


def _leave_out(callback: Any, frozen: set[int]) -> None:
    """Let a callback's function of two weights give the first one back where it is frozen."""
    for holder, name in ((callback._average_model, "avg_fn"), (callback, "_avg_fn")):
        average = getattr(holder, name, None)
        if average is None or isinstance(holder, LightningModule):
            continue
        average = getattr(average, "of_trained", average)

        def of_trained_only(averaged: Tensor, current: Tensor, count: Any, average: Any = average) -> Any:
            return averaged if averaged.data_ptr() in frozen else average(averaged, current, count)

        of_trained_only.of_trained = average  # type: ignore[attr-defined]
        setattr(holder, name, of_trained_only)
