"""Cache of encoded examples in Arrow, keyed by content: the same rows, tokenizer and options are tokenized once.

An entry is a folder with ``rows.arrow``, which is memory-mapped, and ``about.json``, with a checksum of both and of the
entry's name. It is written to a temporary folder and moved in one step; a damaged entry is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.atomic_files import flush_to_disk, remove, remove_leftovers, temporary_path
from lightning_ft.data.layout import Example
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

if TYPE_CHECKING:
    from lightning_ft.data.row_types import Row

_VERSION = 4  # version of the encoding: increase it when the same rows give other tokens
_SCHEMA = pa.schema(
    {
        "input_ids": pa.large_list(pa.int32()),
        "supervised": pa.large_list(pa.bool_()),
        "row": pa.int64(),
        "truncated": pa.bool_(),
    }
)
_EXAMPLES_PER_WRITE = 1000
_Lists: TypeAlias = tuple[np.ndarray, pa.Array]  # offsets of the lists, and the values of all of them


def default_folder() -> Path:
    """Default folder of the cache, inside that of the `datasets` library."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lightning_ft"


def content_key(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, **options: object) -> str:
    """Compute the key of the result of encoding rows.

    Args:
        rows: Rows, each with a `key`.
        tokenizer: Tokenizer with its chat template.
        options: Other settings that change the result.
    """
    digest = hashlib.sha256()
    head = [_VERSION, _tokenizer_content(tokenizer), options]
    digest.update(json.dumps(head, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row.key).encode())
    return digest.hexdigest()


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """Everything in a tokenizer that affects the tokens of a conversation."""
    if tokenizer.is_fast:
        core = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        core |= {"padding": None, "truncation": None}  # set by each call, so they depend on the last caller
    else:
        core = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    template = chat_template(tokenizer)
    name = type(tokenizer).__qualname__  # a subclass may prepare texts itself
    splits = getattr(tokenizer, "split_special_tokens", False)  # not among what a fast tokenizer writes of itself
    return [name, core, splits, template.sources, _dated(template), tokenizer.special_tokens_map]


def _dated(template: ChatTemplate) -> str:
    """Text of a template that reads the date, so that tokens from another day aren't taken for today's."""
    if not template.reads_the_date:
        return ""
    day = template.today()
    try:
        return day + template.render([Message(role="user", content="a")])
    except TokenizerError:
        return day


class EncodedRows:
    """Encoded examples, in memory-mapped Arrow or in memory.

    A row is one example, or consecutive ones, one per completion; the number is the same for all rows.

    Args:
        table: Columns ``input_ids``, ``supervised``, ``row`` (index of the row among those encoded) and ``truncated``.
        about: Other facts about the rows, as JSON values.
    """

    def __init__(self, table: datasets.Dataset, about: dict[str, Any]) -> None:
        self._table = table
        self.about = about

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"Example {index} is out of range: there are {len(self)}.")
        starts, chunks = self._chunks
        chunk = bisect_right(starts, index) - 1
        ids, marks = (_values(column, index - starts[chunk]) for column in chunks[chunk])
        return Example(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(marks.astype(bool)))

    @cached_property
    def _chunks(self) -> tuple[list[int], list[tuple[_Lists, _Lists]]]:
        """First index of each chunk of the table, and its tokens and supervision.

        Reading a row through `datasets` takes 25 times as long.
        """
        ids, marks = (self.column(name).chunks for name in ("input_ids", "supervised"))
        starts = list(accumulate(map(len, ids), initial=0))
        return starts[:-1], [(_lists(one), _lists(other)) for one, other in zip(ids, marks, strict=True)]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_chunks"}  # the copy maps the file itself

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return cast(int, pc.count_distinct(self.column("row")).as_py())

    @property
    def per_row(self) -> int:
        """Number of examples per row."""
        return max(1, len(self) // max(1, self.num_rows))

    @property
    def rows(self) -> list[int]:
        """Index, among the rows that were encoded, of each example's row."""
        return cast("list[int]", self.column("row").to_pylist())

    @property
    def truncated(self) -> list[bool]:
        """Whether the prompt of each example was cut."""
        return cast("list[bool]", self.column("truncated").to_pylist())

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return cast("list[int]", pc.list_value_length(self.column("input_ids")).to_pylist())

    @property
    def supervised(self) -> list[int]:
        """Number of supervised tokens of each example."""
        counts: list[int] = []
        for chunk in self.column("supervised").chunks:
            marks = chunk.flatten().to_numpy(zero_copy_only=False)
            ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
            total = np.concatenate([[0], np.cumsum(marks)])
            counts += np.diff(total[np.concatenate([[0], ends]).astype(np.int64)]).tolist()
        return counts

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the table."""
        return self._table.data.column(name)


def _lists(chunk: pa.Array) -> _Lists:
    return chunk.offsets.to_numpy(), chunk.values


def _values(lists: _Lists, index: int) -> np.ndarray:
    offsets, values = lists
    return cast(np.ndarray, values[offsets[index] : offsets[index + 1]].to_numpy(zero_copy_only=False))


def content_hash(parts: Sequence[EncodedRows]) -> str:
    """Hash encoded rows: their tokens in order, which of them are supervised, and which examples share a row."""
    digest = hashlib.sha256(json.dumps([(len(part), part.per_row) for part in parts]).encode())
    for part in parts:
        for name in ("input_ids", "supervised"):
            column = part.column(name)
            digest.update(json.dumps(pc.list_value_length(column).to_pylist()).encode())
            for chunk in column.chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


class EncodedWriter:
    """Writes encoded rows in batches, to a file or to memory."""

    def __init__(self, sink: pa.NativeFile) -> None:
        self._stream = pa.ipc.new_stream(sink, _SCHEMA)
        self._columns: dict[str, list[object]] = {name: [] for name in _SCHEMA.names}

    def write(self, example: Example, *, row: int, truncated: bool) -> None:
        """Add a row."""
        values = (example.input_ids.numpy(), example.supervised.numpy(), row, truncated)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)
        if len(self._columns["row"]) == _EXAMPLES_PER_WRITE:
            self._flush()

    def _flush(self) -> None:
        self._stream.write_batch(pa.record_batch(list(self._columns.values()), schema=_SCHEMA))
        for column in self._columns.values():
            column.clear()

    def close(self) -> None:
        """Write the remaining rows and the end of the stream."""
        self._flush()
        self._stream.close()


def load(folder: Path, key: str) -> EncodedRows | None:
    """Load the entry of a key; None if it is missing or damaged."""
    path = folder / key
    try:
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
        if about.pop("checksum") != _checksum(key, about, path / "rows.arrow"):
            return None
        table = datasets.Dataset.from_file(str(path / "rows.arrow"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):  # not JSON, or no dict
        return None
    return EncodedRows(table, about)


def _checksum(key: str, about: Mapping[str, object], rows: Path) -> str:
    digest = hashlib.sha256(json.dumps([key, about], sort_keys=True).encode())
    with rows.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


class Entry:
    """A cache entry that is being written.

    Args:
        writer: Writer of the rows.
        about: Other facts about the rows, as JSON values.
    """

    def __init__(self, writer: EncodedWriter) -> None:
        self.writer = writer
        self.about: dict[str, Any] = {}
        self.result: EncodedRows | None = None


@contextmanager
def new_entry(folder: Path | None, key: str) -> Iterator[Entry]:
    """Write an entry. If the block ends without an exception, its `result` is that of :func:`load`.

    Args:
        folder: Folder of the cache; None keeps the rows in memory.
        key: Key of the entry.
    """
    if folder is None:
        sink = pa.BufferOutputStream()
        entry = Entry(EncodedWriter(sink))
        yield entry
        entry.writer.close()
        entry.result = EncodedRows(datasets.Dataset.from_buffer(sink.getvalue()), entry.about)
        return
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    aside = temporary_path(folder)
    try:
        aside.mkdir()
        with pa.OSFile(str(aside / "rows.arrow"), "wb") as file:
            entry = Entry(EncodedWriter(file))
            yield entry
            entry.writer.close()
        about = json.loads(json.dumps(entry.about))  # as it will be read back
        about["checksum"] = _checksum(key, about, aside / "rows.arrow")
        (aside / "about.json").write_text(json.dumps(about), encoding="utf-8")
        flush_to_disk(aside)
        _move(aside, folder / key)
        entry.result = load(folder, key)
        if entry.result is None:
            raise OSError(f"{folder / key}: the entry that was just written can't be read back.")
    finally:
        remove(aside)


def _move(aside: Path, path: Path) -> None:
    if path.exists() and load(path.parent, path.name) is None:
        broken = temporary_path(
            path.parent
        )  # moved first, since another process may write a valid entry in the meantime
        os.replace(path, broken)
        remove(broken)
    try:
        os.replace(aside, path)
    except OSError:  # another process has written the same entry
        if load(path.parent, path.name) is None:
            raise


__all__ = ["EncodedRows", "Entry", "content_hash", "content_key", "default_folder", "load", "new_entry"]
