"""Small models of many architectures whose lower layers are frozen."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.layers import in_top_layers

LAYERS = 4
LENGTHS = (7, 12, 3, 9)
SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough for attention to matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}
ARCHITECTURES = {
    "llama": {},
    "gpt2": {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "phi": {},
    "gpt_neox": {},
}


def build(name, attention="eager", **options):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if name != "gpt2" or k not in ("hidden_size", "num_hidden_layers")}
    config = AutoConfig.for_model(name, **{**sizes, **ARCHITECTURES.get(name, {}), **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def adapted(model, top=2, **lora):
    """Add adapters with an effect to the top layers."""
    config = lora_config({"r": 2, "lora_alpha": 2, "init_lora_weights": False, **lora})
    return add_lora(model, in_top_layers(config, model, top)).train()


def examples(lengths=LENGTHS, seed=1):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        supervised = torch.arange(length) >= length // 2
        made.append(Example(torch.randint(3, 100, (length,), generator=draw), supervised))
    return made


def batch_of(lengths=LENGTHS, *, packing=True, seed=1):
    return collate_examples(examples(lengths, seed), packing=packing)
