"""Frozen weights are cast once for all passes of a generation under autocast, and no value changes."""

import contextlib
from collections import Counter

import pytest
import torch
from architectures import ENDS, SHARING, make_prompts
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ft.evaluation.savings.serving import first_token_seconds
from lightning_ft.models.autocast import weights_cast_once
from lightning_ft.models.generate import generate_text
from lightning_ft.rollout import local
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Sampling


class CountCasts(TorchDispatchMode):
    """Counts how often each weight of a model is cast to bfloat16."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if p.ndim == 2}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._to_copy.default and options.get("dtype") is torch.bfloat16:
            name = self.names.get(arguments[0].data_ptr())
            self.counts.update([name] if name is not None else [])
        return function(*arguments, **(options or {}))


def make_policy(name="llama"):
    torch.manual_seed(0)
    policy = get_peft_model(SHARING[name](), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return policy.eval()


def sample(model):
    torch.manual_seed(1)
    engine = LocalEngine(model, end_token_ids=ENDS, batch_size=4)
    rollouts = engine.generate(make_prompts(), max_new_tokens=8, sampling=Sampling(), num_completions=2)
    return [(completion.tokens, completion.logprobs) for completion in rollouts.completions]


def test_engine_casts_each_frozen_weight_once():
    model = make_policy()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(model)  # the engine's probe of the model is another block
        engine = LocalEngine(model, end_token_ids=ENDS)
        engine.generate([[5, 6]], max_new_tokens=2)
        with CountCasts(model) as casts:
            engine.generate(make_prompts(), max_new_tokens=8)
    layers = [name for name, p in model.named_parameters() if "proj" in name]
    assert len(layers) >= 14
    assert {casts.counts[name] for name in layers} == {1}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_engine_casts_each_weight_once_where_autocast_keeps_no_copies():
    """As in a Trainer since Lightning 2.6; the trained weights of an adapter are cast once then, too."""
    model = make_policy()
    engine = LocalEngine(model, end_token_ids=ENDS)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
    with autocast:
        engine.generate([[5, 6]], max_new_tokens=2)  # probes the model
        with CountCasts(model) as casts:
            engine.generate(make_prompts(), max_new_tokens=8)
        assert not torch.is_autocast_cache_enabled()
    assert {count for name, count in casts.counts.items() if "proj" in name} == {1}
    assert {"lora_A", "base_layer"} <= {part for name in casts.counts for part in name.split(".")}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_casting_once_changes_no_token_and_no_log_probability(name, monkeypatch):
    model = make_policy(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        once = sample(model)
    monkeypatch.setattr(local, "weights_cast_once", lambda model: contextlib.nullcontext())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sample(model) == once
        with model.disable_adapter():
            assert sample(model) != once  # the adapter matters


def test_training_after_it_uses_the_weights_of_its_own_time():
    """Copies of one pass must not be used after the weights have changed, nor keep gradients away."""
    model = make_policy()
    ids = torch.tensor([make_prompts()[0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad(), weights_cast_once(model):
            before = model(ids).logits
        with torch.no_grad():
            model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.add_(0.1)
        loss = model(ids).logits.float().square().mean()
        loss.backward()
        with torch.no_grad():
            assert not torch.equal(model(ids).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in trained)


def test_nothing_changes_without_autocast_or_with_gradients():
    model = make_policy()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    with torch.no_grad(), weights_cast_once(model):
        assert not any(p.requires_grad for p in frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16), weights_cast_once(model):
        assert not any(p.requires_grad for p in frozen)


def test_weights_are_frozen_again_after_an_error():
    model = make_policy().requires_grad_(False)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with pytest.raises(KeyError), torch.no_grad(), autocast, weights_cast_once(model):
        raise KeyError
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("work", ["answers", "timed requests"])
def test_answers_and_timed_requests_cast_once_too(work, tokenizer):
    model = make_policy()
    engine = LocalEngine(model, end_token_ids=ENDS)
    with torch.autocast("cpu", dtype=torch.bfloat16), CountCasts(model) as casts:
        if work == "answers":
            generate_text(model, tokenizer, make_prompts(), pad_token_id=0, max_new_tokens=4)
        else:
            first_token_seconds(engine, make_prompts(), 0, rounds=3)
    counts = {casts.counts[name] for name, p in model.named_parameters() if "proj" in name and not p.requires_grad}
    assert counts == {1}
