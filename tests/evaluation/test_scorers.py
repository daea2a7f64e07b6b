import math

import pytest

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.scorers import LabelMatch, grade_answers, resolve_scorer


def constant_scorer(output, reference):
    return 0.5


@pytest.mark.parametrize(
    ("name", "output", "reference", "expected"),
    [
        ("exact", "Yes", "Yes", 1),
        ("exact", "Yes ", "Yes", 0),
        ("normalized", " STRASSE!\n", "straße", 1),
        ("normalized", "ﬁne", "fine", 1),  # one character for two letters
        ("normalized", "a.b", "ab", 0),  # punctuation counts, except at the end
        ("json", '{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1.0}', 1),
        ("json", '```json\n{"a": 1}\n```', '{"a": 1}', 1),
        ("json", "[2, 1]", "[1, 2]", 0),
        ("json", "true", "1", 0),
        ("json", "null", "false", 0),
        ("json", "NaN", "null", 0),
        ("json", '{"a": 1', '{"a": 1}', 0),
        ("json", "", '""', 0),
        ("json", "[" * 100_000, "[]", 0),
    ],
)
def test_resolve_scorer_finds_scorers_by_name(name, output, reference, expected):
    assert resolve_scorer(name, [reference])[1](output, reference) == expected


def test_label_match_takes_the_first_label_of_whole_words():
    name, scorer = resolve_scorer("label", ["Billing", "late billing", "shipping"])
    assert name == "label"
    assert scorer("It is late billing, not shipping.", "Late Billing") == 1
    assert scorer("It is late billing, not shipping.", "billing") == 0
    assert scorer("rebilling? shipping", "shipping") == 1
    assert scorer("no idea", "shipping") == 0
    with pytest.raises(SavingsError, match="isn't one of the labels"):
        scorer("shipping", "returns")
    with pytest.raises(SavingsError, match="no labels"):
        LabelMatch([" "])


@pytest.mark.parametrize("path", [f"{__name__}:constant_scorer", f"{__name__}.constant_scorer"])
def test_resolve_scorer_imports_a_path(path):
    assert resolve_scorer(path, [])[1]("a", "b") == 0.5


@pytest.mark.parametrize("path", ["exactly", "no.such.module", "math:no_such", "math:pi"])
def test_resolve_scorer_refuses_unknown_names_and_paths(path):
    with pytest.raises(SavingsError, match="scorer="):
        resolve_scorer(path, [])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.5, None, "1", [1, 2]])
def test_grade_answers_refuses_values_outside_0_to_1(bad):
    with pytest.raises(SavingsError, match=r"Scorer 'mine' returned .* for request 'r2'"):
        grade_answers("mine", lambda o, r: bad if o == "b" else 1, ["r1", "r2"], ["a", "b"], ["a", "b"])


def test_grade_answers_names_scorer_and_request_of_an_exception():
    with pytest.raises(SavingsError, match="Scorer 'json' failed on request 'r2': JSONDecodeError"):
        grade_answers("json", resolve_scorer("json", [])[1], ["r1", "r2"], ["1", "1"], ["1", "{oops"])


def test_grade_answers_accepts_booleans():
    assert grade_answers("eq", lambda o, r: o == r, ["1", "2"], ["a", "b"], ["a", "c"]) == (1.0, 0.0)
