"""PEFT, asked where it would put an adapter, on a copy of the model without weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError
from lightning_ft.models.parts import base_name


def adapted_names(base: PreTrainedModel, config: LoraConfig) -> set[str]:
    """Names of the base's parameters that PEFT would put an adapter on.

    Args:
        base: The model; not changed.
        config: The configuration; not changed.

    Raises:
        ModelError: If PEFT refuses.
    """
    with warnings.catch_warnings(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        plain = replace(copy.deepcopy(config), init_lora_weights=True)  # others read the weights
        try:
            model = get_peft_model(skeleton(base), plain)
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            raise ModelError(f"LoRA doesn't fit {type(base).__name__}: {str(error).strip()}") from error
    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    return {base_name(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")[0] for name, layer in layers}


def skeleton(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose weights take no memory and have no values."""
    memo: dict[int, Any] = {id(p): _empty(p) for p in base.parameters()}
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in base.buffers()}
    kept = [value for module in base.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    memo |= {id(value): torch.empty_like(value, device="meta") for value in kept}  # states of recurrent layers
    return copy.deepcopy(base, memo)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    empty = nn.Parameter(torch.empty_like(parameter.data, device="meta"), requires_grad=False)
    for name, value in vars(parameter).items():  # what quantized parameters say of themselves
        setattr(empty, name, value)
    return empty
