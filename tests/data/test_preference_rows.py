"""Formats of preferences, and what is said of rows that can't be used."""

import math

import pytest
from preference_cases import PAIRS, S, answer, implicit, labelled, load, pair, read, talk

from lightning_ft.data.raw_rows import raise_problems
from lightning_ft.errors import ConfigError, DataError


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    row, prompt, completions = PAIRS[name]
    found = read(row)
    assert [(m["role"], m["content"]) for m in found.prompt] == prompt
    assert [[(m["role"], m["content"]) for m in side] for side in found.completions] == completions
    assert found.labels == (True, False)
    assert found.margin is None


@pytest.mark.parametrize(
    ("label", "expected"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("true", True), ("False", False), ("0", False)],
)
def test_labelled_completions(label, expected):
    found = read({"prompt": "q", "completion": "a", "label": label, "margin": "not for them"})
    assert (found.labels, found.margin) == ((expected,), None)
    assert [m["content"] for m in (*found.prompt, *found.completions[0])] == ["q", "a"]


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.5, 0.5), (-1, -1.0), (0, 0.0), ("2.5", 2.5), (None, None), ("", None)]
)
def test_margins(margin, expected):
    assert read({"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin}).margin == expected


def test_columns_id_and_cluster():
    row = {"q": "x", "good": "a", "bad": "b", "by": 2, "nr": 7, "customer": 12}
    names = {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "by", "id": "nr", "cluster": "customer"}
    found = read(row, columns=names)
    assert (found.prompt[0]["content"], found.margin, found.id, found.cluster) == ("x", 2.0, "7", "12")
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}).id == "train:1"
    with pytest.raises(ConfigError, match=r"no format has a field 'choosen'\. Did you mean 'chosen'"):
        load([row], columns={"choosen": "good"})
    with pytest.raises(ConfigError, match="no format has all of the fields label, margin"):
        load([row], columns={"label": "x", "margin": "y"})


IMPLICIT = implicit(talk("q", "a"), talk("q", "b"))
FILL = "Fill it in or remove the row."
SAME = "chosen and rejected are the same"
NOTHING = "nothing left behind the shared prompt"
BAD = {  # a good row of the source, the bad one, the field, and the reason
    "missing": (pair(), pair(rejected="absent"), "rejected", "missing field"),
    "misspelt": (pair(), pair(rejected="absent", reject="b"), "rejected", "missing field"),
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
    "margin is text": (pair(), pair(margin="much"), "margin", "margin is no finite number"),
    "margin is true": (pair(), pair(margin=True), "margin", "margin is no finite number"),
    "margin is NaN": (pair(), pair(margin=math.nan), "margin", "margin is no finite number"),
    "margin is infinite": (pair(), pair(margin="inf"), "margin", "margin is no finite number"),
    "margin is a list": (pair(), pair(margin=[1]), "margin", "margin is no finite number"),
    "margin is huge": (pair(), pair(margin=10**400), "margin", "margin is no finite number"),
    "labelled among pairs": (pair(), labelled(), None, "not a pair"),
    "pair among labelled": (labelled(), pair(), None, "not a completion with a label"),
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
    "label is text": (labelled(), labelled(label="good"), "label", "label is no bool"),
    "label is 2": (labelled(), labelled(label=2), "label", "label is no bool"),
    "label is a share": (labelled(), labelled(label=0.5), "label", "label is no bool"),
    "label is a list": (labelled(), labelled(label=[True]), "label", "label is no bool"),
    "label is None": (labelled(), labelled(label=None), "label", "None"),
    "empty completion": (labelled(), labelled(completion=""), "completion", "empty output"),
    "completion of the user": (labelled(), labelled(completion=talk("x")), "completion", "no assistant turn"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name):
    good, row, field, reason = BAD[name]
    rows, (problem,) = load([good, row, good])
    assert len(rows) == 2
    assert (problem.source, problem.row, problem.field, problem.reason) == ("train", 2, field, reason)
    assert problem.fix


def test_a_named_margin_must_be_there():
    _, (problem,) = load([pair(by=1), pair(buy=1)], columns={"margin": "by"})
    assert problem.reason == "missing field"
    assert problem.fix == "Rename 'buy' to 'by', as in other rows."


def test_all_bad_rows_are_told_together():
    _, problems = load([pair(), *(row for good, row, *_ in BAD.values() if good == pair())])
    with pytest.raises(DataError) as error:
        raise_problems(problems)
    assert str(error.value).startswith(f"{len(problems)} bad rows (")
    assert "train, row 2, 'rejected': missing field" in str(error.value)
