"""Small models whose rotary frequencies depend on the longest row of a pass, and reference values of single rows."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ft.data.layout import Example

SWITCH = 32
_SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def build_scaled(name, *, at=SWITCH, positions=256, **options):
    """Phi-3 and Phi-3.5-MoE with LongRoPE, Llama with dynamic NTK; Llama, YaRN and GPT-2, whose positions are fixed."""
    torch.manual_seed(0)
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 4.0, 6.0, 8.0],
        "original_max_position_embeddings": at,
    }
    mscale = {"short_mscale": 1.0, "long_mscale": 1.2}
    kind, more = {
        "phi3": ("phi3", {"rope_parameters": longrope, "original_max_position_embeddings": at, "sliding_window": None}),
        "phimoe": ("phimoe", {"rope_parameters": {**longrope, **mscale}, "num_local_experts": 2}),
        "dynamic": (
            "llama",
            {
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
                "max_position_embeddings": at,
            },
        ),
        "yarn": (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": at,
                }
            },
        ),
        "llama": ("llama", {}),
        "gpt2": ("gpt2", {}),
    }[name]
    config = AutoConfig.for_model(kind, **{**_SMALL, "max_position_embeddings": positions, **more, **options})
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_examples(lengths):
    """Rows of these lengths, some of their tokens supervised, the last one always."""
    draw = torch.Generator().manual_seed(1)
    made = []
    for length in lengths:
        supervised = torch.rand(length, generator=draw) < 0.6
        supervised[-1] = True
        made.append(Example(torch.randint(3, 100, (length,), generator=draw), supervised))
    return made


def alone(model, example):
    """Log-probabilities of its supervised tokens by the pass of a model that has seen nothing else, ``[n]``."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        fresh(input_ids=torch.tensor([[5]]))  # a short pass resets dynamic NTK
        logits = fresh(input_ids=example.input_ids[None], use_cache=False).logits[0, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, example.input_ids[1:, None])[:, 0]
    return picked[example.supervised[1:]]
