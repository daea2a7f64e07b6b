"""Sources that are read while a model trains, row by row: datasets without a length, iterables, functions, files."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import datasets

from lightning_ft.data.raw_rows import RawRow
from lightning_ft.data.sources import (
    dataset_rows,
    from_hub,
    is_map_style,
    is_row_list,
    looks_like_path,
    named_sources,
    names_function,
    path_of,
    read_rows,
)
from lightning_ft.errors import ConfigError, DataError
from lightning_ft.importing import import_object

State: TypeAlias = dict[str, Any]
"""State of a source between two rows, from its own `state_dict`."""


class RowIterable(Protocol):
    """Any iterable of rows; one that isn't an iterator is read again in every epoch."""

    def __iter__(self) -> Iterator[Any]:
        """The rows."""


class RowFactory(Protocol):
    """A function without arguments that returns the rows of an epoch."""

    def __call__(self) -> Any:
        """The rows, as any iterable."""


def has_no_length(source: object) -> bool:
    """Whether a source can only be read from its start to its end: an `IterableDataset`, an iterable or a function.

    Example:
        >>> has_no_length({"input": "a"} for _ in range(3)), has_no_length([{"input": "a"}]), has_no_length("a.jsonl")
        (True, False, False)
    """
    if isinstance(source, datasets.IterableDataset):
        return True
    return not is_map_style(source) and not isinstance(source, Mapping) and isinstance(source, (Iterable, Callable))  # type: ignore[arg-type]


def is_streamed(sources: object, streaming: bool | None) -> bool:
    """Whether training rows are read while training.

    Args:
        sources: What was passed as `train`.
        streaming: Whether to do so; None for sources without a length.
    """
    if streaming is not None:
        return streaming
    if isinstance(sources, (list, tuple)) and not is_row_list(sources):
        return any(map(has_no_length, sources))
    return has_no_length(sources)


def stream_sources(sources: object, argument: str) -> list[StreamSource]:
    """The sources of an argument, which are read one after the other.

    Raises:
        ConfigError: If anything in it isn't a source.
    """
    return [StreamSource(source, name, argument) for name, source in named_sources(sources, argument)]


def check_streamed(validation: object, mixing: object) -> None:
    """Refuse what can't be done with training rows that are read while training.

    Args:
        validation: Validation rows, or a share of the training rows to hold out.
        mixing: Weights of the sources.

    Raises:
        ConfigError: For a share, and for weights.
    """
    if isinstance(validation, (int, float)):
        raise ConfigError(
            f"validation={validation} holds out a share of the training rows, whose number isn't known while they are "
            "streamed. Pass separate rows as validation=, or streaming=False for rows that fit on disk."
        )
    if mixing is not None:
        raise ConfigError(
            f"mixing={mixing}: streamed sources are read one after the other. Mix them with "
            "datasets.interleave_datasets, or pass streaming=False."
        )


class StreamSource:
    """One source of a stream. It is opened again for each epoch; an iterator can be opened only once.

    Args:
        source: A path, a hub name, the import path of a function, a dataset, any iterable of rows, or a function that
            returns one.
        name: Name of the source in errors.
        argument: Name of the argument it was passed as.

    Raises:
        ConfigError: If it is none of these, or a dataset that was split over ranks.

    Example:
        >>> source = StreamSource(lambda: ({"input": str(n)} for n in range(3)), "train", "train")
        >>> [row.value["input"] for row in source.open(epoch=0)], [row.number for row in source.head(2)]
        (['0', '1', '2'], [1, 2])
    """

    def __init__(self, source: object, name: str, argument: str) -> None:
        if not is_map_style(source) and not has_no_length(source):
            raise ConfigError(
                f"{argument}: expected a path, a hub name, a dataset, an iterable of rows, or a function that returns "
                f"one, got {type(source).__name__}."
            )
        if getattr(source, "_distributed", None) is not None:
            raise ConfigError(
                f"{name}: the dataset was split with split_dataset_by_node. Pass the whole dataset: every rank takes "
                "rows of its own, so that all ranks have as many batches."
            )
        self.name, self.argument = name, argument
        self.notes: Counter[str] = Counter()
        self.is_once = isinstance(source, Iterator)
        self._source: Any = source
        self.path = str(source) if isinstance(source, (str, Path)) else None
        """Path, hub name or import path; None for rows in another form."""
        self._head: list[RawRow] | None = None
        self._opened: Any = None  # what is being read, if it has a state
        self._is_used = False
        self._iterator: object = None  # the last iterator that a function returned

    @property
    def checks_values(self) -> bool | None:
        """Whether nested objects of unchecked rows have the same keys (see `plain`); None if rows are checked."""
        return None if is_map_style(self._source) else isinstance(self._source, datasets.IterableDataset)

    def head(self, count: int) -> list[RawRow]:
        """The first rows. They are kept, since an iterator returns them only once.

        Args:
            count: Maximum number of rows.
        """
        if self._head is None:
            rows = self._read(0, None, 0)
            self._head = list(islice(rows, count))
            if self.is_once:
                self._rest = rows
        return self._head

    def open(self, epoch: int, state: State | None = None, number: int = 0) -> Iterator[RawRow]:
        """Read the rows of an epoch.

        Args:
            epoch: The epoch; a dataset with `set_epoch` has an order for each.
            state: State to continue from; None for the first row.
            number: Number of rows that were read before that state.

        Raises:
            DataError: If the source can't be read, or can't be read again.
        """
        if not self.is_once:
            return self._read(epoch, state, number)
        if self._is_used:
            raise self._read_twice()
        self._is_used = True
        return self._read(epoch, None, 0) if self._head is None else chain(self._head, self._rest)

    def state(self) -> State | None:
        """State after the last row that was read; None if it can't be returned to exactly."""
        if self.is_once or self._opened is None or _has_shuffle_buffer(getattr(self._opened, "_ex_iterable", None)):
            return None  # an iterator's state is also that after the first rows, which were read before
        state = self._opened.state_dict()
        return copy.deepcopy(state) if isinstance(state, dict) and _is_plain(state) else None

    def _read(self, epoch: int, state: State | None, number: int) -> Iterator[RawRow]:
        self._opened = None
        source = self._resolve()
        if is_map_style(source):
            return read_rows(source, self.name, self.argument, self.notes)
        if not isinstance(source, Iterable):
            source = source()
        if isinstance(source, Iterator):
            if source is self._iterator:  # the first rows were read from it, and would be missing now
                raise self._read_twice()
            self._iterator = source
        if isinstance(source, datasets.IterableDataset):
            source = copy.copy(source)  # a state that is loaded would stay for all later iterations
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
            self._opened = source
            if state is not None:
                source.load_state_dict(state)
        return self._numbered(source, number)

    def _read_twice(self) -> DataError:
        return DataError(
            f"{self.name}: an iterator can be read only once. Pass a function that returns a new one, such as the "
            "generator function itself, or an iterable that isn't an iterator."
        )

    def _numbered(self, rows: Iterable[object], number: int) -> Iterator[RawRow]:
        for index, row in enumerate(dataset_rows(rows, self.name, number), start=number + 1):
            yield RawRow(self.name, index, row)

    def _resolve(self) -> Any:
        """The source, or what a string names, unless that is a file."""
        source = self._source
        if not isinstance(source, str) or ((path := path_of(source)) is not None and path.exists()):
            return source
        if names_function(source):
            self._source = import_object(source, argument=self.argument, error=ConfigError)
        elif not looks_like_path(source):
            self._source = from_hub(source, self.argument, streaming=True)
        return self._source


def _has_shuffle_buffer(examples: object) -> bool:
    """Whether a dataset holds rows back, which its state doesn't include.

    Args:
        examples: The dataset's iterable of examples, and whatever that reads from.
    """
    if examples is None:
        return False
    inner = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return "Shuffled" in type(examples).__name__ or any(map(_has_shuffle_buffer, inner))


def _is_plain(value: object) -> bool:
    """Whether a checkpoint that holds a value can be loaded without running code from it."""
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else type(value) in (int, float, str, bool, type(None))


__all__ = [
    "RowFactory",
    "RowIterable",
    "StreamSource",
    "check_streamed",
    "has_no_length",
    "is_streamed",
    "stream_sources",
]
