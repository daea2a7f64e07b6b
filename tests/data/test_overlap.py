"""Overlap of splits that come from separate sources."""

import pytest
from rich.console import Console

from lightning_ft import PairDataModule, PreferenceDataModule
from lightning_ft.data.preview import preview
from lightning_ft.data.splits import RowRules, Splits


def talk(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def row(*texts, **more):
    return {"messages": talk(*texts), **more}


def loaded(names=None, **sources):
    made = Splits(sources, RowRules(None, "error", 64, "drop", seed=0, cache=None))
    made.load(names or list(sources))
    return made


def counts(report):
    return (report.also_in_train, report.question_in_train, report.conversation_in_train, report.cluster_in_train)


TRAIN = [row("a", "1", cluster="x"), row("b", "1", "c", "2"), row("d", "1")]


@pytest.mark.filterwarnings("ignore:test has")
@pytest.mark.parametrize(
    ("test_row", "expected"),
    [
        (row("a", "1"), (1, 1, 0, 0)),
        (row("a", "2"), (0, 1, 0, 0)),  # with another answer
        (row(" a\n", "2"), (0, 1, 0, 0)),
        ({"system": "Be brief.", "input": "a", "output": "1"}, (0, 1, 0, 0)),
        (row("b", "9"), (0, 1, 0, 0)),  # an earlier turn of a row that is trained on
        (row("b", "1", "c", "9"), (0, 1, 0, 0)),
        (row("a", "1", "e", "2"), (0, 0, 1, 0)),  # continues it
        (row("b", "9", "c", "2"), (0, 0, 0, 0)),  # the same words after another answer
        (row("c", "2"), (0, 0, 0, 0)),
        (row("z", "1", cluster="x"), (0, 0, 0, 1)),
        (row("z", "1", cluster="y"), (0, 0, 0, 0)),
        (row("a", "1", cluster="x"), (1, 1, 0, 1)),
    ],
)
def test_overlap_counts_one_row(test_row, expected):
    if "messages" not in test_row:
        made = loaded(train=TRAIN, test=[test_row])
    else:
        made = loaded(train=TRAIN, test=[test_row, row("new", "1")])
    assert counts(made.report["test"]) == expected


def test_overlap_is_warned_of_once_per_split(recwarn):
    made = loaded(
        train=TRAIN, validation=[row("a", "2"), row("z", "1", cluster="x")], test=[row("d", "1"), row("d", "2")]
    )
    made.load(["validation", "test"])
    made.sample("train", 3)
    messages = [str(warning.message).split(", so its")[0] for warning in recwarn.list]
    assert messages == [
        "validation has 1 rows whose question appears in train, 1 rows of a cluster that also has rows in train, of "
        "2 in all",
        "test has 1 rows that also appear in train, 2 rows whose question appears in train, of 2 in all",
    ]


def test_overlap_is_counted_when_train_is_loaded_later():
    made = Splits({"train": TRAIN, "test": TRAIN}, RowRules(None, "error", 64, "drop", seed=0, cache=None))
    made.load(["test"])
    assert counts(made.report["test"]) == (0, 0, 0, 0)
    with pytest.warns(UserWarning, match="test has 3 rows that also appear in train"):
        made.load(["train"])
    assert counts(made.report["test"]) == (3, 3, 0, 1)


@pytest.mark.filterwarnings("ignore:test has")
def test_overlap_counts_only_rows_that_are_used(tokenizer):
    long = "parcel " * 99
    sources = {"train": [row("a", long), row("b", "1")], "test": [row("a", "1"), row("b", "2"), row("b", long)]}
    made = loaded(**sources)
    assert counts(made.report["test"]) == (0, 3, 0, 0)
    for name in ("train", "test"):
        made.encode(name, tokenizer)
    assert (counts(made.report["test"]), made.report["test"].kept) == ((0, 1, 0, 0), 2)


@pytest.mark.filterwarnings("ignore:test has")
def test_overlap_counts_only_sampled_rows():
    rows = [row(str(n), "1") for n in range(20)]
    made = loaded(train=rows, test=rows)
    made.sample("train", 5)
    assert counts(made.report["test"]) == (5, 5, 0, 0)
    assert sum(made.training_index().has_question(talk(str(n))) for n in range(20)) == 5


def test_held_out_share_overlaps_with_test_only():
    rows = [row(str(n // 2), str(n)) for n in range(20)]
    made = Splits({"train": rows, "validation": 0.2, "test": rows}, RowRules(None, "error", 64, "drop", 0, None))
    with pytest.warns(UserWarning, match="test has 16 rows that also appear in train, of 20 in all"):
        made.load(["train", "validation", "test"])
    assert made.report["validation"].overlap == []


def test_predict_rows_are_not_compared(recwarn):
    made = loaded(train=TRAIN, predict=[row("a")])
    assert counts(made.report["predict"]) == (0, 0, 0, 0)
    assert not recwarn.list


def test_overlap_of_preferences_in_text_and_messages():
    train = [{"prompt": "question", "chosen": "good", "rejected": "bad"}]
    other = [{"prompt": talk("question "), "chosen": "better", "rejected": "worse"}]
    data = PreferenceDataModule(train, validation=other)
    with pytest.warns(UserWarning, match="validation has 1 rows whose question appears in train"):
        data.load_rows()
    labeled = [{"prompt": "question", "completion": text, "label": True} for text in ("good", "fine")]
    data = PreferenceDataModule(labeled[:1], validation=labeled)
    with pytest.warns(UserWarning, match="1 rows that also appear in train, 2 rows whose question appears in train"):
        data.load_rows()


@pytest.mark.filterwarnings("ignore:(test|validation) has")
def test_overlap_of_files_of_other_formats(write):
    train = [write("a.csv", "prompt,completion\nquestion 1,a\n"), write("b.jsonl", [row("question 2", "b")])]
    test = write(
        "c.json", '[{"instruction": "question 1", "output": "x"}, {"instruction": "question  2", "output": "y"}]'
    )
    data = PairDataModule(train, test=test)
    data.load_rows()
    assert counts(data.report["test"]) == (0, 2, 0, 0)


@pytest.mark.filterwarnings("ignore:test has")
def test_preview_shows_overlap(tokenizer):
    data = PairDataModule(TRAIN, test=[row("a", "2"), row("d", "1", cluster="x")], tokenizer=tokenizer, cache_dir=False)
    console = Console(record=True, width=120)
    preview(data, console=console)
    shown = console.export_text()
    for line in ("1 │ rows that also appear in train", "2 │ rows whose question appears", "1 │ rows of a cluster that"):
        assert line in shown
