"""Rows of JSONL and JSON files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_ft.data.raw_rows import RawRow, bad_row, numbered
from lightning_ft.data.values import Refused, too_many_digits
from lightning_ft.errors import DataError

BOM = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""

_MOST_DIGITS = 4000
_NO_ROW = re.compile(rb"[\[{]\s*")  # an array, or an object over several lines


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= _MOST_DIGITS else too_many_digits(f"{len(digits):,}")


def _constant(name: str) -> Refused:
    return Refused("malformed JSON", f"{name}, which JSON doesn't have", "Write null or a number.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        found[name] = Refused("key given more than once", f"{count} times in one object", "Keep one of them.")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)


def read_jsonl(path: Path, name: str, notes: Counter[str]) -> Iterator[RawRow]:
    """One JSON value a line; a line ends by LF, CR LF or CR.

    Args:
        path: The file.
        name: What errors call it.
        notes: Counts blank lines and byte order marks.

    Raises:
        DataError: If it isn't one value a line.
    """
    first = True
    for number, line in enumerate(_lines(path), start=1):
        if line.startswith(BOM):  # also within: files were put together
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
                raise DataError(f"{name}: one JSON array, not one JSON object a line. Rename it to .json.") from error
            if first and _NO_ROW.fullmatch(line):
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
    """A row with a byte that isn't UTF-8, and the column of that byte, from 1."""
    return bad_row(name, number, "invalid UTF-8", f"byte 0x{byte:02x} at column {column}", "Save the file as UTF-8.")


def read_json(path: Path, name: str) -> Iterator[RawRow]:
    """An array of rows, or an object that has one.

    Args:
        path: The file.
        name: What errors call it.

    Raises:
        DataError: If the file is anything else.
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
            found = ", ".join(map(repr, list(value)[:5])) or "an empty object"
            raise DataError(f"{name}: expected a JSON array of rows, or an object with one list in it; found {found}.")
        value = value[lists[0]]
    if not isinstance(value, list):
        found = value.detail if isinstance(value, Refused) else type(value).__name__
        raise DataError(f"{name}: expected a JSON array of rows, found {found}.")
    yield from numbered(value, name)
