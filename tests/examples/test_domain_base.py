"""The committed base of the three domains: loading, held-out prompts, and agreement with its script."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Minimum number of entirely correct answers of 100 in held-out documents of level 2; below the measured values by the
# spread of samples of this size.
FLOORS = {"medical": 12, "legal": 48, "api": 56, "routing": 85}


@pytest.fixture(scope="module")
def folder(tiny_base):
    return tiny_base.parent / "domain_base"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_weights_are_small_and_safetensors_only(folder):
    weights = [file for file in folder.iterdir() if file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}]
    assert [file.name for file in weights] == ["model.safetensors"]
    assert weights[0].stat().st_size <= 8_000_000


def test_model_and_tokenizer_fit_together(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "text",
    [
        "asthma J459, hypertension I10",
        "owl F. Supp. 2d 483 : Bako v. Tiremo Steel, 347 F. Supp. 2d 483 (1954)",
        '{"call": "ship tolefi", "site": "oslo", "units": [12]}',
    ],
)
def test_tokenizer_round_trips_answers(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_code_numbers_are_one_token(tokenizer):
    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert pieces("asthma J459")[-1] == "459"
    assert pieces("volume 347")[-1].endswith("347")


@torch.no_grad()
@pytest.mark.parametrize("task", FLOORS)
def test_base_follows_held_out_prompts(model, tokenizer, task):
    from build import share_right
    from pretrain import TASKS

    rng = random.Random("a test of the domains' base")
    documents = []
    while sum(len(d) // 2 for d in documents) < 100:
        documents.append(TASKS[task](rng, 2))
    assert 100 * share_right(model, tokenizer, documents) >= FLOORS[task]


@pytest.mark.parametrize("base", ["domain_base", "tiny_base"])
def test_general_texts_match_the_script(tiny_base, base):
    from pretrain import TASKS, general_texts, routing

    tasks = list(TASKS.values()) if base == "domain_base" else [routing]
    lines = (tiny_base.parent / base / "general.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == general_texts(tasks)


def test_new_embeddings_start_as_means_of_old_ones(tokenizer, tiny_base):
    from pretrain import load_with_vocabulary

    tiny = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    old, new = AutoTokenizer.from_pretrained(tiny_base), load_with_vocabulary(tokenizer)
    (same,) = tokenizer("refund", add_special_tokens=False)["input_ids"]
    (before,) = old("refund", add_special_tokens=False)["input_ids"]
    embeddings = tiny.get_input_embeddings().weight
    assert torch.equal(new.get_input_embeddings().weight[same], embeddings[before])
    after_a_letter = tokenizer.convert_tokens_to_ids("459")
    (after_a_space,) = old("459", add_special_tokens=False)["input_ids"]
    assert torch.equal(new.get_input_embeddings().weight[after_a_letter], embeddings[after_a_space])
    assert torch.equal(new.model.layers[0].mlp.up_proj.weight, tiny.model.layers[0].mlp.up_proj.weight)
