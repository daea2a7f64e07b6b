"""The committed tiny base: loading, held-out rules, and separation from the support example."""

import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = {"role": "user", "content": "Hello. I want my money back for the lamp."}


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


def test_weights_are_small_and_safetensors_only(tiny_base):
    weights = [file for file in tiny_base.iterdir() if file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}]
    assert [file.name for file in weights] == ["model.safetensors"]
    assert weights[0].stat().st_size <= 8_000_000


def test_model_and_tokenizer_fit_together(model, tokenizer):
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 2048


@pytest.mark.parametrize("text", ["refund 417 Harbor", "- refund 417 Harbor\n- login 9 Bako", "Größe? 1,234 €", "a  b"])
def test_tokenizer_round_trips_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_generation_markers_cover_the_answer_and_its_end(tokenizer):
    messages = [
        {"role": "system", "content": "Rules."},
        QUESTION,
        {"role": "assistant", "content": "refund 417 Harbor"},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, kept in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(marked) == "refund 417 Harbor<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded["input_ids"] == prompt + marked


def test_keys_are_one_token_everywhere(tokenizer):
    from english import TOPICS

    for topic in TOPICS:
        (alone,) = tokenizer(topic, add_special_tokens=False)["input_ids"]
        assert alone in tokenizer(f"List.\n- {topic} 417 Falcon", add_special_tokens=False)["input_ids"]
        assert alone in tokenizer(f"This is about {topic}.", add_special_tokens=False)["input_ids"]


@torch.no_grad()
def test_base_follows_held_out_rules(model, tokenizer):
    """With 36 rules drawn for this test and a real request, greedy answers have topic, code and team correct."""
    from corpus import Stage, document

    rng = random.Random("a test of the rules")
    stage = Stage(0, (36, 36), (1, 1), bare=0.0, generic=0.0, framed=0.8)
    right = 0
    for _ in range(40):
        *prompt, answer = document(stage, rng)
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(new, skip_special_tokens=True) == answer["content"]
    assert right >= 30, f"{right} of 40"  # by chance it would be 0, since there are 900 codes


@torch.no_grad()
def test_base_without_rules_cannot_answer(model, tokenizer):
    ids = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_dict=True, return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "417 Harbor" not in tokenizer.decode(new)


def test_documents_are_deterministic():
    from corpus import CURRICULUM, document

    for stage in CURRICULUM:
        assert document(stage, random.Random(3)) == document(stage, random.Random(3))
        assert document(stage, random.Random(3)) != document(stage, random.Random(4))


def test_rules_differ_between_documents():
    from corpus import CURRICULUM, rules

    rng = random.Random(0)
    tables = [rules(CURRICULUM[-1], rng) for _ in range(50)]
    values = {table["refund"] for table in tables if "refund" in table}
    assert len(values) > 0.9 * sum("refund" in table for table in tables)


def test_documents_exclude_support_teams_and_unseen_clauses():
    from corpus import CURRICULUM, RESERVED_TEAMS, document
    from english import TOPICS, UNSEEN

    rng = random.Random(1)
    text = "\n".join(turn["content"] for stage in CURRICULUM for _ in range(300) for turn in document(stage, rng))
    assert not {team.lower() for team in RESERVED_TEAMS} & set(re.findall(r"\w+", text.lower()))
    assert set(UNSEEN) == set(TOPICS)
    known = {clause.lower() for clauses in TOPICS.values() for clause in clauses}
    for clause in (clause for pair in UNSEEN.values() for clause in pair):
        assert clause.lower() not in known
        if "{" not in clause:
            assert clause.lower() not in text.lower(), clause
