"""Multimodal checkpoints load for text with all weights, train, and reload with their class."""

import pytest
import torch
from many_models import make, make_multimodal
from tiny import make_model, make_rows, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ft import FullFineTuning, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.models.load import load_causal_lm, text_class_name, text_model_classes

KINDS = ["mistral3", "qwen2_5_vl", "qwen3_vl", "mllama", "gemma3", "idefics3", "smolvlm", "llava"]


@pytest.fixture
def folder(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "base")
        make_tokenizer().save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


@pytest.mark.parametrize("kind", KINDS)
def test_load_causal_lm_keeps_every_weight(kind, folder):
    source = make_multimodal(kind)
    model = load_causal_lm(folder(source))
    assert type(model) is type(source)
    assert model.training
    saved, loaded = dict(source.named_parameters()), dict(model.named_parameters())
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "llama4"])
def test_multimodal_checkpoints_train_on_text(kind, lora, folder, trainer_options):
    name = folder(make_multimodal(kind))
    options = {"lora": {"r": 2}} if lora else {"dtype": "float32"}
    module = (LoRAFineTuning if lora else FullFineTuning)(name, learning_rate=1e-2, **options)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    data = PairDataModule(make_rows(6), batch_size=3, cache_dir=False)
    Trainer(**trainer_options, max_steps=2).fit(module, data)
    for n, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[n]) != parameter.requires_grad or "router" in n or "expert" in n, n
    trained = [n for n, p in module.model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("vision" in n or "visual" in n or "projector" in n or "connector" in n for n in trained)


def test_load_causal_lm_falls_back_to_the_language_model_alone(folder):
    source = make_multimodal("llama4")
    name = folder(source)
    try:
        source(input_ids=torch.arange(4)[None])
    except AttributeError:
        with pytest.warns(UserWarning, match="doesn't run on text alone"):
            model = load_causal_lm(name)
        inner = source.language_model.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, inner)
    else:
        assert type(load_causal_lm(name)) is type(source)


def test_text_model_classes_prefer_the_class_of_the_checkpoint(folder):
    config = AutoConfig.from_pretrained(folder(make_multimodal("mllama")))
    assert [auto.__name__ for auto in text_model_classes(config)][:2] == [
        "AutoModelForImageTextToText",
        "AutoModelForCausalLM",
    ]
    config.architectures = ["MllamaForCausalLM"]
    assert text_model_classes(config)[0] is AutoModelForCausalLM


def test_text_model_classes_accept_other_configs():
    assert text_model_classes(None) == [AutoModelForCausalLM]
    assert text_model_classes(make_model().config) == [AutoModelForCausalLM]
    config = make_multimodal("llava").config
    config.auto_map = {"AutoModelForCausalLM": "modeling.Theirs"}
    assert text_model_classes(config) == [AutoModelForCausalLM]


def test_text_class_name_loads_an_export():
    assert text_class_name(make_multimodal("mistral3")) == "AutoModelForImageTextToText"
    assert text_class_name(make_multimodal("gemma3")) == "AutoModelForCausalLM"
    assert text_class_name(make("llama")) == "AutoModelForCausalLM"
