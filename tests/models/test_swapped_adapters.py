"""Exported adapters of one base, swapped live in one model, answer as their own modules do."""

import json
import re
import shlex

import pytest
import torch
from guide_code import ROOT
from peft import PeftModel
from tiny import make_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ft import LoRAFineTuning, PairDataModule
from lightning_ft._lightning import Trainer

ROWS = make_rows(24)
ADAPTERS = {
    "tickets": ({"r": 4}, ROWS[:12]),
    "replies": ({"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}, ROWS[12:]),
    "split": ({"r": 2, "init_lora_weights": "pissa"}, ROWS[::2]),  # exported at twice the rank
}
QUESTIONS = [row["input"] for row in ROWS[:4]]


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """Folder of each adapter, and the answers and logits of its own module."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("adapters")
    live = {}
    for name, (lora, rows) in ADAPTERS.items():
        module = LoRAFineTuning(model_folder, lora=lora, learning_rate=2e-2, dtype="float32")
        options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(**options, max_epochs=8, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, PairDataModule(rows, batch_size=4, cache_dir=False))
        module.export(root / name)
        module.model.eval()
        live[name] = outputs(module.model, module.tokenizer)
    return root, live


@torch.no_grad()
def outputs(model, tokenizer):
    """Greedy answers to the questions, and the logits after each."""
    answers, logits = [], []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))
        logits.append(model(**inputs).logits[0, -1])
    return answers, torch.stack(logits)


def assert_same(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_adapters_are_swapped_by_peft(exported, model_folder):
    root, live = exported
    first, *others = ADAPTERS
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, root / first, adapter_name=first).eval()
    for name in others:
        model.load_adapter(root / name, adapter_name=name)
    tokenizer = AutoTokenizer.from_pretrained(root / first)
    for name in (*ADAPTERS, *ADAPTERS):  # again: no adapter leaves anything in the base
        model.set_adapter(name)
        assert_same(outputs(model, tokenizer), live[name])
    answers = [tuple(found) for found, _ in live.values()]
    assert len(set(answers)) == len(ADAPTERS)  # they have learned different things


def test_adapters_are_loaded_by_transformers(exported, model_folder):
    """One at a time: its `set_adapter` refuses PEFT 0.21, and a second `load_adapter` reports the first as missing."""
    root, live = exported
    tokenizer = AutoTokenizer.from_pretrained(root / "tickets")
    for name in ADAPTERS:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        model.load_adapter(str(root / name))
        assert_same(outputs(model, tokenizer), live[name])


def test_documented_commands_name_the_same_adapters(exported):
    """The guide's `vllm serve --lora-modules` and its PEFT code; vLLM itself isn't installed here."""
    root, _ = exported
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (command,) = (line for line in page.splitlines() if line.startswith("vllm serve") and "--lora-modules" in line)
    words = shlex.split(command)
    modules = dict(word.split("=") for word in words[words.index("--lora-modules") + 1 :])
    assert modules == dict(pair[::-1] for pair in re.findall(r'"(runs/\w+)", adapter_name="(\w+)"', page))
    assert set(modules) == set(re.findall(r'"model": "(\w+)"', page)) <= set(ADAPTERS)
    limit = int(words[words.index("--max-lora-rank") + 1])
    for name in modules:
        config = json.loads((root / name / "adapter_config.json").read_text())
        assert config["r"] <= limit
        # what vLLM's documentation requires of an adapter
        assert (config["modules_to_save"], config["bias"], config["use_dora"]) == (None, "none", False)
