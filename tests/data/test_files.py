"""Files: what is read, and what is said of those that can't be."""

from collections import Counter

import datasets
import pytest

from lightning_ft.data.rows import load_source
from lightning_ft.data.sources import as_sources
from lightning_ft.errors import ConfigError, DataError, DataNotFoundError

ROWS = [{"input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}]


def load(source, **options):
    from lightning_ft.data.report import SplitReport

    report = SplitReport()
    ((name, source),) = as_sources(source, "train").items()
    rows, problems = load_source(source, name, "train", report=report, **options)
    return rows, problems, report


def contents(rows):
    return [tuple(m["content"] for m in row.messages) for row in rows]


CSV = 'input,output\n2+2?,4\n"3+3?",6\n'
SAME = {
    "a.jsonl": ROWS,
    "a.ndjson": ROWS,
    "a.json": '[{"input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}]',
    "b.json": '{"version": 1, "rows": [{"input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}]}',
    "a.csv": CSV,
    "a.tsv": CSV.replace(",", "\t"),
}


@pytest.mark.parametrize("name", SAME)
def test_every_format_gives_the_same_rows(write, name):
    rows, problems, report = load(write(name, SAME[name]))
    assert contents(rows) == [("2+2?", "4"), ("3+3?", "6")]
    assert (problems, report.read, report.kept) == ([], 2, 2)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    assert contents(load(str(path))[0]) == [("2+2?", "4"), ("3+3?", "6")]


@pytest.mark.parametrize(
    "source",
    [ROWS, datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS).to_iterable_dataset()],
    ids=["list", "Dataset", "IterableDataset"],
)
def test_objects(source):
    rows, _, _ = load(source)
    assert contents(rows) == [("2+2?", "4"), ("3+3?", "6")]
    assert [row.id for row in rows] == ["train:1", "train:2"]


def test_nested_parquet_messages(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(str(path))
    assert contents(load(str(path))[0]) == [("a", "b")]


def test_malformed_json_names_the_line(write):
    path = write(
        "a.jsonl", '{"input": "a", "output": "b"}\n\n{"input": "c", "output": \n{"input": "d", "output": "e"}\n'
    )
    rows, (problem,), report = load(path)
    assert str(problem).startswith(f"{path}, row 3: malformed JSON (Expecting value at column")
    assert problem.fix == "Each line must be one JSON object."
    assert [row.row for row in rows] == [1, 4]
    assert report.notes == Counter({"blank line": 1})


def test_deep_nesting_is_a_bad_row(write):
    _, (problem,), _ = load(write("a.jsonl", b'{"input": "a", "output": "b"}\n' + b"[" * 200_000 + b"\n"))
    assert (problem.row, problem.reason) == (2, "malformed JSON")


def test_a_row_that_is_no_object(write):
    _, (problem,), _ = load(write("a.jsonl", '{"input": "a", "output": "b"}\n[1, 2]\n'))
    assert (problem.row, problem.reason, problem.detail) == (2, "not an object", "found list")


@pytest.mark.parametrize(("name", "bad"), [("a.jsonl", b'{"input": "\xff", "output": "b"}\n'), ("a.csv", b"x\xff,b\n")])
def test_invalid_utf8_spoils_its_own_row_only(write, name, bad):
    good = b'{"input": "a", "output": "b"}\n' if name == "a.jsonl" else b"a,b\n"
    head = b"" if name == "a.jsonl" else b"input,output\n"
    rows, (problem,), _ = load(write(name, head + good + bad + good))
    assert problem.reason == "invalid UTF-8"
    assert problem.row == (2 if name == "a.jsonl" else 3)
    assert problem.detail.startswith("byte 0xff at column")
    assert problem.fix == "Save the file as UTF-8."
    assert len(rows) == 2


def test_invalid_utf8_in_json(write):
    with pytest.raises(DataError, match=r"line 2: invalid UTF-8"):
        load(write("a.json", b'[{"input": "a", "output": "b"},\n{"input": "\xff"}]'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark(write, name):
    content = SAME[name] if isinstance(SAME[name], str) else '{"input": "2+2?", "output": "4"}\n'
    rows, problems, report = load(write(name, b"\xef\xbb\xbf" + content.encode()))
    assert contents(rows)[0] == ("2+2?", "4")
    assert not problems
    assert report.notes["byte order mark removed"] == 1


def test_csv_rows_are_numbered_by_the_line_they_start_on(write):
    rows, (problem,), _ = load(write("a.csv", 'input,output\n"two\nlines",x\nc,d\ne,f,g\n"h, i",j\n'))
    assert [row.row for row in rows] == [2, 4, 6]
    assert (problem.row, problem.reason, problem.detail) == (5, "wrong number of cells", "3 cells, the header has 2")


def test_csv_long_cells(write):
    rows, _, _ = load(write("a.csv", "input,output\n" + "a" * 200_000 + ",b\n"))
    assert len(rows[0].messages[0]["content"]) == 200_000


WHOLE = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b" \n\n", "the file is empty"),
    "bom.jsonl": (b"\xef\xbb\xbf", "the file is empty"),
    "header.csv": (b"input,output\n", "there are no rows in it"),
    "none.json": (b"[]", "there are no rows in it"),
    "parquet.jsonl": (b"PAR1....", "the file is Parquet, not jsonl. Rename or convert it."),
    "zip.csv": (b"PK\x03\x04....", "the file is a zip archive"),
    "gzip.jsonl": (b"\x1f\x8b....", "the file is gzip"),
    "utf16.jsonl": ('{"input": "a"}'.encode("utf-16"), "the file is UTF-16 text"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the data itself"),
    "not.parquet": (b"input,output\n", "the file is not Parquet"),
    "array.jsonl": (
        b'[{"input": "a"},\n{"input": "b"}]',
        "one JSON array, not one JSON object a line. Rename it to .json",
    ),
    "lines.json": (b'{"input": "a"}\n{"input": "b"}\n', "line 2, column 1: malformed JSON, Extra data. If each line"),
    "broken.json": (b'[{"input": "a",\n"output"}]', "line 2, column 9: malformed JSON"),
    "object.json": (b'{"a": 1}', "expected a JSON array of rows, or an object with one list in it; found 'a'"),
    "number.json": (b"3", "expected a JSON array of rows, found int"),
    "json.csv": (b'{"input": "a", "output": "b"}\n', "looks like JSON, not CSV. Rename it to .jsonl"),
    "semicolon.csv": (b"input;output\na;b\n", "seems to be separated by ';', expected ','"),
    "twice.csv": (b"input,input\na,b\n", "the header names 'input' twice"),
    "quote.csv": (b'input,output\n"a"b,c\n', "line 2: malformed CSV"),
    "a.docx": (b"whatever", "files ending in '.docx' aren't read; expected one of .jsonl"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_files_that_cannot_be_read_at_all(write, name):
    content, said = WHOLE[name]
    path = write(name, content)
    with pytest.raises(DataError) as error:
        load(path)
    assert path in str(error.value)
    assert said in str(error.value)


def test_missing_file_names_the_nearest(write, tmp_path):
    write("support.jsonl", ROWS)
    with pytest.raises(
        DataNotFoundError, match=r"train='.*suport\.jsonl': there is no such file. Did you mean '.*support\.jsonl'\?"
    ):
        load(str(tmp_path / "suport.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"The folder '.*nowhere' doesn't exist"):
        load(str(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(DataNotFoundError, match=r"The folder holds support\.jsonl"):
        load(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataNotFoundError, match="It is a folder: name a file in it"):
        load(str(tmp_path))


def test_hub_name(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load("someone/pairs")[0][0].id == "someone/pairs:1"
    assert load("someone/pairs:test")[2].read == 2
    assert asked == [("someone/pairs", "train"), ("someone/pairs", "test")]


def test_hub_name_that_is_not_there(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no such thing\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataNotFoundError, match=r"is no file, and the Hub dataset 'someone/pairs' \(split 'train'\) couldn't be"
    ):
        load("someone/pairs")


def test_what_is_no_source():
    with pytest.raises(
        ConfigError, match="expected a path, a hub name, a dataset, a pandas or polars DataFrame or a list of dicts, or a list"
    ):
        as_sources(3, "train")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(ConfigError, match=r"got DatasetDict: pass one of its splits \(train, test\)"):
        as_sources(both, "train")
