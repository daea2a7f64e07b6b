"""Sampling with an adapter merged into the weights that it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor

from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.head import CausalLM
from lightning_ft.rollout.errors import errors_named
from lightning_ft.rollout.kept_state import data_kept
from lightning_ft.rollout.merged_weights import plain_modules


@contextmanager
def merged_adapter(model: CausalLM) -> Iterator[None]:
    """Forward passes of the block read weights with the adapter merged, and skip the adapter's own products.

    An adapter adds two small products, their dropout and a sum to each of its layers, which a decoding step of few
    tokens feels more than training does. The weights themselves aren't touched: their parameters have copies for data
    during the block, so that afterwards they are what they were, bit for bit. (Merging in place and subtracting again
    adds rounding errors with every rollout.) The copies take the memory of the adapted weights, in their dtype.

    Args:
        model: Model in training. Without an adapter, or with a disabled one, nothing changes.

    Raises:
        ConfigError: If the weights are sharded, or no plain model can have them.
        RolloutError: If the adapter can't be merged, for example because its weights aren't finite.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), LoraConfig())
        >>> weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
        >>> address = weight.data_ptr()
        >>> with torch.no_grad(), merged_adapter(model):
        ...     weight.data_ptr() == address
        False
        >>> weight.data_ptr() == address
        True
    """
    try:
        adapted = [module for module in plain_modules(model) if module.adapter is not None]
    except ModelError as error:
        raise ConfigError(f"merge_adapter=True: {error}") from error
    if any(isinstance(parameter, DTensor) for module in adapted for parameter in module.parameters.values()):
        raise ConfigError(
            "merge_adapter=True: the weights are sharded, so no rank has room for copies. Leave it out with FSDP2."
        )
    layers: list[BaseTunerLayer] = []
    torch.clear_autocast_cache()  # it may have half-precision copies of the weights without the adapter
    try:
        with data_kept() as replace_data:
            for module in adapted:
                with errors_named(f"merge_adapter=True: the adapter of {module.prefix}* can't be merged"):
                    weights = module.merged()
                for name, parameter in module.parameters.items():
                    replace_data(parameter, weights[name])
                for layer in _nested(module.adapter):
                    layer.merged_adapters = list(layer.active_adapters)  # its forward pass reads the base layer alone
                    layers.append(layer)
            yield
    finally:
        for layer in layers:
            layer.merged_adapters = []
        torch.clear_autocast_cache()


def _nested(layer: Any) -> Iterator[BaseTunerLayer]:
    """An adapter layer and those inside it: layers that adapt several parameters of one module are nested."""
    while isinstance(layer, BaseTunerLayer):
        yield layer
        layer = cast(Any, layer).base_layer
