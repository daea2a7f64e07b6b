"""Columns under other names: what is proposed works when it is followed."""

import ast
import re

import pytest

from lightning_ft.data.columns import Formats
from lightning_ft.data.preference_rows import PREFERENCES
from lightning_ft.data.prompts import PROMPTS
from lightning_ft.data.row_types import PAIRS
from lightning_ft.data.rows import load_source
from lightning_ft.errors import DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def load(rows, kind=PAIRS, **options):
    return load_source(rows, "train", "train", row_type=kind, **options)


def refused(rows, kind=PAIRS, **options):
    with pytest.raises(DataError) as error:
        load(rows, kind, **options)
    return str(error.value)


def proposed(said):
    """The complete mapping that an error proposes."""
    (found,) = re.findall(r"columns=(\{.*?\})", said)
    return ast.literal_eval(found)


def rows_of(*names, count=4, **fixed):
    return [{name: f"{name} says {n} words" for name in names} | fixed for n in range(count)]


TICKETS = [
    {"ticket": str(n), "customer_message": f"where is my parcel {n}", "routing": ("Billing", "Shipping")[n % 2]}
    for n in range(6)
]
LETTERS = [
    {"name": name, "mail": f"a long letter of {name}, all about {n}", "team": ("first", "second")[n % 2]}
    for n, name in enumerate(("Ann", "Bob", "Cy", "Di"))
]
PAIR_COLUMNS = {
    "question, answer": (rows_of("question", "answer"), {"input": "question", "output": "answer"}),
    "query, response": (rows_of("query", "response"), {"input": "query", "output": "response"}),
    "source, target": (rows_of("source", "target"), {"input": "source", "output": "target"}),
    "source of a pair": (rows_of("source", "question", "answer"), {"input": "question", "output": "answer"}),
    "instruction, response": (rows_of("instruction", "response"), {"output": "response"}),
    "alpaca": (rows_of("instruction", "input", "response"), {"output": "response"}),
    "dolly": (rows_of("instruction", "context", "response"), {"input": "context", "output": "response"}),
    "reading": (
        rows_of("context", "question", "answer"),
        {"instruction": "question", "input": "context", "output": "answer"},
    ),
    "prompt, answer": (rows_of("prompt", "answer"), {"completion": "answer"}),
    "capitals": (rows_of("Question", "Answer"), {"input": "Question", "output": "Answer"}),
    "blanks": (rows_of(" input", "output "), {"input": " input", "output": "output "}),
    "plural": (rows_of("inputs", "targets"), {"input": "inputs", "output": "targets"}),
    "long names": (
        rows_of("user_question", "modelAnswer", "model"),
        {"input": "user_question", "output": "modelAnswer"},
    ),
    "numbers as answers": ([{"problem": "2+2?", "answer": "4"}], {"input": "problem", "output": "answer"}),
    "dialogue": (rows_of("id", "dialogue", "summary"), {"input": "dialogue", "output": "summary"}),
    "turns": ([{"dialog": TURNS}] * 2, {"messages": "dialog"}),
    "turns of no known name": ([{"nr": 7, "thread": TURNS}] * 2, {"messages": "thread"}),
    "three free names": (TICKETS, {"input": "customer_message", "output": "routing"}),
    "names and labels": (LETTERS, {"input": "mail", "output": "team"}),
    "two free names": (rows_of("left_side_text_long", "right"), {"input": "left_side_text_long", "output": "right"}),
    "a text and its label": (rows_of("text", label="good"), {"input": "text", "output": "label"}),
    "a system column": (rows_of("system", "query", "reply"), {"input": "query", "output": "reply"}),
    "one text": (rows_of("content"), {"text": "content"}),
}


@pytest.mark.parametrize("name", PAIR_COLUMNS)
def test_columns_proposed_for_pairs_work(name):
    rows, expected = PAIR_COLUMNS[name]
    said = refused(rows)
    assert proposed(said) == expected
    assert said.count("train") == 1  # one error for the source, not one per row
    found, problems = load(rows, columns=proposed(said))
    assert (len(found), problems) == (len(rows), [])


PREFERENCE_COLUMNS = {
    "question": (
        rows_of("question", "chosen_response", "rejected_response"),
        {"prompt": "question", "chosen": "chosen_response", "rejected": "rejected_response"},
    ),
    "good and bad": (rows_of("prompt", "good", "bad"), {"chosen": "good", "rejected": "bad"}),
    "the prompt alone": (rows_of("system", "question", "chosen", "rejected"), {"prompt": "question"}),
    "turns and a prompt": (
        [{"question": "q", "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "no"}]}],
        {"prompt": "question"},
    ),
    "a label": (
        rows_of("question", "answer", liked=1),
        {"prompt": "question", "completion": "answer", "label": "liked"},
    ),
}


@pytest.mark.parametrize("name", PREFERENCE_COLUMNS)
def test_columns_proposed_for_preferences_work(name):
    rows, expected = PREFERENCE_COLUMNS[name]
    said = refused(rows, PREFERENCES)
    assert proposed(said) == expected
    assert load(rows, PREFERENCES, columns=proposed(said))[1] == []


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (rows_of("problem", "solution"), {"prompt": "problem"}),
        (rows_of("question", "context"), {"instruction": "question", "input": "context"}),
        ([{"mail": f"letter {n} of a user", "nr": n} for n in range(3)], {"prompt": "mail"}),
        ([{"nr": 3, "thread": TURNS[:1]}], {"messages": "thread"}),
    ],
    ids=["problem", "context", "free name", "turns"],
)
def test_columns_proposed_for_prompts_work(rows, expected):
    said = refused(rows, PROMPTS)
    assert proposed(said) == expected
    assert load(rows, PROMPTS, columns=proposed(said))[1] == []


def test_columns_for_rows_to_answer_need_no_answer():
    rows = rows_of("question")
    said = refused(rows, answered=False)
    assert proposed(said) == {"input": "question"}
    assert load(rows, columns=proposed(said), answered=False)[1] == []


def test_columns_already_given_are_part_of_the_proposal():
    rows = [{"question": "q", "answer": "a", "customer": "c"}]
    expected = {"cluster": "customer", "input": "question", "output": "answer"}
    assert proposed(refused(rows, columns={"cluster": "customer", "input": "question"})) == expected


def test_columns_chosen_by_contents_say_so():
    said = refused(TICKETS)
    assert said.endswith("if 'customer_message' asks and 'routing' answers.")
    listed = "'ticket' (text), 'customer_message' (text), 'routing' (text)"
    assert said.startswith(f"train: no row format has these columns (columns: {listed}).")
    assert "It leaves out 'premise'" in refused(
        [{"premise": f"it is {n}", "hypothesis": f"it is rather {n}", "label": "yes"} for n in range(4)]
    )


UNCLEAR = {
    "three texts": (
        rows_of("left", "middle", "right"),
        ["{'input': '<the column that asks>', 'output': '<the column that answers>'}", "'middle' (text)"],
    ),
    "no text": ([{"a": 1, "b": {"c": "d"}}], ["<the column that asks>", "'a' (int), 'b' (dict)", "input + output"]),
    "nothing": ([{}], ["columns: none"]),
    "no answer": (rows_of("input"), ["columns={'output': '<the column that answers>'}"]),
    "numbers": ([{"question": "q", "answer": 4}], ["'answer' is named for it, but holds int: write it as text"]),
    "empty": ([{"question": "q", "answer": ""}] * 3, ["'answer' is named for it, but is empty in many rows"]),
    "preferences": (rows_of("prompt", "chosen", "rejected"), ["Preferences are for a PreferenceDataModule"]),
    "text or label": (rows_of("text", "label"), ["to learn answers, or remove 'label' to learn all of 'text'"]),
    "text or number": (rows_of("text", label=1), ["Write 'label' as text, or remove 'label' to learn all of 'text'"]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_columns_that_cannot_be_guessed_are_listed(name):
    rows, expected = UNCLEAR[name]
    said = refused(rows)
    assert [part for part in expected if part not in said] == []
    assert "'messages':" not in said  # none of these holds a conversation


def test_a_misspelt_column_is_named():
    said = refused(rows_of("question", "answer"), columns={"input": "questoin", "output": "answer"})
    assert said.startswith("train: columns= names 'questoin', which no row has (columns: question, answer)")
    assert proposed(said) == {"input": "question", "output": "answer"}
    said = refused(rows_of("input", "output", "customer"), columns={"cluster": "custommer"})
    assert proposed(said) == {"cluster": "customer"}


def test_a_row_of_another_format_is_told_apart():
    rows = [*rows_of("input", "output"), {"prompt": "q", "completion": "a"}]
    _, (problem,) = load(rows)
    assert problem.row == 5
    assert problem.fix.startswith("It is a row of the format prompt_completion, most are input_output")


def test_a_text_of_which_nothing_answers_is_a_text():
    (found, problems) = load(rows_of("text", "source", "url"))
    assert (len(found), problems) == (4, [])


def test_two_whole_conversations_need_no_prompt_column():
    whole = [{"question": "Is 2 even?", "chosen": "Is 2 even? Yes", "rejected": "Is 2 even? No"}]
    (found,), _ = load(whole, PREFERENCES)
    assert found.prompt[0]["content"].strip() == "Is 2 even?"


def test_detect_of_no_rows_is_some_format():
    assert Formats({"pair": ("input", "output")}).detect([], None) == "pair"
