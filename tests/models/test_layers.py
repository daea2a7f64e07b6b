"""`in_top_layers` puts adapters into the top layers only, whatever their names are in an architecture."""

import copy
import re

import pytest
import torch
from frozen import ARCHITECTURES, LAYERS, build
from peft import LoraConfig
from tiny import make_model
from torch import nn
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel
from transformers.pytorch_utils import Conv1D

from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.layers import in_top_layers, layers_of, refuse_adapters_below


def adapted(model):
    """Indices of the layers with adapters, and names of adapters outside of layers."""
    inside, outside = set(), set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
            outside.add(name) if found is None else inside.add(int(found[1]))
    return sorted(inside), outside


@pytest.mark.parametrize("count", [1, LAYERS - 1, LAYERS])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_top_layers_adapt_all_and_only_their_linear_modules(name, count):
    model = build(name)
    _, layers = layers_of(model)
    linear = [
        {n for n, part in layer.named_modules() if isinstance(part, (nn.Linear, Conv1D))} for layer in layers[-count:]
    ]
    config = in_top_layers(lora_config({"r": 2}), model, count)
    model = add_lora(model, config)
    assert adapted(model) == (list(range(LAYERS - count, LAYERS)), set())
    for layer, names in zip(layers_of(model)[1][-count:], linear, strict=True):
        assert {n for n, part in layer.named_modules() if hasattr(part, "lora_A")} == names


def test_layer_list_name_is_found():
    assert {name: layers_of(build(name))[0] for name in ("llama", "gpt2", "gpt_neox")} == {
        "llama": "layers",
        "gpt2": "h",
        "gpt_neox": "layers",
    }
    model = add_lora(build("llama"), lora_config({"r": 2}))
    assert layers_of(model)[1] == list(model.get_base_model().model.layers)


def test_layer_list_ignores_lists_inside_layers():
    """With as many experts as layers, the outer list is the list of layers."""
    model = make_model(layers=3)
    for layer in model.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert layers_of(model)[1] == list(model.model.layers)


def test_top_layers_reject_models_with_ambiguous_layers():
    model = make_model(layers=3)
    model.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(ModelError, match=r"one list of its 3 layers among its modules, found 2 of that length"):
        layers_of(model)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
    config = BertConfig(**sizes)
    both = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, copy.deepcopy(config)))
    with pytest.raises(ModelError, match=r"among its modules, found"):
        layers_of(both)


def test_top_layers_keep_target_modules_of_the_user():
    model = add_lora(make_model(), in_top_layers(lora_config({"r": 2, "target_modules": ["q_proj"]}), make_model(), 1))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all(".layers.1.self_attn.q_proj." in name for name in trained)


def test_top_layers_do_not_change_the_passed_config():
    config = LoraConfig(target_modules="all-linear")
    before = copy.deepcopy(config)
    top = in_top_layers(config, make_model(), 1)
    assert config == before
    assert (top.r, top.layers_to_transform, top.layers_pattern) == (config.r, [1], ["layers"])


def test_top_layers_accept_an_equal_layers_to_transform():
    config = lora_config({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]})
    assert in_top_layers(config, make_model(layers=3), 2).layers_to_transform == [1, 2]
    with pytest.raises(ConfigError, match=r"layers_to_transform=\[1, 2\] contradict each other"):
        in_top_layers(config, make_model(layers=3), 1)


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_top_layers_reject_more_layers_than_the_model_has(count):
    with pytest.raises(ConfigError, match=f"top_layers={count}: the model has 3 layers"):
        in_top_layers(lora_config({}), make_model(layers=3), count)


@pytest.mark.parametrize("targets", [r".*\.q_proj", None])
def test_top_layers_refuse_a_full_name_pattern(targets):
    """PEFT supports no layers_to_transform with a pattern."""
    with pytest.raises(ConfigError, match="as a list of names"):
        in_top_layers(LoraConfig(target_modules=targets), make_model(), 1)


def test_top_layer_adapter_changes_only_that_layer():
    model = make_model(layers=3).eval()
    ids = torch.randint(0, 400, (1, 6))
    before = model(ids, output_hidden_states=True).hidden_states
    adapter = lora_config({"r": 2, "init_lora_weights": False})
    model = add_lora(model, in_top_layers(adapter, model, 1)).eval()
    after = model(ids, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, True, False]


def test_top_layers_refuse_adapters_in_lower_layers():
    model = add_lora(make_model(layers=3), lora_config({"r": 2}))
    with pytest.raises(ModelError, match=r"top_layers=1, but PEFT put an adapter on .* of layer 0 too"):
        refuse_adapters_below(model, 1)
    refuse_adapters_below(model, 3)
    refuse_adapters_below(add_lora(make_model(layers=3), in_top_layers(lora_config(None), make_model(layers=3), 1)), 1)
