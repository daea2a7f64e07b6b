"""Layouts depend on the device and the model: rows for dense masks, one row for kernels that compute what is seen."""

import pytest
import torch
from tiny import make_model
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_ft.data import row_costs
from lightning_ft.data.layout import Example, Segment, balanced_rows, collate_examples, lay_out
from lightning_ft.data.rearrange import in_one_row, padded_to_multiple, unpack
from lightning_ft.data.row_costs import RowCosts
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.models.logprob_model import LogProbModel


def example(length, seed=0):
    ids = torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(length + 100 * seed))
    return Example(ids, torch.arange(length) >= length // 2)


def test_long_rows_are_cheaper_for_wide_models():
    lengths = [300, 200, 100, 50, 40, 30]
    counts = [len(balanced_rows(lengths, square)) for square in (1, 1500, 100_000, None)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 1


def test_constants_of_a_device_can_be_set(monkeypatch):
    monkeypatch.delitem(row_costs.SQUARE_PER_WIDTH, "cuda", raising=False)  # an example of the pages sets it
    assert RowCosts.of("cuda", "sdpa", 100) == RowCosts(600, 16)
    monkeypatch.setitem(row_costs.SQUARE_PER_WIDTH, "cuda", 20.0)
    assert RowCosts.of("cuda", "sdpa", 100).square == 2000
    assert RowCosts.of("cpu", "sdpa", 100).square == 600
    assert RowCosts.of("cuda", "flash_attention_2", 100) == RowCosts(None, 1)
    assert RowCosts.of("cuda", "eager", 100).multiple == 1
    assert RowCosts.of("cpu", "sdpa", None).square == row_costs.SQUARE


def test_shared_prompts_are_in_one_row_where_only_what_is_seen_is_computed():
    prompts, completions = [example(4).input_ids], [[example(60, i) for i in range(8)]]
    assert lay_out_completions(prompts, completions, square=100).input_ids.shape[0] > 1
    assert lay_out_completions(prompts, completions, square=None).input_ids.shape == (1, 4 + 8 * 60)


def test_rows_joined_without_padding_keep_tokens_targets_and_parents():
    batch = lay_out(
        [
            [Segment(example(6)), Segment(example(3), 0), Segment(example(4), 0, 1)],
            [Segment(example(5), group=2)],
            [Segment(example(2)), Segment(example(7), 0, 3)],
        ]
    )
    joined = in_one_row(batch)
    assert joined.input_ids.shape == (1, batch.num_tokens)
    assert torch.equal(joined.targets, batch.targets)
    assert torch.equal(
        joined.input_ids.flatten()[joined.predictors], batch.input_ids.flatten()[batch.predictors]
    )  # the same tokens predict them
    assert torch.equal(joined.position_ids[0], batch.position_ids[batch.segment_ids >= 0])
    count = batch.parents.shape[1]
    assert joined.segment_ids.flatten().unique().tolist() == [0, 1, 2, count, 2 * count, 2 * count + 1]
    assert joined.parents[0, [1, 2, 2 * count + 1]].tolist() == [0, 0, 2 * count]


@pytest.mark.parametrize("lengths", [[5], [9, 3, 4], [16, 16], [7, 30, 2, 11]])
def test_padded_rows_keep_tokens_and_targets(lengths):
    batch = collate_examples([example(n, i) for i, n in enumerate(lengths)], square=20)
    padded = padded_to_multiple(batch, 16, pad_token_id=3)
    rows, length = batch.input_ids.shape
    assert padded.input_ids.shape == (rows, -(-length // 16) * 16)
    assert padded.num_tokens == batch.num_tokens == sum(lengths)
    assert torch.equal(padded.input_ids[:, :length], batch.input_ids)
    assert bool((padded.input_ids[:, length:] == 3).all() & (padded.segment_ids[:, length:] == -1).all())
    assert int(padded.position_ids.max()) == int(batch.position_ids.max())
    one, other = unpack(batch), unpack(padded)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.predictors, other.predictors)
    starts = batch.boundaries[:-1].long()
    assert torch.equal(padded.input_ids.flatten()[padded.boundaries[:-1].long()], batch.input_ids.flatten()[starts])
    assert int(padded.boundaries[-1]) == padded.input_ids.numel()


def test_padding_stays_within_a_table_of_positions():
    """Rows of several sequences may be longer than any sequence that the model has positions for."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300, "resid_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)).eval()
    sequences = [example(60), example(40, 1), example(40, 2)]
    batch = lay_out([[Segment(sequences[0])], [Segment(sequences[1], group=1), Segment(sequences[2], group=2)]])
    assert int(batch.position_ids.max()) == 59
    logprobs = LogProbModel()
    alone = torch.cat([logprobs(model, collate_examples([one])).logprobs for one in sequences])
    torch.testing.assert_close(logprobs(model, batch).logprobs, alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- masked rows on CUDA


def test_masked_rows_are_padded_by_the_constant_of_their_device(monkeypatch):
    base = make_model()
    logprob_model = LogProbModel(pad_token_id=1)
    monkeypatch.setitem(row_costs.MULTIPLE, "meta", row_costs.MULTIPLE["cuda"])
    for packing, square, length in ((True, None, 16), (False, None, 9)):
        batch = collate_examples([example(n, n) for n in (9, 3, 2)], packing=packing, square=square)
        assert logprob_model._aligned(base, batch) is batch  # a CPU has no such constant
        aligned = logprob_model._aligned(base, batch.to("meta"))
        assert aligned.input_ids.shape[1] == length  # without a mask nothing has to be aligned
    base.set_attn_implementation("eager")
    assert logprob_model._aligned(base, batch.to("meta")).input_ids.shape[1] == 9
