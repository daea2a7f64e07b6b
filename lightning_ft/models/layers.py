"""Find the layers of a model, and restrict adapters to the topmost ones."""

from __future__ import annotations

import copy

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.head import CausalLM, base_of


def layers_of(model: CausalLM) -> tuple[str, list[nn.Module]]:
    """The layers of a model's backbone, and the name of their list (``layers``, ``h``, ...).

    Raises:
        ModelError: If there isn't exactly one list of them.
    """
    base = base_of(model)
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name, module)
        for name, module in base.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        raise ModelError(
            f"{type(base).__name__}: expected one list of its {count} layers among its modules, found {len(outer)} of "
            "that length."
        )
    name, layers = outer[0]
    return name.split(".")[-1], list(layers)


def refuse_adapters_below(model: CausalLM, count: int) -> None:
    """Check that nothing is trained below the top `count` layers.

    Raises:
        ModelError: If something is. PEFT puts adapters on some experts regardless of `layers_to_transform`.
    """
    for number, layer in enumerate(layers_of(model)[1][:-count]):
        trained = next((name for name, p in layer.named_parameters() if p.requires_grad), None)
        if trained is not None:
            raise ModelError(
                f"top_layers={count}, but PEFT put an adapter on {trained} of layer {number} too. Leave such modules "
                "out of lora's target_modules (and target_parameters)."
            )


def in_top_layers(config: LoraConfig, model: CausalLM, count: int) -> LoraConfig:
    """A copy of an adapter's configuration that adapts the top `count` layers only.

    Args:
        config: Configuration of the adapter.
        model: The model that the adapter will be put on.
        count: Number of layers.

    Raises:
        ConfigError: If the model has fewer layers, or the configuration already selects other layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> top = in_top_layers(LoraConfig(target_modules="all-linear"), LlamaForCausalLM(config), 1)
        >>> top.layers_to_transform, sorted(top.target_modules)[:3]
        ([2], ['down_proj', 'gate_proj', 'k_proj'])
    """
    name, layers = layers_of(model)
    if not 1 <= count <= len(layers):
        raise ConfigError(f"top_layers={count}: the model has {len(layers)} layers.")
    numbers = list(range(len(layers) - count, len(layers)))
    if config.layers_to_transform is not None and config.layers_to_transform != numbers:
        raise ConfigError(
            f"top_layers={count} and lora's layers_to_transform={config.layers_to_transform} contradict each other. "
            "Pass only one of them."
        )
    top = copy.deepcopy(config)
    if config.target_modules == "all-linear":
        linear = [n for layer in layers for n, part in layer.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
        top.target_modules = sorted({name.split(".")[-1] for name in linear})
    elif not isinstance(config.target_modules, (list, set)):
        raise ConfigError(
            f"top_layers={count} needs lora's target_modules as a list of names, not {config.target_modules!r}."
        )
    top.layers_to_transform, top.layers_pattern = numbers, [name]
    return top
