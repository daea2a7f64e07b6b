"""Completions that share a prompt have the log-probabilities of single ones in many architectures, or aren't shared."""

import warnings

import pytest
import torch
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForSequenceClassification

from lightning_ft.data.layout import Example
from lightning_ft.data.shared_prompts import last_positions, lay_out_completions
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.head import hidden_states
from lightning_ft.models.logprob_model import LogProbModel, probe
from lightning_ft.models.reward_head import last_token_rewards, reward_head

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # large enough for attention to matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGEST = 13 + 11
SHARING = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": LONGEST},
    "mistral": {"sliding_window": LONGEST},
    "phi3": {"sliding_window": LONGEST},
}


def build(name, options, attention=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **options})
    return AutoModelForCausalLM.from_config(config, **({} if attention is None else {"attn_implementation": attention}))


def make():
    """Three prompts with one to four completions, some of which start with the same tokens."""
    draw = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, 100, (length,), generator=draw)

    prompts = [ids(5), ids(13), ids(1)]
    completions = []
    for lengths in ((3, 8), (11, 1, 4, 6), (7,)):
        beginning = ids(1)
        behind = []
        for length in lengths:
            supervised = torch.ones(length, dtype=torch.bool)
            supervised[-1] = length < 6
            behind.append(Example(torch.cat([beginning, ids(length - 1)]), supervised))
        completions.append(behind)
    return prompts, completions


def one_by_one(model, prompts, completions):
    """Log-probabilities by the model's own forward pass over each prompt with one completion."""
    found = []
    for prompt, behind in zip(prompts, completions, strict=True):
        for completion in behind:
            whole = torch.cat([prompt, completion.input_ids])
            logits = model(input_ids=whole[None], use_cache=False).logits[0, :-1].float()
            picked = logits.log_softmax(-1).gather(-1, whole[1:, None])[:, 0]
            found.append(picked[len(prompt) - 1 :][completion.supervised])
    return torch.cat(found)


def gradients(model, logprobs):
    weights = torch.linspace(-1, 1, len(logprobs))  # a loss that weights completions differently
    model.zero_grad()
    (weights * logprobs).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_sharing_matches_logprobs_and_gradients_of_single_completions(name, attention, lora):
    model = build(name, SHARING[name], attention).train()
    if lora:
        model = add_lora(model, lora_config({"r": 4, "init_lora_weights": False}), seed=0)
    prompts, completions = make()
    want = one_by_one(model, prompts, completions)
    expected = gradients(model, want)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0.1
    logprob_model = LogProbModel()
    for share_prompts in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a fallback would warn
            batch = logprob_model.lay_out(model, prompts, completions, share_prompts=share_prompts)
            scored = logprob_model(model, batch)
        assert batch.has_shared_prefixes == share_prompts
        torch.testing.assert_close(scored.logprobs, want, rtol=0, atol=1e-5)
        found = gradients(model, scored.logprobs)
        assert found.keys() == expected.keys()
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_sharing_keeps_completions_independent(name, attention):
    model = build(name, SHARING[name], attention).eval()
    prompts, completions = make()
    logprob_model = LogProbModel()
    first = logprob_model(model, logprob_model.lay_out(model, prompts, completions))
    batch = logprob_model.lay_out(model, prompts, completions)
    changed, group = completions[1][2], 4  # two completions precede it, and one follows
    other = changed.input_ids.clone()
    other[1] = (other[1] + 40) % 97 + 3
    completions[1][2] = Example(other, changed.supervised)
    second = logprob_model(model, logprob_model.lay_out(model, prompts, completions))
    own = batch.groups == group
    assert torch.equal(first.logprobs[~own], second.logprobs[~own])  # bit for bit
    assert first.logprobs[own][0] == second.logprobs[own][0]  # the token before the change
    assert (first.logprobs[own][1:] != second.logprobs[own][1:]).all()


def falls_back(model, match):
    """Lay out twice, and return the warnings and the batch."""
    prompts, completions = make()
    logprob_model = LogProbModel()
    with pytest.warns(UserWarning, match=match) as caught:
        batch = logprob_model.lay_out(model, prompts, completions)
    assert len([w for w in caught if "computes each prompt once for each completion" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the warning isn't repeated
        logprob_model.lay_out(model, prompts, completions)
    assert not batch.has_shared_prefixes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scored = logprob_model(model, batch)
    torch.testing.assert_close(scored.logprobs, one_by_one(model, prompts, completions), rtol=0, atol=1e-4)
    return batch


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "phi3"])
def test_sharing_falls_back_for_small_sliding_windows(name):
    window = LONGEST - 1
    model = build(name, {"sliding_window": window})
    batch = falls_back(model, f"{LONGEST} tokens are more than its attention window of {window}")
    assert batch.packed
    assert probe(model).sharing is None  # shorter batches would be shared


def test_sharing_falls_back_for_state_space_models():
    batch = falls_back(build("mamba", {"state_size": 4}), "it doesn't keep packed sequences apart")
    assert not batch.packed


def test_sharing_falls_back_for_unknown_heads():
    class Shifted(type(make_model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * torch.linspace(0.5, 2.0, out.logits.shape[-1])
            return out

    falls_back(Shifted(make_model(100).config), "its own forward pass is used")


def test_sharing_is_skipped_for_single_completions():
    model = build("mistral", {"sliding_window": 4})
    logprob_model = LogProbModel()
    prompts, completions = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        batch = logprob_model.lay_out(model, prompts, [behind[:1] for behind in completions])
    assert not batch.has_shared_prefixes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [LONGEST, 8])
def test_sharing_matches_scores_of_single_conversations(attention, window):
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, sliding_window=window, num_labels=1, attn_implementation=attention)
    model = MistralForSequenceClassification(config).eval()
    prompts, completions = make()
    wholes = [torch.cat([p, c.input_ids]) for p, behind in zip(prompts, completions, strict=True) for c in behind]
    want = torch.cat([last_token_rewards(model, [whole], 0) for whole in wholes])
    own = torch.cat([model(input_ids=whole[None]).logits[:, 0] for whole in wholes])
    torch.testing.assert_close(want, own, rtol=0, atol=1e-5)
    layouts = [{"shared": False}, {"shared": False, "packing": False}]
    for layout in [{"shared": True}, *layouts] if window == LONGEST else layouts:
        batch = lay_out_completions(prompts, completions, **layout)
        last = hidden_states(model, batch).flatten(0, 1)[last_positions(batch)]
        torch.testing.assert_close(reward_head(model)(last)[:, 0], want, rtol=0, atol=1e-5)
