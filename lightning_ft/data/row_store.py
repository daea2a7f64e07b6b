"""Checked rows on disk: each is a few hundred bytes in memory-mapped Arrow, and becomes an object when it is read.

As Python objects, rows take about 1 KB each in the memory of every rank, 10 GB for ten million. Here a rank holds pages
that the operating system can drop at any time. A selection of rows, a change to each and several sources in one are
views, which hold eight bytes per row or none.
"""

from __future__ import annotations

import io
import mmap
import pickle
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from lightning_ft.atomic_files import write_failure
from lightning_ft.distributed import rank_zero_warn

RowT = TypeVar("RowT")
_ROWS_PER_CHUNK = 1000
_SCHEMA = pa.schema({"row": pa.large_binary()})


class LazyRows(Sequence[RowT], Generic[RowT]):
    """Base of rows that are made when they are read."""

    def row(self, index: int) -> RowT:
        """The row of an index that is in range."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> RowT: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowT]: ...
    def __getitem__(self, index: int | slice) -> RowT | list[RowT]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"Row {index} is out of range: there are {len(self)}.")
        return self.row(number)

    def __iter__(self) -> Iterator[RowT]:
        return map(self.row, range(len(self)))


class StoredRows(LazyRows[RowT]):
    """Rows that are written to a file without a name, which disappears with the process. Nothing is added after a read.

    Only this process can read the file, so its rows are pickled. Few rows stay in memory, and of many one file is open,
    not two: a process has 1,024 on many systems, and each of hundreds of sources has rows of its own.

    Args:
        folder: Folder of the file; None for memory.

    Example:
        >>> rows = StoredRows()
        >>> rows.append({"input": "2+2?"})
        >>> len(rows), rows[-1], list(rows)
        (1, {'input': '2+2?'}, [{'input': '2+2?'}])
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._count = self._written = 0  # numbers of rows, and of chunks in the file
        self._pending: list[bytes] = []
        self._folder = folder
        self._file: IO[bytes] = io.BytesIO()
        self._stream = pa.ipc.new_stream(self._file, _SCHEMA)
        self._chunks: list[pa.LargeBinaryArray] | None = None

    def __len__(self) -> int:
        return self._count

    def append(self, row: RowT) -> None:
        """Add a row."""
        self._pending.append(pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL))
        self._count += 1
        if len(self._pending) == _ROWS_PER_CHUNK:
            if not self._written:
                self._file = _unnamed_file(self._folder)
                self._stream = pa.ipc.new_stream(self._file, _SCHEMA)
            self._flush()

    def row(self, index: int) -> RowT:
        """See `LazyRows`."""
        if self._chunks is None:
            self._chunks = self._finish()
        chunk, number = divmod(index, _ROWS_PER_CHUNK)
        row: RowT = pickle.loads(self._chunks[chunk][number].as_buffer())
        return row

    def _flush(self) -> None:
        batch = pa.record_batch([pa.array(self._pending, pa.large_binary())], schema=_SCHEMA)
        self._pending.clear()
        try:
            self._stream.write_batch(batch)
            self._file.flush()
        except OSError as error:
            self._move_to_memory(error)
            self._stream.write_batch(batch)
        self._written += 1

    def _move_to_memory(self, error: OSError) -> None:
        """Go on in memory, where the disk is full."""
        _warn_of_memory(error)
        chunks, in_memory = self._read_written(), io.BytesIO()
        self._stream = pa.ipc.new_stream(in_memory, _SCHEMA)
        for chunk in chunks:
            self._stream.write_batch(pa.record_batch([chunk], schema=_SCHEMA))
        with suppress(OSError):  # what is still to be written doesn't fit
            self._file.close()
        self._file = in_memory

    def _finish(self) -> list[pa.LargeBinaryArray]:
        """The chunks that are written, of :data:`_ROWS_PER_CHUNK` rows each but the last."""
        if self._pending:
            self._flush()
        chunks = self._read_written()
        if not isinstance(self._file, io.BytesIO):
            self._file.close()  # the map has a descriptor of its own
        return chunks

    def _read_written(self) -> list[pa.LargeBinaryArray]:
        if not self._written:
            return []
        if isinstance(self._file, io.BytesIO):
            buffer = pa.py_buffer(self._file.getbuffer())
        else:
            buffer = pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        reader = pa.ipc.open_stream(buffer)
        return [reader.read_next_batch().column(0) for _ in range(self._written)]

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": list(self)}  # for a process that isn't forked, which can't map the file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        for row in state["rows"]:
            self.append(row)


def _unnamed_file(folder: Path | None) -> IO[bytes]:
    if folder is None:
        return io.BytesIO()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        _warn_of_memory(error)
        return io.BytesIO()


def _warn_of_memory(error: OSError) -> None:
    rank_zero_warn(
        f"Rows can't be written to the cache's folder ({write_failure(error) or error}), so they are kept in memory. "
        "Free some space, or pass another cache_dir=."
    )


class SelectedRows(LazyRows[RowT]):
    """Some of other rows, in any order.

    Args:
        rows: The other rows.
        indices: Indices of those that are selected.

    Example:
        >>> list(SelectedRows(["a", "b", "c"], [2, 0]))
        ['c', 'a']
    """

    def __init__(self, rows: Sequence[RowT], indices: Sequence[int] | np.ndarray) -> None:
        self._rows, self._indices = rows, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, index: int) -> RowT:
        """See `LazyRows`."""
        return self._rows[int(self._indices[index])]


class ChainedRows(LazyRows[RowT]):
    """Rows of several sources, one after the other.

    Args:
        parts: Rows of each source.

    Example:
        >>> rows = ChainedRows([["a"], [], ["b", "c"]])
        >>> len(rows), rows[1], list(rows)
        (3, 'b', ['a', 'b', 'c'])
    """

    def __init__(self, parts: Sequence[Sequence[RowT]]) -> None:
        self._parts = list(parts)
        self._starts = list(accumulate(map(len, self._parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> RowT:
        """See `LazyRows`."""
        part = bisect_right(self._starts, index) - 1  # skips empty parts, which start where the next part does
        return self._parts[part][index - self._starts[part]]


class MappedRows(LazyRows[RowT]):
    """Other rows, each changed by a function.

    Args:
        rows: The other rows.
        function: The function.

    Example:
        >>> list(MappedRows(["a", "b"], str.upper))
        ['A', 'B']
    """

    def __init__(self, rows: Sequence[RowT], function: Callable[[RowT], RowT]) -> None:
        self._rows, self._function = rows, function

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> RowT:
        """See `LazyRows`."""
        return self._function(self._rows[index])
