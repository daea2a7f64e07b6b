"""The backbone of a model, which computes its last hidden states: a module of its own, or the model up to its head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

Backbone = Callable[..., Any]
"""Callable that computes a model's last hidden states, in its output's `last_hidden_state`."""


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward pass names this argument; ``**kwargs`` doesn't count.

    Example:
        >>> accepts(nn.Linear(1, 1), "input"), accepts(nn.Linear(1, 1), "position_ids")
        (True, False)
    """
    return argument in inspect.signature(module.forward).parameters


def first_tensor(out: Tensor | tuple[object, ...] | ModelOutput) -> Tensor:
    """The first tensor of a forward pass's output: hidden states of a backbone, logits of a whole model.

    Raises:
        TypeError: If the first output isn't a tensor.

    Example:
        >>> first_tensor((torch.ones(1), None)).tolist()
        [1.0]
    """
    first = out if isinstance(out, torch.Tensor) else out[0]
    if not isinstance(first, torch.Tensor):
        raise TypeError(f"expected a tensor first, got {type(first).__name__}")
    return first


def takes_positions(module: nn.Module) -> bool:
    """Whether position ids can be passed to a module, which may still ignore them."""
    return accepts(module, "position_ids") or takes_keywords(module)


def takes_keywords(module: nn.Module) -> bool:
    """Whether a module's forward pass takes any keyword, which transformers passes on to the attention."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


def head_of(base: PreTrainedModel) -> nn.Module | None:
    """The module that maps hidden states to logits; None for a model without one."""
    try:
        head = base.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def backbone_of(base: PreTrainedModel) -> Backbone:
    """The callable that computes a model's last hidden states: its base module, or the whole model up to its head."""
    return base.base_model if base.base_model is not base else partial(up_to_head, base)


def without_positions(run: Backbone, position_ids: Tensor | None = None, **inputs: object) -> Any:
    """Call `run` without position ids, for models that count positions themselves (RoBERTa's start at pad id + 1)."""
    return run(**inputs)


def up_to_head(base: PreTrainedModel, **inputs: object) -> SimpleNamespace:
    """Run a whole model except for the product with its head's matrix.

    The head's input is the hidden states that predict the tokens, however the model is built (Llama 4 has no base
    module). A hook keeps that input and passes an empty one on to the head.

    Args:
        base: The transformers model.
        inputs: Arguments of its forward pass.

    Returns:
        The model's output with `last_hidden_state`, ``[b, s, d]``.

    Raises:
        ModelError: If the model has no head, or doesn't call it exactly once.
    """
    head, caught = head_of(base), list[Tensor]()
    if head is None:
        raise ModelError(f"{type(base).__name__} has no output embeddings, so it isn't a causal language model.")

    def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[object, ...]:
        caught.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(catch)
    try:
        out = base(**inputs)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ModelError(f"{type(base).__name__} calls its head {len(caught)} times per forward pass; expected once.")
    return SimpleNamespace(**{**dict(out.items()), "last_hidden_state": caught[0]})
