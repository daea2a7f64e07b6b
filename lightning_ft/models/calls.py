"""How a model's forward pass may be called, and what it gives: asked of the model, for architectures differ."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward pass has an argument of this name; one that swallows any doesn't count.

    Example:
        >>> accepts(nn.Linear(1, 1), "input"), accepts(nn.Linear(1, 1), "position_ids")
        (True, False)
    """
    return argument in inspect.signature(module.forward).parameters


def first_tensor(out: Any) -> Tensor:
    """The tensor that a forward pass gives first: hidden states of a backbone, logits of a whole model.

    Raises:
        TypeError: If it gives none.

    Example:
        >>> first_tensor((torch.ones(1), None)).tolist()
        [1.0]
    """
    found = out if isinstance(out, torch.Tensor) else out[0]
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"expected a tensor first, got {type(found).__name__}")
    return found
