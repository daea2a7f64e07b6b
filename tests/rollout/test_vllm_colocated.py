"""vLLM in the training process. (`vllm.LLM` is a mock that generates with a transformers model; none of it is real.)"""

import os
import random
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from policies import BATCHES, Policy, by_tokens
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM
from trl import import_utils

from lightning_ft import GRPO
from lightning_ft._lightning import Trainer
from lightning_ft.errors import ConfigError, MissingDependencyError, RolloutError
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling
from lightning_ft.rollout.vllm_colocated import ColocatedVLLMEngine

END = 1
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [5] * 12]


class MockLLM:
    """Has weights and a cache only while it is awake, as vLLM at sleep level 2."""

    made: ClassVar = []

    def __init__(self, model, **options):
        self.options, self.calls = {"model": model, **options}, []
        assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # as vLLM does in the process of its worker
            seed(options["seed"])
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.awake = {"weights", "kv_cache"}
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(
                driver_worker=SimpleNamespace(
                    model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
                )
            )
        )
        MockLLM.made.append(self)

    def sleep(self, level):
        assert level == 2
        self.awake = set()
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    def wake_up(self, tags):
        self.awake |= set(tags)

    def load_weights(self, weights):
        assert "weights" in self.awake
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def generate(self, inputs, sampling_params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        self.calls.append(sampling_params)
        greedy = sampling_params["temperature"] == 0
        assert not greedy or sampling_params["n"] == 1
        sampling = None if greedy else Sampling(temperature=sampling_params["temperature"])
        local = LocalEngine(self.model, end_token_ids=sampling_params["stop_token_ids"])
        found = local.generate(
            [one["prompt_token_ids"] for one in inputs],
            max_new_tokens=sampling_params["max_tokens"],
            sampling=sampling,
            num_completions=sampling_params["n"],
        ).completions
        n = sampling_params["n"]
        return [
            SimpleNamespace(outputs=[self.output(c, sampling_params) for c in found[i * n : (i + 1) * n]])
            for i in range(len(inputs))
        ]

    @staticmethod
    def output(completion, sampling_params):
        logprobs = None
        if sampling_params["logprobs"] is not None:
            logprobs = [
                {token: SimpleNamespace(logprob=value), 0: SimpleNamespace(logprob=-50.0)}
                for token, value in zip(completion.tokens, completion.logprobs, strict=True)
            ]
        return SimpleNamespace(token_ids=list(completion.tokens), logprobs=logprobs)


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = MockLLM, lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(MockLLM, "made", [])


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.mark.parametrize("adapted", [False, True])
def test_it_generates_with_the_current_weights(model, adapted):
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
    engine = ColocatedVLLMEngine(end_token_ids=[END])
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        engine.sync_weights(model)
        found = engine.generate(PROMPTS, max_new_tokens=8, num_completions=2)
        expected = LocalEngine(model, end_token_ids=[END]).generate(PROMPTS, max_new_tokens=8, num_completions=2)
        assert [c.tokens for c in found.completions] == [c.tokens for c in expected.completions]
    (llm,) = MockLLM.made
    assert llm.options["dtype"] == "bfloat16"
    assert llm.options["distributed_executor_backend"] == "external_launcher"
    assert llm.options["enable_sleep_mode"] is True
    assert not llm.awake


def test_its_start_changes_neither_environment_nor_random_state(model):
    def draws():
        return random.random(), np.random.rand(), float(torch.rand(()))

    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
        restore(state)
    ColocatedVLLMEngine(end_token_ids=[END]).sync_weights(model)
    assert len(MockLLM.made) == 1
    assert draws() == expected
    assert dict(os.environ) == environment


def test_samples_have_log_probabilities_unless_filtered(model):
    engine = ColocatedVLLMEngine(end_token_ids=[END])
    engine.sync_weights(model)
    found = engine.generate(PROMPTS, max_new_tokens=6, sampling=Sampling(temperature=0.7), num_completions=3)
    assert len(found.completions) == 9
    for number, completion in enumerate(found.completions):
        prompt = PROMPTS[number // 3]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion.tokens]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1)[range(len(completion.tokens)), completion.tokens]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=1e-4)
    engine.sync_weights(model)
    filtered = engine.generate(PROMPTS, max_new_tokens=6, sampling=Sampling(top_k=4))
    assert all(c.logprobs == () for c in filtered.completions)


def test_a_rank_without_prompts_wakes_and_sleeps_as_the_others(model):
    engine = ColocatedVLLMEngine(end_token_ids=[END], sleep=False, settings={"max_model_len": 64})
    engine.sync_weights(model)
    assert engine.generate([], max_new_tokens=4).completions == ()
    assert len(engine.generate(PROMPTS, max_new_tokens=4).completions) == 3
    assert MockLLM.made[0].awake == {"weights", "kv_cache"}
    assert MockLLM.made[0].options["max_model_len"] == 64


def test_errors_name_what_to_do(model, monkeypatch):
    engine = ColocatedVLLMEngine(end_token_ids=[END])
    with pytest.raises(RolloutError, match=r"call sync_weights\(model\) before each rollout"):
        engine.generate(PROMPTS, max_new_tokens=4)
    engine.sync_weights(model)
    engine.generate(PROMPTS, max_new_tokens=4)
    with pytest.raises(RolloutError, match=r"call sync_weights\(model\)"):
        engine.generate(PROMPTS, max_new_tokens=4)
    engine.sync_weights(model)
    monkeypatch.setattr(MockLLM, "generate", lambda *args, **options: 1 / 0)
    with pytest.raises(RolloutError, match="vLLM failed to generate: ZeroDivisionError"):
        engine.generate(PROMPTS, max_new_tokens=4)
    for name in ("seed", "gpu_memory_utilization"):
        with pytest.raises(ConfigError, match=f"'{name}' is set by the engine itself"):
            ColocatedVLLMEngine(end_token_ids=[END], settings={name: 0.3})
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=1\.5"):
        ColocatedVLLMEngine(end_token_ids=[END], gpu_memory_utilization=1.5)
    with pytest.raises(ConfigError, match=r"mode='colocate': .* Did you mean 'colocated'"):
        GRPO("some/model", rewards=len, vllm={"mode": "colocate"})
    with pytest.raises(ConfigError, match="Did you mean 'gpu_memory_utilization'"):
        GRPO("some/model", rewards=len, vllm={"mode": "colocated", "gpu_memory_utilisation": 0.3})
    with pytest.raises(ConfigError, match="vllm settings=5: expected a dict"):
        GRPO("some/model", rewards=len, vllm={"mode": "colocated", "settings": 5})
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization='0\.3': expected a number"):
        GRPO("some/model", rewards=len, vllm={"mode": "colocated", "gpu_memory_utilization": "0.3"})
    model.config._name_or_path = model.name_or_path = ""
    with pytest.raises(ConfigError, match="has neither: pass one of them as model="):
        ColocatedVLLMEngine(end_token_ids=[END]).sync_weights(model)
    monkeypatch.setattr(import_utils, "is_vllm_available", lambda *args, **kwargs: False)
    with pytest.raises(MissingDependencyError, match="needs vLLM in this environment"):
        ColocatedVLLMEngine(end_token_ids=[END])


def test_training_samples_with_it(model, trainer_options):
    torch.manual_seed(0)
    module = Policy(
        model,
        tokenizer=make_tokenizer(),
        rewards=by_tokens,
        num_completions=3,
        max_new_tokens=9,
        vllm={"mode": "colocated", "gpu_memory_utilization": 0.4},
    )
    trainer = Trainer(**{**trainer_options, "max_epochs": 1})
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    (llm,) = MockLLM.made
    assert llm.calls.count("reset") == len(BATCHES)
    assert float(trainer.callback_metrics["train/sampling_ratio"]) == pytest.approx(1, abs=1e-3)
