"""Block masks of FlexAttention agree with dense masks, and FlexAttention with rows alone.

On a CPU, FlexAttention has no backward pass unless its check of the device is left out; then it runs as plain products.
"""

import pytest
import torch
from tiny import make_model
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_ft.data.layout import Example, Segment, collate_examples, lay_out
from lightning_ft.data.masks import attention_mask
from lightning_ft.errors import ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.block_mask import block_mask
from lightning_ft.models.logprob_model import LogProbModel


def example(length, seed=0):
    ids = torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(length + 100 * seed))
    return Example(ids, torch.arange(length) >= min(1, length - 1))


def forests():
    """Batches by name: packed, padded, with shared prompts, with three generations, with segments between relatives."""
    return {
        "packed": lay_out([[Segment(example(n), group=i) for i, n in enumerate((5, 1, 9, 16, 3))]]),
        "rows": lay_out([[Segment(example(20))], [Segment(example(3)), Segment(example(8), group=1)]]),
        "shared": lay_out(
            [
                [Segment(example(9)), Segment(example(4), 0), Segment(example(7), 0, 1), Segment(example(2), group=2)],
                [Segment(example(3)), Segment(example(3), 0, 3)],
            ]
        ),
        "deep": lay_out(
            [
                [
                    Segment(example(6)),
                    Segment(example(5), group=1),
                    Segment(example(4), 0, 2),
                    Segment(example(3), 2, 3),
                    Segment(example(5), 1, 4),
                    Segment(example(2), 2, 5),
                ]
            ]
        ),
    }


@pytest.mark.parametrize("block", [1, 2, 4, 7, 128])
@pytest.mark.parametrize("name", forests())
def test_block_mask_equals_the_dense_mask(name, block):
    batch = forests()[name]
    rows, length = batch.input_ids.shape
    mask = block_mask(batch, block)
    assert mask.shape == (rows, 1, length, length)
    dense = attention_mask(batch)
    assert torch.equal(create_mask(mask.mask_mod, rows, 1, length, length, device="cpu"), dense)
    searched = create_block_mask(mask.mask_mod, rows, None, length, length, device="cpu", BLOCK_SIZE=block)
    seen, full = _tables(mask)
    expected_seen, expected_full = _tables(searched)
    assert torch.equal(seen | full, expected_seen | expected_full)  # every block with a pair that is seen, and no other
    # A block on the diagonal is never listed as full, also where all of its one pair is seen.
    assert not (full & ~expected_full).any()
    if block > 1:
        assert torch.equal(full, expected_full)


def _tables(mask):
    """Blocks that are seen in part, and in full, ``bool [b, n, n]`` each."""
    found = []
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        listed = torch.arange(indices.shape[-1]) < counts[..., None]
        found.append(torch.zeros(indices.shape).scatter(-1, indices.long(), listed.float())[:, 0] > 0)
    return found


def test_block_mask_under_autocast_is_the_same():
    """Whether blocks are full is decided by products, which autocast rounds."""
    batch = lay_out([[Segment(example(1, seed=i), group=i) for i in range(700)]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = block_mask(batch, 128)
    assert torch.equal(rounded.to_dense(), block_mask(batch, 128).to_dense())


# ---------------------------------------------------------------- the attention itself


@pytest.fixture
def uncompiled():
    """FlexAttention as plain products: compiling it takes half a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def differentiable(uncompiled, monkeypatch):
    """FlexAttention that can be trained on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.fixture
def masks(monkeypatch):
    """Masks and shapes of each call of the attention."""
    found, plain = [], ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def attention(module, query, key, value, mask, **options):
        found.append((mask, tuple(query.shape)))
        return plain(module, query, key, value, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flex_attention", attention)
    return found


def flex_model(*, lora=False):
    model = make_model().train()
    model.set_attn_implementation("flex_attention")
    return add_lora(model, lora_config({"r": 4, "init_lora_weights": False}), seed=0) if lora else model


def gradients(model, logprobs):
    model.zero_grad()
    (torch.linspace(-1, 1, len(logprobs)) * logprobs).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(model, sequences):
    """Log-probabilities of sequences by the model's own forward pass, each in a row of its own, under SDPA."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation("sdpa")
    found = []
    for ids, supervised in sequences:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0][supervised[1:]])
    base.set_attn_implementation("flex_attention")
    return torch.cat(found)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_flex_attention_matches_rows_alone(layout, lora, differentiable, masks):
    model, logprob_model = flex_model(lora=lora), LogProbModel()
    prompts = [example(n, 1) for n in (150, 5)]
    completions = [[example(n, 2) for n in sizes] for sizes in ((3, 140, 8), (11, 1))]
    answers = [[Example(c.input_ids, torch.ones(len(c), dtype=torch.bool)) for c in group] for group in completions]
    whole = [
        (torch.cat([prompt.input_ids, c.input_ids]), torch.arange(len(prompt) + len(c)) >= len(prompt))
        for prompt, group in zip(prompts, completions, strict=True)
        for c in group
    ]
    expected = alone(model, whole)
    wanted = gradients(model, expected)
    if layout == "shared":
        batch = logprob_model.lay_out(model, [prompt.input_ids for prompt in prompts], answers)
        assert batch.has_shared_prefixes
    else:
        batch = collate_examples([Example(*one) for one in whole])
    assert logprob_model.exactness(model).sharing is None
    masks.clear()
    found = logprob_model(model, batch).logprobs
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    tokens = batch.num_tokens
    assert masks
    assert all(isinstance(mask, BlockMask) and shape[0] == 1 and shape[2] == tokens for mask, shape in masks)
    assert len({id(mask) for mask, _ in masks}) == 1  # one for all layers
    got = gradients(model, found)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max().clamp(min=1.0)), name


def test_training_with_flex_attention_on_a_cpu_is_refused(uncompiled):
    model = flex_model()
    batch = collate_examples([example(5), example(9)])
    with pytest.raises(ModelError, match="FlexAttention does not support backward on CPU"):
        LogProbModel()(model, batch)


@pytest.mark.slow
def test_compiled_flex_attention_matches_rows_alone():
    model, sequences = flex_model(), [example(n) for n in (140, 9, 30, 200)]
    expected = alone(model, [(one.input_ids, one.supervised) for one in sequences])
    # The code that PyTorch 2.13 makes for CPUs and shapes of any size doesn't compile (cur_qSplitSize0 isn't declared).
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        found = LogProbModel()(model, collate_examples(sequences)).logprobs
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
