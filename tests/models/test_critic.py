"""Critic values per token, from the policy's backbone or an adapter of their own, without affecting the policy."""

import pytest
import torch
from peft import LoraConfig
from tiny import make_model

from lightning_ft.data.layout import Example
from lightning_ft.data.shared_prompts import lay_out_completions
from lightning_ft.errors import ConfigError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.critic import Critic
from lightning_ft.models.head import base_of, completion_logprobs

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([9, 8])]
COMPLETIONS = [[[11, 12], [13]], [[14, 15, 16], [17, 2]]]


def batch(shared=True):
    rows = [[Example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool)) for ids in row] for row in COMPLETIONS]
    return lay_out_completions(PROMPTS, rows, shared=shared)


def adapted(**config):
    """A policy whose adapter has an effect."""
    torch.manual_seed(1)
    model = add_lora(make_model(), lora_config({"r": 4, **config}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_head(critic):
    torch.manual_seed(2)
    torch.nn.init.normal_(critic.head.weight)
    torch.nn.init.normal_(critic.head.bias)
    return critic


def by_itself(model, head):
    """Reference values: each sequence alone, with the head at the position before each token."""
    values = []
    for prompt, row in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in row:
            ids = torch.tensor([prompt.tolist() + completion])
            states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
            values += [head(states[len(prompt) + place - 1])[0] for place in range(len(completion))]
    return torch.stack(values)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("make", [make_model, adapted])
def test_critic_values_use_the_policys_hidden_states(make, shared):
    model = make()
    critic = with_head(Critic(model))
    tokens = batch(shared)
    values = critic(model, tokens, completion_logprobs(model, tokens, states=True).states)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, by_itself(model, critic.head), rtol=0, atol=1e-5)
    values.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in trained)
    assert list(critic.own_parameters(model)) == list(critic.head.parameters())


@pytest.mark.parametrize("shared", [True, False])
def test_critic_values_use_their_own_adapter(shared):
    model = adapted()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    policy = completion_logprobs(model, batch(shared)).logprobs
    critic = with_head(Critic(model, "adapter"))
    tokens = batch(shared)
    values = critic(model, tokens, None)
    # It starts from the base, not from the policy's adapter.
    torch.testing.assert_close(values, by_itself(make_model(), critic.head), rtol=0, atol=1e-5)
    assert (values - by_itself(model, critic.head)).abs().max() > 1e-2

    (values**2).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning
    assert all(".critic." in name for name in learning)
    own = {id(parameter) for parameter in critic.own_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    assert names == {name for name, _ in model.named_parameters() if ".critic." in name}
    assert len(own) == len(names) + 2

    with torch.no_grad():
        for parameter in critic.own_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(completion_logprobs(model, tokens).logprobs, policy)
    assert (critic(model, tokens, None) - values).abs().max() > 0.1
    assert model.active_adapter == "default"
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert after == {**before, **dict.fromkeys(names, True)}


@pytest.mark.parametrize("trunk", ["shared", "adapter"])
def test_critic_starts_at_zero_without_using_the_random_state(trunk):
    model = adapted()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    critic = Critic(model, trunk)
    assert torch.equal(torch.rand(3), expected)
    assert not critic(model, batch(), completion_logprobs(model, batch(), states=True).states).any()


def test_critic_seed_determines_its_adapter():
    found = []
    for seed in (0, 0, 1):
        model = adapted()
        Critic(model, "adapter", seed=seed)
        found.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A.critic" in n]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
def test_critic_accepts_adapters_that_change_the_base(init):
    model = adapted(init_lora_weights=init)
    weights = {name: p.clone() for name, p in base_of(model).named_parameters()}
    critic = with_head(Critic(model, "adapter"))
    for name, weight in weights.items():
        assert torch.equal(dict(base_of(model).named_parameters())[name], weight), name
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B.critic" in n)
    assert critic(model, batch(), None).isfinite().all()
    assert model.peft_config["default"].init_lora_weights == init


def test_critic_adapter_needs_an_adapted_policy():
    with pytest.raises(ConfigError, match="pass lora=True"):
        Critic(make_model(), "adapter")


def test_critic_head_is_fp32_over_a_bf16_backbone():
    model = add_lora(make_model().bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    for trunk in ("shared", "adapter"):
        critic = with_head(Critic(model, trunk))
        values = critic(model, batch(), completion_logprobs(model, batch(), states=True).states)
        assert values.dtype == torch.float32
        assert critic.head.weight.dtype == torch.float32
