"""Columns with other names: the proposed `columns=` work as proposed."""

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


def load(rows, row_type=PAIRS, **options):
    return load_source(rows, "train", "train", row_type=row_type, **options)


def error_of(rows, row_type=PAIRS, **options):
    with pytest.raises(DataError) as error:
        load(rows, row_type, **options)
    return str(error.value)


def proposed(message):
    """The complete mapping that an error proposes."""
    (columns,) = re.findall(r"columns=(\{.*?\})", message)
    return ast.literal_eval(columns)


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
def test_proposed_columns_work_for_pairs(name):
    rows, expected = PAIR_COLUMNS[name]
    message = error_of(rows)
    assert proposed(message) == expected
    assert message.count("train") == 1  # one error for the source, not one per row
    loaded, problems = load(rows, columns=proposed(message))
    assert (len(loaded), problems) == (len(rows), [])


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
    "thumbs": (
        [{"prompt": "q", "completion": f"a{n}", "thumbs_up": n > 0, "shipped": n > 1} for n in range(3)],
        {"label": "thumbs_up"},
    ),
    "the only yes or no": (
        [{"question": "what is it", "answer": "a lamp", "kept": n % 2} for n in range(3)],
        {"prompt": "question", "completion": "answer", "label": "kept"},
    ),
}


@pytest.mark.parametrize("name", PREFERENCE_COLUMNS)
def test_proposed_columns_work_for_preferences(name):
    rows, expected = PREFERENCE_COLUMNS[name]
    message = error_of(rows, PREFERENCES)
    assert proposed(message) == expected
    assert load(rows, PREFERENCES, columns=proposed(message))[1] == []


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
def test_proposed_columns_work_for_prompts(rows, expected):
    message = error_of(rows, PROMPTS)
    assert proposed(message) == expected
    assert load(rows, PROMPTS, columns=proposed(message))[1] == []


def test_label_that_is_neither_true_nor_false_is_to_be_written_so():
    message = error_of(rows_of("prompt", "completion", thumbs_up="yes"), PREFERENCES)
    assert "'thumbs_up' has a fitting name, but contains text: write true or false." in message
    message = error_of([{"prompt": "q", "completion": "a", "kept": 1, "sent": 0}], PREFERENCES)  # either may be meant
    assert proposed(message) == {"label": "<column with the label>"}


def test_proposed_columns_of_predict_rows_need_no_answer():
    rows = rows_of("question")
    message = error_of(rows, answered=False)
    assert proposed(message) == {"input": "question"}
    assert load(rows, columns=proposed(message), answered=False)[1] == []


def test_predict_rows_with_other_columns_than_the_training_rows_are_to_be_renamed():
    """Another columns= would fit them, and no longer the training rows."""
    message = error_of(rows_of("question"), columns={"input": "Customer", "output": "Reply"}, answered=False)
    assert message.endswith("Rename 'question' to 'Customer': columns= holds for the rows of all splits.")


def test_proposal_includes_passed_columns():
    rows = [{"question": "q", "answer": "a", "customer": "c"}]
    expected = {"cluster": "customer", "input": "question", "output": "answer"}
    assert proposed(error_of(rows, columns={"cluster": "customer", "input": "question"})) == expected


def test_proposal_by_contents_is_marked_as_such():
    message = error_of(TICKETS)
    assert message.endswith("if 'customer_message' holds the prompt and 'routing' holds the answer.")
    listed = "'ticket' (text), 'customer_message' (text), 'routing' (text)"
    assert message.startswith(f"train: no row format has these columns (columns: {listed}).")
    assert "It leaves out 'premise'" in error_of(
        [{"premise": f"it is {n}", "hypothesis": f"it is rather {n}", "label": "yes"} for n in range(4)]
    )


UNCLEAR = {
    "three texts": (
        rows_of("left", "middle", "right"),
        ["{'input': '<column with the prompt>', 'output': '<column with the answer>'}", "'middle' (text)"],
    ),
    "no text": ([{"a": 1, "b": {"c": "d"}}], ["<column with the prompt>", "'a' (int), 'b' (dict)", "input + output"]),
    "nothing": ([{}], ["columns: none"]),
    "no answer": (rows_of("input"), ["columns={'output': '<column with the answer>'}"]),
    "numbers": ([{"question": "q", "answer": 4}], ["'answer' has a fitting name, but contains int: write it as text"]),
    "empty": ([{"question": "q", "answer": ""}] * 3, ["'answer' has a fitting name, but is empty in many rows"]),
    "preferences": (rows_of("prompt", "chosen", "rejected"), ["Preferences are for a PreferenceDataModule"]),
    "text or label": (rows_of("text", "label"), ["to learn answers, or remove 'label' to learn all of 'text'"]),
    "text or number": (rows_of("text", label=1), ["Write 'label' as text, or remove 'label' to learn all of 'text'"]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_proposal_lists_columns_that_cannot_be_guessed(name):
    rows, expected = UNCLEAR[name]
    message = error_of(rows)
    assert [part for part in expected if part not in message] == []
    assert "'messages':" not in message  # none of these contains a conversation


def test_misspelled_column_gets_the_nearest_name():
    message = error_of(rows_of("question", "answer"), columns={"input": "questoin", "output": "answer"})
    assert message.startswith("train: columns= names 'questoin', which no row has (columns: question, answer)")
    assert proposed(message) == {"input": "question", "output": "answer"}
    message = error_of(rows_of("input", "output", "customer"), columns={"cluster": "custommer"})
    assert proposed(message) == {"cluster": "customer"}


def test_row_of_another_format_is_a_bad_row():
    rows = [*rows_of("input", "output"), {"prompt": "q", "completion": "a"}]
    _, (problem,) = load(rows)
    assert problem.row == 5
    assert problem.fix.startswith("The row has the format prompt_completion, most have input_output")


def test_text_without_an_answer_column_is_a_text():
    loaded, problems = load(rows_of("text", "source", "url"))
    assert (len(loaded), problems) == (4, [])


def test_two_whole_conversations_need_no_prompt_column():
    whole = [{"question": "Is 2 even?", "chosen": "Is 2 even? Yes", "rejected": "Is 2 even? No"}]
    (row,), _ = load(whole, PREFERENCES)
    assert row.prompt[0]["content"].strip() == "Is 2 even?"


def test_detect_without_rows_returns_a_format():
    assert Formats({"pair": ("input", "output")}).detect([], None) == "pair"
