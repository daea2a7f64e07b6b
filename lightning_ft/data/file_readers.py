"""Readers of CSV, JSONL, JSON and Parquet files."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_ft.data.raw_rows import RawRow, bad_row, numbered
from lightning_ft.data.values import Refused, too_many_digits
from lightning_ft.errors import DataError

_SEPARATOR_LINE = re.compile(r"sep=([;,|\t])")
"""First line with which Excel is told the delimiter."""
_SPREADSHEET_ERRORS = frozenset(("#N/A", "#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!"))
"""What a spreadsheet writes for a formula without a value."""


def read_csv(path: Path, name: str, delimiter: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Rows of a CSV file with a header; each is numbered by the line on which it starts.

    Args:
        path: The file.
        name: Name of the file in errors.
        delimiter: Character between cells, unless the header has only one of another.
        notes: Counter of blank lines, errors of a spreadsheet, and of what differs from a file with this delimiter.

    Raises:
        DataError: If the header can't be used, or cells can't be told apart.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default limit is 128 KiB per cell
    expected, delimiter = delimiter, _find_delimiter(path, delimiter)
    if delimiter != expected:
        notes[f"separated by {delimiter!r}"] += 1
    # Bytes that aren't UTF-8 are decoded as surrogates, so that they make only their own row bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        start = 1
        try:
            for cells in reader:
                number, start = start, reader.line_num + 1  # line_num is the last line of a row, which may span several
                text = "".join(cells)
                if not text.strip() and (len(cells) < 2 or not header):  # Excel may write ",,," above a header
                    notes["blank line"] += 1
                elif not header and _SEPARATOR_LINE.fullmatch(delimiter.join(cells)):
                    notes["line with the separator"] += 1
                elif not header:
                    header = cells
                    _check_header(header, name, number)
                elif (bad := _surrogate(text)) is not None:
                    yield undecodable(name, number, *bad)
                elif len(cells) != len(header):
                    detail = f"{len(cells)} cells, the header has {len(header)}"
                    fix = f"Quote cells that contain {delimiter!r} or line breaks."
                    yield bad_row(name, number, "wrong number of cells", detail, fix)
                elif "\0" in text:
                    field = next(column for column, cell in zip(header, cells, strict=True) if "\0" in cell)
                    fix = "The file is damaged: remove the byte, or write the file again."
                    yield bad_row(name, number, "NUL byte", "", fix, field)
                else:
                    row = dict(zip(header, cells, strict=True))
                    if "#" in text:
                        errors = (item for item in row.items() if item[1] in _SPREADSHEET_ERRORS)
                        notes.update(f"{cell} in {column!r}" for column, cell in errors)
                    yield RawRow(name, number, row)
        except csv.Error as error:
            where = f"line {start}" if start >= reader.line_num else f"lines {start} to {reader.line_num}"
            hint = " A quote is opened and never closed." if "unexpected end" in str(error) else ""
            raise DataError(f"{name}, {where}: malformed CSV, {error}.{hint}") from error


def _find_delimiter(path: Path, expected: str) -> str:
    """The delimiter that the header is written with: Excel writes semicolons in many languages, whatever the suffix.

    It is the one that a first line such as ``sep=;`` names. A header of one column isn't one if another delimiter
    makes several of it.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = next((line for line in file if line.strip(" \t\r\n,;|")), "")
    if (named := _SEPARATOR_LINE.fullmatch(header.rstrip("\r\n"))) is not None:
        return named[1]
    columns = {d: len(next(csv.reader([header], delimiter=d), [])) for d in (expected, ";", "\t", "|", ",")}
    return expected if columns[expected] > 1 else max(columns, key=lambda delimiter: columns[delimiter])


def _check_header(header: list[str], name: str, number: int) -> None:
    text = "".join(header)
    if (bad := _surrogate(text)) is not None or "\0" in text:
        content = "a NUL byte" if bad is None else f"byte 0x{bad[0]:02x}, which isn't UTF-8"
        raise DataError(f"{name}, line {number}: the header contains {content}. Save the file as UTF-8.")
    if header[0].lstrip().startswith(("{", "[")):
        raise DataError(f"{name}: the file looks like JSON, not CSV. Rename it to .jsonl (or .json for one array).")
    repeated = [column for column, count in Counter(header).items() if count > 1]
    if repeated:
        raise DataError(f"{name}: the header names {repeated[0]!r} twice. Rename one of the columns.")


def _surrogate(text: str) -> tuple[int, int] | None:
    """The first byte that isn't UTF-8, and its column, counted from 1."""
    if text.isascii():
        return None
    return next(((ord(c) - 0xDC00, i) for i, c in enumerate(text, 1) if 0xDC80 <= ord(c) <= 0xDCFF), None)


BOM = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

_MAX_DIGITS = 4000
_OPENING = re.compile(rb"[\[{]\s*")  # first line of an array, or of an object over several lines


def _integer(digits: str) -> int | Refused:
    return int(digits) if len(digits) <= _MAX_DIGITS else too_many_digits(f"{len(digits):,}")


def _constant(name: str) -> Refused:
    return Refused("malformed JSON", f"{name}, which isn't JSON", "Write null or a number.")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        value[name] = Refused("key given more than once", f"{count} times in one object", "Keep one of them.")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)


def read_jsonl(path: Path, name: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Rows of a JSONL file: one JSON value per line, where lines end in LF, CR LF or CR.

    Args:
        path: The file.
        name: Name of the file in errors.
        notes: Counter of blank lines and byte order marks.

    Raises:
        DataError: If the file is an array, or its objects extend over several lines.
    """
    first = True
    for number, line in enumerate(_lines(path), start=1):
        if line.startswith(BOM):  # also in the middle, where files were concatenated
            line = line.removeprefix(BOM)
            notes["byte order mark removed"] += 1
        if not line.strip():
            notes["blank line"] += 1
            continue
        try:
            yield RawRow(name, number, _DECODER.decode(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            yield undecodable(name, number, error.object[error.start], error.start + 1)
        except RecursionError:
            yield bad_row(name, number, "malformed JSON", "nested too deep", "Each line must be one JSON object.")
        except json.JSONDecodeError as error:
            if first and line.lstrip().startswith(b"["):
                raise DataError(f"{name}: one JSON array, not one JSON object per line. Rename it to .json.") from error
            if first and _OPENING.fullmatch(line):
                raise DataError(
                    f"{name}, line {number}: the objects extend over several lines. Write each on a line of its own, "
                    "or rename the file to .json if it is one JSON array."
                ) from error
            detail = f"{error.msg} at column {error.colno}"
            yield bad_row(name, number, "malformed JSON", detail, "Each line must be one JSON object.")
        first = False


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            yield from line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def undecodable(name: str, number: int, byte: int, column: int) -> RawRow:
    """A bad row with a byte that isn't UTF-8, in a column counted from 1."""
    return bad_row(name, number, "invalid UTF-8", f"byte 0x{byte:02x} at column {column}", "Save the file as UTF-8.")


def read_json(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a JSON file: an array, or an object with one array in it.

    Args:
        path: The file.
        name: Name of the file in errors.

    Raises:
        DataError: If the file contains anything else.
    """
    try:
        value = _DECODER.decode(path.read_bytes().removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: invalid UTF-8. Save the file as UTF-8.") from error
    except RecursionError as error:
        raise DataError(f"{name}: malformed JSON, nested too deep. Expected an array of rows.") from error
    except json.JSONDecodeError as error:
        hint = " If each line is an object of its own, rename the file to .jsonl." if error.msg == "Extra data" else ""
        raise DataError(
            f"{name}, line {error.lineno}, column {error.colno}: malformed JSON, {error.msg}.{hint}"
        ) from error
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            keys = ", ".join(map(repr, list(value)[:5])) or "an empty object"
            raise DataError(f"{name}: expected a JSON array of rows, or an object with one list in it; found {keys}.")
        value = value[lists[0]]
    if not isinstance(value, list):
        content = value.detail if isinstance(value, Refused) else type(value).__name__
        raise DataError(f"{name}: expected a JSON array of rows, found {content}.")
    yield from numbered(value, name)


_BATCH_SIZE = 1000  # rows that are read at once
_DAMAGED = "The file is damaged, or uses a feature that this pyarrow can't read. Write it again."


def read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a Parquet file, numbered from 1.

    Args:
        path: The file.
        name: Name of the file in errors.

    Raises:
        DataError: If the file is damaged, encrypted or compressed with a codec that isn't installed, or two columns
            have the same name. It says how many rows were read before.
    """
    read = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            repeated = [column for column, count in Counter(columns).items() if count > 1]
            if repeated:
                raise DataError(f"{name}: two columns are named {repeated[0]!r}. Rename one of them.")
            for batch in file.iter_batches(_BATCH_SIZE):
                for row in _rows(batch, name, read):
                    read += 1
                    yield row
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        after = f", after row {read:,}" if read else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{name}{after}: Parquet that can't be read ({reason}). {_DAMAGED}") from error


def _rows(batch: pa.RecordBatch, name: str, before: int) -> Iterator[RawRow]:
    """Rows of a batch. Where it can't be converted as a whole, rows are read one by one: only some of them are bad."""
    batch.validate()
    try:
        values = batch.to_pylist()
    except Exception:  # bytes that aren't UTF-8, dates out of range, unknown time zones, ...
        for i in range(batch.num_rows):
            yield _row(batch, i, name, before + i + 1)
        return
    for number, value in enumerate(values, start=before + 1):
        yield RawRow(name, number, value)


def _row(batch: pa.RecordBatch, index: int, name: str, number: int) -> RawRow:
    row: dict[str, object] = {}
    for field, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[field] = column[index].as_py()
        except UnicodeDecodeError as error:
            detail = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
            return bad_row(name, number, "invalid UTF-8", detail, "Write the text again as UTF-8.", field)
        except Exception as error:
            fix = "Remove the column, or store it as text."
            return bad_row(name, number, "value that can't be read", type(error).__name__, fix, field)
    return RawRow(name, number, row)
