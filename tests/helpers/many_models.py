"""Tiny models of any architecture, made from their default configuration."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    # sizes of towers
    "image_size": 28,
    "patch_size": 14,
    "num_heads": 4,
    "depth": 2,
    "out_hidden_size": 32,
    "vision_output_dim": 32,
    "intermediate_size_mlp": 48,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shrink(config, **options):
    """Shrink a config and its nested configs."""
    for part in [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]:
        shrink(part)
    for name, value in {**{n: v for n, v in SIZES.items() if n in vars(config)}, **options}.items():
        setattr(config, name, value)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[:2]
    return config


def make(kind, seed=0, image=False, **options):
    """A random model of two layers."""
    config = shrink(AutoConfig.for_model(kind), **options)
    torch.manual_seed(seed)
    return (AutoModelForImageTextToText if image else AutoModelForCausalLM).from_config(config).float()


def make_multimodal(kind):
    """A random model with a tower for images."""
    config = shrink(AutoConfig.for_model(kind))
    if kind in ("qwen2_5_vl", "qwen3_vl"):
        section = {"mrope_section": [2, 1, 1]}
        config.text_config.rope_parameters = {**config.text_config.rope_parameters, **section}
    if kind == "mllama":
        config.text_config.cross_attention_layers = [1]
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).float()
