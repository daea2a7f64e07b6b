"""Row formats of preferences, and the problems of rows that can't be used."""

import math

import pytest
from preference_cases import PAIRS, S, answer, implicit, labeled, load, pair, read, talk

from lightning_ft.data.raw_rows import raise_problems
from lightning_ft.errors import ConfigError, DataError


@pytest.mark.parametrize("name", PAIRS)
def test_pair_becomes_prompt_and_completions(name):
    row, prompt, completions = PAIRS[name]
    preference = read(row)
    assert [(m["role"], m["content"]) for m in preference.prompt] == prompt
    assert [[(m["role"], m["content"]) for m in side] for side in preference.completions] == completions
    assert preference.labels == (True, False)
    assert preference.margin is None


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False", False), ("0", False)],
)
def test_labeled_completion_has_one_label(label, expected):
    preference = read({"prompt": "q", "completion": "a", "label": label, "margin": "not for them"})
    assert (preference.labels, preference.margin) == ((expected,), None)
    assert [m["content"] for m in (*preference.prompt, *preference.completions[0])] == ["q", "a"]


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.5, 0.5), (-1, -1.0), (0, 0.0), ("2.5", 2.5), (None, None), ("", None)]
)
def test_margin_is_a_number_or_none(margin, expected):
    assert read({"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}).margin == expected


def test_columns_rename_fields_id_and_cluster():
    row = {"q": "x", "good": "a", "bad": "b", "by": 2, "nr": 7, "customer": 12}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "by", "id": "nr", "cluster": "customer"}
    preference = read(row, columns=names)
    values = preference.prompt[0]["content"], preference.margin, preference.id, preference.cluster
    assert values == ("x", 2.0, "7", "12")
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}).id == "train:1"
    with pytest.raises(ConfigError, match=r"no format has a field 'choosen'\. Did you mean 'chosen'"):
        load([row], columns={"choosen": "good"})
    with pytest.raises(ConfigError, match="no format has all of the fields label, margin"):
        load([row], columns={"label": "x", "margin": "y"})


IMPLICIT = implicit(talk("q", "a"), talk("q", "b"))
FILL = "Fill it in or remove the row."
SAME = "chosen and rejected are the same"
NOTHING = "nothing left after the shared prompt"
BAD = {  # a good row of the source, the bad one, the field, and the reason
    "missing": (pair(), pair(rejected="absent"), "rejected", "missing field"),
    "misspelled": (pair(), pair(rejected="absent", reject="b"), "rejected", "missing field"),
    "None": (pair(), pair(chosen=None), "chosen", "None"),
    "number": (pair(), pair(chosen=4), "chosen", "wrong type"),
    "no object": (pair(), "q", None, "not an object"),
    "empty prompt": (pair(), pair(prompt=""), "prompt", "empty input"),
    "no turns in the prompt": (pair(), pair(prompt=[]), "prompt", "no question in the prompt"),
    "only a system turn": (pair(), pair(prompt=[{"role": S, "content": "s"}]), "prompt", "no question in the prompt"),
    "empty chosen": (pair(), pair(chosen=""), "chosen", "empty output"),
    "blank rejected": (pair(), pair(rejected=" \n"), "rejected", "whitespace-only output"),
    "no turns in chosen": (pair(), pair(chosen=[]), "chosen", "empty output"),
    "unknown role": (pair(), pair(chosen=[{"role": "narrator", "content": "a"}]), "chosen[0].role", "unknown role"),
    "same": (pair(), pair(chosen="b"), "rejected", SAME),
    "same in other ways": (pair(), pair(chosen=answer("b")), "rejected", SAME),
    "ends with the user": (
        pair(), pair(rejected=[*answer("b"), *talk("x")]), "rejected", "no answer to the last turn",
    ),
    "starts with the user": (pair(), pair(chosen=talk("x", "a")), "chosen", "wrong role order"),
    "answer in the prompt": (pair(), pair(prompt=talk("q", "r")), "prompt", "prompt ends with an answer"),
    "margin is text": (pair(), pair(margin="much"), "margin", "margin isn't a finite number"),
    "margin is true": (pair(), pair(margin=True), "margin", "margin isn't a finite number"),
    "margin is NaN": (pair(), pair(margin=math.nan), "margin", "margin isn't a finite number"),
    "margin is infinite": (pair(), pair(margin="inf"), "margin", "margin isn't a finite number"),
    "margin is a list": (pair(), pair(margin=[1]), "margin", "margin isn't a finite number"),
    "margin is huge": (pair(), pair(margin=10**400), "margin", "margin isn't a finite number"),
    "labeled among pairs": (pair(), labeled(), None, "not a pair"),
    "pair among labeled": (labeled(), pair(), None, "not a completion with a label"),
    "implicit, same": (IMPLICIT, implicit(talk("q", "a"), talk("q", "a")), "rejected", SAME),
    "implicit, same text": (IMPLICIT, implicit("q a", "q a"), "rejected", SAME),
    "implicit, other questions": (IMPLICIT, implicit(talk("q", "a"), talk("r", "b")), None, "no shared prompt"),
    "implicit, other texts": (IMPLICIT, implicit("yes", "no"), None, "no shared prompt"),
    "implicit, blank prompt": (IMPLICIT, implicit("  yes", "  no"), None, "no shared prompt"),
    "implicit, only a system turn": (
        IMPLICIT, implicit(talk("q", "a", system="s"), talk("r", "b", system="s")), None, "no question in the prompt",
    ),
    "implicit, nothing left": (IMPLICIT, implicit(talk("q", "a"), talk("q", "a", "x", "b")), "chosen", NOTHING),
    "implicit, no text left": (IMPLICIT, implicit("Assistant: yes", "Assistant:"), "rejected", NOTHING),
    "implicit, no word left": (IMPLICIT, implicit("Assistant: yes", "Assistant: "), "rejected", NOTHING),
    "implicit, text and turns": (IMPLICIT, implicit("q a", talk("q", "b")), "rejected", "wrong type"),
    "implicit, ends with the user": (
        IMPLICIT, implicit(talk("q", "a", "x"), talk("q", "b")), "chosen", "no answer to the last turn",
    ),
    "implicit, empty": (IMPLICIT, implicit("", "q b"), "chosen", "empty output"),
    "label is text": (labeled(), labeled(label="good"), "label", "label isn't a boolean"),
    "label is 2": (labeled(), labeled(label=2), "label", "label isn't a boolean"),
    "label is a share": (labeled(), labeled(label=0.5), "label", "label isn't a boolean"),
    "label is a list": (labeled(), labeled(label=[True]), "label", "label isn't a boolean"),
    "label is None": (labeled(), labeled(label=None), "label", "None"),
    "empty completion": (labeled(), labeled(completion=""), "completion", "empty output"),
    "completion of the user": (labeled(), labeled(completion=talk("x")), "completion", "no assistant turn"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_row_has_field_and_reason(name):
    good, row, field, reason = BAD[name]
    rows, (problem,) = load([good, row, good])
    assert len(rows) == 2
    assert (problem.source, problem.row, problem.field, problem.reason) == ("train", 2, field, reason)
    assert problem.fix


def test_margin_named_in_columns_is_required():
    _, (problem,) = load([pair(by=1), pair(buy=1)], columns={"margin": "by"})
    assert problem.reason == "missing field"
    assert problem.fix == "Rename 'buy' to 'by', as in other rows."


def test_raise_problems_lists_all_bad_rows():
    _, problems = load([pair(), *(row for good, row, *_ in BAD.values() if good == pair())])
    with pytest.raises(DataError) as error:
        raise_problems(problems)
    assert str(error.value).startswith(f"{len(problems)} bad rows (")
    assert "train, row 2, 'rejected': missing field" in str(error.value)
