"""Packed rows say of every token what the rows say one by one."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_ft.data.encode import encode_conversation
from lightning_ft.data.layout import attention_mask, collate_examples


def logprobs(model, batch):
    """Log-probabilities of the targets, with nothing of this package in between but the batch."""
    allowed = attention_mask(batch)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False)
    scores = out.logits.flatten(0, 1)[batch.predictors].log_softmax(-1)
    return scores.gather(1, batch.targets[:, None])[:, 0], batch.groups


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_is_one_by_one(tokenizer, pairs, attention):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    examples = [
        encode_conversation(
            tokenizer, [{"role": "user", "content": p["input"]}, {"role": "assistant", "content": p["output"]}]
        )
        for p in pairs[:8]
    ]
    with torch.no_grad():
        packed, groups = logprobs(model, collate_examples(examples))
        padded, _ = logprobs(model, collate_examples(examples, packing=False))
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
        for index, example in enumerate(examples):
            plain = model(input_ids=example.input_ids[None]).logits[0, :-1].log_softmax(-1)
            alone = plain.gather(1, example.input_ids[1:, None])[:, 0][example.supervised[1:]]
            torch.testing.assert_close(packed[groups == index], alone, atol=1e-5, rtol=0)


def test_packing_throws_nothing_away(tokenizer, pairs):
    examples = [
        encode_conversation(
            tokenizer, [{"role": "user", "content": p["input"]}, {"role": "assistant", "content": p["output"]}]
        )
        for p in pairs
    ]
    batch = collate_examples(examples)
    assert batch.num_tokens == batch.input_ids.numel() == sum(map(len, examples))
    assert batch.num_targets == sum(int(e.supervised.sum()) for e in examples)
    assert batch.padding_fraction == 0
