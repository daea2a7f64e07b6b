"""An adapter finds the local folder that it was trained on without storing its path."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from tiny import make_model

from lightning_ft import DPO, LoRAFineTuning
from lightning_ft.errors import ModelError
from lightning_ft.models.adapter_export import save_adapter
from lightning_ft.models.load import adapter_base, load_causal_lm


@pytest.fixture
def adapter(model_folder, tmp_path, tokenizer):
    """A nested folder of an adapter, whose base folder `base` is two levels above."""
    shutil.copytree(model_folder, tmp_path / "work" / "base")
    model = load_causal_lm(str(tmp_path / "work" / "base"))
    folder = tmp_path / "work" / "runs" / "last"
    folder.mkdir(parents=True)
    save_adapter(get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM")), folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_adapter_config_contains_no_absolute_path(adapter):
    text = (adapter / "adapter_config.json").read_text()
    assert str(adapter.parent) not in text
    assert json.loads(text)["base_model_name_or_path"] == "base"


def test_base_folder_is_found_in_parents_and_after_a_move(adapter, tmp_path, monkeypatch):
    assert adapter_base(str(adapter)) == str(tmp_path / "work" / "base")
    module = LoRAFineTuning(str(adapter))
    module.configure_model()
    (tmp_path / "away").mkdir()
    moved = shutil.move(adapter, tmp_path / "away" / "last")
    monkeypatch.chdir(tmp_path / "work")
    assert adapter_base(str(moved)) == "base"


def test_base_folder_ignores_another_folder_of_that_name(adapter, tmp_path):
    other = tmp_path / "work" / "runs" / "base"
    make_model(seed=5).save_pretrained(other)
    assert adapter_base(str(adapter)) == str(tmp_path / "work" / "base")
    shutil.rmtree(tmp_path / "work" / "base")
    with pytest.raises(
        ModelError, match=r"local folder called 'base', .*adapter_config\.json .*`--merge true`.*model= "
    ):
        adapter_base(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    assert adapter_base(str(adapter)) == str(other)  # as the user passed it


@pytest.mark.parametrize("levels", ["models", "models/small"])
def test_base_folder_is_found_below_the_current_folder(adapter, tmp_path, monkeypatch, levels):
    parent = tmp_path / "project" / levels
    parent.mkdir(parents=True)
    shutil.move(tmp_path / "work" / "base", parent / "base")
    monkeypatch.chdir(tmp_path / "project")
    assert adapter_base(str(adapter)) == f"{levels}/base"


def test_base_folder_is_found_next_to_folders_above_the_adapter(adapter, tmp_path):
    (tmp_path / "work" / "models").mkdir()
    base = shutil.move(tmp_path / "work" / "base", tmp_path / "work" / "models" / "base")
    assert adapter_base(str(adapter)) == str(base)


def test_base_folder_with_glob_characters_is_found(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder, tmp_path / "base [v2]")
    model = load_causal_lm(str(tmp_path / "base [v2]"))
    save_adapter(get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM")), tmp_path / "last")
    (tmp_path / "models").mkdir()
    shutil.move(tmp_path / "base [v2]", tmp_path / "models" / "base [v2]")
    monkeypatch.chdir(tmp_path)
    assert adapter_base("last") == "models/base [v2]"


def test_base_folder_is_found_from_any_folder_on_the_machine_of_the_export(
    adapter, tmp_path, tmp_path_factory, monkeypatch
):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    moved = shutil.move(adapter, tmp_path / "elsewhere" / "deep" / "last")
    monkeypatch.chdir(moved)
    assert adapter_base(".") == str(tmp_path / "work" / "base")
    content = b"".join(file.read_bytes() for file in moved.glob("adapter_*"))
    assert str(tmp_path).encode() not in content  # the note is in the machine's cache alone
    for note in (tmp_path_factory.getbasetemp() / "datasets" / "lightning_ft" / "bases").iterdir():
        note.write_bytes(b"\xff\x00")  # damaged
    with pytest.raises(ModelError, match=r"local folder called 'base', .*exported on this machine\."):
        adapter_base(".")


def test_continued_adapter_looks_for_no_local_name_on_the_hub(adapter, monkeypatch, recwarn):
    monkeypatch.chdir(adapter)
    module = DPO(".", lora=True)
    module.configure_model()
    assert not [str(w.message) for w in recwarn if "Could not find a config file" in str(w.message)]


def test_unknown_target_modules_are_answered_with_those_of_the_model(model_folder):
    module = LoRAFineTuning(model_folder, lora={"target_modules": ["q_prj"]})
    with pytest.raises(
        ModelError, match=r"'q_prj'.* Did you mean 'q_proj'\? Modules with weights: .*down_proj.*q_proj"
    ):
        module.configure_model()


def test_adapter_is_exported_with_a_cache_that_cannot_be_written(model_folder, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("not a folder")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = load_causal_lm(model_folder)
    save_adapter(get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM")), tmp_path / "last")
    assert (tmp_path / "last" / "adapter_model.safetensors").is_file()


def test_adapter_without_a_base_says_where_to_write_it(adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(
        ModelError, match=r"doesn't name a base model\. Write its name or path there as base_model_name"
    ):
        adapter_base(str(adapter))
