"""Batched generation matches `generate` on single prompts, for all models."""

import warnings

import pytest
import torch
from scaled_positions import SWITCH, build_scaled
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, RwkvConfig, RwkvForCausalLM

from lightning_ft.data.layout import Example
from lightning_ft.errors import ModelError
from lightning_ft.models.batched_generation import left_padding, plan_batches
from lightning_ft.models.generate import generate_text
from lightning_ft.models.logprob_model import LogProbModel
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

NEVER = [1000]  # a token that doesn't exist


def make_rwkv():
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = RwkvForCausalLM(RwkvConfig(**sizes, context_length=256)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def draw_prompts(*lengths):
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 100, (length,), generator=draw).tolist() for length in lengths]


def by_generate(model, prompts, max_new_tokens):
    """Greedy tokens of each prompt alone, by `generate`."""
    answers = []
    for prompt in prompts:
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(tuple(out[0, len(prompt) :].tolist()))
    return answers


class Unmasked(LlamaForCausalLM):
    """A model whose outputs depend on padding."""

    def forward(self, *args, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class Counting(LlamaForCausalLM):
    """A model whose rows affect each other: its logits depend on the batch size."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * (1 + 0.5 * torch.cos(torch.arange(out.logits.shape[-1]) * len(out.logits)))
        return out


def test_plan_batches_probes_left_padding():
    assert left_padding(make_model(100).eval(), 0) == "any"
    assert left_padding(Unmasked(make_model(100).config).eval(), 0) == "equal"
    assert left_padding(make_rwkv(), 0) == "one"  # transformers' RWKV sums the states of rows
    assert left_padding(Counting(make_model(100).config).eval(), 0) == "one"


@pytest.mark.parametrize("num_completions", [1, 2])
def test_engine_separates_prompts_if_the_model_reads_padding(num_completions):
    model = Unmasked(make_model(100).config).eval()
    prompts = draw_prompts(4, 9, 4, 7)
    engine = LocalEngine(model, end_token_ids=NEVER, share_prefix=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = engine.generate(prompts, max_new_tokens=6, num_completions=num_completions)
        engine.generate(prompts, max_new_tokens=6)
    assert "longer prompts of its batch, so only prompts of equal length share one" in str(caught[0].message)
    assert len([w for w in caught if "equal length" in str(w.message)]) == 1
    want = [answer for answer in by_generate(model, prompts, 6) for _ in range(num_completions)]
    assert [c.tokens for c in first.completions] == want
    assert len(set(want)) > 2


@pytest.mark.parametrize("make", [make_rwkv, lambda: Counting(make_model(100).config).eval()], ids=["rwkv", "counting"])
def test_engine_generates_row_by_row_if_rows_affect_each_other(make):
    model = make()
    prompts = draw_prompts(5, 5, 8)
    engine = LocalEngine(model, end_token_ids=NEVER, share_prefix=False)
    with pytest.warns(UserWarning, match="so prompts are generated one at a time"):
        rollouts = engine.generate(prompts, max_new_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sampled = engine.generate(prompts, max_new_tokens=2, sampling=Sampling(top_k=1), num_completions=2)
    want = by_generate(model, prompts, 5)
    assert [c.tokens for c in rollouts.completions] == want
    assert [c.tokens for c in sampled.completions] == [answer[:2] for answer in want for _ in range(2)]


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
def test_engine_matches_generate_across_the_length_switch(name):
    """Prompts below, at and above the switch, which cross it at different steps."""
    model = build_scaled(name)
    prompts = draw_prompts(4, SWITCH - 12, SWITCH - 3, SWITCH, SWITCH + 6, SWITCH + 6)
    want = by_generate(model, prompts, 12)
    engine = LocalEngine(model, end_token_ids=NEVER)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollouts = engine.generate(prompts, max_new_tokens=12)
        short = engine.generate(prompts[:2], max_new_tokens=12)
    assert [c.tokens for c in rollouts.completions] == want
    assert [c.tokens for c in short.completions] == want[:2]
    assert len(set(want)) == 6
    assert [w for w in caught if f"more than {SWITCH} tokens" in str(w.message)]


def test_engine_keeps_its_cache_within_the_length_switch():
    model = build_scaled("phi3")
    engine = LocalEngine(model, end_token_ids=NEVER)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rollouts = engine.generate([[5, 6, *p] for p in draw_prompts(4, SWITCH - 12)], max_new_tokens=10)
    assert rollouts.shared_prefix == 2


@pytest.mark.parametrize("side", [0, SWITCH + 1])
def test_sampled_logprobs_match_computed_ones_on_each_side_of_the_length_switch(side):
    model = build_scaled("phi3")
    prompts = draw_prompts(side + 4, side + 9)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rollouts = LocalEngine(model, end_token_ids=NEVER).generate(
            prompts, max_new_tokens=10, sampling=Sampling(), num_completions=3
        )
    completions = [Example(torch.tensor(c.tokens), torch.ones(10, dtype=torch.bool)) for c in rollouts.completions]
    logprob_model = LogProbModel()
    batch = logprob_model.lay_out(model, [torch.tensor(p) for p in prompts], [completions[:3], completions[3:]])
    sampled = torch.tensor([value for c in rollouts.completions for value in c.logprobs])
    torch.testing.assert_close(logprob_model(model, batch).logprobs.detach(), sampled, rtol=0, atol=1e-4)


def test_engine_warns_of_differing_sampled_and_computed_logprobs():
    engine = LocalEngine(build_scaled("phi3"), end_token_ids=NEVER)
    with pytest.warns(UserWarning, match="computed with other positions than its first tokens were sampled with"):
        engine.generate(draw_prompts(SWITCH - 4), max_new_tokens=8, sampling=Sampling())


@pytest.mark.parametrize("make", [make_rwkv, lambda: build_scaled("phi3")], ids=["rwkv", "longrope"])
def test_generate_text_matches_single_prompts(make, tokenizer):
    model = make()
    prompts = draw_prompts(4, SWITCH - 3, 9, SWITCH + 5, 4)
    options = {"pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    alone = [generate_text(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
    with pytest.warns(UserWarning, match="only slower"):
        assert generate_text(model, tokenizer, prompts, **options) == alone
    assert len(set(alone)) > 2


def test_plan_batches_uses_one_batch_for_ordinary_models():
    found = plan_batches(make_model(100).eval(), [3, 9, 500], max_new_tokens=4, pad_token_id=0)
    assert (found.keys, found.alone, found.why) == ((0, 0, 0), False, None)


def test_plan_batches_refuses_a_model_that_cannot_generate():
    class Broken(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            raise KeyError("pixel_values")

    with pytest.raises(ModelError, match=r"Broken: transformers' generate fails \(KeyError: 'pixel_values'\)"):
        left_padding(Broken(make_model(100).config).eval(), 0)


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma", "minimax", "llama4_text"])
def test_engine_matches_generate_on_other_architectures(name):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 256,
    }  # fmt: skip
    more = {
        "mamba": {"state_size": 4},
        "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
        "minimax": {"num_local_experts": 2, "block_size": 8},
        "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},
    }
    config = AutoConfig.for_model(name, **sizes, **more[name])
    model = AutoModelForCausalLM.from_config(config).float().eval()
    prompts = draw_prompts(4, 9, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rollouts = LocalEngine(model, end_token_ids=NEVER).generate(prompts, max_new_tokens=6)
    assert [c.tokens for c in rollouts.completions] == by_generate(model, prompts, 6)
