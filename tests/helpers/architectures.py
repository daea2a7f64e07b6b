"""Small models of several architectures, prompts with a common prefix, and reference answers."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,  # large enough for attention to matter
}
ENDS = [3, 5, 9]
SHARING = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=400, **SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(head_dim=16, sliding_window=400, **SIZES)),
}
NOT_SHARING = {
    "short_window": (
        lambda: MistralForCausalLM(MistralConfig(sliding_window=8, **SIZES)),
        "sliding window of 8 tokens",
    ),
    "gemma2": (lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=16, sliding_window=8, **SIZES)), "sliding window"),
    "mamba": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
        "doesn't accept position_ids",
    ),
}


def make_prompts(count=11, prefix=20):
    draw = torch.Generator().manual_seed(1)
    head = torch.randint(10, 64, (prefix,), generator=draw).tolist()
    lengths = torch.randint(1, 9, (count,), generator=draw).tolist()
    return [head + torch.randint(10, 64, (length,), generator=draw).tolist() for length in lengths]


def one_by_one(model, prompts, max_new_tokens):
    """Reference generation, one token at a time without a cache."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=ENDS,
            pad_token_id=0,
        )
        answers.append(tuple(out[0, len(prompt) :].tolist()))
    return answers
