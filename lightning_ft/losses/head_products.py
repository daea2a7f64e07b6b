"""Matrix products of a linear head, in the dtype of the run's other products and accumulated in fp32.

Under autocast (``bf16-mixed``) weights are fp32, but products run in half precision, which takes less than half of the
time. On a GPU the logits leave the product in fp32. Elsewhere PyTorch rounds them to half precision, as those of a
transformers model are. That is good enough for a cross-entropy, but not for differences of log-probabilities, of which
a model that hasn't moved should have none: those are computed in fp32 there. Gradients of the weight are summed over
chunks in fp32. Shapes: `c` targets of a chunk, hidden size `d`, vocabulary `v`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def product_dtype(weight: Tensor, *, rounded: bool = False) -> torch.dtype:
    """Dtype of the products with a weight: autocast's where it is on, otherwise that of the weight.

    Args:
        weight: Weight of the head.
        rounded: Whether logits may be rounded to half precision, where products can't have fp32 results.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     print(product_dtype(weight), product_dtype(weight, rounded=True))
        torch.float32 torch.bfloat16
    """
    device_type = weight.device.type
    half = weight.dtype in (torch.float32, *_HALF) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if half and (rounded or weight.is_cuda) else weight.dtype


def logits_buffer(hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Buffer that every chunk's products overwrite, ``[chunk, v]``: new tensors would take twice the memory."""
    rows = 0 if _wide(weight) else min(chunk, len(hidden))
    return weight.new_empty(rows, len(weight))


def raw_products(states: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None = None) -> Tensor:
    """Compute ``states @ weight.T + bias``.

    Args:
        states: Hidden states, ``[c, d]``, in the dtype of the products.
        weight: Weight of the head, ``[v, d]``, in the same.
        bias: Bias of the head, ``[v]``.
        buffer: From :func:`logits_buffer`; overwritten.

    Returns:
        ``[c, v]``: fp32 on a GPU, in the dtype of the products elsewhere; part of `buffer` where it has rows.
    """
    if _wide(weight):
        products = torch.mm(states, weight.t(), out_dtype=torch.float32)
        return products if bias is None else products.add_(bias)
    out = None if buffer is None else buffer[: len(states)]
    if bias is None:
        return torch.mm(states, weight.t(), out=out)
    return torch.addmm(bias.to(weight.dtype), states, weight.t(), out=out)


class HeadGradients:
    """Gradients of a head's inputs, added up over chunks; None where one isn't needed.

    Args:
        hidden: Hidden states, ``[n, d]``, in the dtype of the products.
        weight: Weight of the head, ``[v, d]``, in its own dtype.
        bias: Bias of the head, ``[v]``.
        needed: Whether the gradient of each of the three is needed.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=_sum_dtype(weight)) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=_sum_dtype(bias)) if bias is not None and needed[2] else None

    @property
    def needed(self) -> bool:
        """Whether any gradient is needed."""
        return self.hidden is not None or self.weight is not None or self.bias is not None

    def add(self, grad: Tensor, states: Tensor, weight: Tensor, start: int) -> None:
        """Add those of a chunk.

        Args:
            grad: Gradient of the raw products, ``[c, v]``.
            states: Hidden states of the chunk, ``[c, d]``, in the dtype of the products.
            weight: Weight of the head, ``[v, d]``, in the same.
            start: Index of the chunk's first target.
        """
        if self.bias is not None:
            self.bias += grad.sum(0)
        grad = grad.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[start : start + len(states)] = grad @ weight
        if self.weight is None:
            return
        if self.weight.dtype == weight.dtype:
            self.weight.addmm_(grad.T, states)
        elif _wide(weight):
            self.weight += torch.mm(grad.T, states, out_dtype=torch.float32)
        else:
            self.weight += grad.T @ states

    def results(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, in the dtypes of `weight` and `bias`."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


def _wide(weight: Tensor) -> bool:
    """Whether products of this dtype can have fp32 results; PyTorch has such products on CUDA only."""
    return weight.is_cuda and weight.dtype in _HALF


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in _HALF else tensor.dtype
