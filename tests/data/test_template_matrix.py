"""What is supervised under each chat template that TRL ships and some thirty more, spelt out in `template_matrix.json`.

A cell holds the text of each run of supervised tokens, or why the row is refused; `told` is what the user is told.
After a change that is meant to change cells: `python tests/data/test_template_matrix.py` writes the file again, to be
read before it is committed.
"""

import json
from pathlib import Path

import pytest
from chat_templates import ALL, LONG, SCENARIOS, runs, template_tokenizer

from lightning_ft.data.encode import encode, encode_prompt
from lightning_ft.data.spans import MOVED, REASONING_LEFT_OUT, TRIMMED
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError

FILE = Path(__file__).parent / "template_matrix.json"
WORDS = {TRIMMED: "trimmed", REASONING_LEFT_OUT: "reasoning left out", MOVED: "moved"}


def cell(tokenizer, template, messages, kwargs):
    """Supervised texts of a conversation, or the error."""
    try:
        encoded = encode(tokenizer, messages, template, kwargs)
    except TokenizerError as error:
        return {"refused": str(error).partition(". ")[0]}
    found = {"supervised": [run.replace(LONG, "<LONG>") for run in runs(tokenizer, encoded.example)]}
    told = [WORDS[note] for note in dict.fromkeys(encoded.notes)]
    if not encoded.prompt_matches:
        told.append("other prompt: {!r} instead of {!r}".format(*encoded.mismatch))
    return {**found, "told": told} if told else found


def column(name):
    """All cells of a template."""
    tokenizer = template_tokenizer(name)
    template = ChatTemplate(tokenizer)
    return {scenario: cell(tokenizer, template, *turns) for scenario, turns in SCENARIOS.items()}


@pytest.fixture(scope="module")
def matrix():
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ALL)
def test_encode_supervises_what_the_matrix_says(name, matrix):
    assert column(name) == matrix[name]


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "gemma4", "gptoss", "glm4moe_training", "smollm3", "tekken"]
)
def test_encode_depends_on_no_other_row(name, matrix):
    """What is cached about a template from other rows has no effect."""
    tokenizer = template_tokenizer(name)
    for scenario in ("tools", "last call", "reasoning", "inline", "system, multi"):
        assert cell(tokenizer, ChatTemplate(tokenizer), *SCENARIOS[scenario]) == matrix[name][scenario]


def test_matrix_covers_every_template(matrix):
    assert set(matrix) == set(ALL)
    assert all(set(cells) == set(SCENARIOS) for cells in matrix.values())


@pytest.mark.parametrize("name", ALL)
def test_matrix_supervises_no_text_of_other_roles(name, matrix):
    """Checks the file itself, without the code under test."""
    for scenario, cells in matrix[name].items():
        messages = SCENARIOS[scenario][0]
        others = [m["content"] for m in messages if m["role"] != "assistant" and scenario not in ("echo", "long")]
        replies = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        if "refused" in cells:
            assert cells["refused"].startswith("the chat template ")
            continue
        assert len(cells["supervised"]) == len(replies)
        for run, reply in zip(cells["supervised"], replies, strict=True):
            assert not any(other in run for other in others)
            assert reply.replace(LONG, "<LONG>").split("</think>")[-1].strip() in run


@pytest.mark.parametrize("name", ALL)
def test_encode_matches_rendering_and_tokenization_of_transformers(name):
    tokenizer = template_tokenizer(name)
    messages = SCENARIOS["multi" if name != "wants_system" else "system, multi"][0]
    if name in ("single_turn", "parts"):
        messages = messages[:2]
    given = (
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages] if name in PARTS else messages
    )
    theirs = tokenizer.apply_chat_template(given[:-1], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(tokenizer, messages[:-1]) == theirs


PARTS = {"parts", "idefics3", "idefics3_training", "smolvlm", "smolvlm_training", "llava_next", "llava_next_training"}

if __name__ == "__main__":
    columns = {name: column(name) for name in ALL}
    lines = []
    for name, cells in columns.items():
        rows = [f"    {json.dumps(s)}: {json.dumps(c, ensure_ascii=False)}" for s, c in cells.items()]
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n  }")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
