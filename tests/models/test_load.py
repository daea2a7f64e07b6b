import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from lightning_ft.errors import ModelError
from lightning_ft.models.adapt import add_lora, load_adapter, lora_config
from lightning_ft.models.adaptation import Adaptation
from lightning_ft.models.load import load_causal_lm, load_reward_model

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def saved_adapter(tmp_path_factory):
    where = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    adapted = add_lora(make_model(), lora_config({"r": 4}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(where)
    return where


@pytest.fixture
def adapter(saved_adapter, tmp_path):
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


def change(folder, edit, file=WEIGHTS):
    """Change the weights file of a folder."""
    weights = edit(load_file(folder / file))
    save_file({name: value.clone() for name, value in weights.items()}, folder / file, metadata={"format": "pt"})
    return str(folder)


def configure(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(folder)


# ---- weights of a model


def test_load_model_is_silent_about_a_complete_checkpoint(model_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_causal_lm(model_folder)


def test_load_model_names_missing_weights(folder):
    change(folder, lambda w: {name: v for name, v in w.items() if "layers.1.mlp" not in name})
    with pytest.raises(ModelError, match=r"lacks 3 weights of LlamaForCausalLM: model\.layers\.\*\.mlp\.down_proj"):
        load_causal_lm(str(folder))


def test_load_model_names_missing_weights_of_layers_that_only_the_configuration_has(folder):
    with pytest.raises(ModelError, match="lacks 9 weights"):
        load_causal_lm(configure(folder, num_hidden_layers=3))


def test_load_model_lists_unexpected_weights_with_missing_ones(folder):
    change(folder, lambda w: {f"module.{name}": v for name, v in w.items()})
    with pytest.raises(ModelError, match=r"It contains 21 weights that LlamaForCausalLM lacks: module\.lm_head"):
        load_causal_lm(str(folder))


def test_load_model_refuses_a_model_without_a_head(folder, model_folder):
    AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"lacks 1 weight of LlamaForCausalLM: lm_head\.weight"):
        load_causal_lm(str(folder))


def test_load_model_accepts_tied_weights_that_are_saved_once(tmp_path):
    make_model(tie=True).save_pretrained(tmp_path)
    assert load_causal_lm(str(tmp_path)).lm_head.weight is not None


def test_load_model_warns_of_unexpected_weights(folder):
    change(folder, lambda w: {**w, "model.layers.7.mtp.weight": torch.ones(3)})
    with pytest.warns(UserWarning, match=r"contains 1 weight that LlamaForCausalLM doesn't have.*layers\.\*\.mtp"):
        load_causal_lm(str(folder))


def test_load_model_names_weights_of_other_sizes(folder):
    with pytest.raises(ModelError, match=r"lm_head\.weight is \(400, 32\) in the checkpoint and \(500, 32\) by"):
        load_causal_lm(configure(folder, vocab_size=500))


def test_load_reward_model_adds_a_head_to_a_language_model(model_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_reward_model(model_folder).score.weight.shape == (1, 32)


def test_load_reward_model_names_missing_weights_of_the_backbone(folder):
    change(folder, lambda w: {name: v for name, v in w.items() if name != "model.norm.weight"})
    with pytest.raises(ModelError, match=r"lacks 1 weight of LlamaForSequenceClassification: model\.norm\.weight"):
        load_reward_model(str(folder))


def test_load_reward_model_refuses_a_classifier(folder, model_folder):
    AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=3).save_pretrained(folder)
    with pytest.raises(ModelError, match="is a classifier of 3 labels"):
        load_reward_model(str(folder))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"model\.safetensors' is damaged or incomplete"),
        (b"", r"model\.safetensors' is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ],
)
def test_load_model_names_a_damaged_file(folder, content, says):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ModelError, match=says):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("content", [b"", b"nothing that torch reads", None])
def test_load_model_names_a_damaged_pickle(folder, content):
    (folder / WEIGHTS).unlink()
    file = folder / "pytorch_model.bin"
    torch.save(make_model().state_dict(), file)
    load_causal_lm(str(folder))
    file.write_bytes(file.read_bytes()[:9000] if content is None else content)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin' is"):
        load_causal_lm(str(folder))


def test_load_model_names_a_damaged_or_missing_shard(tmp_path):
    make_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ModelError, match=f"{shard.name}' is damaged"):
        load_causal_lm(str(tmp_path))
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize("sort", ["t5", "bart"])
def test_load_model_refuses_encoder_decoders(tmp_path, sort):
    small = {"d_model": 16, "vocab_size": 40, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    layers = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = AutoConfig.for_model(sort, **(small if sort == "t5" else {"d_model": 16, "vocab_size": 60, **layers}))
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"is an encoder-decoder \({sort}\), and this package trains causal"):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize("values", [{"num_attention_heads": "x"}, {"model_type": "unheard_of"}])
def test_load_model_refuses_a_configuration_that_transformers_refuses(folder, values):
    with pytest.raises(ModelError, match=r"could not be loaded: .*(num_attention_heads|unheard_of)"):
        load_causal_lm(configure(folder, **values))


def test_load_model_error_names_a_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="there is no such folder"):
        load_causal_lm(str(tmp_path / "none"))


def test_load_model_warns_of_matrices_of_zeros(folder):
    change(folder, lambda w: {n: torch.zeros_like(v) if "layers.1" in n else v for n, v in w.items()})
    with pytest.warns(UserWarning, match=r"7 contain only zeros \(model\.layers.*whose end was lost"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("content", ['{"eos_tok', "[1]", b"\xff\xfe"])
def test_load_model_refuses_a_damaged_generation_config(folder, content):
    path = folder / "generation_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=r"generation_config\.json' isn't a JSON object"):
        load_causal_lm(str(folder))
    path.unlink()
    load_causal_lm(str(folder))


# ---- adapters


def test_load_adapter_restores_saved_weights(saved_adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted = load_adapter(make_model(), str(saved_adapter))
    saved = load_file(saved_adapter / ADAPTER)
    loaded = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(loaded) == len(saved) == 28
    for name, value in saved.items():
        torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], value)


def test_load_adapter_warns_of_layers_that_cannot_learn(adapter):
    change(adapter, lambda w: {n: torch.zeros_like(v) if "lora_B" in n else v for n, v in w.items()}, ADAPTER)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(make_model(), str(adapter))  # an adapter that is new has one matrix of zeros
    change(adapter, lambda w: {n: torch.zeros_like(v) if "layers.1" in n else v for n, v in w.items()}, ADAPTER)
    with pytest.warns(UserWarning, match=r"Of the 14 layers .*, 7 have only zeros in both matrices \(.*\.layers\.\*"):
        load_adapter(make_model(), str(adapter))


def test_load_adapter_names_weights_that_the_model_does_not_know(adapter):
    change(adapter, lambda w: {name.replace("self_attn", "attention"): v for name, v in w.items()}, ADAPTER)
    with pytest.raises(ModelError, match=r"16 of its weights are missing \(.*self_attn.*16 .*unknown .*attention"):
        load_adapter(make_model(), str(adapter))


def test_load_adapter_refuses_a_part_of_an_adapter(adapter):
    change(adapter, lambda w: {name: v for name, v in w.items() if "layers.0" in name}, ADAPTER)
    with pytest.raises(ModelError, match="14 of its weights are missing"):
        load_adapter(make_model(), str(adapter))


def test_load_adapter_refuses_a_base_with_fewer_layers(adapter):
    with pytest.raises(ModelError, match="14 of its weights are unknown to the model"):
        load_adapter(make_model(layers=1), str(adapter))


def test_load_adapter_refuses_a_base_of_another_width(adapter):
    with pytest.raises(
        ModelError, match=r"28 of its weights have unexpected sizes\. The first: .*layers.0.self_attn.q_proj"
    ):
        load_adapter(make_model(hidden=64), str(adapter))


def test_load_adapter_refuses_another_rank(adapter):
    configure(adapter, "adapter_config.json", r=8)
    with pytest.raises(ModelError, match="28 of its weights have unexpected sizes"):
        load_adapter(make_model(), str(adapter))


def test_load_adapter_names_trained_modules_that_are_missing(adapter):
    configure(adapter, "adapter_config.json", modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"its weights lack '.*lm_head\.weight'"):
        load_adapter(make_model(), str(adapter))


@pytest.mark.parametrize(("content", "says"), [(None, "is damaged"), (b"", "is empty")])
def test_load_adapter_names_a_damaged_file(adapter, content, says):
    file = adapter / ADAPTER
    file.write_bytes(file.read_bytes()[:3000] if content is None else content)
    with pytest.raises(ModelError, match=rf"adapter_model\.safetensors' {says}"):
        load_adapter(make_model(), str(adapter))


def test_load_adapter_error_names_missing_weights(adapter):
    (adapter / ADAPTER).unlink()
    with pytest.raises(ModelError, match="the folder contains no weights"):
        load_adapter(make_model(), str(adapter))


@pytest.mark.parametrize("content", ["{", "[1]", '{"peft_type": "FOO"}', '{"peft_type": null}', '{"r": 4}'])
def test_load_adapter_names_an_unreadable_config(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    for use in (lambda: load_adapter(make_model(), str(adapter)), lambda: Adaptation(str(adapter), None, None)):
        with pytest.raises(ModelError, match=r"adapter_config\.json"):
            use()


def test_load_adapter_refuses_other_peft_types(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "task_type": "CAUSAL_LM"}))
    with pytest.raises(ModelError, match="IA3, not LoRA"):
        load_adapter(make_model(), str(tmp_path))


def test_load_adapter_warns_of_another_base(adapter, model_folder):
    configure(adapter, "adapter_config.json", base_model_name_or_path="some/other-model")
    with pytest.warns(UserWarning, match="was trained on 'some/other-model' and is continued on"):
        load_adapter(load_causal_lm(model_folder), str(adapter))
    name = model_folder.rstrip("/").split("/")[-1]
    configure(adapter, "adapter_config.json", base_model_name_or_path=f"elsewhere/{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(load_causal_lm(model_folder), str(adapter))


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [5, 6]}},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
@pytest.mark.parametrize("tie", [False, True])
def test_load_adapter_accepts_every_lora_variant(tmp_path, lora, tie):
    first = add_lora(make_model(tie=tie), lora_config({"r": 4, **lora}))
    first.save_pretrained(tmp_path)
    again = load_adapter(make_model(tie=tie), str(tmp_path))
    assert isinstance(again.active_peft_config, LoraConfig)
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (first, again)]
    assert trained[0] == trained[1]


def test_file_in_place_of_a_folder_is_named(tmp_path):
    for name, message in (("weights.gguf", "GGUF file can't be trained"), ("model.safetensors", "it is a file")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=message):
            load_causal_lm(str(tmp_path / name))
