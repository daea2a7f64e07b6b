"""Map source rows to messages, or to rows of a known format, with the user's function (`format=`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from lightning_ft.data.raw_rows import RawRow, bad_row, check_values
from lightning_ft.errors import ConfigError
from lightning_ft.importing import import_object, is_file_path, is_import_path

RowFunction: TypeAlias = Callable[[dict[str, Any]], dict[str, Any] | list[Any]]
"""Maps a source row to a list of messages, or to a row of a known format."""

_KEPT = ("id", "cluster", "prompt_context", "structured_output")  # fields about a row, not part of its messages
_FIX = "Fix the function or the row."


def check_row_function(function: object) -> None:
    """Check what was passed as `format=`, without importing or calling it.

    Raises:
        ConfigError: If it is neither a callable nor an import path.
    """
    if function is None or callable(function):
        return
    if not isinstance(function, str) or not (is_file_path(function) or is_import_path(function)):
        raise ConfigError(
            f"format={function!r}: expected a function that maps a row to its messages, or the import path of one: "
            "package.module.function or path/to/file.py:function."
        )


def load_row_function(function: str | RowFunction) -> RowFunction:
    """The function that `format=` names.

    Raises:
        ConfigError: If the import path leads to nothing that can be called.

    Example:
        >>> load_row_function("operator.itemgetter").__name__
        'itemgetter'
    """
    loaded = import_object(function, argument="format", error=ConfigError) if isinstance(function, str) else function
    if not callable(loaded):
        raise ConfigError(f"format={function!r} names an object of type {type(loaded).__name__}, not a function.")
    return loaded


def map_rows(
    rows: Iterable[RawRow], function: RowFunction, columns: Mapping[str, str] | None = None
) -> Iterator[RawRow]:
    """Call the function once per row; a row for which it fails gets a problem instead of a value.

    Messages become the row ``{"messages": [...]}``, which keeps the `id`, the `cluster`, the `prompt_context` and the
    `structured_output` of the source row. A dict is the whole row: nothing of the source row is added to it.

    Args:
        rows: The source rows. Those that are already bad, or aren't objects, pass through.
        function: The user's function.
        columns: Field names of the format to those in the data.

    Example:
        >>> def to_messages(row):
        ...     return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
        >>> rows = [RawRow("train", 1, {"q": "2+2?", "a": "4"}), RawRow("train", 2, {"q": "3+3?"})]
        >>> good, bad = map_rows(rows, to_messages)
        >>> good.value["messages"][1]["content"], str(bad.problem)
        ('4', "train, row 2: format= raised KeyError ('a'). Fix the function or the row.")
    """
    names = {field: (columns or {}).get(field, field) for field in ("messages", *_KEPT)}
    mapped = (_map_row(raw, function, names) for raw in rows)
    return check_values(mapped, filled=False)


def _map_row(raw: RawRow, function: RowFunction, names: Mapping[str, str]) -> RawRow:
    if raw.problem is not None or not isinstance(raw.value, Mapping):
        return raw
    row = dict(raw.value)
    kept = {names[field]: row[names[field]] for field in _KEPT if names[field] in row}
    try:
        result: object = function(row)
    except Exception as error:  # whatever the user's code raises
        detail = (str(error).strip().splitlines() or [""])[0][:80]
        return bad_row(raw.source, raw.number, f"format= raised {type(error).__name__}", detail, _FIX)
    if isinstance(result, Mapping):
        return RawRow(raw.source, raw.number, dict(result))
    if isinstance(result, (list, tuple)):
        return RawRow(raw.source, raw.number, {**kept, names["messages"]: list(result)})
    fix = "Return a list of messages, or a dict in a known row format."
    return bad_row(raw.source, raw.number, "format= returned no row", f"found {type(result).__name__}", fix)
