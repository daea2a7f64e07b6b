"""Every type of export generates as the trained model does, loaded in another process by the code of its model card."""

import json
import os
import subprocess
import sys

import pytest
import torch
from full_disk import full_disk
from tiny import make_model, make_rows, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_ft import DPO, FullFineTuning, LoRAFineTuning, PreferenceDataModule, RewardModeling
from lightning_ft._lightning import Trainer
from lightning_ft.atomic_files import temporary_path
from lightning_ft.errors import ConfigError, ExportError, ModelError
from lightning_ft.models.generate import end_token_ids

ROWS = make_rows(12)
ASKED = [row["input"] for row in ROWS[:3]]

READER = r"""
import json, re, sys, torch
out = {}
for folder in sys.argv[2:]:
    card = open(f"{folder}/README.md").read()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    names = {"print": lambda text: None}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=2"), names)
    tokenizer, model, found = names["tokenizer"], names["model"], []
    for asked, answer in json.loads(sys.argv[1]):
        chat = [{"role": "user", "content": asked}]
        if "logits" in code:
            chat.append({"role": "assistant", "content": answer})
            inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
            found.append(model(**inputs).logits[0, 0].item())
        else:
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            found.append(ids.tolist())
    out[folder] = found
print("\n" + json.dumps(out))
"""


def tokens_of(module, asked):
    """Token ids that the module's engine generates, including the end token."""
    from lightning_ft.data.encode import encode_prompt
    from lightning_ft.rollout.local import LocalEngine

    engine = LocalEngine(module.model, end_token_ids=end_token_ids(module.model, module.tokenizer))
    prompts = [encode_prompt(module.tokenizer, [{"role": "user", "content": text}]) for text in asked]
    return [list(c.tokens) for c in engine.generate(prompts, max_new_tokens=24).completions]


def make_bases(folder):
    """The base of most exports, and variants of it."""
    eos = {"eos": "<|pad|>"}  # not the token that the chat template ends turns with
    size = len(make_tokenizer())
    plain, tied = make_model(size), make_model(size, tie=True)
    qwen = AutoConfig.for_model(
        "qwen2",
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    for name, model in (("plain", plain), ("tied", tied), ("biased", AutoModelForCausalLM.from_config(qwen))):
        model.generation_config = GenerationConfig(eos_token_id=0)
        model.save_pretrained(folder / name)
        make_tokenizer(**eos).save_pretrained(folder / name)
    grown, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "plain"), make_tokenizer(**eos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<call>"]})
    grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    grown.save_pretrained(folder / "bigger")
    tokenizer.save_pretrained(folder / "bigger")


VARIANTS = {
    "full": ("plain", None),
    "adapter": ("plain", {}),
    "grown": ("bigger", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embeddings": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, both": ("tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied, whole head": ("tied", {"modules_to_save": ["lm_head"]}),
    "tied, one norm": ("tied", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}),
    "pissa": ("plain", {"init_lora_weights": "pissa"}),
    "pissa and more": (
        "biased",
        {
            "init_lora_weights": "pissa",
            "modules_to_save": ["lm_head"],
            "bias": "all",
            "use_dora": True,
            "trainable_token_indices": [5, 6],
        },
    ),
    "pissa, rslora, ranks": (
        "plain",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "olora on embeddings": ("plain", {"init_lora_weights": "olora", "target_modules": ["q_proj", "embed_tokens"]}),
    "bias": ("biased", {"bias": "all"}),
    "lora_only bias": ("biased", {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "tokens": ("plain", {"trainable_token_indices": [5, 6, 7]}),
    "tied tokens": ("tied", {"trainable_token_indices": [5, 6, 7]}),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Folders of every type of export, answers of the trained model, and answers by the card's code."""
    torch.set_num_threads(1)  # earlier than the function-scoped fixtures
    root = tmp_path_factory.mktemp("exports")
    make_bases(root)
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(root),
    }
    from lightning_ft import PairDataModule

    rows = [*ROWS, {"input": "say it", "output": "<call>"}]
    live = {}
    for name, (base, lora) in VARIANTS.items():
        kind = FullFineTuning if lora is None else LoRAFineTuning
        given = {} if lora is None else {"lora": {"r": 4, **lora}}
        module = kind(str(root / base), learning_rate=1e-2, dtype="float32", **given)
        data = PairDataModule(rows if base == "bigger" else ROWS, batch_size=4, cache_dir=False, on_bad_row="skip")
        Trainer(**options, max_epochs=30 if name in ("full", "adapter", "grown") else 3).fit(module, data)
        for merge in (False, True)[: 1 if lora is None else 2]:
            folder = f"{name}{', merged' * merge}"
            module.export(root / folder, merge=merge)
            live[folder] = tokens_of(module, ASKED)
    answers = [row["output"] for row in ROWS[:3]]
    for name, lora in (("scores", None), ("scores adapter", {"r": 4})):
        module = RewardModeling(str(root / "plain"), lora=lora, learning_rate=1e-2)
        pairs = [{"prompt": r["input"], "chosen": r["output"], "rejected": "no"} for r in ROWS]
        Trainer(**options, max_epochs=2).fit(module, PreferenceDataModule(pairs, batch_size=4, cache_dir=False))
        for merge in (False, True)[: 1 if lora is None else 2]:
            folder = f"{name}{', merged' * merge}"
            module.export(root / folder, merge=merge)
            chats = [
                [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
                for a, b in zip(ASKED, answers, strict=True)
            ]
            live[folder] = module.score_conversations(chats).tolist()
    questions = json.dumps(list(zip(ASKED, answers, strict=True)))
    done = subprocess.run(
        [sys.executable, "-c", READER, questions, *live],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, live, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_export_generates_as_the_trained_model(exports, name):
    root, live, loaded = exports
    folders = [folder for folder in live if folder in (name, f"{name}, merged")]
    assert len(folders) == (1 if name == "full" else 2)
    for folder in folders:
        assert loaded[folder] == live[folder], folder
    if name in ("full", "adapter", "grown"):  # trained until it generates end tokens
        end = AutoTokenizer.from_pretrained(root / name).convert_tokens_to_ids("<|im_end|>")
        assert all(ids[-1] == end and ids.count(end) == 1 for ids in live[name])


@pytest.mark.parametrize("name", ["scores", "scores adapter", "scores adapter, merged"])
def test_export_of_reward_model_scores_as_the_trained_model(exports, name):
    _, live, loaded = exports
    assert loaded[name] == pytest.approx(live[name], rel=1e-4, abs=1e-5)
    assert len(set(live[name])) == 3


def test_export_stops_at_every_end_token_without_sampling_defaults(exports):
    root, live, _ = exports
    for folder in (f for f in live if not f.startswith("scores")):
        written = json.loads((root / folder / "generation_config.json").read_text())
        end = AutoTokenizer.from_pretrained(root / folder).convert_tokens_to_ids("<|im_end|>")
        assert written["eos_token_id"] == [end, 0]
        assert written.keys() <= {"eos_token_id", "transformers_version"}


def test_export_lists_end_tokens_that_the_base_lacks(exports):
    root, _, _ = exports
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert f"eos_token_id=[{end}, 0]" in (root / "adapter" / "README.md").read_text()
    assert "eos_token_id" not in (root / "full" / "README.md").read_text()


def test_export_contains_no_local_paths(exports):
    root, live, _ = exports
    for folder in live:
        for file in (root / folder).iterdir():
            if file.is_file():
                assert str(root).encode() not in file.read_bytes(), file
    assert json.loads((root / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "plain"
    assert 'base = "plain"  # it was a local folder' in (root / "adapter" / "README.md").read_text()


def test_merged_export_unties_the_head_only_if_needed(exports):
    root, _, _ = exports
    for name, tied in (("tied head", False), ("tied, both", False), ("tied, whole head", True), ("tied tokens", True)):
        assert AutoConfig.from_pretrained(root / f"{name}, merged").tie_word_embeddings is tied, name


def test_unmerged_export_of_a_resized_model_is_refused(exports, fit, tmp_path):
    root, _, _ = exports
    tokenizer = AutoTokenizer.from_pretrained(root / "bigger")
    size = len(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(root / "plain")
    model.resize_token_embeddings(size, mean_resizing=False)
    module = LoRAFineTuning(model, tokenizer=tokenizer, lora={"r": 4})
    with pytest.warns(UserWarning, match=rf"{size:,} embeddings, .* has {size - 1}: .*merge=True.*, or first save"):
        fit(module, ROWS, max_steps=1)
    with pytest.raises(
        ExportError, match=rf"has {size} embeddings, .* has {size - 1}: .*`--merge true`.*; or save the resized"
    ):
        module.export(tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(module.export(tmp_path / "merged", merge=True))
    assert whole.config.vocab_size == size
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<call>") == size - 1


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying: PEFT ties"),
        ({"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}, "lm_head .* shares its weights with"),
        ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "1 rows of lm_head .* are zero"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens: .*never be trained"),
    ],
)
def test_unexportable_adapter_is_refused_before_training(lora, words, fit, tmp_path):
    make_model(tie=True).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=words):
        fit(LoRAFineTuning(str(tmp_path), lora={"r": 4, **lora}), ROWS, max_steps=1)


def test_lora_options_that_peft_refuses_fail_in_the_constructor():
    with pytest.raises(ConfigError, match="lora_bias=True is only supported with"):
        LoRAFineTuning("base", lora={"init_lora_weights": "pissa", "lora_bias": True})


def test_trained_base_biases_rule_out_a_reference(trainer_options, model_folder):
    module = DPO(model_folder, lora={"r": 4, "bias": "all"})
    rows = [{"prompt": r["input"], "chosen": r["output"], "rejected": "no"} for r in ROWS]
    with pytest.raises(ConfigError, match="bias='all' in `lora` trains biases of the base"):
        Trainer(**trainer_options, max_steps=1).fit(module, PreferenceDataModule(rows, cache_dir=False))


def test_export_saves_generation_settings_that_transformers_refuses(model_folder, tmp_path):
    model = make_model()
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=7)  # without do_sample
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "by transformers")
    module = FullFineTuning(model, tokenizer=make_tokenizer())
    written = json.loads((module.export(tmp_path / "out") / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["eos_token_id"]) == (0.6, 0.9, [2, 7])
    assert model.generation_config.eos_token_id == 7  # the live one is unchanged


def test_export_of_another_type_replaces_all_files(model_folder, tmp_path):
    module = LoRAFineTuning(model_folder, lora={"r": 4})
    module.export(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    module.export(tmp_path / "out", merge=True, overwrite=True)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "notes.txt"} <= files
    assert not {file for file in files if "adapter" in file or file.startswith(".")}


def test_export_over_another_one_removes_its_additional_chat_templates(tmp_path):
    several, single = make_tokenizer(), make_tokenizer()
    several.chat_template = {"default": single.chat_template, "rag": "RAG {{ messages[0].content }}"}
    folder = FullFineTuning(make_model(), tokenizer=several).export(tmp_path / "out")
    assert set(AutoTokenizer.from_pretrained(folder).chat_template) == {"default", "rag"}
    (folder / "additional_chat_templates" / "notes.txt").write_text("mine")
    FullFineTuning(make_model(), tokenizer=single).export(folder, overwrite=True)
    assert AutoTokenizer.from_pretrained(folder).chat_template == single.chat_template
    assert [path.name for path in (folder / "additional_chat_templates").iterdir()] == ["notes.txt"]


def test_failed_export_keeps_the_previous_one(model_folder, tmp_path, monkeypatch):
    module = LoRAFineTuning(model_folder, lora={"r": 4})
    module.export(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("lightning_ft.models.export.model_card", full)
    with pytest.raises(OSError, match="no space"):
        module.export(tmp_path / "out", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    monkeypatch.undo()
    for size in (2000, 12_000):  # neither the weights fit, nor the tokenizer
        with full_disk(size), pytest.raises(ExportError, match=r"out' can't be written \(File too large\).*unchanged"):
            module.export(tmp_path / "out", overwrite=True)
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_export_removes_leftovers_of_a_killed_export(model_folder, tmp_path):
    left = (
        tmp_path / "out" / temporary_path(tmp_path).name.replace(f"-{os.getpid()}-", "-4194305-")
    )  # a process id that doesn't exist
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    LoRAFineTuning(model_folder, lora={"r": 4}).export(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
