"""Numeric checks of models: whether outputs agree within a tolerance, and whether all weights are finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError
from lightning_ft.models.head import gathered_dtype, input_device


def tolerance_of(base: PreTrainedModel) -> float:
    """Tolerance for comparing a model's outputs, relative to the largest value; higher below fp32 precision."""
    half = gathered_dtype(base) is not None or torch.is_autocast_enabled(input_device(base).type)
    exact = base.dtype == torch.float32 and not half
    return 1e-4 if exact and not getattr(base, "is_quantized", False) else 5e-2


def are_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether all values are within `tolerance` times the largest expected magnitude (at least 1).

    Example:
        >>> expected = torch.tensor([0.0, 200.0])
        >>> are_close(expected + 0.01, expected, 1e-4), are_close(expected + 0.03, expected, 1e-4)
        (True, False)
    """
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))


def refuse_nonfinite(model: nn.Module) -> None:
    """Refuse a model with a weight that isn't finite, since its outputs would be NaN.

    Args:
        model: The model, adapted or not.

    Raises:
        ModelError: With the name of the first such weight.
    """
    if (name := first_nonfinite(model.named_parameters())) is not None:
        raise ModelError(
            f"The model's weight {name} contains values that aren't finite (NaN or infinite), so its output would be "
            "NaN. Download its files again; if they are intact, load it with dtype='float32' or 'bfloat16', since "
            "float16 can't represent large weights."
        )


@torch.no_grad()
def nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity.

    Each tensor is read once, and the CPU waits for the GPU once. Quantized and integer tensors are skipped. Each rank
    reads its own part of sharded tensors, so all ranks must call this with the same names; all get the same result.

    Args:
        tensors: Names and tensors, on any devices.

    Example:
        >>> nonfinite([("a", torch.zeros(2)), ("b", torch.tensor([1.0, torch.inf])), ("c", torch.tensor([7]))])
        ['b']
    """
    names: list[str] = []
    largest: list[Tensor] = []
    sharded = False
    for name, value in tensors:
        if value.device.type == "meta" or not value.is_floating_point() or value.element_size() < 2:
            continue
        if isinstance(value, DTensor):
            sharded, value = True, value.to_local()
        names.append(name)
        # The largest magnitude is NaN if any value is, and unlike `isfinite` needs no copy of the tensor.
        largest.append(torch.linalg.vector_norm(value, torch.inf).float() if value.numel() else value.new_zeros(()))
    if not names:
        return []
    device = largest[0].device
    wrong = ~torch.stack([value.to(device, torch.float32) for value in largest]).isfinite()
    if sharded and dist.is_initialized():
        counts = wrong.int()
        dist.all_reduce(counts)
        wrong = counts > 0
    return [name for name, bad in zip(names, wrong.tolist(), strict=True) if bad]


def first_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name of :func:`nonfinite`, under the same conditions; None if all tensors are finite."""
    return next(iter(nonfinite(tensors)), None)
