"""Several completions per prompt: each prompt is run once, whatever the batches."""

from functools import partial

import pytest
import torch
from architectures import ENDS, NOT_SHARING, SHARING, make_prompts, one_by_one
from peft import LoraConfig, get_peft_model
from tiny import make_model

from lightning_ft.errors import ConfigError
from lightning_ft.models.head import takes_explicit_masks
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.decode import next_logits, prefill_tokens
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.probe import probe_cache
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.shared_rows import SharedRows, prefill_prompts

NEVER = [1000]  # no such token


class Passes:
    """Shapes of the forward passes of a model: of those that prefill prompts, and of decoding steps."""

    def __init__(self, model, engine):
        engine._layers(3)  # probes the model before passes are recorded
        self.seen = []
        model.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module, args, kwargs):
        mask, (rows, tokens) = kwargs["attention_mask"], kwargs["input_ids"].shape
        decodes = tokens == 1 or (mask is not None and mask.ndim == 4)
        self.seen.append((rows * tokens, tokens, decodes))

    def prefilled_tokens(self):
        return sum(tokens for tokens, _, decodes in self.seen if not decodes)

    def decoded_tokens(self):
        return [tokens for tokens, _, decodes in self.seen if decodes]

    def sequences_per_row(self):
        return [width for _, width, decodes in self.seen if decodes]


def adapted():
    return get_peft_model(make_model(vocab_size=64), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))


EVERY = SHARING | {name: make for name, (make, _) in NOT_SHARING.items()} | {"lora": adapted}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore:.*only slower")
def test_greedy_groups_are_copies_of_transformers_completions(name):
    torch.manual_seed(0)
    model, prompts = EVERY[name]().eval(), make_prompts(7)
    expected = one_by_one(model, prompts, 8)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=3)
    for sampling in (None, Sampling(temperature=0.0)):
        rollouts = engine.generate(prompts, max_new_tokens=8, sampling=sampling, num_completions=3)
        assert [c.tokens for c in rollouts.completions] == [tokens for tokens in expected for _ in range(3)]


def test_greedy_groups_are_decoded_once():
    model = SHARING["llama"]().eval()
    engine = LocalEngine(model, end_token_ids=NEVER)
    passes = Passes(model, engine)
    engine.generate(make_prompts(3), max_new_tokens=5, num_completions=9)
    assert passes.decoded_tokens() == [3] * 4


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 64])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_engine_prefills_each_prompt_once(batch_size, share_prefix):
    model = SHARING["llama"]().eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [[7] * 20 + torch.randint(10, 64, (6,), generator=draw).tolist() for _ in range(5)]  # no padding
    engine = LocalEngine(model, end_token_ids=NEVER, batch_size=batch_size, share_prefix=share_prefix)
    passes = Passes(model, engine)
    rollouts = engine.generate(prompts, max_new_tokens=4, sampling=Sampling(), num_completions=4)
    shared = rollouts.shared_prefix
    assert shared == (20 if share_prefix else 0)
    assert passes.prefilled_tokens() == rollouts.prefilled == shared + sum(len(prompt) - shared for prompt in prompts)
    assert max(passes.decoded_tokens()) <= batch_size
    assert sum(passes.decoded_tokens()) == 5 * 4 * 3  # the first token of each comes from the prefill of its prompt


def test_decode_drops_ended_sequences_from_the_batch():
    model = SHARING["llama"]().eval()
    engine = LocalEngine(model, end_token_ids=list(range(12)))
    passes = Passes(model, engine)
    torch.manual_seed(2)
    rollouts = engine.generate(
        make_prompts(4), max_new_tokens=30, sampling=Sampling(temperature=3.0), num_completions=8
    )
    lengths = [len(c.tokens) for c in rollouts.completions]
    rows = passes.decoded_tokens()
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]
    for step, batch in enumerate(rows, start=1):  # at most a quarter of the rows of a pass have ended
        assert sum(length > step for length in lengths) > 0.75 * batch
    assert sum(lengths) - 32 < sum(rows) < 1.34 * sum(lengths)


def test_engine_splits_groups_only_beyond_the_batch_size():
    model, progress = SHARING["llama"]().eval(), []
    engine = LocalEngine(model, end_token_ids=NEVER, batch_size=5)
    passes = Passes(model, engine)
    options = {"max_new_tokens": 2, "sampling": Sampling(), "on_answered": progress.append}
    engine.generate(make_prompts(5), num_completions=2, **options)
    assert passes.decoded_tokens() == [4, 4, 2]
    passes.seen.clear()
    engine.generate(make_prompts(2), num_completions=12, **options)
    assert passes.decoded_tokens() == [5, 5, 2] * 2
    assert progress == [2, 2, 1, 1, 1]


def test_completions_are_in_the_order_of_their_prompts():
    """The first token is fixed by a filter, so a completion shows which prompt it continues."""
    model, prompts = SHARING["llama"]().eval(), make_prompts(9)
    firsts = [tokens[0] for tokens in one_by_one(model, prompts, 1)]
    assert len(set(firsts)) > 4
    for batch_size in (2, 4, 64):
        engine = LocalEngine(model, end_token_ids=ENDS, batch_size=batch_size)
        rollouts = engine.generate(prompts, max_new_tokens=3, sampling=Sampling(top_k=1), num_completions=3)
        assert [c.tokens[0] for c in rollouts.completions] == [first for first in firsts for _ in range(3)]


def test_completions_of_a_long_prompt_share_rows_and_are_the_same():
    """Compared with a copy of the prompt's cache per completion, while sequences end at different steps."""
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(10, 64, (n,), generator=draw).tolist() for n in (160, 150, 151)]
    for name in SHARING:
        torch.manual_seed(0)
        model = SHARING[name]().eval()
        engine = LocalEngine(model, end_token_ids=list(range(9)), batch_size=12, share_prefix=False)
        passes, results = Passes(model, engine), {}
        assert engine._can_share_rows
        for shared in (True, False):
            engine._can_share_rows = shared
            passes.seen.clear()
            torch.manual_seed(3)
            results[shared] = engine.generate(
                prompts, max_new_tokens=40, sampling=Sampling(temperature=1.5), num_completions=4
            )
            assert passes.sequences_per_row()[0] == (4 if shared else 1)
            assert passes.decoded_tokens()[-1] < passes.decoded_tokens()[0]
        for one, other in zip(*(rollouts.completions for rollouts in results.values()), strict=True):
            assert (one.tokens, one.truncated) == (other.tokens, other.truncated)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len({c.tokens for c in results[True].completions}) > 9


@pytest.mark.parametrize("per_row", [1, 2, 3, 5, 6])
def test_shared_rows_mask_other_prompts_and_sequences(per_row):
    """Logits after forced tokens, before and after some sequences are dropped, equal those of plain passes."""
    model = SHARING["llama"]().eval()
    prefix, prompts = [11, 12, 13], [[20, 21], [22, 23, 24, 25]]
    forward = partial(next_logits, model)
    draw = torch.Generator().manual_seed(0)
    forced = torch.randint(10, 64, (5, 6), generator=draw)  # five steps of six sequences, three per prompt
    with torch.no_grad():
        start = prefill_tokens(model, prefix, 3)
        prefilled = prefill_prompts(forward, prompts, start, layers=3, pad_token_id=0, device=torch.device("cpu"))
        shared_rows = SharedRows(
            prefilled, num_completions=3, reuse_cache=False, max_new_tokens=5, sequences_per_row=per_row
        )
        kept_sequences = list(range(6))
        for step, tokens in enumerate(forced):
            if step in (2, 4):
                kept_sequences = kept_sequences[:: 2 if step == 2 else 3]
                shared_rows.keep(kept_sequences)
            got = shared_rows.append(forward, tokens[kept_sequences])
            for row, sequence in enumerate(kept_sequences):
                ids = [*prefix, *prompts[sequence // 3], *forced[: step + 1, sequence].tolist()]
                want = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                assert torch.allclose(got[row], want, atol=1e-4), (step, sequence)


def test_probe_cache_rejects_shared_rows_without_exact_masks(monkeypatch):
    model = SHARING["llama"]().eval()
    assert probe_cache(model, 3, 0) == (True, True)
    monkeypatch.setattr("lightning_ft.rollout.decode.attention_bias", lambda base, seen: 0.0 * seen)  # masks nothing
    assert probe_cache(model, 3, 0) == (True, False)
    monkeypatch.undo()
    model.config._attn_implementation = "flex_attention"
    assert not takes_explicit_masks(model)
    model.config._attn_implementation = "sdpa"
    monkeypatch.setattr("lightning_ft.rollout.probe.takes_explicit_masks", lambda base: False)
    assert probe_cache(model, 3, 0) == (True, False)


def test_gathered_cache_is_an_independent_copy():
    cache = GrowingCache(1)
    keys = torch.arange(12.0).view(2, 2, 3, 1)  # two rows, two heads, three positions
    cache.update(keys, keys + 100, 0)
    gathered = cache.gather(torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[2, 0, 1], [1, 1, 2]]), room=1)
    expected = torch.tensor([[[8.0, 6.0, 1.0], [11.0, 9.0, 4.0]], [[1.0, 1.0, 2.0], [4.0, 4.0, 5.0]]])
    assert torch.equal(gathered.growing[0].keys[..., 0], expected)
    assert torch.equal(gathered.growing[0].values[..., 0], expected + 100)
    new = torch.full((2, 2, 3, 1), 9.0)
    gathered.update(new, new, 0)
    assert gathered.get_seq_length() == 6
    assert torch.equal(gathered.growing[0].keys, torch.cat([expected[..., None], new], dim=2))
    assert cache.get_seq_length() == 3
    assert torch.equal(cache.growing[0].filled()[0], keys)


@pytest.mark.parametrize("name", NOT_SHARING)
def test_engine_warns_what_is_run_repeatedly_without_cache_support(name):
    make, reason = NOT_SHARING[name]
    torch.manual_seed(0)
    model, prompts = make().eval(), make_prompts(3)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=2)
    with pytest.warns(UserWarning, match=f"common prefix .* once per completion, because .*{reason}"):
        rollouts = engine.generate(prompts, max_new_tokens=4, sampling=Sampling(), num_completions=3)
    assert len(rollouts.completions) == 9
    assert rollouts.prefilled == 3 * sum(map(len, prompts))
    assert len({c.tokens for c in rollouts.completions}) > 3
    assert all(c.truncated == (c.tokens[-1] not in ENDS) for c in rollouts.completions)


def test_fallback_ignores_and_keeps_the_models_generation_config():
    torch.manual_seed(0)
    model = NOT_SHARING["short_window"][0]().eval()
    prompts = make_prompts(3)
    expected = one_by_one(model, prompts, 6)
    own = model.generation_config
    own.num_beams, own.suppress_tokens, own.temperature, own.do_sample = (
        2,
        [tokens[0] for tokens in expected],
        9.0,
        True,
    )
    with pytest.warns(UserWarning, match="only slower"):
        rollouts = LocalEngine(model, end_token_ids=ENDS).generate(prompts, max_new_tokens=6)
    assert [c.tokens for c in rollouts.completions] == expected
    assert model.generation_config is own


@pytest.mark.parametrize("lora", [False, True])
def test_engine_uses_the_current_weights(lora):
    model = adapted() if lora else SHARING["qwen3"]()
    engine, prompts = LocalEngine(model, end_token_ids=ENDS), make_prompts(6)
    options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0.8), "num_completions": 2}

    def generate():
        torch.manual_seed(0)
        return engine.generate(prompts, **options)

    before = generate()
    name, weight = next((n, p) for n, p in model.named_parameters() if ("lora_B" if lora else "q_proj") in n)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    changed = generate()
    assert changed != before, name
    fresh = LocalEngine(model, end_token_ids=ENDS)
    torch.manual_seed(0)
    assert fresh.generate(prompts, **options) == changed
    with torch.no_grad():
        weight.copy_(kept)
    assert generate() == before


def test_engine_restores_training_modes():
    model = SHARING["llama"]().train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    LocalEngine(model, end_token_ids=ENDS).generate(
        make_prompts(3), max_new_tokens=4, sampling=Sampling(), num_completions=2
    )
    assert [module.training for module in model.modules()] == before
    assert model.is_gradient_checkpointing
    assert torch.is_grad_enabled()


def test_engine_refuses_invalid_requests():
    engine = LocalEngine(SHARING["llama"](), end_token_ids=ENDS)
    with pytest.raises(ConfigError, match="num_completions=0"):
        engine.generate([[1]], max_new_tokens=1, num_completions=0)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        engine.generate([[1]], max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"Prompt 1 has 2,000 tokens; with max_new_tokens=60 .* context of 2,048"):
        engine.generate([[1], [1] * 2000], max_new_tokens=60)
