"""Rows of Parquet files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_ft.data.raw_rows import RawRow, bad_row
from lightning_ft.errors import DataError

_READ_TOGETHER = 1000
_DAMAGED = "The file is damaged, or of a kind that this pyarrow doesn't read: write it again."


def read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    """Rows of a Parquet file, numbered from 1.

    Args:
        path: The file.
        name: What errors call it.

    Raises:
        DataError: If the file is damaged, encrypted or compressed by a codec that isn't there, or two columns have one
            name; where rows were read before, it says how many.
    """
    read = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            repeated = [column for column, count in Counter(columns).items() if count > 1]
            if repeated:
                raise DataError(f"{name}: two columns are named {repeated[0]!r}. Rename one of them.")
            for batch in file.iter_batches(_READ_TOGETHER):
                for row in _rows(batch, name, read):
                    read += 1
                    yield row
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        after = f", after row {read:,}" if read else ""
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{name}{after}: Parquet that can't be read ({said}). {_DAMAGED}") from error


def _rows(batch: pa.RecordBatch, name: str, before: int) -> Iterator[RawRow]:
    """Rows of a batch; where values can't be read, each by itself, so that only its own row is bad."""
    batch.validate()
    try:
        values = batch.to_pylist()
    except Exception:  # bytes that aren't UTF-8, dates out of range, time zones that aren't there, ...
        for i in range(batch.num_rows):
            yield _row(batch, i, name, before + i + 1)
        return
    for number, value in enumerate(values, start=before + 1):
        yield RawRow(name, number, value)


def _row(batch: pa.RecordBatch, index: int, name: str, number: int) -> RawRow:
    row: dict[str, Any] = {}
    for field, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[field] = column[index].as_py()
        except UnicodeDecodeError as error:
            detail = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1}"
            return bad_row(name, number, "invalid UTF-8", detail, "Write the text again as UTF-8.", field)
        except Exception as error:
            fix = "Remove the column, or store it as a text."
            return bad_row(name, number, "value that can't be read", type(error).__name__, fix, field)
    return RawRow(name, number, row)
