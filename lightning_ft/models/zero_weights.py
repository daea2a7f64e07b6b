"""Find weights that a file holds as zeros only, as one does whose end was lost in a power cut or an incomplete copy.

Such a file has its full size and is read without an error. Layers of zeros learn nothing, or hardly anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lightning_ft.models.load_report import shortened, warn_on_rank_zero

_REMEDY = "Download, copy or export it again, unless it was made so."


def warn_of_zero_weights(model: nn.Module, name: str) -> None:
    """Warn if matrices of a model that was loaded contain only zeros.

    Args:
        model: The model. A matrix that isn't zero costs the read of one value.
        name: Hub name or folder, for the message.
    """
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    if zeros := [n for n, matrix in matrices.items() if _is_zero(matrix)]:
        warn_on_rank_zero(
            f"Of the {len(matrices):,} weight matrices of {name!r}, {len(zeros):,} contain only zeros "
            f"({shortened(zeros)}), as in a file whose end was lost. {_REMEDY}"
        )


def warn_of_dead_adapter(model: PeftModel, name: str) -> None:
    """Warn if both matrices of adapted layers are zero: such a layer gets no gradient, so it would never be trained.

    Args:
        model: Model with the adapter that was loaded.
        name: Folder or hub name of the adapter, for the message.
    """
    layers = {n: list(_products(m, model.active_adapter)) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    layers = {n: pairs for n, pairs in layers.items() if pairs}
    if dead := [n for n, pairs in layers.items() if all(_is_zero(a) and _is_zero(b) for a, b in pairs)]:
        warn_on_rank_zero(
            f"Of the {len(layers):,} layers that the adapter in {name!r} adapts, {len(dead):,} have only zeros in both "
            f"matrices ({shortened(dead)}), so they change nothing and can't learn. Its file may have lost its end. "
            f"{_REMEDY}"
        )


def _products(layer: LoraLayer, adapter: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Both matrices of an adapted layer."""
    if adapter in layer.lora_A and adapter in layer.lora_B:
        yield cast(Tensor, layer.lora_A[adapter].weight), cast(Tensor, layer.lora_B[adapter].weight)
    if adapter in layer.lora_embedding_A and adapter in layer.lora_embedding_B:
        yield layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]


@torch.no_grad()
def _is_zero(matrix: Tensor) -> bool:
    """Whether a floating-point matrix in memory holds zeros only."""
    readable = matrix.is_floating_point() and matrix.element_size() > 1 and matrix.device.type != "meta"
    if not readable or not matrix.numel() or bool(matrix[(0,) * matrix.ndim]):
        return False
    return not bool(matrix.any())
