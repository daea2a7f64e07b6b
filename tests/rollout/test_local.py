import random

import pytest
import torch
from architectures import ENDS, NOT_SHARING, SHARING, make_prompts, one_by_one
from peft import LoraConfig, get_peft_model
from tiny import make_model

from lightning_ft.errors import ConfigError
from lightning_ft.rollout.local import LocalEngine, split_by_length
from lightning_ft.rollout.protocol import common_prefix


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("name", SHARING)
def test_greedy_completions_are_those_of_transformers(name, share_prefix):
    torch.manual_seed(0)
    model, prompts = SHARING[name]().eval(), make_prompts()
    expected = one_by_one(model, prompts, 12)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=4, share_prefix=share_prefix)
    rollouts = engine.generate(prompts, max_new_tokens=12)
    assert [c.tokens for c in rollouts.completions] == expected
    assert [c.truncated for c in rollouts.completions] == [tokens[-1] not in ENDS for tokens in expected]
    assert len(set(expected)) > 5  # otherwise mistakes would not show


def test_engine_prefills_the_common_prefix_once():
    model, prompts = SHARING["llama"]().eval(), make_prompts()
    seen = []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=4)
    engine._layers(3)  # probes the model before passes are recorded
    seen.clear()
    rollouts = engine.generate(prompts, max_new_tokens=3)
    assert rollouts.shared_prefix == 20
    assert rollouts.prefilled == 20 + sum(len(prompt) - 20 for prompt in prompts)
    assert [shape for shape in seen if shape[1] >= 20] == [(1, 20)]
    unshared = LocalEngine(model, end_token_ids=ENDS, share_prefix=False).generate(prompts, max_new_tokens=3)
    assert unshared.prefilled == sum(map(len, prompts))


@pytest.mark.parametrize("name", NOT_SHARING)
def test_engine_falls_back_without_cache_support_and_warns_why(name):
    make, reason = NOT_SHARING[name]
    torch.manual_seed(0)
    model, prompts = make().eval(), make_prompts()
    with pytest.warns(UserWarning, match=reason) as caught:
        rollouts = LocalEngine(model, end_token_ids=ENDS, batch_size=4).generate(prompts, max_new_tokens=8)
    assert len([w for w in caught if "common prefix" in str(w.message)]) == 1
    assert rollouts.shared_prefix == 0
    assert [c.tokens for c in rollouts.completions] == one_by_one(model, prompts, 8)


def test_engine_falls_back_when_cached_output_differs(monkeypatch):
    model, prompts = SHARING["llama"]().eval(), make_prompts()
    monkeypatch.setattr(LocalEngine, "_is_exact", lambda self, layers: False)
    with pytest.warns(UserWarning, match="output differs when a prefix is taken from a cache"):
        rollouts = LocalEngine(model, end_token_ids=ENDS).generate(prompts, max_new_tokens=8)
    assert [c.tokens for c in rollouts.completions] == one_by_one(model, prompts, 8)


def test_engine_uses_the_adapter():
    model = make_model(vocab_size=64)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    prompts = make_prompts()
    rollouts = LocalEngine(adapted, end_token_ids=ENDS, batch_size=3).generate(prompts, max_new_tokens=6)
    tokens = [c.tokens for c in rollouts.completions]
    assert tokens == one_by_one(adapted.eval(), prompts, 6)
    with adapted.disable_adapter():
        assert tokens != one_by_one(adapted, prompts, 6)


def test_engine_restores_training_modes_and_grad_mode():
    model = SHARING["llama"]().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    LocalEngine(model, end_token_ids=ENDS).generate(make_prompts(3), max_new_tokens=4)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_completions_do_not_depend_on_batch_size_and_progress_is_reported():
    model, prompts = SHARING["qwen3"]().eval(), make_prompts(6)
    progress = []
    never = [1000]  # no such token: all completions reach the limit, and the cache has to grow
    engines = [LocalEngine(model, end_token_ids=never, batch_size=size) for size in (1, 5, 64)]
    results = [engine.generate(prompts, max_new_tokens=70, on_answered=progress.append) for engine in engines]
    assert results[0] == results[1] == results[2]
    assert sum(progress) == 3 * len(prompts)
    assert {(len(c.tokens), c.truncated) for c in results[0].completions} == {(70, True)}


def test_engine_does_not_pad_short_prompts_to_the_length_of_a_long_one():
    model, prompts = SHARING["llama"]().eval(), make_prompts()
    prompts = [[*prompts[0], *prompts[1] * 6], *(prompt[20:] for prompt in prompts)]
    expected = one_by_one(model, prompts, 3)
    shapes = []
    model.model.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    engine = LocalEngine(model, end_token_ids=ENDS)
    engine._layers(3)  # probes the model before passes are recorded
    shapes.clear()
    assert [c.tokens for c in engine.generate(prompts, max_new_tokens=3).completions] == expected
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert prefills[0] == (1, len(prompts[0]))
    assert sum(rows for rows, _ in prefills) == len(prompts)


@pytest.mark.parametrize("seed", range(20))
def test_split_by_length_costs_least_of_all_splits(seed):
    rng = random.Random(seed)
    lengths = sorted((rng.randint(1, 200) for _ in range(rng.randint(1, 9))), reverse=True)
    step_tokens = rng.choice([0, 10, 100, 1000])

    def cost(sizes):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return sum(lengths[start] * size + step_tokens for start, size in zip(starts, sizes, strict=True))

    def splits(count):
        return [[]] if not count else [[n, *rest] for n in range(1, count + 1) for rest in splits(count - n)]

    found = split_by_length(lengths, step_tokens)
    assert sum(found) == len(lengths)
    assert cost(found) == min(map(cost, splits(len(lengths))))


def test_engine_accepts_identical_prompts_and_no_prompts():
    model = SHARING["llama"]().eval()
    engine = LocalEngine(model, end_token_ids=ENDS)
    same = engine.generate([[11, 12, 13]] * 3, max_new_tokens=4)
    assert same.shared_prefix == 2
    assert len({c.tokens for c in same.completions}) == 1
    assert engine.generate([], max_new_tokens=4).completions == ()


def test_first_token_is_the_same_with_a_prefilled_prefix():
    model, prompts = SHARING["llama"]().eval(), make_prompts()
    engine = LocalEngine(model, end_token_ids=ENDS)
    prefix = engine.prefill_prefix(prompts[0][:20], 64)
    expected = one_by_one(model, prompts, 1)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert engine.first_token(prompt) == engine.first_token(prompt[20:], prefix) == tokens[0]


def test_common_prefix_matches_brute_force():
    prompts = make_prompts(7, prefix=5)
    brute = max(k for k in range(min(map(len, prompts))) if len({tuple(p[:k]) for p in prompts}) == 1)
    assert common_prefix(prompts) == brute


def test_engine_refuses_invalid_arguments():
    model = SHARING["llama"]()
    with pytest.raises(ConfigError, match="end_token_ids is empty"):
        LocalEngine(model, end_token_ids=[])
    with pytest.raises(ConfigError, match="batch_size=0"):
        LocalEngine(model, end_token_ids=ENDS, batch_size=0)
    with pytest.raises(ConfigError, match="Prompt 1 has no tokens"):
        LocalEngine(model, end_token_ids=ENDS).generate([[1], []], max_new_tokens=1)
