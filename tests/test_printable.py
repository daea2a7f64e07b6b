"""Text that reaches a terminal."""

import io

import pytest
from rich.console import Console

from lightning_ft.data.problems import Problem, raise_problems
from lightning_ft.data.rows import load_source
from lightning_ft.errors import DataError
from lightning_ft.printable import printable
from lightning_ft.report.samples import samples_table

NASTY = "a\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202egpj\u2066\u2028\x00"
SAFE = r"a\x1b[2J\x1b]0;title\x07\x0d\x08\x9b31m\u202egpj\u2066\u2028\x00"


def test_printable_escapes_what_changes_a_terminal():
    assert printable(NASTY) == SAFE
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("a\nb\r\n", one_line=True) == r"a\nb\x0d\n"
    assert printable("half \ud83d").encode() == rb"half \ud83d"


@pytest.mark.parametrize(
    "text",
    [
        "caf\u00e9 na\u0308ive",
        "\u4f60\u597d",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f468\u200d\U0001f469",
        "[bold]x[/bold]",
        r"\x1b",
    ],
)
def test_printable_leaves_text_as_it_is(text):
    assert printable(text) == text


def test_problems_are_printable():
    problem = Problem(NASTY, 1, NASTY, "x", NASTY + "\n", NASTY)
    with pytest.raises(DataError) as error:
        raise_problems([problem])
    assert "\x1b" not in str(error.value)
    assert str(problem).count("\n") == 0
    assert SAFE in str(problem)


def test_names_of_columns_are_printable(caplog):
    with caplog.at_level("INFO"):
        load_source([{"input": "a", "output": "b", NASTY: 1}], "train", "train")
    assert f"ignored columns: {SAFE}" in caplog.text
    with pytest.raises(DataError) as error:
        load_source([{NASTY: 1, "x\x1b": "y"}], "train", "train")
    assert "\x1b" not in str(error.value)


def test_samples_table_is_printable():
    row = {"step": 3, "prompt": NASTY, "completion": NASTY, "rewards": {NASTY: 1.0}, "reward": 1.0}
    row |= {"advantage": 0.5, "truncated": False, "length": 2}
    file = io.StringIO()
    Console(file=file, width=200).print(samples_table([row]))
    assert not {"\x1b", "\x07", "\u202e", "\r", "\x00"} & set(file.getvalue())
    assert r"\x1b[2J" in file.getvalue()
