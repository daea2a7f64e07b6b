"""Transformers' continuous batching as an engine: equal to the built-in one, and reproducible."""

import gc
import math
import os
import threading

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from policies import BATCHES, Policy, make
from tiny import make_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.generation.continuous_batching import continuous_api

from lightning_ft import GRPO
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError, NonFiniteError, RolloutError
from lightning_ft.rollout.continuous_batching import ContinuousBatchingEngine
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling

END = 1
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [5] * 20, list(range(5, 45))]
PAGES = {"page_size": 16}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def engine(model, **options):
    return ContinuousBatchingEngine(model, end_token_ids=[END], **{"settings": PAGES, **options})


def with_adapter(model):
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def sliding_windows(**options):
    config = Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=8, **options)
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    "model",
    [make_model, lambda: with_adapter(make_model()), sliding_windows],
    ids=["llama", "adapter", "sliding windows"],
)
def test_greedy_tokens_equal_those_of_the_built_in_engine(model):
    model = model().train()
    expected = LocalEngine(model, end_token_ids=[END]).generate(PROMPTS, max_new_tokens=12, num_completions=2)
    found = engine(model, batch_size=3).generate(PROMPTS, max_new_tokens=12, num_completions=2)
    assert found.completions == expected.completions
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def logprobs_of(model, prompt, completion, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(completion.tokens)), completion.tokens]


def test_samples_have_the_models_log_probabilities_and_repeat_with_the_random_state():
    model = make_model()
    sampling = Sampling(temperature=0.7)

    def sample():
        return engine(model, batch_size=4).generate(PROMPTS, max_new_tokens=10, sampling=sampling, num_completions=6)

    torch.manual_seed(3)
    first, after = sample(), torch.rand(1)
    second = sample()
    torch.manual_seed(3)
    assert sample() == first
    assert torch.rand(1) == after
    assert second != first
    for number, completion in enumerate(first.completions):
        expected = logprobs_of(model, PROMPTS[number // 6], completion, 0.7)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)
    starts = [{c.tokens[0] for c in first.completions[i : i + 6]} for i in range(0, 24, 6)]
    assert any(len(tokens) > 1 for tokens in starts)  # transformers' return sequences share their first token


def test_sampled_tokens_are_distributed_as_the_model_says():
    model = make_model()
    prompt, count = [5, 6, 7], 3000
    found = engine(model, batch_size=500).generate(
        [prompt], max_new_tokens=1, sampling=Sampling(), num_completions=count
    )
    shares = torch.bincount(torch.tensor([c.tokens[0] for c in found.completions]), minlength=model.config.vocab_size)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert (shares / count - expected).abs().max() < 4 * (0.25 / count) ** 0.5


def test_filters_restrict_the_tokens():
    model = make_model()
    with torch.no_grad():
        probabilities = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    ranked = probabilities.argsort(descending=True)
    allowed = {
        "top_k": set(ranked[:3].tolist()),
        "top_p": set(ranked[: int((probabilities[ranked].cumsum(0) < 0.2).sum()) + 1].tolist()),
        "min_p": set((probabilities >= 0.8 * probabilities.max()).nonzero().flatten().tolist()),
    }
    for name, value in {"top_k": 3, "top_p": 0.2, "min_p": 0.8}.items():
        sampling = Sampling(**{name: value})
        found = engine(model).generate(PROMPTS[:1], max_new_tokens=1, sampling=sampling, num_completions=60)
        assert {c.tokens[0] for c in found.completions} <= allowed[name]
        assert all(c.logprobs == () for c in found.completions)


def test_completions_end_at_end_tokens_and_stop_strings(tokenizer):
    model = make_model()
    local = LocalEngine(model, end_token_ids=[END]).generate(PROMPTS, max_new_tokens=12)
    tokens = local.completions[0].tokens
    stop = tokenizer.decode([tokens[3]])
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=0.0, stop=(stop,))}
    expected = LocalEngine(model, end_token_ids=[END], tokenizer=tokenizer).generate(PROMPTS, **options)
    found = engine(model, tokenizer=tokenizer).generate(PROMPTS, **options)
    assert found.completions == expected.completions
    assert not found.completions[0].truncated
    ending = ContinuousBatchingEngine(model, end_token_ids=[tokens[2]], settings=PAGES)
    (completion,) = ending.generate(PROMPTS[:1], max_new_tokens=12).completions
    assert completion.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert not completion.truncated


def test_autocast_leaves_the_weights_as_they_were():
    model = make_model()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine(model).generate(PROMPTS, max_new_tokens=4, sampling=Sampling())
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]
        assert torch.equal(parameter, before[name][2])
    half = make_model().to(torch.bfloat16)
    for prompt, completion in zip(PROMPTS, found.completions, strict=True):
        expected = logprobs_of(half, prompt, completion, 1.0).float()
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.05, rtol=0.02)


def test_model_without_attention_is_refused_by_name():
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
    with pytest.raises(RolloutError, match=r"Continuous batching of MambaForCausalLM failed: .* built-in engine"):
        engine(MambaForCausalLM(MambaConfig(**sizes))).generate(PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: sliding_windows(attn_logit_softcapping=0.5, initializer_range=0.3),
        lambda: get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    ],
    ids=["soft caps", "virtual tokens"],
)
def test_model_that_is_run_otherwise_in_pages_is_refused(model):
    torch.manual_seed(0)
    with pytest.raises(RolloutError, match=r"gives other log-probabilities than the model, by 0\.\d+ nats"):
        engine(model()).generate(PROMPTS, max_new_tokens=4)


def test_lengths_that_change_other_sequences_of_a_pass_are_refused():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=24, rope_scaling=scaling))
    assert len(engine(model).generate([[5], [5] * 12], max_new_tokens=12).completions) == 2
    with pytest.raises(ConfigError, match=r"more than 24 tokens, and continuous batching puts all sequences into one"):
        engine(model).generate([[5], [5] * 13], max_new_tokens=12)


def test_completions_of_nonfinite_logits_have_logprobs_that_say_so():
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    prompts = [[5, 6, 7], [9, 10], [5, 6, 8]]
    for sampling in (Sampling(), Sampling(top_k=300)):
        found = engine(model, batch_size=1).generate(prompts, max_new_tokens=4, sampling=sampling).completions
        expected = LocalEngine(model, end_token_ids=[END], batch_size=1).generate(
            prompts, max_new_tokens=4, sampling=Sampling()
        )
        for completion, local in zip(found, expected.completions, strict=True):
            finite = all(math.isfinite(logprob) for logprob in completion.logprobs)
            assert finite is all(math.isfinite(logprob) for logprob in local.logprobs)
        assert len(found[1].logprobs) == len(found[1].tokens)
    with pytest.raises(NonFiniteError, match="logits weren't finite"):
        engine(model).generate(prompts, max_new_tokens=4)


def test_steps_of_nonfinite_logits_are_skipped(trainer_options):
    module = make(Policy, continuous_batching=PAGES, on_nonfinite="skip")
    module.configure_model()

    def overflow(head, args, output):
        of_rollout = not head.training and output.shape[-2] == 12  # a step of 12 completions
        return output * torch.nan if of_rollout else output

    module.model.lm_head.register_forward_hook(overflow)
    trainer = Trainer(**{**trainer_options, "max_epochs": 1, "limit_train_batches": 1})
    with pytest.warns(UserWarning, match="12 completions were sampled from logits that are not finite.* It is skipped"):
        trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_attention_and_environment_are_as_before_also_after_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    environment, threads = dict(os.environ), threading.active_count()
    model = make_model()
    model.set_attn_implementation("eager")
    engine(model).generate(PROMPTS, max_new_tokens=2)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(RolloutError, match="failed: AttributeError"):
        engine(model, settings={**PAGES, "varlen_compile_config": 3}).generate(PROMPTS, max_new_tokens=2)
    assert model.config._attn_implementation == "eager"
    assert dict(os.environ) == environment
    assert threading.active_count() == threads
    assert gc.get_freeze_count() == 0


def test_fp32_weights_stay_without_flash_attention(monkeypatch):
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **options: True)
    assert len(engine(make_model()).generate(PROMPTS, max_new_tokens=2).completions) == len(PROMPTS)
    with pytest.raises(RolloutError, match=r"[Ff]lash"):
        engine(make_model().to(torch.bfloat16)).generate(PROMPTS, max_new_tokens=2)


def test_errors_of_requests_and_settings():
    model = make_model()
    with pytest.raises(ConfigError, match="Prompt 1 has no tokens"):
        engine(model).generate([[5], []], max_new_tokens=4)
    with pytest.raises(ConfigError, match="pass the engine a tokenizer="):
        engine(model).generate([[5]], max_new_tokens=4, sampling=Sampling(stop=("x",)))
    with pytest.raises(ConfigError, match=r"max_new_tokens=2\.5: expected an integer"):
        engine(model).generate([[5]], max_new_tokens=2.5)
    with pytest.raises(ConfigError, match="batch_size=0"):
        engine(model, batch_size=0)
    with pytest.raises(ConfigError, match=r"no 'page_sise'\. Did you mean 'page_size'"):
        GRPO("some/model", rewards=len, continuous_batching={"page_sise": 16})
    for name, value in {"seed": 3, "max_queue_size": 2, "drop_unsupported_processors": True}.items():
        with pytest.raises(ConfigError, match=f"'{name}' is set by the engine itself"):
            engine(model, settings={name: value})
    for settings, message in (
        ({"page_size": 2}, "page_size=2: expected at least 4"),
        ({"page_size": "16"}, "page_size='16': expected an integer. Leave out the quotes"),
        ({"num_blocks": 4.5}, r"num_blocks=4\.5: expected an integer or None"),
        ({"scheduler_type": "lifo"}, "scheduler_type='lifo': expected fifo or prefill_first"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine(model, settings=settings)
    for value in ("yes", {}):
        with pytest.raises(ConfigError, match=f"continuous_batching={value!r}: expected True, False or a dict with"):
            GRPO("some/model", rewards=len, continuous_batching=value)
    with pytest.raises(RolloutError, match=r"can be offloaded\. Leave out"):
        engine(model, settings={**PAGES, "num_blocks": 1}).generate(PROMPTS, max_new_tokens=4)
    with pytest.raises(ConfigError, match="vllm= and continuous_batching= each say"):
        GRPO("some/model", rewards=len, vllm=True, continuous_batching=True)
    assert engine(model).generate([], max_new_tokens=4).completions == ()


def test_training_samples_with_it(trainer_options):
    torch.manual_seed(0)
    module = make(Policy, continuous_batching=PAGES)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer = Trainer(**{**trainer_options, "max_epochs": 1})
    trainer.fit(module, loader)
    assert isinstance(module.engine, ContinuousBatchingEngine)
    assert module.hparams["continuous_batching"] == PAGES
    assert float(trainer.callback_metrics["train/sampling_ratio"]) == pytest.approx(1, abs=1e-3)
    assert trainer.global_step > 0
    assert module.model.training
