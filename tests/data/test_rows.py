"""Row formats, and the problems of rows that can't be used."""

import pytest

from lightning_ft.data.formats import detect_format
from lightning_ft.data.raw_rows import raise_problems
from lightning_ft.data.rows import load_source
from lightning_ft.data.split_report import SplitReport
from lightning_ft.errors import ConfigError, DataError, LightningFTError


def load(rows, **options):
    return load_source(rows, "train", "train", **options)


def turns(row, **options):
    (loaded,), problems = load([row], **options)
    assert not problems
    return [(m["role"], m["content"]) for m in loaded.messages]


def bad(row, **options):
    good = {"input": "a", "output": "b"} if not {"messages", "conversations"} & row.keys() else None
    _, (problem,) = load([row] if good is None else [good, row], **options)
    assert problem.source == "train"
    assert problem.row == (1 if good is None else 2)
    assert problem.fix
    return problem


U, A, S = "user", "assistant", "system"
GOOD = {
    "input_output": ({"input": "q", "output": "a"}, [(U, "q"), (A, "a")]),
    "system": ({"system": "s", "input": "q", "output": "a"}, [(S, "s"), (U, "q"), (A, "a")]),
    "empty system": ({"system": "", "input": "q", "output": "a"}, [(U, "q"), (A, "a")]),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, [(U, "q"), (A, "a")]),
    "alpaca": ({"instruction": "i", "input": "x", "output": "a"}, [(U, "i\n\nx"), (A, "a")]),
    "alpaca without input": ({"instruction": "i", "input": "", "output": "a"}, [(U, "i"), (A, "a")]),
    "alpaca, no field": ({"instruction": "i", "output": "a"}, [(U, "i"), (A, "a")]),
    "messages": (
        {"messages": [{"role": r, "content": r[0]} for r in (S, U, A, U, A)]},
        [(S, "s"), (U, "u"), (A, "a"), (U, "u"), (A, "a")],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    "lists as values": (
        {
            "prompt": [{"role": S, "content": "s"}, {"role": U, "content": "q"}],
            "completion": [{"role": A, "content": "a"}],
        },
        [(S, "s"), (U, "q"), (A, "a")],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_row_format_becomes_turns(name):
    row, expected = GOOD[name]
    assert turns(row) == expected


def test_columns_rename_fields_and_choose_the_format():
    assert turns({"q": "x", "a": "y"}, columns={"input": "q", "output": "a"}) == [(U, "x"), (A, "y")]
    row = {"messages": "not these", "q": "x", "completion": "y"}
    assert turns(row, columns={"prompt": "q"}) == [(U, "x"), (A, "y")]


def test_id_and_cluster_are_read_from_columns():
    rows, _ = load(
        [{"input": "a", "output": "b", "nr": 7, "customer": 12}, {"input": "c", "output": "d"}],
        columns={"id": "nr", "cluster": "customer"},
    )
    assert [(row.id, row.cluster) for row in rows] == [("7", "12"), ("train:2", None)]


def test_detect_format_chooses_the_format_of_most_rows():
    rows = [{"inptu": "a", "output": "b"}, *({"input": str(n), "output": "b"} for n in range(3))]
    loaded, (problem,) = load(rows)
    assert len(loaded) == 3
    assert (problem.row, problem.field, problem.reason) == (1, "input", "missing field")


def test_columns_rejects_unknown_fields():
    with pytest.raises(ConfigError, match=r"no format has a field 'ouput'\. Did you mean 'output'"):
        load([{"input": "a"}], columns={"ouput": "b"})
    with pytest.raises(ConfigError, match=r"'icd'\. Write the format's name first: {'output': 'icd'}\."):
        load([{"complaint": "a", "icd": "b"}], columns={"icd": "output"})
    with pytest.raises(ConfigError, match="no format has all of the fields completion, messages"):
        load([{"input": "a"}], columns={"messages": "b", "completion": "c"})


def test_detect_format_of_prompts():
    assert detect_format([{"prompt": "a"}], None, answered=False) == "prompt_completion"
    assert detect_format([{"input": "a"}], None, answered=False) == "input_output"


def test_predict_rows_need_no_answer():
    assert turns({"prompt": "q"}, answered=False) == [(U, "q")]
    assert turns({"prompt": "q", "completion": None}, answered=False) == [(U, "q")]
    assert turns({"messages": [{"role": U, "content": "q"}]}, answered=False) == [(U, "q")]


RENAME = "Rename 'inputs' to 'input', as in other rows."
FILL = "Fill it in or remove the row."
BAD = {
    "missing": ({"input": "a"}, "output", "missing field", "Add it, or remove the row."),
    "misspelled": ({"inputs": "a", "output": "b"}, "input", "missing field", RENAME),
    "None": ({"input": "a", "output": None}, "output", "None", FILL),
    "number": ({"input": "a", "output": 4}, "output", "wrong type", "Expected a string or a list of messages."),
    "labels": (
        {"input": "a", "output": ["J44.9", "R06.02"]},
        "output[0]",
        "wrong type",
        "Each message needs a role and a content. If it is a list of texts, join them to one text, in the file or with "
        "format=.",
    ),
    "empty input": ({"input": "", "output": "b"}, "input", "empty input", FILL),
    "empty output": ({"input": "a", "output": ""}, "output", "empty output", FILL),
    "blank input": ({"input": " \n", "output": "b"}, "input", "whitespace-only input", FILL),
    "blank output": ({"input": "a", "output": "\t"}, "output", "whitespace-only output", FILL),
    "system": ({"system": 3, "input": "a", "output": "b"}, "system", "wrong type", "Expected a string."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_row_has_field_reason_and_fix(name):
    row, field, reason, fix = BAD[name]
    problem = bad(row)
    assert (problem.field, problem.reason, problem.fix) == (field, reason, fix)


def conversation(*roles, **changed):
    return [{"role": role, "content": "x", **changed} for role in roles]


BAD_TURNS = {
    "order": (conversation(A, U, A), None, "wrong role order"),
    "two users": (conversation(U, U, A), None, "wrong role order"),
    "late system": (conversation(U, S, A), None, "wrong role order"),
    "two systems": (conversation(S, S, U, A), None, "wrong role order"),
    "no assistant": (conversation(U), None, "no assistant turn"),
    "nothing": ([], None, "no assistant turn"),
    "open end": (conversation(U, A, U), None, "no answer to the last turn"),
    "unknown role": (conversation(U, "assistent"), "messages[1].role", "unknown role"),
    "role of another type": (conversation(U, 3), "messages[1].role", "unknown role"),
    "tool that was not called": (conversation(U, "tool", A), None, "wrong role order"),
    "no role": ([{"content": "x"}], "messages[0].role", "missing field"),
    "no content": ([{"role": U, "contents": "x"}], "messages[0].content", "missing field"),
    "null content": (conversation(U, A, content=None), "messages[0].content", "None"),
    "number": (conversation(U, A, content=3), "messages[0].content", "wrong type"),
    "empty answer": ([*conversation(U), {"role": A, "content": ""}], "messages[1].content", "empty output"),
    "blank question": (conversation(U, A, content=" "), "messages[0].content", "whitespace-only input"),
    "no message": (["x"], "messages[0]", "wrong type"),
    "no list": ("x", "messages", "wrong type"),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_bad_turn_has_field_and_reason(name):
    value, field, reason = BAD_TURNS[name]
    problem = bad({"messages": value})
    assert (problem.field, problem.reason) == (field, reason)
    if name == "unknown role":
        assert problem.fix == "Did you mean 'assistant'?"
    if name == "no content":
        assert problem.fix == "Rename 'contents' to 'content'."


def test_raise_problems_lists_all_bad_rows():
    rows = [{"input": "a", "output": "" if n % 2 else None} for n in range(50)]
    _, problems = load(rows)
    with pytest.raises(DataError) as error:
        raise_problems(problems)
    message = str(error.value)
    assert message.startswith("50 bad rows (25 x None, 25 x empty output):\n  train, row 1, 'output': None. Fill it in")
    assert "train, row 20, 'output': empty output" in message
    assert "row 21" not in message
    assert "... and 30 more" in message
    assert "on_bad_row='skip'" in message
    assert isinstance(error.value, (LightningFTError, ValueError))


def test_skipped_rows_are_counted_by_reason():
    report = SplitReport()
    rows, problems = load(
        [{"input": "a", "output": "b"}, {"input": "a"}, {"input": "", "output": "b"}, {"input": "", "output": "c"}],
        on_bad_row="skip",
        report=report,
    )
    assert (len(rows), problems) == (1, [])
    assert dict(report.skipped) == {"missing field": 1, "empty input": 2}
    assert (report.read, report.kept) == (4, 1)


def test_skipping_every_row_is_an_error():
    with pytest.raises(DataError, match=r"all of its 2 rows are bad\. The first: train, row 1, 'output': empty output"):
        load([{"input": "a", "output": ""}, {"input": "b", "output": None}], on_bad_row="skip")


def test_source_without_rows_is_an_error():
    with pytest.raises(DataError, match="train: it contains no rows"):
        load([])
