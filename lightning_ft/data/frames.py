"""Rows of pandas and polars frames, neither of which is imported: whoever passes a frame has done so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from lightning_ft.errors import DataError

_LIBRARIES = ("pandas", "polars")


class DataFrame(Protocol):
    """A `pandas.DataFrame` or a `polars.DataFrame`."""

    @property
    def columns(self) -> Any:
        """Names of its columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""


def library_of(source: Any, what: str = "DataFrame") -> str | None:
    """Which library a frame is of, None if it is no frame.

    Args:
        source: Anything.
        what: Name of the class.

    Example:
        >>> import pandas
        >>> library_of(pandas.DataFrame({"input": ["2+2?"]})), library_of([{"input": "2+2?"}])
        ('pandas', None)
    """
    for ancestor in type(source).__mro__:
        library = ancestor.__module__.partition(".")[0]
        if ancestor.__name__ == what and library in _LIBRARIES:
            return library
    return None


def frame_rows(frame: Any, name: str) -> Iterator[dict[str, Any]]:
    """Rows of a frame; missing values (NaN, NaT, `pandas.NA`) are None.

    Args:
        frame: A pandas or polars frame. The index of a pandas frame is left out.
        name: What errors call it.

    Raises:
        DataError: If two columns have one name, or names have several levels.

    Example:
        >>> import pandas
        >>> list(frame_rows(pandas.DataFrame({"input": ["2+2?"], "score": [float("nan")]}), "train"))
        [{'input': '2+2?', 'score': None}]
    """
    if library_of(frame) == "polars":
        columns, values = list(frame.columns), frame.iter_rows()
    else:
        if getattr(frame.columns, "nlevels", 1) > 1:
            raise DataError(
                f"{name}: the frame's columns have {frame.columns.nlevels} levels. Name each by one string."
            )
        columns = [str(column) for column in frame.columns]
        values = zip(*(frame.iloc[:, i].tolist() for i in range(len(columns))), strict=True)
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(f"{name}: two columns are named {repeated[0]!r}. Rename one of them.")
    for row in values:
        yield {column: None if _is_missing(value) else value for column, value in zip(columns, row, strict=True)}


def _is_missing(value: Any) -> bool:
    return (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
