"""Trained layers get from the frozen layers what the full model would compute, or the model is refused."""

import pytest
import torch
from frozen import ARCHITECTURES, GPT2, LAYERS, adapted, batch_of, build
from peft import LoraConfig, get_peft_model
from tiny import make_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_ft.errors import ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.frozen_layers import FrozenLayers
from lightning_ft.models.head import base_of, hidden_states


def states_of(frozen, batch):
    """Hidden states of a batch, with each sequence computed alone."""
    found = torch.zeros(*batch.input_ids.shape, frozen.width, dtype=frozen.dtype)
    for row, kinds in enumerate(batch.segment_ids):
        for segment in kinds[kinds >= 0].unique().tolist():
            found[row, kinds == segment] = frozen.states(batch.input_ids[row, kinds == segment])
    return found


def both_ways(model, batch):
    """Last hidden states of the full model, and of the trained layers over given states, at real tokens."""
    frozen = FrozenLayers(model)
    states = states_of(frozen, batch)
    real = batch.segment_ids >= 0
    every = hidden_states(base_of(model), batch)[real]
    with frozen.replaced_by(states):
        return every, hidden_states(base_of(model), batch)[real]


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trained_layers_match_the_full_model(name, packing):
    """Gemma 1 and 2 scale embeddings before their layers; the scaling isn't repeated, since layers get the states."""
    every, top = both_ways(adapted(build(name)).double(), batch_of(packing=packing))
    assert every.abs().max() > 1
    torch.testing.assert_close(top, every, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("top", range(1, LAYERS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_frozen_layers_match_the_full_model_at_any_depth(name, top):
    model = adapted(build(name, attention="sdpa"), top).double()
    assert FrozenLayers(model).depth == LAYERS - top
    every, given = both_ways(model, batch_of(packing=False))
    torch.testing.assert_close(given, every, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_frozen_layers_keep_gradients_of_trained_layers(name):
    model, batch = adapted(build(name)).double(), batch_of()
    weight = torch.randn(batch.num_tokens, 32).double()
    found = []
    for hidden in both_ways(model, batch):
        model.zero_grad()
        (hidden * weight).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_frozen_and_trained_layers_run_separately():
    model = adapted(build("llama"), 1)
    frozen = FrozenLayers(model)
    ran = []
    for number, layer in enumerate(frozen.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: ran.append(number))
    states = frozen.states(torch.arange(3, 8))
    assert ran == [0, 1, 2]
    ran.clear()
    with frozen.replaced_by(states[None]):
        model(torch.arange(3, 8)[None])
    assert ran == [3]


@torch.no_grad()
def test_frozen_layers_use_the_replaced_states():
    model = adapted(build("llama"), 1).eval()
    frozen = FrozenLayers(model)
    ids = torch.arange(3, 8)[None]
    with frozen.replaced_by(frozen.states(torch.arange(20, 25))[None]):
        other = model(ids).logits
    assert torch.equal(other, model(torch.arange(20, 25)[None]).logits)
    assert not torch.equal(other, model(ids).logits)


class GivesTuples(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs),)


@torch.no_grad()
@pytest.mark.parametrize("top", range(1, LAYERS))
def test_frozen_layers_support_tuple_outputs(top):
    """Layers return tuples in older architectures, whose models use the first element."""
    model = build("llama")

    first = model.model.layers[0]

    def of_tuple(module, args):
        assert isinstance(args[0], tuple) == (module is not first)
        return (args[0][0] if isinstance(args[0], tuple) else args[0], *args[1:])

    for layer in model.model.layers:
        layer.register_forward_pre_hook(of_tuple)
        layer.__class__ = GivesTuples
    model.model.norm.register_forward_pre_hook(of_tuple)
    model = adapted(model, top).double()
    frozen = FrozenLayers(model)
    assert frozen._tuples
    every, given = both_ways(model, batch_of())
    torch.testing.assert_close(given, every, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gemma3n_text"])
def test_frozen_layers_refuse_outputs_beyond_hidden_states(name):
    options = {
        "bloom": {"n_layer": 4, "n_head": 4},
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
        "gemma3n_text": {
            "layer_types": ["full_attention"] * 4,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 100,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 4,
        },
    }
    with pytest.raises(ModelError, match="more than"):
        FrozenLayers(adapted(build(name, **options[name]), 3))


# -------------------------------------------------------------------- forward


def test_frozen_layers_restore_forward_after_an_error():
    model = adapted(build("llama"))
    frozen = FrozenLayers(model)
    assert not any("forward" in vars(layer) for layer in frozen.layers)
    with pytest.raises(ZeroDivisionError), frozen.replaced_by(torch.zeros(1, 3, 32)):
        assert [1 / ("forward" in vars(layer)) for layer in frozen.layers] == [1.0, 1.0]
    assert not any("forward" in vars(layer) for layer in frozen.layers)
    frozen.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        frozen.states(torch.arange(3))
    assert not any("forward" in vars(layer) for layer in frozen.layers)
    assert not any(layer._forward_hooks for layer in frozen.layers)


@pytest.mark.parametrize("index", [0, 3])
def test_frozen_layers_keep_a_patched_forward(index):
    """A forward that was patched, as by accelerate's hooks."""
    model = adapted(build("llama"))
    layer = base_of(model).model.layers[index]
    original, calls = layer.forward, []

    def watched(*args, **kwargs):
        calls.append(index)
        return original(*args, **kwargs)

    layer.forward = watched
    frozen = FrozenLayers(model)
    assert vars(layer)["forward"] is watched
    with frozen.replaced_by(frozen.states(torch.arange(3))[None]):
        model(torch.arange(3)[None])
    assert vars(layer)["forward"] is watched
    model(torch.arange(3)[None])
    assert calls == ([0] * 3 if index == 0 else [3] * 2)  # states, states, all layers | replaced states, all layers


# -------------------------------------------------------------------- refusals


def with_lora(**options):
    tie = options.pop("tie", False)
    return add_lora(make_model(tie=tie, layers=3), lora_config({"r": 2, **options}))


TOP = {"layers_to_transform": [2], "target_modules": ["q_proj"]}
REFUSED = {
    "all layers": (lambda: with_lora(), "The lowest of the 3 layers is trained"),
    "the lowest": (lambda: with_lora(**{**TOP, "layers_to_transform": [0]}), "lowest of the 3 layers is trained"),
    "embeddings": (lambda: with_lora(**TOP, modules_to_save=["embed_tokens"]), "isn't inside a layer"),
    "tokens": (lambda: with_lora(**TOP, trainable_token_indices=[5]), "isn't inside a layer"),
    "tied head": (lambda: with_lora(**TOP, modules_to_save=["lm_head"], tie=True), "isn't inside a layer"),
    "everything": (lambda: make_model().requires_grad_(True), "isn't inside a layer"),
    "nothing": (lambda: make_model().requires_grad_(False), "No parameter of the model is trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_frozen_layers_refuse_states_that_change_between_steps(case):
    make, reason = REFUSED[case]
    with pytest.raises(ModelError, match=reason):
        FrozenLayers(make())


@pytest.mark.parametrize(
    ("lora", "depth"),
    [
        ({}, 2),
        ({"layers_to_transform": [1]}, 1),
        ({"modules_to_save": ["lm_head"]}, 2),
        ({"target_modules": ["lm_head"], "layers_to_transform": None}, 3),
    ],
)
def test_frozen_layers_accept_trained_modules_above(lora, depth):
    assert FrozenLayers(with_lora(**{**TOP, **lora})).depth == depth


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, "LlamaAttention.attention_dropout is 0.1"),
        ("gpt_neox", {"hidden_dropout": 0.3}, "Dropout.p is 0.3"),
        ("gpt2", {"embd_pdrop": 0.1}, "Dropout.p is 0.1"),
        ("gpt2", {"resid_pdrop": 0.1}, "Dropout.p is 0.1"),
        ("gpt2", {"attn_pdrop": 0.2}, "Dropout.p is 0.2"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "layerdrop": 0.1}, "layerdrop is 0.1"),
    ],
)
def test_frozen_layers_refuse_dropout(name, options, reason):
    with pytest.raises(ModelError, match=reason):
        FrozenLayers(adapted(build(name, **options)))


def test_frozen_layers_accept_dropout_in_trained_layers():
    model = adapted(build("llama"), 1, lora_dropout=0.5)
    base_of(model).model.layers[-1].self_attn.attention_dropout = 0.3
    assert FrozenLayers(model).depth == LAYERS - 1


# -------------------------------------------------------------------- the key


def change(model, name):
    with torch.no_grad():
        dict(base_of(model).named_parameters())[name].view(-1)[-1] += 1e-3


LLAMA = "model.layers.{}.input_layernorm.weight"


@pytest.mark.parametrize(
    ("name", "weight", "changes"),
    [
        ("llama", LLAMA.format(0), True),
        ("llama", LLAMA.format(1), True),
        ("llama", LLAMA.format(2), False),
        ("llama", "model.layers.3.self_attn.q_proj.base_layer.weight", False),
        ("llama", "model.layers.3.self_attn.q_proj.lora_A.default.weight", False),
        ("llama", "lm_head.weight", False),
        ("llama", "model.embed_tokens.weight", True),
        ("gpt2", "transformer.wpe.weight", True),  # learned positions
        ("gpt2", "transformer.h.1.attn.c_attn.weight", True),
    ],
)
def test_frozen_layers_key_depends_on_frozen_computation(name, weight, changes):
    model = adapted(build(name, **(GPT2 if name == "gpt2" else {})))
    frozen = FrozenLayers(model)
    before = frozen.content_key()
    assert before == FrozenLayers(adapted(build(name))).content_key()
    change(model, weight)
    assert (frozen.content_key() != before) == changes


def test_frozen_layers_key_depends_on_settings():
    def key(model=None, *details, attention="eager", top=2, **options):
        return FrozenLayers(model or adapted(build("llama", attention, **options), top)).content_key(*details)

    every = [key(), key(attention="sdpa"), key(top=1), key(rms_norm_eps=1e-4), key(None, "bfloat16")]
    every.append(key(adapted(build("llama").to(torch.bfloat16))))
    assert len(set(every)) == 6
    assert key(adapted(build("llama"), lora_alpha=3)) == key()
    model = build("llama")
    model.config._name_or_path = "elsewhere"
    assert key(adapted(model)) == key()
    lora = LoraConfig(r=8, target_modules=["v_proj"], layers_to_transform=[2])
    assert key(get_peft_model(build("llama"), lora)) == key()
