"""Packed rows give the same outputs as single rows."""

import pytest
import torch
from tiny import make_model
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_ft.data.encode import encode_conversation
from lightning_ft.data.layout import Example, balanced_rows, collate_examples
from lightning_ft.data.masks import attention_mask
from lightning_ft.data.rearrange import in_one_row
from lightning_ft.models.logprob_model import for_attention


def logprobs(model, batch):
    """Log-probabilities of the targets, computed with transformers only."""
    allowed = attention_mask(batch)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False)
    scores = out.logits.flatten(0, 1)[batch.predictors].log_softmax(-1)
    return scores.gather(1, batch.targets[:, None])[:, 0], batch.groups


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_hidden_states_match_single_examples(tokenizer, pairs, attention):
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


def test_packing_keeps_all_targets(tokenizer, pairs):
    examples = [
        encode_conversation(
            tokenizer, [{"role": "user", "content": p["input"]}, {"role": "assistant", "content": p["output"]}]
        )
        for p in pairs
    ]
    batch = collate_examples(examples)
    assert batch.num_tokens == sum(map(len, examples))
    assert batch.num_targets == sum(int(e.supervised.sum()) for e in examples)
    assert 1 < len(batch.input_ids) < len(examples)
    assert batch.padding_fraction < 0.1
    alike = collate_examples([examples[0]] * 6)  # equal lengths need no padding
    assert alike.padding_fraction == 0
    assert alike.groups.tolist() == sorted(alike.groups.tolist())


@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [9, 1, 1, 1], [3, 8, 2, 8, 5, 1, 4, 7], list(range(1, 40))])
def test_balanced_rows_hold_all_sequences_in_short_rows(lengths):
    rows = balanced_rows(lengths)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert min(filled) > 0
    assert max(filled) <= sum(lengths) / len(rows) + max(lengths)


def test_balanced_rows_minimize_cost():
    assert len(balanced_rows([512] * 8)) == 8  # longer rows would cost more attention, and save no padding
    assert len(balanced_rows([900, *[30] * 30])) == 2  # a row can't be shorter than the longest sequence
    assert len(balanced_rows([10] * 64)) == 64
    assert len(balanced_rows([11, 13] * 8)) < 16  # here padding would cost more


def test_in_one_row_keeps_targets_and_mask():
    examples = [Example(torch.arange(n) + 3, torch.arange(n) > 0) for n in (5, 2, 3, 4)]
    batch = collate_examples(examples)
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    one = in_one_row(batch)
    assert one.segment_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3]]
    assert (attention_mask(one)[0, 0, :7, :7] == attention_mask(batch)[0, 0]).all()
    assert not attention_mask(one)[0, 0, 7:, :7].any()
    assert one.input_ids.flatten()[one.predictors + 1].tolist() == batch.targets.tolist()


def test_for_attention_joins_packed_rows_for_flash_attention():
    model = make_model()
    batch = collate_examples([Example(torch.arange(n) + 3, torch.arange(n) > 0) for n in (5, 2, 3, 4)])
    assert for_attention(model, batch) is batch
    model.config._attn_implementation = "flash_attention_2"
    assert for_attention(model, batch).input_ids.shape == (1, 14)
    padded = collate_examples([Example(torch.arange(n) + 3, torch.arange(n) > 0) for n in (5, 2)], packing=False)
    assert for_attention(model, padded) is padded
