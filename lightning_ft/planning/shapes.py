"""Models without memory: the weights' shapes and dtypes as they will be trained."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedConfig

from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.head import CausalLM


def shape_model(
    config: PreTrainedConfig,
    lora: LoraConfig | dict[str, Any] | bool | None = None,
    *,
    base_dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
) -> CausalLM:
    """Make a model on the meta device: all weights in fp32, or with an adapter a frozen base below an fp32 adapter.

    Args:
        config: Configuration of the model.
        lora: As for `LoRAFineTuning`; None or False for full fine-tuning.
        base_dtype: Dtype of the base below an adapter.
        attn_implementation: Attention implementation, by transformers' name.

    Raises:
        ConfigError: For an argument that PEFT doesn't have.
        ModelError: If the adapter doesn't fit the model.

    Example:
        >>> from transformers import LlamaConfig
        >>> sizes = {"vocab_size": 100, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = shape_model(LlamaConfig(**sizes, num_hidden_layers=2), {"r": 4})
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad), next(model.parameters()).device.type
        (896, 'meta')
    """
    adapted = lora is not None and lora is not False
    with torch.device("meta"):
        dtype = base_dtype if adapted else torch.float32
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        model: CausalLM = add_lora(base, lora_config(lora)) if adapted else base
    for parameter in model.parameters():
        if parameter.requires_grad:  # trained weights are fp32 under any mixed precision
            parameter.data = parameter.data.float()
    return model
