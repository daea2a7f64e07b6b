"""Several completions of each prompt: each prompt is read once, whatever the batches."""

from functools import partial

import pytest
import torch
from architectures import ENDS, NOT_SHARING, SHARING, make_prompts, one_by_one
from peft import LoraConfig, get_peft_model
from tiny import make_model

from lightning_ft.errors import ConfigError
from lightning_ft.models.head import takes_explicit_masks
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.decode import next_logits, read_tokens
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.probe import probe_cache
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.shared_rows import SharedRows, read_prompts

NEVER = [1000]  # no such token


class Passes:
    """Shapes of the passes through a model that read prompts, and of those that write."""

    def __init__(self, model, engine):
        engine._layers(3)  # asks the model
        self.seen = []
        model.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        mask, (rows, tokens) = kwargs["attention_mask"], kwargs["input_ids"].shape
        writes = tokens == 1 or (mask is not None and mask.ndim == 4)
        self.seen.append((rows * tokens, tokens, writes))

    def read(self):
        return sum(tokens for tokens, _, writes in self.seen if not writes)

    def written(self):
        return [tokens for tokens, _, writes in self.seen if writes]

    def together(self):
        return [width for _, width, writes in self.seen if writes]


def adapted():
    return get_peft_model(make_model(vocab_size=64), LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))


EVERY = SHARING | {name: make for name, (make, _) in NOT_SHARING.items()} | {"lora": adapted}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore:.*only slower")
def test_greedy_groups_are_copies_of_what_generate_writes(name):
    torch.manual_seed(0)
    model, prompts = EVERY[name]().eval(), make_prompts(7)
    expected = one_by_one(model, prompts, 8)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=3)
    for sampling in (None, Sampling(temperature=0.0)):
        rollouts = engine.generate(prompts, max_new_tokens=8, sampling=sampling, num_completions=3)
        assert [c.tokens for c in rollouts.completions] == [answer for answer in expected for _ in range(3)]


def test_greedy_groups_are_written_once():
    model = SHARING["llama"]().eval()
    engine = LocalEngine(model, end_token_ids=NEVER)
    passes = Passes(model, engine)
    engine.generate(make_prompts(3), max_new_tokens=5, num_completions=9)
    assert passes.written() == [3] * 4


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 64])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_each_prompt_is_read_once(batch_size, share_prefix):
    model = SHARING["llama"]().eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [[7] * 20 + torch.randint(10, 64, (6,), generator=draw).tolist() for _ in range(5)]  # no padding
    engine = LocalEngine(model, end_token_ids=NEVER, batch_size=batch_size, share_prefix=share_prefix)
    passes = Passes(model, engine)
    rollouts = engine.generate(prompts, max_new_tokens=4, sampling=Sampling(), num_completions=4)
    shared = rollouts.shared_prefix
    assert shared == (20 if share_prefix else 0)
    assert passes.read() == rollouts.prefilled == shared + sum(len(prompt) - shared for prompt in prompts)
    assert max(passes.written()) <= batch_size
    assert sum(passes.written()) == 5 * 4 * 3  # the first token of each comes from the pass that read its prompt


def test_rows_leave_the_batch_as_they_end():
    model = SHARING["llama"]().eval()
    engine = LocalEngine(model, end_token_ids=list(range(12)))
    passes = Passes(model, engine)
    torch.manual_seed(2)
    rollouts = engine.generate(
        make_prompts(4), max_new_tokens=30, sampling=Sampling(temperature=3.0), num_completions=8
    )
    lengths = [len(c.tokens) for c in rollouts.completions]
    rows = passes.written()
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]
    for step, batch in enumerate(rows, start=1):  # at most a quarter of the rows of a pass have ended
        assert sum(length > step for length in lengths) > 0.75 * batch
    assert sum(lengths) - 32 < sum(rows) < 1.34 * sum(lengths)


def test_a_group_is_split_only_where_it_does_not_fit():
    model, told = SHARING["llama"]().eval(), []
    engine = LocalEngine(model, end_token_ids=NEVER, batch_size=5)
    passes = Passes(model, engine)
    options = {"max_new_tokens": 2, "sampling": Sampling(), "on_answered": told.append}
    engine.generate(make_prompts(5), num_completions=2, **options)
    assert passes.written() == [4, 4, 2]
    passes.seen.clear()
    engine.generate(make_prompts(2), num_completions=12, **options)
    assert passes.written() == [5, 5, 2] * 2
    assert told == [2, 2, 1, 1, 1]


def test_completions_stand_in_the_order_of_their_prompts():
    """The first token is fixed by a filter, so a completion shows which prompt it continues."""
    model, prompts = SHARING["llama"]().eval(), make_prompts(9)
    firsts = [answer[0] for answer in one_by_one(model, prompts, 1)]
    assert len(set(firsts)) > 4
    for batch_size in (2, 4, 64):
        engine = LocalEngine(model, end_token_ids=ENDS, batch_size=batch_size)
        rollouts = engine.generate(prompts, max_new_tokens=3, sampling=Sampling(top_k=1), num_completions=3)
        assert [c.tokens[0] for c in rollouts.completions] == [first for first in firsts for _ in range(3)]


def test_completions_of_a_long_prompt_are_written_in_one_row_and_are_the_same():
    """Greedy and sampled, with rows that end on the way, against a copy of the cache for each."""
    draw = torch.Generator().manual_seed(4)
    prompts = [torch.randint(10, 64, (n,), generator=draw).tolist() for n in (160, 150, 151)]
    for name in SHARING:
        torch.manual_seed(0)
        model = SHARING[name]().eval()
        engine = LocalEngine(model, end_token_ids=list(range(9)), batch_size=12, share_prefix=False)
        passes, answers = Passes(model, engine), {}
        assert engine._together
        for together in (True, False):
            engine._together = together
            passes.seen.clear()
            torch.manual_seed(3)
            answers[together] = engine.generate(
                prompts, max_new_tokens=40, sampling=Sampling(temperature=1.5), num_completions=4
            )
            assert passes.together()[0] == (4 if together else 1)
            assert passes.written()[-1] < passes.written()[0]
        for one, other in zip(*(found.completions for found in answers.values()), strict=True):
            assert (one.tokens, one.truncated) == (other.tokens, other.truncated)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert len({c.tokens for c in answers[True].completions}) > 9


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6])
def test_sequences_of_a_row_see_their_own_prompt_and_tokens_only(width):
    """Logits behind forced tokens, before and after some sequences have left, against plain passes."""
    model = SHARING["llama"]().eval()
    prefix, prompts = [11, 12, 13], [[20, 21], [22, 23, 24, 25]]
    forward = partial(next_logits, model)
    draw = torch.Generator().manual_seed(0)
    forced = torch.randint(10, 64, (5, 6), generator=draw)  # five steps of six sequences, three of each prompt
    with torch.no_grad():
        start = read_tokens(model, prefix, 3)
        read = read_prompts(forward, prompts, start, layers=3, pad_token_id=0, device=torch.device("cpu"))
        bundles = SharedRows(read, times=3, last=False, ahead=5, width=width)
        staying = list(range(6))
        for step, tokens in enumerate(forced):
            if step in (2, 4):
                staying = staying[:: 2 if step == 2 else 3]
                bundles.keep(staying)
            got = bundles.write(forward, tokens[staying])
            for row, sequence in enumerate(staying):
                ids = [*prefix, *prompts[sequence // 3], *forced[: step + 1, sequence].tolist()]
                want = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                assert torch.allclose(got[row], want, atol=1e-4), (step, sequence)


def test_a_model_that_takes_no_masks_or_minds_them_gets_a_copy_for_each(monkeypatch):
    model = SHARING["llama"]().eval()
    assert probe_cache(model, 3, 0) == (True, True)
    monkeypatch.setattr("lightning_ft.rollout.decode.attention_bias", lambda base, seen: 0.0 * seen)  # all is seen
    assert probe_cache(model, 3, 0) == (True, False)
    monkeypatch.undo()
    model.config._attn_implementation = "flex_attention"
    assert not takes_explicit_masks(model)
    model.config._attn_implementation = "sdpa"
    monkeypatch.setattr("lightning_ft.rollout.probe.takes_explicit_masks", lambda base: False)
    assert probe_cache(model, 3, 0) == (True, False)


def test_a_gathered_cache_is_a_copy_and_grows_by_itself():
    cache = GrowingCache(1)
    keys = torch.arange(12.0).view(2, 2, 3, 1)  # two rows, two heads, three places
    cache.update(keys, keys + 100, 0)
    gathered = cache.gathered(torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[2, 0, 1], [1, 1, 2]]), room=1)
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
def test_models_without_such_a_cache_say_what_is_run_again(name):
    make, reason = NOT_SHARING[name]
    torch.manual_seed(0)
    model, prompts = make().eval(), make_prompts(3)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=2)
    with pytest.warns(UserWarning, match=f"common prefix .* each of its completions, because .*{reason}"):
        rollouts = engine.generate(prompts, max_new_tokens=4, sampling=Sampling(), num_completions=3)
    assert len(rollouts.completions) == 9
    assert rollouts.prefilled == 3 * sum(map(len, prompts))
    assert len({c.tokens for c in rollouts.completions}) > 3
    assert all(c.truncated == (c.tokens[-1] not in ENDS) for c in rollouts.completions)


def test_a_checkpoints_own_generation_config_is_left_out_and_left_alone():
    torch.manual_seed(0)
    model = NOT_SHARING["short_window"][0]().eval()
    prompts = make_prompts(3)
    expected = one_by_one(model, prompts, 6)
    own = model.generation_config
    own.num_beams, own.suppress_tokens, own.temperature, own.do_sample = (
        2,
        [answer[0] for answer in expected],
        9.0,
        True,
    )
    with pytest.warns(UserWarning, match="only slower"):
        rollouts = LocalEngine(model, end_token_ids=ENDS).generate(prompts, max_new_tokens=6)
    assert [c.tokens for c in rollouts.completions] == expected
    assert model.generation_config is own


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_weights_are_those_of_the_moment(kind):
    model = adapted() if kind == "lora" else SHARING["qwen3"]()
    engine, prompts = LocalEngine(model, end_token_ids=ENDS), make_prompts(6)
    options = {"max_new_tokens": 6, "sampling": Sampling(temperature=0.8), "num_completions": 2}

    def ask():
        torch.manual_seed(0)
        return engine.generate(prompts, **options)

    before = ask()
    name, weight = next((n, p) for n, p in model.named_parameters() if ("lora_B" if kind == "lora" else "q_proj") in n)
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(-3)
    changed = ask()
    assert changed != before, name
    fresh = LocalEngine(model, end_token_ids=ENDS)
    torch.manual_seed(0)
    assert fresh.generate(prompts, **options) == changed
    with torch.no_grad():
        weight.copy_(kept)
    assert ask() == before


def test_modes_are_left_as_they_were():
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


def test_errors():
    engine = LocalEngine(SHARING["llama"](), end_token_ids=ENDS)
    with pytest.raises(ConfigError, match="num_completions=0"):
        engine.generate([[1]], max_new_tokens=1, num_completions=0)
    with pytest.raises(ConfigError, match="max_new_tokens=0"):
        engine.generate([[1]], max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"Prompt 1 has 2,000 tokens: with 60 new ones .* context of 2,048"):
        engine.generate([[1], [1] * 2000], max_new_tokens=60)
