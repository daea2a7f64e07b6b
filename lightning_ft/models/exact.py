"""How far apart two ways to compute the same may be."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.models.head import input_device


def tolerance_of(base: PreTrainedModel) -> float:
    """Of what a model gives, to its largest value: more where it rounds to fewer bits than fp32 has."""
    exact = base.dtype == torch.float32 and not torch.is_autocast_enabled(input_device(base).type)
    return 1e-4 if exact and not getattr(base, "is_quantized", False) else 5e-2


def are_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether no value is further from the expected one than a share of the largest, or of 1.

    Example:
        >>> expected = torch.tensor([0.0, 200.0])
        >>> are_close(expected + 0.01, expected, 1e-4), are_close(expected + 0.03, expected, 1e-4)
        (True, False)
    """
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))
