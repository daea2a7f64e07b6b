"""Casts of a module, as by ``precision="bf16-true"``, that leave exact what has to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ft._lightning import LightningModule
from lightning_ft.models.kept_float32 import kept_float32

_TRUE_DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
"""Dtypes that the Trainer casts whole modules to, after it has restored a checkpoint."""


class CastModule(LightningModule):
    """Keeps in float32, when the module is cast, what a loaded model has in float32 in every dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CastModule:
        with kept_float32(self):
            super()._apply(fn, recurse)
        return self

    def _take_dtypes(self, weights: Mapping[str, Any]) -> None:
        """Cast the parameters that a checkpoint is loaded into where the Trainer does so only afterwards.

        Weights of ``64-true`` would be rounded in a float32 model, and those of ``16-true`` in a bfloat16 one.

        Args:
            weights: Weights of the checkpoint.
        """
        dtype = None if self._trainer is None else _TRUE_DTYPES.get(str(self._trainer.precision))
        for name, parameter in self.named_parameters():
            weight = weights.get(name)
            if weight is not None and weight.dtype == dtype and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
