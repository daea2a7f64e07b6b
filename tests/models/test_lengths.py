"""Models in which the longest sequence of a pass affects the others: found by probing, with exact log-probabilities."""

import copy
import warnings

import pytest
import torch
from scaled_positions import SWITCH, alone, build_scaled, make_examples
from transformers import MistralConfig, MistralForSequenceClassification

from lightning_ft.data.layout import Example, Segment, collate_examples, lay_out
from lightning_ft.errors import ModelError
from lightning_ft.models.head import as_forward, hidden_states, register_sharded
from lightning_ft.models.lengths import length_switch
from lightning_ft.models.logprob_model import LogProbModel
from lightning_ft.models.passes import parts_of, put_back, sequence_lengths
from lightning_ft.models.reward_head import last_token_rewards


@pytest.mark.parametrize(
    ("name", "mixed"),
    [("phi3", True), ("phimoe", True), ("dynamic", False), ("llama", None), ("yarn", None), ("gpt2", None)],
)
def test_length_switch_is_found_by_probing(name, mixed):
    model = build_scaled(name).train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = length_switch(model)
    assert (None if found is None else (found.at, found.mixed_beyond)) == (None if mixed is None else (SWITCH, mixed))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_length_switch_is_found_in_low_precision_and_at_long_lengths():
    model = build_scaled("phi3", at=4096, positions=131072, initializer_range=0.02).bfloat16()
    assert length_switch(model).at == 4096


def test_length_switch_ignores_state_of_a_long_pass():
    model = build_scaled("dynamic")
    ids = torch.arange(3, 3 + SWITCH + 5)[None] % 100
    fresh = copy.deepcopy(model)(input_ids=ids).logits
    switch = length_switch(model)
    with torch.no_grad():
        model(input_ids=torch.arange(0, 3 * SWITCH)[None] % 100)
        stale = model(input_ids=ids).logits
        switch.forget()
        again = model(input_ids=ids).logits
    torch.testing.assert_close(again, fresh, rtol=0, atol=1e-5)
    assert float((stale - fresh).abs().max()) > 1e-2  # otherwise the test would be trivial


@pytest.mark.parametrize("name", ["phi3", "dynamic", "phimoe"])
@pytest.mark.parametrize("plain", [False, True], ids=["fast", "plain"])
def test_logprob_model_matches_single_rows_across_the_length_switch(name, plain, monkeypatch):
    model = build_scaled(name)
    examples = make_examples((7, SWITCH + 9, SWITCH, 2 * SWITCH, SWITCH + 9, 3))
    want = torch.cat([alone(model, e) for e in examples])
    logprob_model = LogProbModel()
    if plain:
        known = logprob_model.exactness(model)
        object.__setattr__(known, "head", "is treated as unknown")
    results = []
    for rows in ([examples], [[e] for e in examples], [examples[:2], examples[2:]]):
        for packing in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                scored = [logprob_model(model, collate_examples(part, packing=packing)) for part in rows]
            results.append(torch.cat([s.logprobs for s in scored]))
    for result in results:
        torch.testing.assert_close(result, want, rtol=0, atol=2e-5)
    total = logprob_model(model, collate_examples(examples), "sum")
    torch.testing.assert_close(total.logprobs, want.sum(), rtol=1e-5, atol=1e-4)
    results[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for n, p in model.named_parameters() if "q" in n)


def test_logprob_model_warns_once_of_several_passes():
    model, logprob_model = build_scaled("phi3"), LogProbModel()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logprob_model(model, collate_examples(make_examples((5, SWITCH))))
    batch = collate_examples(make_examples((5, SWITCH + 1)))
    with pytest.warns(UserWarning, match=f"more than {SWITCH} tokens, so such a batch takes several passes"):
        logprob_model(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logprob_model(model, batch)


def test_padding_of_packed_rows_does_not_cross_the_switch():
    """Padding continues the positions of a row's last sequence, up to those of the batch's tokens."""
    model = build_scaled("phi3")
    examples = make_examples((SWITCH - 2, SWITCH - 2, SWITCH - 2))
    first, second, third = (Segment(example, group=i) for i, example in enumerate(examples))
    batch = lay_out([[first, second], [third]])
    assert batch.input_ids.shape[1] > SWITCH > int(batch.position_ids.max())
    scored = LogProbModel()(model, batch)
    torch.testing.assert_close(scored.logprobs, torch.cat([alone(model, e) for e in examples]), rtol=0, atol=1e-5)


def test_prompts_are_shared_on_one_side_of_the_length_switch_only():
    model, logprob_model = build_scaled("phi3"), LogProbModel()
    prompt = torch.arange(10, 10 + SWITCH - 8)
    for lengths, shared in (((3, 8), True), ((20, 30), True), ((3, 20), False)):
        completions = [Example(torch.arange(20, 20 + n), torch.ones(n, dtype=torch.bool)) for n in lengths]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batch = logprob_model.lay_out(model, [prompt], [completions])
            scored = logprob_model(model, batch)
        assert batch.has_shared_prefixes == shared
        assert (
            any("once for each completion, because it changes the positions" in str(w.message) for w in caught)
            != shared
        )
        wholes = [Example(torch.cat([prompt, c.input_ids]), torch.cat([prompt < 0, c.supervised])) for c in completions]
        torch.testing.assert_close(scored.logprobs, torch.cat([alone(model, e) for e in wholes]), rtol=0, atol=1e-5)


def test_sequence_scores_and_hidden_states_match_single_rows():
    rope = build_scaled("dynamic").config.rope_parameters
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SWITCH, rope_parameters=rope, num_labels=1, pad_token_id=0,
        sliding_window=None, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForSequenceClassification(config).eval()
    fresh = copy.deepcopy(model)  # has processed no long row
    rows = [e.input_ids for e in make_examples((9, SWITCH + 20, SWITCH + 3))]
    with torch.no_grad():
        want = torch.cat([copy.deepcopy(fresh)(input_ids=row[None]).logits[:, 0] for row in rows])
        torch.testing.assert_close(last_token_rewards(model, rows, 0), want, rtol=0, atol=1e-5)
        examples = make_examples((9, SWITCH + 20, SWITCH + 3))
        hidden = hidden_states(model, collate_examples(examples, packing=False))
        for row, ids in zip(hidden, rows, strict=True):
            single = copy.deepcopy(fresh).model(input_ids=ids[None]).last_hidden_state[0]
            torch.testing.assert_close(row[: len(ids)], single, rtol=0, atol=1e-4)


def test_parts_of_a_batch_keep_their_order():
    examples = make_examples((4, 9, 2, 6))
    for packing in (True, False):
        batch = collate_examples(examples, packing=packing)
        assert sorted(sequence_lengths(batch)) == [2, 4, 6, 9]
        parts = parts_of(batch, [[0, 3], [1, 2]])
        states = [part.batch.input_ids[..., None].float() for part in parts]
        whole = put_back(parts, states, batch)[..., 0]
        real = batch.segment_ids >= 0
        assert torch.equal(whole[real].long(), batch.input_ids[real])
        assert sorted(torch.cat([part.targets for part in parts]).tolist()) == list(range(batch.num_targets))
        for part in parts:
            assert torch.equal(part.batch.targets, batch.targets[part.targets])
            flat = batch.input_ids.flatten()
            ours, theirs = part.batch.predictors, batch.predictors[part.targets]
            assert torch.equal(part.batch.input_ids.flatten()[ours], flat[theirs])


def test_several_passes_are_refused_on_sharded_models(monkeypatch):
    model = build_scaled("phi3")
    batch = collate_examples(make_examples((5, SWITCH + 5)))
    as_forward(model, hidden_states, batch)
    monkeypatch.setattr("torch.distributed.fsdp.register_fsdp_forward_method", lambda *_: None)
    register_sharded(model)
    with pytest.raises(ModelError, match="several passes, which the ranks of a sharded model can't synchronize"):
        as_forward(model, hidden_states, batch)
