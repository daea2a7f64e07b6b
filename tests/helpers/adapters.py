"""Adapters of several sorts, trained a little."""

import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model

LORAS = {
    "linear": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["v_proj"], "use_dora": True},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"},
    "embedding": {"target_modules": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 9]}},
}


def adapted(variant, **options):
    model = make_model(vocab_size=64, attention_bias=variant == "bias", **options)
    adapter = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **LORAS[variant]), adapter_name="policy")
    with torch.no_grad():
        for _, weight in adapter.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)
    return adapter
