"""Packed rows under FlashAttention, for which an attention with its name and arguments takes its place."""

import pytest
import torch
from tiny import make_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_ft.data.layout import Example, Segment, collate_examples, lay_out
from lightning_ft.data.rearrange import in_one_row
from lightning_ft.models.head import hidden_states
from lightning_ft.models.logprob_model import LogProbModel

FLASH = "flash_attention_2"


@pytest.fixture
def calls():
    """Arguments of each call of the attention, which keeps sequences apart by their boundaries alone."""
    found = []

    def attention(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **options):
        found.append((query.shape[0], mask, cu_seq_lens_q, options.get("cu_seq_lens_k"), max_length_q))
        columns = torch.arange(query.shape[2])
        seen = columns[:, None] >= columns
        if cu_seq_lens_q is not None:
            sequences = torch.bucketize(columns, cu_seq_lens_q.long(), right=True)
            seen &= sequences[:, None] == sequences
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return out.transpose(1, 2), None

    earlier = ALL_ATTENTION_FUNCTIONS[FLASH]
    ALL_ATTENTION_FUNCTIONS.register(FLASH, attention)
    yield found
    ALL_ATTENTION_FUNCTIONS.register(FLASH, earlier)


def examples(lengths):
    generator = torch.Generator().manual_seed(0)
    return [Example(torch.randint(4, 300, (n,), generator=generator), torch.arange(n) >= n // 2) for n in lengths]


@pytest.mark.parametrize("lengths", [[5], [9, 3, 4], [7, 2, 11, 2, 6, 8, 5, 3]])
def test_packed_rows_pass_their_boundaries_and_match_single_rows(lengths, calls):
    rows = examples(lengths)
    plain = make_model()
    expected = LogProbModel()(plain, collate_examples(rows, packing=False)).logprobs
    model = make_model()
    model.config._attn_implementation = FLASH
    batch = collate_examples(rows)
    logprobs = LogProbModel()
    logprobs.exactness(model)
    calls.clear()
    found = logprobs(model, batch).logprobs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert calls
    for row_count, mask, boundaries, of_keys, longest in calls:
        assert row_count == 1
        assert mask is None
        if len(lengths) == 1:
            assert boundaries is None
            continue
        assert boundaries.dtype == torch.int32
        assert torch.equal(boundaries, of_keys)
        assert sorted(boundaries.diff().tolist())[-1] == longest >= max(lengths)


def test_boundaries_are_passed_for_a_single_row_only(calls):
    model = make_model()
    model.config._attn_implementation = FLASH
    rows = [[Segment(example, group=i)] for i, example in enumerate(examples([9, 4, 7]))]
    two_rows = lay_out([rows[0], [*rows[1], *rows[2]]])
    hidden_states(model, two_rows)
    assert calls
    assert all(boundaries is None for _, _, boundaries, _, _ in calls)


def test_boundaries_cover_padding_and_skip_empty_segments():
    a, b, c, nothing = (*examples([3, 2, 4]), *examples([0]))
    batch = lay_out([[Segment(a), Segment(b)], [Segment(nothing), Segment(c, group=1)]])
    assert batch.boundaries.tolist() == [0, 3, 5, 10]  # one position of padding belongs to the last sequence
    assert batch.longest == 4
    joined = in_one_row(batch)
    assert joined.boundaries.tolist() == [0, 3, 5, 9]
    assert joined.boundaries.dtype == torch.int32
    assert joined.input_ids.shape == (1, 9)
    assert joined.input_ids.flatten()[joined.predictors + 1].tolist() == batch.targets.tolist()
    assert batch.num_tokens == 9
    shared = lay_out([[Segment(a), Segment(b, parent=0), Segment(c, parent=0)]])
    assert shared.boundaries is None
    assert shared.has_shared_prefixes
    assert not batch.has_shared_prefixes
