"""Decoding with shared rows reads each key and value head once, and gives what repeated ones give."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_ft.models.grouped_attention import grouped_attention, grouped_sdpa_forward
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}


class KeyHeads(TorchDispatchMode):
    """Numbers of key heads and of queries of each call of an attention kernel with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.__name__ and (kwargs or {}).get("attn_mask") is not None:
            self.seen.append((args[1].shape[1], args[0].shape[2]))
        return func(*args, **(kwargs or {}))


def tiny(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoding_step_of_shared_rows_repeats_no_keys(name, monkeypatch):
    model = tiny(name)
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(10, 64, (120,), generator=draw).tolist()
    found = {}
    for how, context in (("grouped", grouped_attention), ("repeated", lambda base: nullcontext())):
        monkeypatch.setattr("lightning_ft.rollout.decode.grouped_attention", context)
        engine = LocalEngine(model, end_token_ids=[0], batch_size=4)
        torch.manual_seed(2)
        with KeyHeads() as kernels:
            rollouts = engine.generate([prompt], max_new_tokens=6, sampling=Sampling(), num_completions=4)
        found[how] = rollouts.completions
        decoded = [heads for heads, queries in kernels.seen if queries in (4, 12)]
        assert len(decoded) >= 2 * 5
        assert set(decoded) == ({2} if how == "grouped" else {6})
    for one, other in zip(found["grouped"], found["repeated"], strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attention_with_repeated_keys(dtype):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, t, 8, generator=draw).to(dtype) for heads, t in ((6, 3), (2, 20), (2, 20))
    )
    mask = torch.rand(2, 1, 3, 20, generator=draw) > 0.4
    layer = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    for given in (mask, torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype), None):
        got, _ = grouped_sdpa_forward(layer, query, key, value, given, scaling=0.3)
        want, _ = sdpa_attention_forward(layer, query, key, value, given, scaling=0.3)
        assert got.shape == want.shape == (2, 3, 6, 8)
        assert torch.allclose(got, want, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_what_it_does_not_cover_is_left_to_transformers():
    query, key = torch.randn(1, 6, 3, 8), torch.randn(1, 2, 20, 8)
    layer = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    shared, per_head = torch.zeros(1, 1, 3, 20), torch.randn(1, 6, 3, 20)
    for mask, options in ((per_head, {}), (shared, {"position_bias": per_head})):
        got, _ = grouped_sdpa_forward(layer, query, key, key, mask, **options)
        assert torch.equal(got, sdpa_attention_forward(layer, query, key, key, mask, **options)[0])
    with pytest.raises(ValueError, match="softcap"):
        grouped_sdpa_forward(layer, query, key, key, shared, softcap=30.0)


def test_the_attention_of_the_model_is_restored_and_others_are_left_alone():
    model = tiny("llama")
    seen = []

    def fail():
        with grouped_attention(model):
            seen.append(model.config._attn_implementation)
            raise RuntimeError("in the pass")

    with pytest.raises(RuntimeError, match="in the pass"):
        fail()
    assert seen[0] != model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    with grouped_attention(model):
        assert model.config._attn_implementation == "eager"
