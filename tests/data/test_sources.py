"""Sources in memory (data frames, datasets, lists), and the errors for those that can't be read."""

import datetime
import decimal
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest

from lightning_ft import PairDataModule, PromptDataModule
from lightning_ft.data.rows import load_source
from lightning_ft.data.sources import as_sources, read_rows, source_as_json
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.values import MAX_DEPTH, plain
from lightning_ft.errors import ConfigError, DataError, DataNotFoundError

ROWS = [{"input": "2+2?", "output": "4", "score": 1.5}, {"input": "3+3?", "output": "6", "score": None}]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "bot"}]


def load(source, **options):
    ((name, source),) = as_sources(source, "train").items()
    return load_source(source, name, "train", **options)


def contents(rows):
    return [tuple(message["content"] for message in row.messages) for row in rows]


def polars_frame(rows):
    return pytest.importorskip("polars").DataFrame(rows)


@pytest.mark.parametrize("frame", [pd.DataFrame, polars_frame])
def test_frame_rows_equal_those_of_a_list(frame):
    rows, problems = load(frame(ROWS))
    assert (contents(rows), problems) == ([("2+2?", "4"), ("3+3?", "6")], [])
    assert [row.id for row in rows] == ["train:1", "train:2"]


@pytest.mark.parametrize("frame", [pd.DataFrame, polars_frame])
def test_frame_missing_values_are_none(frame):
    _, (problem,) = load(frame([{"input": "q", "output": "a"}, {"input": "q", "output": None}]))
    assert (problem.row, problem.field, problem.reason) == (2, "output", "None")
    data = PromptDataModule(frame([{"prompt": "q", "x": 1.0}, {"prompt": "r", "x": float("nan")}]))
    data.load_rows()
    assert [row.columns["x"] for row in data.splits.rows["train"][0]] == [1.0, None]


@pytest.mark.parametrize(
    "missing",
    [
        pd.array(["a", None], dtype="string"),
        pd.Categorical(["a", None]),
        pd.to_datetime(["2020-01-01", None]),
        pd.array([1, None], dtype="Int64"),
    ],
    ids=["NA", "category", "NaT", "Int64"],
)
def test_pandas_missing_values_are_none(missing):
    data = PromptDataModule(pd.DataFrame({"prompt": ["q", "r"], "x": missing}))
    data.load_rows()
    first, second = (row.columns["x"] for row in data.splits.rows["train"][0])
    assert (first is None, second) == (False, None)


@pytest.mark.parametrize("frame", [pd.DataFrame, polars_frame])
def test_frame_of_conversations_is_read(frame):
    (row,), problems = load(frame([{"messages": TURNS}]))
    assert ([message["role"] for message in row.messages], problems) == (["user", "assistant"], [])


def test_pandas_arrays_of_turns_are_read(tmp_path):
    datasets.Dataset.from_list([{"messages": TURNS}]).to_parquet(str(tmp_path / "a.parquet"))
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert isinstance(frame["messages"][0], np.ndarray)
    assert contents(load(frame)[0]) == [("q", "a")]


def test_pandas_frame_with_unusual_columns_is_read():
    with pytest.raises(DataError, match=r"train: two columns are named 'input'"):
        load(pd.DataFrame([["q", "a", "b"]], columns=["input", "output", "input"]))
    levels = pd.MultiIndex.from_tuples([("input", "x"), ("output", "x")])
    with pytest.raises(DataError, match=r"train: the frame's columns have 2 levels"):
        load(pd.DataFrame([["q", "a"]], columns=levels))
    assert contents(load(pd.DataFrame([["q", "a"]]), columns={"input": "0", "output": "1"})[0]) == [("q", "a")]
    with pytest.raises(DataError, match="it contains no rows"):
        load(pd.DataFrame())


def test_every_split_may_be_a_frame():
    frame = pd.DataFrame([{"input": f"{n}+1?", "output": str(n + 1)} for n in range(10)])
    data = PairDataModule(frame[:6], validation=frame[6:8], test=[frame[8:9], frame[9:]])
    data.load_rows()
    assert {name: report.kept for name, report in data.report.items()} == {"train": 6, "validation": 2, "test": 2}
    assert source_as_json(frame) is None


def test_lazy_frame_must_be_collected():
    polars = pytest.importorskip("polars")
    with pytest.raises(ConfigError, match=r"got LazyFrame: pass its \.collect\(\)\."):
        as_sources(polars.LazyFrame(ROWS), "train")


def iterable_dataset(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


@pytest.mark.parametrize("source", [datasets.Dataset.from_list, iterable_dataset])
def test_keys_that_arrow_adds_are_removed(source):
    calls = [{"name": "f", "arguments": {"city": "Paris"}}, {"name": "g", "arguments": {"day": 3}}]
    rows = [{"prompt": "q", "calls": calls, "none": None}, {"prompt": "r", "calls": [], "none": 1}]
    data = PromptDataModule(source(rows), streaming=False)
    data.load_rows()
    first, _ = data.splits.rows["train"][0]
    assert first.columns == {"calls": calls, "none": None}


def test_failing_dataset_error_names_it():
    def rows():
        yield ROWS[0]
        raise OSError("connection lost")

    with pytest.raises(DataError, match=r"train: reading the dataset failed after row 1 with OSError: connection lost"):
        load(datasets.IterableDataset.from_generator(rows))


VALUES = {
    "scalars": ({"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True), "d": np.str_("x")}, None),
    "array": ({"a": np.array([[1, 2], [3, 4]])}, {"a": [[1, 2], [3, 4]]}),
    "tuple": ({"a": ({"b": None},)}, {"a": [{"b": None}]}),
    "no row": ([1], [1]),
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_converts_numpy_and_tuples(name):
    row, expected = VALUES[name]
    expected = expected or {"a": 3, "b": 0.5, "c": True, "d": "x"}
    result = plain(row)
    assert result == expected
    assert not any(isinstance(v, np.generic) for v in (result.values() if isinstance(result, dict) else result))


def test_plain_keeps_values_without_a_plain_form():
    row = {"day": datetime.date(2020, 1, 1), "price": decimal.Decimal("1.5"), "raw": b"x", "set": {1}}
    assert plain(row) == row
    rows, problems = load([{"input": "q", "output": "a", **row}])
    assert (len(rows), problems) == (1, [])
    _, (problem,) = load([{"input": "q", "output": "a"}, {"input": "q", "output": decimal.Decimal("1.5")}])
    assert (problem.field, problem.reason, problem.detail) == ("output", "wrong type", "found Decimal")


def nested(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


HALF, CYCLE = "half \ud83d", {}
CYCLE["again"] = CYCLE
BAD = {
    "surrogate": ({"input": HALF}, "input", "half of a surrogate pair"),
    "surrogate in another column": ({"note": HALF}, "note", "half of a surrogate pair"),
    "surrogate in a message": ({"m": [{"role": "user", "content": HALF}]}, "m[0].content", "half of a surrogate pair"),
    "surrogate in a key": ({"m": [{HALF: 1}]}, "m[0]", "half of a surrogate pair"),
    "surrogate in a name": ({HALF: 1}, None, "half of a surrogate pair"),
    "digits": ({"id": 10**5000}, "id", "an integer of too many digits"),
    "depth": ({"a": nested(MAX_DEPTH + 2)}, "a" + "[0]" * (MAX_DEPTH + 1), "nested too deep"),
    "cycle": ({"a": CYCLE}, "a" + ".again" * MAX_DEPTH, "nested too deep"),
    "name": ({1: "x"}, None, "a field's name isn't a string"),
    "keys of several types": ({"a": [{1: "x", "b": "y"}]}, "a[0]", "a key isn't a string"),
    "keys that JSON has not": ({"a": {(1, 2): "x"}}, "a", "a key isn't a string"),
}


@pytest.mark.parametrize("name", BAD)
def test_forbidden_values_are_bad_rows(name):
    row, field, reason = BAD[name]
    good = {"input": "q", "output": "a"}
    rows, (problem,) = load([good, {**good, **row}, good])
    assert len(rows) == 2
    assert (problem.source, problem.row, problem.reason) == ("train", 2, reason)
    assert problem.field == field or name == "depth" or name == "cycle"
    assert str(problem).encode()  # can be printed
    report = SplitReport()
    load([good, {**good, **row}], on_bad_row="skip", report=report)
    assert (report.read, report.kept, dict(report.skipped)) == (2, 1, {reason: 1})


def test_nesting_below_the_limit_is_read():
    assert len(load([{"input": "q", "output": "a", "deep": nested(MAX_DEPTH - 2)}])[0]) == 1


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/a.jsonl", "a\0b.jsonl"])
def test_sources_reject_strings_that_cannot_be_paths(name):
    with pytest.raises(DataNotFoundError, match=r"^train='.{1,200}there is no such file"):
        load(name)


def test_folder_saved_by_datasets_error_names_the_remedy(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "more"))
    with pytest.raises(DataNotFoundError, match=r"pass datasets\.load_from_disk\('.*one'\), or save it as Parquet"):
        load(str(tmp_path / "one"))
    with pytest.raises(DataNotFoundError, match=r"pass datasets\.load_from_disk\('.*more'\)\[SPLIT\]"):
        load(str(tmp_path / "more"))
    assert len(load(datasets.load_from_disk(str(tmp_path / "one")))[0]) == 2


def test_template_kwargs_must_have_string_names():
    row = {"input": "q", "output": "a", "chat_template_kwargs": {1: 2}}
    _, (problem,) = load([ROWS[0], row])
    assert (problem.field, problem.detail) == ("chat_template_kwargs", "found names that aren't strings")


@pytest.mark.parametrize("layout", ["pandas", "polars", "arrow"])
@pytest.mark.parametrize("streamed", [False, True])
def test_dataset_whose_format_makes_tables_of_rows_is_read(layout, streamed):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    dataset = datasets.Dataset.from_list([{"messages": turns}] * 2)
    source = (dataset.to_iterable_dataset() if streamed else dataset).with_format(layout)
    rows = [raw.value for raw in read_rows(source, "train", "train", Counter())]
    assert rows == [{"messages": turns}] * 2
