"""Where a model's last hidden states come from: the backbone that its class names, or all of it but the head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError


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


def takes_positions(module: nn.Module) -> bool:
    """Whether position ids can be passed to a module, which may take no notice of them."""
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def head_of(base: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits; None for a model without one."""
    try:
        head = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def backbone_of(base: PreTrainedModel) -> Callable[..., Any]:
    """What gives a model's last hidden states: the module that its class names, or the whole model up to its head."""
    return base.base_model if base.base_model is not base else partial(up_to_head, base)


def without_positions(run: Callable[..., Any], position_ids: Tensor | None = None, **inputs: Any) -> Any:
    """Run what counts positions in its own way (RoBERTa's begin behind its padding token's id)."""
    return run(**inputs)


def up_to_head(base: PreTrainedModel, **inputs: Any) -> Any:
    """Run a whole model but for the product with its head's matrix.

    What goes into the head are the states that predict the tokens, whatever the model is made of (Llama 4's class names
    no backbone). The head itself gets no rows.

    Args:
        base: The transformers model.
        inputs: Arguments of its forward pass.

    Returns:
        Its output, with `last_hidden_state`, ``[b, s, d]``.

    Raises:
        ModelError: If the model has no head, or uses it other than once.
    """
    head, caught = head_of(base), list[Tensor]()
    if head is None:
        raise ModelError(f"{type(base).__name__} has no output embeddings, so it isn't a causal language model.")

    def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(catch)
    try:
        out = base(**inputs)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ModelError(f"{type(base).__name__} uses its head {len(caught)} times in a forward pass, expected once.")
    return SimpleNamespace(**{**dict(out.items()), "last_hidden_state": caught[0]})
