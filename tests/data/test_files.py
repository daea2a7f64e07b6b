"""Reading files, and the errors for those that can't be read."""

import datetime
import decimal
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_ft.data.files import read_file
from lightning_ft.data.rows import load_source
from lightning_ft.data.sources import as_sources
from lightning_ft.data.split_report import SplitReport
from lightning_ft.errors import ConfigError, DataError, DataNotFoundError

ROWS = [{"input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}]


def load(source, **options):
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
def test_read_file_returns_equal_rows_for_every_format(write, name):
    rows, problems, report = load(write(name, SAME[name]))
    assert contents(rows) == [("2+2?", "4"), ("3+3?", "6")]
    assert (problems, report.read, report.kept) == ([], 2, 2)


def test_parquet_rows_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    assert contents(load(str(path))[0]) == [("2+2?", "4"), ("3+3?", "6")]


@pytest.mark.parametrize(
    "source",
    [ROWS, datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS).to_iterable_dataset()],
    ids=["list", "Dataset", "IterableDataset"],
)
def test_sources_in_memory_are_read(source):
    rows, _, _ = load(source)
    assert contents(rows) == [("2+2?", "4"), ("3+3?", "6")]
    assert [row.id for row in rows] == ["train:1", "train:2"]


def test_parquet_reads_nested_messages(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"messages": turns}]).to_parquet(str(path))
    assert contents(load(str(path))[0]) == [("a", "b")]


def test_jsonl_error_names_the_malformed_line(write):
    path = write(
        "a.jsonl", '{"input": "a", "output": "b"}\n\n{"input": "c", "output": \n{"input": "d", "output": "e"}\n'
    )
    rows, (problem,), report = load(path)
    assert str(problem).startswith(f"{path}, row 3: malformed JSON (Expecting value at column")
    assert problem.fix == "Each line must be one JSON object."
    assert [row.row for row in rows] == [1, 4]
    assert report.notes == Counter({"blank line": 1})


def test_jsonl_deep_nesting_is_a_bad_row(write):
    _, (problem,), _ = load(write("a.jsonl", b'{"input": "a", "output": "b"}\n' + b"[" * 200_000 + b"\n"))
    assert (problem.row, problem.reason) == (2, "malformed JSON")


def test_jsonl_row_that_is_not_an_object_is_a_bad_row(write):
    _, (problem,), _ = load(write("a.jsonl", '{"input": "a", "output": "b"}\n[1, 2]\n'))
    assert (problem.row, problem.reason, problem.detail) == (2, "not an object", "found list")


@pytest.mark.parametrize(("name", "bad"), [("a.jsonl", b'{"input": "\xff", "output": "b"}\n'), ("a.csv", b"x\xff,b\n")])
def test_invalid_utf8_makes_only_its_own_row_bad(write, name, bad):
    good = b'{"input": "a", "output": "b"}\n' if name == "a.jsonl" else b"a,b\n"
    head = b"" if name == "a.jsonl" else b"input,output\n"
    rows, (problem,), _ = load(write(name, head + good + bad + good))
    assert problem.reason == "invalid UTF-8"
    assert problem.row == (2 if name == "a.jsonl" else 3)
    assert problem.detail.startswith("byte 0xff at column")
    assert problem.fix == "Save the file as UTF-8."
    assert len(rows) == 2


def test_json_invalid_utf8_names_the_line(write):
    with pytest.raises(DataError, match=r"line 2: invalid UTF-8"):
        load(write("a.json", b'[{"input": "a", "output": "b"},\n{"input": "\xff"}]'))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_is_removed(write, name):
    content = SAME[name] if isinstance(SAME[name], str) else '{"input": "2+2?", "output": "4"}\n'
    rows, problems, report = load(write(name, b"\xef\xbb\xbf" + content.encode()))
    assert contents(rows)[0] == ("2+2?", "4")
    assert not problems
    assert report.notes["byte order mark removed"] == 1


def test_csv_rows_are_numbered_by_the_line_they_start_on(write):
    rows, (problem,), _ = load(write("a.csv", 'input,output\n"two\nlines",x\nc,d\ne,f,g\n"h, i",j\n'))
    assert [row.row for row in rows] == [2, 4, 6]
    assert (problem.row, problem.reason, problem.detail) == (5, "wrong number of cells", "3 cells, the header has 2")


def test_errors_of_a_spreadsheet_are_counted_by_column(write):
    rows, problems, report = load(write("a.csv", "input,output\na,#N/A\nb,#N/A\n#REF!,c\nwhat is #N/A?,d\n"))
    assert len(rows) == 4  # they may be meant
    assert not problems
    assert report.notes == {"#N/A in 'output'": 2, "#REF! in 'input'": 1}


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.csv", 'input;output\n"a;b, c";"1,5"\n', "separated by ';'"),
        ("a.csv", 'input\toutput\n"a;b, c"\t"1,5"\n', "separated by '\\t'"),
        ("a.tsv", 'input;output\n"a;b, c";"1,5"\n', "separated by ';'"),
        ("a.csv", 'sep=;\r\ninput;output\r\n"a;b, c";"1,5"\r\n', "line with the separator"),
        ("a.csv", 'sep=,\ninput,output\n"a;b, c","1,5"\n', "line with the separator"),
    ],
)
def test_csv_is_read_with_the_delimiter_of_its_header(write, name, content, note):
    rows, problems, report = load(write(name, content))
    assert contents(rows) == [("a;b, c", "1,5")]
    assert rows[0].row == (3 if content.startswith("sep=") else 2)
    assert not problems
    assert report.notes[note] == 1


def test_csv_delimiter_in_a_cell_of_the_header_is_part_of_a_name(write):
    rows, _, report = load(write("a.csv", 'input,output,"x;y;z;w"\na,b,c\n'))
    assert contents(rows) == [("a", "b")]
    assert not report.notes


def test_csv_reads_long_cells(write):
    rows, _, _ = load(write("a.csv", "input,output\n" + "a" * 200_000 + ",b\n"))
    assert len(rows[0].messages[0]["content"]) == 200_000


WHOLE = {
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b" \n\n", "the file is empty"),
    "bom.jsonl": (b"\xef\xbb\xbf", "the file is empty"),
    "header.csv": (b"input,output\n", "it contains no rows"),
    "none.json": (b"[]", "it contains no rows"),
    "parquet.jsonl": (b"PAR1....", "the file is Parquet, not jsonl. Rename or convert it."),
    "zip.csv": (b"PK\x03\x04....", "the file is a zip archive"),
    "gzip.jsonl": (b"\x1f\x8b....", "the file is gzip"),
    "utf16.jsonl": ('{"input": "a"}'.encode("utf-16"), "the file is UTF-16 text"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the data itself"),
    "not.parquet": (b"input,output\n", "the file is not Parquet"),
    "array.jsonl": (
        b'[{"input": "a"},\n{"input": "b"}]',
        "one JSON array, not one JSON object per line. Rename it to .json",
    ),
    "lines.json": (b'{"input": "a"}\n{"input": "b"}\n', "line 2, column 1: malformed JSON, Extra data. If each line"),
    "broken.json": (b'[{"input": "a",\n"output"}]', "line 2, column 9: malformed JSON"),
    "object.json": (b'{"a": 1}', "expected a JSON array of rows, or an object with one list in it; found 'a'"),
    "number.json": (b"3", "expected a JSON array of rows, found int"),
    "json.csv": (b'{"input": "a", "output": "b"}\n', "looks like JSON, not CSV. Rename it to .jsonl"),
    "twice.csv": (b"input,input\na,b\n", "the header names 'input' twice"),
    "quote.csv": (b'input,output\n"a"b,c\n', "line 2: malformed CSV"),
    "a.docx": (b"whatever", "files with the suffix '.docx' can't be read; expected one of .jsonl"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_read_file_rejects_unreadable_files(write, name):
    content, message = WHOLE[name]
    path = write(name, content)
    with pytest.raises(DataError) as error:
        load(path)
    assert path in str(error.value)
    assert message in str(error.value)


def test_missing_file_of_a_relative_path_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match=rf"The folder '{tmp_path}' contains no data files\."):
        load("support.jsonl")
    with pytest.raises(DataNotFoundError, match=rf"The folder '{tmp_path / 'data'}' doesn't exist\."):
        load("data/support.jsonl")


def test_link_to_a_missing_file_is_named_as_one(tmp_path):
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "moved.jsonl")
    with pytest.raises(DataNotFoundError, match=r"It is a link to '.*moved\.jsonl', which doesn't exist\."):
        load(str(tmp_path / "rows.jsonl"))


def test_missing_file_suggests_the_nearest_name(write, tmp_path):
    write("support.jsonl", ROWS)
    with pytest.raises(
        DataNotFoundError, match=r"train='.*suport\.jsonl': there is no such file. Did you mean '.*support\.jsonl'\?"
    ):
        load(str(tmp_path / "suport.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"The folder '.*nowhere' doesn't exist"):
        load(str(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(DataNotFoundError, match=r"The folder '/.*' contains support\.jsonl"):
        load(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataNotFoundError, match="It is a folder: name a file in it"):
        load(str(tmp_path))


def test_hub_name_loads_the_named_split(monkeypatch):
    requested = []

    def load_dataset(name, split):
        requested.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load("someone/pairs")[0][0].id == "someone/pairs:1"
    assert load("someone/pairs:test")[2].read == 2
    assert requested == [("someone/pairs", "train"), ("someone/pairs", "test")]


def test_hub_name_that_does_not_exist_is_an_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no such thing\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataNotFoundError, match=r"isn't a file, and Hub dataset 'someone/pairs' \(split 'train'\) couldn't be"
    ):
        load("someone/pairs")


def test_as_sources_rejects_other_types():
    with pytest.raises(
        ConfigError,
        match="expected a path, a hub name, a dataset, a pandas or polars DataFrame or a list of dicts, or a list",
    ):
        as_sources(3, "train")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(ConfigError, match=r"got DatasetDict: pass one of its splits \(train, test\)"):
        as_sources(both, "train")


# ---- damaged and unusual files


def parquet(rows, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


def damaged(content, *, at, count=200):
    """File contents with some bytes overwritten."""
    start = int(len(content) * at)
    return content[:start] + b"\xff" * count + content[start + count :]


MANY = [{"input": f"what is {n} plus {n}?", "output": str(2 * n)} for n in range(5000)]


@pytest.mark.parametrize("at", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_damaged_parquet_error_names_the_file(write, at):
    path = write("bad.parquet", damaged(parquet(MANY, write_page_checksum=True), at=at))
    with pytest.raises(DataError, match=r"bad\.parquet.*Parquet that can't be read"):
        load(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_parquet_error_names_the_file(write, share):
    content = parquet(MANY)
    with pytest.raises(DataError, match=r"cut\.parquet.*can't be read"):
        load(write("cut.parquet", content[: int(len(content) * share)]))


def test_damaged_parquet_row_group_error_names_the_last_row_read(write):
    content = parquet(MANY, row_group_size=1000, write_page_checksum=True)
    with pytest.raises(DataError, match=r"bad\.parquet, after row \d,000: Parquet that can't be read"):
        load(write("bad.parquet", damaged(content, at=0.6)))


def test_parquet_rejects_empty_ambiguous_and_encrypted_files(write):
    with pytest.raises(DataError, match=r"none\.parquet: it contains no rows"):
        load(write("none.parquet", parquet([])))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["input", "input"])
    sink = pa.BufferOutputStream()
    pq.write_table(twice, sink)
    with pytest.raises(DataError, match=r"twice\.parquet: two columns are named 'input'"):
        load(write("twice.parquet", sink.getvalue().to_pybytes()))
    with pytest.raises(DataError, match=r"locked\.parquet: the file is Parquet with an encrypted footer\. Decrypt it"):
        load(write("locked.parquet", b"PARE" + b"x" * 40))


def test_parquet_unreadable_values_are_bad_rows(write):
    texts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")]
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"input": texts, "output": ["x", "y", "z"]}), sink)
    rows, (problem,), report = load(write("a.parquet", sink.getvalue().to_pybytes()))
    assert [row.row for row in rows] == [1, 3]
    assert (problem.row, problem.field, problem.reason) == (2, "input", "invalid UTF-8")
    assert (report.read, report.kept) == (3, 2)


def test_parquet_allows_unused_columns_without_a_json_form(write):
    more = {"day": datetime.datetime(2020, 1, 1), "raw": b"x", "price": decimal.Decimal("1.5")}
    rows, problems, _ = load(write("a.parquet", parquet([{**ROWS[0], **more}])))
    assert (len(rows), problems) == (1, [])


def test_parquet_drops_nested_keys_that_are_none(write):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
    assert contents(load(write("a.parquet", parquet([{"messages": turns}])))[0]) == [("a", "b")]


DIGITS = '{"input": "a", "output": "b", "id": ' + "9" * 5000 + "}"
BAD_VALUES = {
    "digits": (DIGITS, "id", "an integer of too many digits"),
    "negative digits": (DIGITS.replace("999", "-999", 1), "id", "an integer of too many digits"),
    "NaN": ('{"input": "a", "output": "b", "score": NaN}', "score", "malformed JSON"),
    "Infinity": ('{"input": "a", "output": "b", "scores": [1, -Infinity]}', "scores[1]", "malformed JSON"),
    "key twice": ('{"input": "a", "output": "b", "input": "c"}', "input", "key given more than once"),
    "nested key twice": ('{"input": "a", "output": "b", "m": {"x": 1, "x": 1}}', "m.x", "key given more than once"),
    "surrogate": ('{"input": "a \\ud83d", "output": "b"}', "input", "half of a surrogate pair"),
    "surrogate in a key": ('{"input": "a", "output": "b", "m": {"\\udc00": 1}}', "m", "half of a surrogate pair"),
    "NaN as a row": ("NaN", None, "malformed JSON"),
}
GOOD = '{"input": "a", "output": "b"}'


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_json_forbidden_values_are_bad_rows(write, name, suffix):
    bad, field, reason = BAD_VALUES[name]
    lines = [GOOD, bad, GOOD]
    path = write(f"a.{suffix}", "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    rows, (problem,), _ = load(path)
    assert len(rows) == 2
    assert (problem.source, problem.row, problem.field, problem.reason) == (path, 2, field, reason)
    _, problems, report = load(path, on_bad_row="skip")
    assert (problems, report.read, report.kept, dict(report.skipped)) == ([], 3, 2, {reason: 1})


def test_json_surrogate_pairs_are_characters(write):
    rows, problems, _ = load(write("a.jsonl", '{"input": "\\ud83d\\ude00", "output": "b"}\n'))
    assert (rows[0].messages[0]["content"], problems) == ("\U0001f600", [])


def test_json_deep_nesting_names_the_file(write):
    with pytest.raises(DataError, match=r"deep\.json: malformed JSON, nested too deep"):
        load(write("deep.json", "[" * 200_000))


BLANK = {
    "lines.jsonl": " \n" * 40 + GOOD + "\n",
    "far.jsonl": "\n" * 200_000 + GOOD + "\n",
    "bom.jsonl": "\ufeff" + "\n \n" * 30 + GOOD + "\n",
    "blank.json": " \n" * 40 + f"[{GOOD}]",
    "bom.json": "\ufeff" + "\n" * 40 + f"[{GOOD}]",
    "blank.csv": "\n" * 40 + "input,output\na,b\n",
    "bom.csv": "\ufeff" + "\n" * 40 + "input,output\na,b\n",
    "cells.csv": ",,\n" * 4 + "input,output\na,b\n",
    "spaces.tsv": "   \n" * 40 + "input\toutput\na\tb\n",
}


@pytest.mark.parametrize("name", BLANK)
def test_read_file_skips_leading_blank_lines(write, name):
    rows, problems, report = load(write(name, BLANK[name]))
    assert (contents(rows), problems) == ([("a", "b")], [])
    assert report.notes["byte order mark removed"] == name.startswith("bom")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_read_file_accepts_all_line_endings(write, name, end):
    lines = [GOOD, "", GOOD, "{"] if name == "a.jsonl" else ["input,output", "", "a,b", "a,b", "c"]
    rows, (problem,), report = load(write(name, end.join(lines) + end))
    assert [row.row for row in rows] == ([1, 3] if name == "a.jsonl" else [3, 4])
    assert (problem.row, report.notes["blank line"]) == (4 if name == "a.jsonl" else 5, 1)


def test_concatenated_files_may_contain_byte_order_marks(write):
    rows, problems, report = load(write("a.jsonl", f"\ufeff{GOOD}\n\ufeff{GOOD}\n"))
    assert (len(rows), problems, report.notes["byte order mark removed"]) == (2, [], 2)


def test_csv_nul_byte_makes_only_its_own_row_bad(write):
    rows, (problem,), _ = load(write("a.csv", "input,output\na,b\nc,d\0\ne,f\n"))
    assert [row.row for row in rows] == [2, 4]
    assert (problem.row, problem.field, problem.reason) == (3, "output", "NUL byte")


def test_csv_unclosed_quote_names_its_lines(write):
    with pytest.raises(DataError, match=r"a\.csv, lines 3 to 5: malformed CSV.*A quote is opened and never closed"):
        load(write("a.csv", 'input,output\na,b\n"c,d\ne,f\ng,h\n'))


UNUSUAL = {
    "utf16.jsonl": (GOOD.encode("utf-16-le"), "the file is UTF-16 text, not jsonl. Save it as UTF-8."),
    "utf16.csv": ("input,output\na,b\n".encode("utf-16-be"), "the file is UTF-16 text, not csv. Save it as UTF-8."),
    "utf32.json": (f"[{GOOD}]".encode("utf-32"), "the file is UTF-16 text"),
    "zeros.jsonl": (b"\0" * 500, "the file is binary, or damaged"),
    "arrow.jsonl": (b"ARROW1\0\0", "the file is Arrow, not jsonl"),
    "page.json": (b"<!doctype html><html>", "the file is a web page"),
    "header.csv": (b"inp\xfft,output\na,b\n", "line 1: the header contains byte 0xff, which isn't UTF-8"),
    "nul.csv": (b"input,output" + b" " * 100 + b"\0\na,b\n", "line 1: the header contains a NUL byte"),
    "a.jsonl.gz": (b"\x1f\x8b", "compressed files can't be read. Unpack it first: gunzip "),
    "a.csv.zip": (b"PK", "compressed files can't be read. Unpack it first: unzip "),
    "a.arrow": (b"ARROW1", "Arrow files can't be read. Pass datasets.Dataset.from_file("),
    "a.feather": (b"ARROW1", "Arrow files can't be read. Pass pandas.read_feather("),
    "a.xlsx": (b"PK", "spreadsheets can't be read. Save it as CSV, or pass pandas.read_excel(...)."),
    "pretty.jsonl": (b'{\n  "input": "a",\n  "output": "b"\n}\n', "line 1: the objects extend over several lines"),
    "list.jsonl": (b'\n[\n{"input": "a"}\n]', "one JSON array, not one JSON object per line"),
    "empty.json": (b"{}", "found an empty object"),
    "nan.json": (b"NaN", "found NaN, which isn't JSON"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_read_file_error_names_the_remedy(write, name):
    content, message = UNUSUAL[name]
    path = write(name, content)
    with pytest.raises(DataError) as error:
        load(path)
    assert path in str(error.value)
    assert message in str(error.value)


def test_read_file_error_names_missing_permission(write, monkeypatch):
    path = write("a.jsonl", ROWS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: the file can't be read: Permission denied\. Check that"):
        load(path)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_read_file_rejects_a_file_that_changes(write, suffix):
    content = GOOD + "\n" if suffix == "jsonl" else "input,output\na,b\n"
    path = write(f"a.{suffix}", content)
    rows = read_file(Path(path), path, Counter())
    next(rows)
    Path(path).write_text(content * 2)
    with pytest.raises(DataError, match=r"the file changed while it was read"):
        list(rows)


def test_read_file_rejects_a_file_that_vanishes(write):
    path = write("a.jsonl", ROWS)
    rows = read_file(Path(path), path, Counter())
    next(rows)
    Path(path).unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: the file can't be read: No such file"):
        list(rows)


def test_read_file_rejects_a_folder_named_like_a_file(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataNotFoundError, match="It is a folder: name a file in it"):
        load(str(tmp_path / "a.jsonl"))
