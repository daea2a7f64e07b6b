"""Row formats of prompts, their columns, and the problems of rows that can't be used."""

import pytest
from preference_cases import talk

from lightning_ft.data.encode import encode_prompt
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.prompts import PROMPTS
from lightning_ft.data.rows import load_source
from lightning_ft.errors import ConfigError


def load(rows, **options):
    return load_source(rows, "train", "train", row_type=PROMPTS, **options)


def read(row, **options):
    (prompt,), problems = load([row], **options)
    assert not problems
    return prompt


GOOD = {  # a row, its prompt as rewards get it, and its columns
    "prompt": ({"prompt": "q", "answer": 4}, "q", {"answer": 4}),
    "prompt of messages": ({"prompt": talk("q", "r", "s"), "x": None}, talk("q", "r", "s"), {"x": None}),
    "input and output": ({"input": "q", "output": ["4", 4]}, "q", {"output": ["4", 4]}),
    "prompt and completion": ({"prompt": "q", "completion": ""}, "q", {"completion": ""}),
    "a preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", {"chosen": "a", "rejected": "b"}),
    "alpaca": ({"instruction": "i", "input": "x", "output": "a"}, "i\n\nx", {"output": "a"}),
    "alpaca without input": ({"instruction": "i", "input": ""}, "i", {}),
    "messages": ({"messages": talk("q"), "id": 3}, talk("q"), {"id": 3}),
    "answered messages": ({"messages": talk("q", "r", "s", "a")}, talk("q", "r", "s"), {}),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}]}, talk("q"), {}),
    "system": ({"system": "s", "prompt": "q", "cluster": "c"}, talk("q", system="s"), {"cluster": "c"}),
    "empty system": ({"system": " ", "prompt": "q"}, "q", {}),
    "several": ({"prompt": "q", "messages": talk("x"), "input": 3}, "q", {"messages": talk("x"), "input": 3}),
}


@pytest.mark.parametrize("name", GOOD)
def test_row_format_becomes_prompt_and_columns(name):
    row, prompt, columns = GOOD[name]
    read_row = read(row)
    assert read_row.prompt == prompt
    assert read_row.columns == columns
    assert list(read_row.messages) == (talk(prompt) if isinstance(prompt, str) else prompt)


def test_columns_rename_fields():
    row = {"question": "q", "sys": "s", "nr": 7, "customer": 12, "output": "a"}
    prompt = read(row, columns={"input": "question", "system": "sys", "id": "nr", "cluster": "customer"})
    assert prompt.prompt == talk("q", system="s")
    assert prompt.columns == {"nr": 7, "customer": 12, "output": "a"}
    assert (prompt.id, prompt.cluster) == ("7", "12")
    assert read({"prompts": "q"}, columns={"prompt": "prompts"}).columns == {}
    with pytest.raises(ConfigError, match="no format has a field 'output'"):
        load([row], columns={"output": "answer"})


def test_column_values_are_passed_unchanged():
    value = object()
    assert read({"prompt": "q", "tests": value}).columns["tests"] is value


BAD = {
    "missing": ({"prompts": "q"}, "prompt", "missing field"),
    "None": ({"prompt": None}, "prompt", "None"),
    "empty": ({"prompt": ""}, "prompt", "empty input"),
    "blank": ({"prompt": "\n"}, "prompt", "whitespace-only input"),
    "number": ({"prompt": 3}, "prompt", "wrong type"),
    "no turns": ({"prompt": []}, "prompt", "wrong role order"),
    "only a system turn": ({"prompt": talk(system="s")}, "prompt", "wrong role order"),
    "ends with an answer": ({"prompt": talk("q", "a")}, "prompt", "prompt ends with an answer"),
    "two users": ({"prompt": talk("q") + talk("r")}, "prompt", "wrong role order"),
    "starts with an answer": ({"prompt": talk("", "a", "q")[1:]}, "prompt", "wrong role order"),
    "unknown role": ({"prompt": [{"role": "usr", "content": "q"}]}, "prompt[0].role", "unknown role"),
    "system": ({"prompt": "q", "system": 3}, "system", "wrong type"),
    "no object": ("q", None, "not an object"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_has_field_and_reason(name):
    row, field, reason = BAD[name]
    rows, (problem,) = load([{"prompt": "q"}, row])
    assert len(rows) == 1
    assert (problem.source, problem.row, problem.field, problem.reason) == ("train", 2, field, reason)
    assert problem.fix


@pytest.mark.parametrize("row", [{"messages": talk("", "a")[1:]}, {"messages": []}])
def test_messages_without_a_question_are_bad_rows(row):
    _, (problem,) = load([row])
    assert (problem.field, problem.reason) == ("messages", "wrong role order")


@pytest.mark.parametrize("template", ["chatml", "llama", "none"])
def test_tokens_are_those_of_the_generation_prompt(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    row = read({"prompt": talk("where is my parcel", "refund", "and now")})
    encoded, same = RowEncoder(tokenizer, 64, "error", PROMPTS)(row)
    assert same is row
    assert encoded.example.input_ids.tolist() == encode_prompt(tokenizer, row.messages)
    assert not encoded.example.supervised.any()


LONG = " ".join(f"parcel {n}" for n in range(60))


def test_overlong_prompt_is_truncated_or_rejected(tokenizer):
    row = read({"prompt": LONG})
    length = len(encode_prompt(tokenizer, row.messages))
    RowEncoder(tokenizer, length, "error", PROMPTS)(row)
    assert RowEncoder(tokenizer, length - 1, "error", PROMPTS)(row).reason == "overlong prompt"
    encoded, cut = RowEncoder(tokenizer, 64, "truncate_prompt", PROMPTS)(row)
    assert 56 < len(encoded.example) <= 64
    assert LONG.endswith(cut.prompt)
    assert encoded.example.input_ids.tolist() == encode_prompt(tokenizer, talk(cut.prompt))
    empty = len(encode_prompt(tokenizer, talk("")))
    problem = RowEncoder(tokenizer, empty, "truncate_prompt", PROMPTS)(row)
    assert problem.reason == "overlong turns before the question"
    problem = RowEncoder(tokenizer, 64, "truncate_prompt", PROMPTS)(read({"prompt": "q", "system": LONG}))
    assert problem.reason == "overlong system turn"
    problem = RowEncoder(tokenizer, 64, "truncate_prompt", PROMPTS)(read({"prompt": talk("q", LONG, "r")}))
    assert problem.reason == "overlong turns before the question"


def test_template_without_output_is_rejected(make_tokenizer):
    problem = RowEncoder(make_tokenizer("{{ '' }}"), 64, "error", PROMPTS)(read({"prompt": "q"}))
    assert problem.reason == "no token in the prompt"
