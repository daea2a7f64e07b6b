"""Rows from JSONL, JSON, CSV and Parquet files, each with the line it stands on."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from lightning_ft.data.problems import Problem
from lightning_ft.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of the files that are read."""

_BOM = b"\xef\xbb\xbf"
_OTHER_FORMATS = {
    b"PAR1": "Parquet",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x1f\x8b": "gzip",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"version https://git-lfs": "a Git LFS pointer, not the data itself",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


@dataclass(frozen=True)
class RawRow:
    """A row as it was found.

    Args:
        source: Where it comes from.
        number: The line it starts on in a JSONL or CSV file, else its number, from 1.
        value: What stands there; a mapping if all is well.
        problem: Why it couldn't be read.
    """

    source: str
    number: int
    value: Any
    problem: Problem | None = None


def read_file(path: Path, name: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Read a file row by row; the ending of its name says what it is.

    Args:
        path: The file.
        name: What errors call it.
        notes: Counts things worth knowing that are no problem.

    Raises:
        DataError: If the file as a whole can't be read: it is empty, of another format, or broken beyond telling rows
            apart.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{name}: files ending in {suffix!r} aren't read; expected one of {', '.join(SUFFIXES)}.")
    with path.open("rb") as file:
        head = file.read(32)
    if not head.removeprefix(_BOM).strip():
        raise DataError(f"{name}: the file is empty.")
    kind = next((kind for magic, kind in _OTHER_FORMATS.items() if head.startswith(magic)), None)
    if suffix == ".parquet":
        if kind != "Parquet":
            raise DataError(f"{name}: the file is {kind or 'not Parquet'}. Rename or convert it.")
        yield from numbered(datasets.Dataset.from_parquet(str(path), keep_in_memory=True), name)
        return
    if kind is not None:
        raise DataError(f"{name}: the file is {kind}, not {suffix[1:]}. Rename or convert it.")
    if head.startswith(_BOM):
        notes["byte order mark removed"] += 1
    if suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path, name, notes)
    elif suffix == ".json":
        yield from _read_json(path, name)
    else:
        yield from _read_csv(path, name, "\t" if suffix == ".tsv" else ",", notes)


def numbered(rows: Iterable[Any], name: str) -> Iterator[RawRow]:
    """Rows with their numbers, from 1."""
    for number, row in enumerate(rows, start=1):
        yield RawRow(name, number, row)


def _undecodable(name: str, number: int, byte: int, column: int) -> RawRow:
    detail = f"byte 0x{byte:02x} at column {column}"
    return RawRow(name, number, None, Problem(name, number, None, "invalid UTF-8", detail, "Save the file as UTF-8."))


def _read_jsonl(path: Path, name: str, notes: Counter[str]) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                notes["blank line"] += 1
                continue
            try:
                yield RawRow(name, number, json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield _undecodable(name, number, error.object[error.start], error.start + 1)
            except (json.JSONDecodeError, RecursionError) as error:
                if number == 1 and line.lstrip().startswith(b"["):
                    raise DataError(
                        f"{name}: one JSON array, not one JSON object a line. Rename it to .json."
                    ) from error
                if isinstance(error, json.JSONDecodeError):
                    detail = f"{error.msg} at column {error.colno}"
                else:
                    detail = "nested too deep"
                fix = "Each line must be one JSON object."
                yield RawRow(name, number, None, Problem(name, number, None, "malformed JSON", detail, fix))


def _read_json(path: Path, name: str) -> Iterator[RawRow]:
    try:
        value = json.loads(path.read_bytes().removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: invalid UTF-8. Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        hint = " If each line is an object of its own, rename the file to .jsonl." if error.msg == "Extra data" else ""
        place = f"{name}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{place}: malformed JSON, {error.msg}.{hint}") from error
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            found = ", ".join(map(repr, list(value)[:5]))
            raise DataError(f"{name}: expected a JSON array of rows, or an object with one list in it; found {found}.")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a JSON array of rows, found {type(value).__name__}.")
    yield from numbered(value, name)


def _read_csv(path: Path, name: str, delimiter: str, notes: Counter[str]) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    # What isn't UTF-8 comes through as surrogates, so that one bad byte spoils its own row only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader)
            _check_header(header, name, delimiter)
            start = reader.line_num + 1
            for cells in reader:
                number, start = start, reader.line_num + 1  # line_num is where a row ends; it may span several lines
                if not cells:
                    notes["blank line"] += 1
                elif (bad := _surrogate("".join(cells))) is not None:
                    yield _undecodable(name, number, *bad)
                elif len(cells) != len(header):
                    detail = f"{len(cells)} cells, the header has {len(header)}"
                    fix = f"Quote cells that hold {delimiter!r} or line breaks."
                    problem = Problem(name, number, None, "wrong number of cells", detail, fix)
                    yield RawRow(name, number, None, problem)
                else:
                    yield RawRow(name, number, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{name}, line {reader.line_num}: malformed CSV, {error}.") from error


def _check_header(header: list[str], name: str, delimiter: str) -> None:
    if header and header[0].lstrip().startswith(("{", "[")):
        raise DataError(f"{name}: the file looks like JSON, not CSV. Rename it to .jsonl (or .json for one array).")
    if len(header) == 1:
        other = next((d for d in (";", "\t", "|", ",") if d != delimiter and d in header[0]), None)
        if other is not None:
            raise DataError(
                f"{name}: the header has one column, {header[0]!r}; the file seems to be separated by {other!r}, "
                f"expected {delimiter!r}. Save it as CSV with commas, or as .tsv with tabs."
            )
    repeated = [column for column, count in Counter(header).items() if count > 1]
    if repeated:
        raise DataError(f"{name}: the header names {repeated[0]!r} twice. Rename one of the columns.")


def _surrogate(text: str) -> tuple[int, int] | None:
    """The first byte that isn't UTF-8 and its column, from 1."""
    return next(((ord(c) - 0xDC00, i) for i, c in enumerate(text, 1) if 0xDC80 <= ord(c) <= 0xDCFF), None)
