"""Sampled tokens have the right probabilities and log-probabilities, and sampling is reproducible."""

import pytest
import torch
from architectures import ENDS, NOT_SHARING, SHARING, make_prompts
from scipy.stats import chisquare
from tiny import make_model
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightning_ft.errors import ConfigError
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.sampling import TokenSampler, draw

NEVER = [1000]  # no such token
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.3, top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(temperature=0.6, top_k=20, top_p=0.8, min_p=0.05),
]
FALLBACK = ["short_window", "mamba"]


def make(name):
    torch.manual_seed(0)
    return (SHARING[name]() if name in SHARING else NOT_SHARING[name][0]()).eval()


def plain_logprobs(model, prompt, tokens, temperature):
    logits = model(torch.tensor([list(prompt) + list(tokens)])).logits[0].double()
    chosen = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return chosen[torch.arange(len(tokens)), torch.tensor(tokens)].float()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
@pytest.mark.parametrize("share_prefix", [True, False])
def test_sampled_tokens_are_those_of_transformers(sampling, share_prefix, monkeypatch):
    monkeypatch.setattr(
        "lightning_ft.rollout.sampling.draw", lambda p: torch.multinomial(p, 1)[:, 0]
    )  # like transformers
    model = make("qwen3")
    draw = torch.Generator().manual_seed(1)
    head = torch.randint(10, 64, (6,), generator=draw)
    prompts = torch.cat([head.expand(4, 6), torch.randint(10, 64, (4, 5), generator=draw)], dim=1)  # of equal length
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=9,
        num_return_sequences=3,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        eos_token_id=NEVER,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)[:, 11:]
    engine = LocalEngine(model, end_token_ids=NEVER, share_prefix=share_prefix)
    torch.manual_seed(3)
    rollouts = engine.generate(prompts.tolist(), max_new_tokens=9, sampling=sampling, num_completions=3)
    assert [list(c.tokens) for c in rollouts.completions] == expected.tolist()
    assert len({c.tokens for c in rollouts.completions}) > 8


def test_draw_follows_the_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])
    counts = torch.bincount(draw(probabilities.expand(200_000, 6)), minlength=6) / 200_000
    torch.testing.assert_close(counts, probabilities, atol=0.005, rtol=0)  # four standard deviations
    assert not counts[probabilities == 0].any()
    wide = torch.zeros(2000)  # several blocks of tokens, the last one shorter
    tokens = [3, 255, 256, 700, 1999]
    wide[tokens] = torch.tensor([0.4, 0.1, 0.2, 0.05, 0.25])
    counts = torch.bincount(draw(wide.expand(50_000, 2000)), minlength=2000) / 50_000
    torch.testing.assert_close(counts, wide, atol=0.01, rtol=0)


@pytest.mark.parametrize("tokens", [6, 2000])
def test_draw_raises_no_warning(tokens, recwarn):
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch repeats most of its warnings only then
    try:
        draw(torch.full((3, tokens), 1 / tokens))
    finally:
        torch.set_warn_always(always)
    assert not recwarn.list


def test_draw_never_returns_probability_zero_at_the_ends(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda total: torch.ones_like(total))
    assert draw(torch.tensor([[0.25, 0.75, 0.0, 0.0]])).tolist() == [1]
    monkeypatch.setattr(torch, "rand_like", lambda total: torch.zeros_like(total))
    assert draw(torch.tensor([[0.0, 0.0, 0.25, 0.75]])).tolist() == [2]


@pytest.mark.parametrize("name", [*SHARING, *FALLBACK])
@pytest.mark.filterwarnings("ignore:.*only slower")
def test_logprobs_match_a_plain_pass(name):
    model, prompts = make(name), make_prompts(5)
    sampling = Sampling(temperature=2.5, top_k=30, top_p=0.9)
    engine = LocalEngine(model, end_token_ids=range(3, 16), batch_size=6)
    rollouts = engine.generate(prompts, max_new_tokens=10, sampling=sampling, num_completions=2)
    assert len({len(c.tokens) for c in rollouts.completions}) > 2  # some sequences end early and leave the batch
    for number, completion in enumerate(rollouts.completions):
        assert len(completion.logprobs) == len(completion.tokens)
        expected = plain_logprobs(model, prompts[number // 2], completion.tokens, 2.5)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_greedy_completions_have_no_logprobs():
    for sampling in (None, Sampling(temperature=0.0)):
        (completion,) = (
            LocalEngine(make("llama"), end_token_ids=ENDS)
            .generate([[11, 12]], max_new_tokens=2, sampling=sampling)
            .completions
        )
        assert completion.logprobs == ()


def test_sampled_token_frequencies_match_probabilities():
    """Chi-square on one-token completions of a small vocabulary. (Over 200 seeds the p-values were uniform.)"""
    model = make_model(vocab_size=12, hidden=16).eval()
    prompt, temperature = [5, 6, 7], 1.7
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    engine = LocalEngine(model, end_token_ids=[11], batch_size=500)
    torch.manual_seed(5)
    rollouts = engine.generate(
        [prompt], max_new_tokens=1, sampling=Sampling(temperature=temperature), num_completions=4000
    )
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in rollouts.completions]), minlength=12)
    expected = (logits / temperature).softmax(-1) * 4000
    assert expected.min() > 5  # required by the chi-square test
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3
    assert chisquare(counts.numpy(), (logits.softmax(-1) * 4000).numpy()).pvalue < 1e-9  # without the temperature


@pytest.mark.parametrize(
    ("sampling", "chain"),
    [
        (Sampling(top_k=4), [TopKLogitsWarper(4)]),
        (Sampling(top_p=0.5), [TopPLogitsWarper(0.5)]),
        (Sampling(min_p=0.3), [MinPLogitsWarper(0.3)]),
        (
            Sampling(temperature=2.0, top_k=9, top_p=0.7, min_p=0.1),
            [TemperatureLogitsWarper(2.0), TopKLogitsWarper(9), TopPLogitsWarper(0.7), MinPLogitsWarper(0.1)],
        ),
    ],
)
def test_sampler_draws_exactly_the_tokens_that_filters_keep(sampling, chain):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    kept = logits
    for warper in chain:
        kept = warper(None, kept)
    allowed = [set(row.isfinite().nonzero()[:, 0].tolist()) for row in kept]
    assert all(1 < len(tokens) < 40 for tokens in allowed)
    sampler, seen = TokenSampler(sampling), [set(), set(), set()]
    for _ in range(400):
        for row, token in enumerate(sampler(logits)[0].tolist()):
            seen[row].add(token)
    assert seen == allowed  # all of them are drawn, and no other


@pytest.mark.parametrize("name", ["llama", "short_window"])
@pytest.mark.filterwarnings("ignore:.*only slower")
def test_rollout_depends_only_on_the_generator_state(name):
    model, prompts = make(name), make_prompts(5)
    options = {"max_new_tokens": 8, "sampling": Sampling(temperature=0.9), "num_completions": 3}
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=7)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = engine.generate(prompts, **options)
    after = torch.get_rng_state()
    second = engine.generate(prompts, **options)
    assert second != first
    torch.set_rng_state(state)
    again = LocalEngine(model, end_token_ids=ENDS, batch_size=7).generate(
        prompts, **options
    )  # a new engine probes the model again
    assert again == first
    assert torch.equal(torch.get_rng_state(), after)
    LocalEngine(model, end_token_ids=ENDS).generate(prompts, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), after)  # greedy draws nothing


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": True},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"stop": "</s>"},
        {"stop": ("a", "")},
        {"stop": (3,)},
    ],
    ids=str,
)
def test_sampling_refuses_values_out_of_range(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name + "="):
        Sampling(**options)
