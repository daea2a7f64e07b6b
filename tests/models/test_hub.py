"""Uploads to the hub: one commit of safetensors, and refusals in plain words, against a hub on loopback."""

import warnings

import pytest
from fake_hub import TOKEN, running_hub
from tiny import make_rows
from transformers import AutoConfig

from lightning_ft import ExportModel, LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer
from lightning_ft.errors import HubError
from lightning_ft.models.hub import check_hub

ROWS = make_rows(12)


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as started:
        yield started


@pytest.fixture
def module(model_folder):
    built = LoRAFineTuning(model_folder, lora={"r": 4}, dtype="float32")
    built.configure_model()
    return built


def fit(module, trainer_options, **export):
    callback = ExportModel(**export)
    Trainer(**trainer_options, max_steps=1, callbacks=[callback]).fit(module, PairDataModule(ROWS, cache_dir=False))
    return callback


def test_push_to_hub_uploads_the_export_as_a_private_repository(hub, module, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hub")
        url = module.push_to_hub("org/name", merge=True)
    assert url == f"{hub.address}/org/name"
    assert (hub.repos["org/name"]["visibility"], hub.repos["org/name"]["commits"]) == ("private", 2)
    module.export(tmp_path / "same", merge=True)
    local = {file.name: file.read_bytes() for file in (tmp_path / "same").iterdir()}
    uploaded = hub.files("org/name")
    assert uploaded.keys() == local.keys()
    assert {name for name in local if uploaded[name] != local[name]} == {"README.md"}
    card = uploaded["README.md"].decode()
    assert 'from_pretrained("org/name")' in card  # it can be loaded from there
    (tmp_path / "downloaded").mkdir()
    for name, data in uploaded.items():
        (tmp_path / "downloaded" / name).write_bytes(data)
    assert AutoConfig.from_pretrained(tmp_path / "downloaded").model_type == "llama"


def test_push_to_hub_can_make_a_public_repository(hub, module):
    module.push_to_hub("org/name", merge=True, private=False)
    assert hub.repos["org/name"]["visibility"] == "public"


def test_push_to_hub_refuses_a_repository_with_files_unless_asked(hub, module):
    hub.add("org/name", **{"model.safetensors": b"old", "notes.txt": b"mine"})
    with pytest.raises(HubError, match=r"'org/name' has files already \(2, .*hub_overwrite=True"):
        module.push_to_hub("org/name")
    assert hub.files("org/name") == {"model.safetensors": b"old", "notes.txt": b"mine"}
    with pytest.warns(UserWarning, match="an adapter whose base is the local folder"):
        module.push_to_hub("org/name", hub_overwrite=True)
    files = hub.files("org/name")
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files  # of the earlier export: both would be loaded
    assert files["notes.txt"] == b"mine"
    assert hub.repos["org/name"]["commits"] == 2


def test_push_to_hub_removes_weights_of_other_formats(hub, module):
    old = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "model.gguf"]
    kept = ["training_args.bin", "runs/model.gguf"]
    hub.add("org/name", **dict.fromkeys([*old, *kept], b"old"))
    module.push_to_hub("org/name", merge=True, hub_overwrite=True)
    files = hub.files("org/name")
    assert not files.keys() & set(old)
    assert {name: files[name] for name in kept} == dict.fromkeys(kept, b"old")


def test_push_to_hub_replaces_additional_chat_templates(hub, module, tmp_path):
    old = {"additional_chat_templates/old.jinja": b"old", "additional_chat_templates/notes.txt": b"mine"}
    hub.add("org/name", **old)
    module.tokenizer.chat_template = {"default": module.tokenizer.chat_template, "rag": "RAG"}
    module.push_to_hub("org/name", merge=True, hub_overwrite=True)
    found = {name: data for name, data in hub.files("org/name").items() if name.startswith("additional")}
    assert found == {"additional_chat_templates/rag.jinja": b"RAG", "additional_chat_templates/notes.txt": b"mine"}


def test_push_to_hub_refuses_a_public_repository_unless_asked(hub, module):
    hub.add("org/name", visibility="public")
    with pytest.raises(HubError, match=r"'org/name' is public. Make it private .* private=False"):
        module.push_to_hub("org/name", merge=True)
    assert not hub.files("org/name")
    module.push_to_hub("org/name", merge=True, private=False)
    assert "model.safetensors" in hub.files("org/name")


def test_upload_leaves_the_users_own_files_alone(hub, module, tmp_path):
    module.export(tmp_path / "out", merge=True)
    for name in ("notes.txt", "train.jsonl", "pytorch_model.bin"):
        (tmp_path / "out" / name).write_text("secret")
    module.upload(tmp_path / "out", "org/name", merge=True)
    assert not {"notes.txt", "train.jsonl", "pytorch_model.bin"} & hub.files("org/name").keys()


@pytest.mark.parametrize("name", ["a/b/c", "spaces are bad", "org/--x"])
def test_name_of_a_repository_is_checked(hub, name):
    with pytest.raises(HubError, match="no name of a repository"):
        check_hub(name)
    assert not hub.calls


def test_upload_offline_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        check_hub("org/name")


def test_upload_without_token_is_refused(monkeypatch):
    with running_hub(monkeypatch, token=None) as hub, pytest.raises(HubError, match=r"no token for the hub.*HF_TOKEN"):
        check_hub("org/name")
    assert not hub.calls


def test_refused_token_is_told_without_the_token(monkeypatch):
    with running_hub(monkeypatch, token="hf_wrong"), pytest.raises(HubError, match="refused the token") as raised:
        check_hub("org/name")
    assert "hf_wrong" not in str(raised.value)


def test_gguf_is_not_uploaded(hub):
    with pytest.raises(HubError, match="safetensors"):
        check_hub("org/name", format="gguf")


def test_failed_upload_is_told_and_the_folder_stays(hub, module, tmp_path):
    module.export(tmp_path / "out", merge=True)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    hub.failing = "/commit/"
    with pytest.raises(HubError, match=r"Nothing was uploaded to 'org/name': .*out': run `hf upload org/name"):
        module.upload(tmp_path / "out", "org/name", merge=True)
    assert hub.files("org/name") == {}
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_export_callback_uploads_at_the_end(hub, model_folder, trainer_options, tmp_path):
    module = LoRAFineTuning(model_folder, lora={"r": 4}, dtype="float32")
    callback = fit(module, trainer_options, output=str(tmp_path / "out"), merge=True, push_to_hub="org/name")
    assert callback.uploaded == f"{hub.address}/org/name"
    card = hub.files("org/name")["README.md"].decode()
    assert "| optimizer steps | 1 |" in card
    assert "# org/name" in card
    assert "# last" in (tmp_path / "out" / "last" / "README.md").read_text()
    assert not [name for name in hub.files("org/name") if name.endswith((".bin", ".pt", ".ckpt"))]


def test_export_callback_refuses_before_training(hub, model_folder, trainer_options, tmp_path):
    hub.add("org/name", **{"config.json": b"{}"})
    module = LoRAFineTuning(model_folder, lora={"r": 4}, dtype="float32")
    with pytest.raises(HubError, match=r"has files already \(1, first: config.json\)"):
        fit(module, trainer_options, output=str(tmp_path / "out"), push_to_hub="org/name")
    assert module.trainer.global_step == 0


@pytest.mark.parametrize("failing", ["/commit/", "/api/"])
def test_failed_upload_does_not_stop_a_run(hub, model_folder, trainer_options, tmp_path, failing):
    hub.failing = failing  # from the start: a hub that can't be asked may be reached later
    module = LoRAFineTuning(model_folder, lora={"r": 4}, dtype="float32")
    with pytest.warns(UserWarning, match="There was no upload to 'org/name': Nothing was uploaded"):
        callback = fit(module, trainer_options, output=str(tmp_path / "out"), merge=True, push_to_hub="org/name")
    assert module.trainer.global_step == 1
    assert (tmp_path / "out" / "last" / "model.safetensors").is_file()
    assert len(callback.failures) == 1  # the command line exits with a nonzero status
    assert TOKEN not in callback.failures[0]
