"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lightning_ft.data.json_rows import undecodable
from lightning_ft.data.raw_rows import RawRow, bad_row
from lightning_ft.errors import DataError


def read_csv(path: Path, name: str, delimiter: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Rows after a header; each has the number of the line it starts on.

    Args:
        path: The file.
        name: What errors call it.
        delimiter: What separates its cells.
        notes: Counts blank lines.

    Raises:
        DataError: If the header is of no use, or cells can't be told apart.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    # What isn't UTF-8 comes through as surrogates, so that one bad byte spoils its own row only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        start = 1
        try:
            for cells in reader:
                number, start = start, reader.line_num + 1  # line_num is where a row ends; it may span several lines
                text = "".join(cells)
                if not text.strip() and (len(cells) < 2 or not header):  # Excel writes ",,," above a header
                    notes["blank line"] += 1
                elif not header:
                    header = cells
                    _check_header(header, name, number, delimiter)
                elif (bad := _surrogate(text)) is not None:
                    yield undecodable(name, number, *bad)
                elif len(cells) != len(header):
                    detail = f"{len(cells)} cells, the header has {len(header)}"
                    fix = f"Quote cells that hold {delimiter!r} or line breaks."
                    yield bad_row(name, number, "wrong number of cells", detail, fix)
                elif "\0" in text:
                    field = next(column for column, cell in zip(header, cells, strict=True) if "\0" in cell)
                    fix = "Remove it, or write the file again: it is damaged."
                    yield bad_row(name, number, "NUL byte", "", fix, field)
                else:
                    yield RawRow(name, number, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            where = f"line {start}" if start >= reader.line_num else f"lines {start} to {reader.line_num}"
            opened = " A quote is opened and never closed." if "unexpected end" in str(error) else ""
            raise DataError(f"{name}, {where}: malformed CSV, {error}.{opened}") from error


def _check_header(header: list[str], name: str, number: int, delimiter: str) -> None:
    text = "".join(header)
    if (bad := _surrogate(text)) is not None or "\0" in text:
        found = "a NUL byte" if bad is None else f"byte 0x{bad[0]:02x}, which isn't UTF-8"
        raise DataError(f"{name}, line {number}: the header contains {found}. Save the file as UTF-8.")
    if header[0].lstrip().startswith(("{", "[")):
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
    if text.isascii():
        return None
    return next(((ord(c) - 0xDC00, i) for i, c in enumerate(text, 1) if 0xDC80 <= ord(c) <= 0xDCFF), None)
