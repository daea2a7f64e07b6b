"""Where rows come from: files, the Hub, datasets, frames and lists."""

from __future__ import annotations

import difflib
import errno
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import datasets

from lightning_ft.data.files import PACKED, SUFFIXES, read_file
from lightning_ft.data.raw_rows import RawRow, check_values, numbered
from lightning_ft.errors import ConfigError, DataError, DataNotFoundError

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


Source: TypeAlias = str | Path | datasets.Dataset | datasets.IterableDataset | DataFrame | list[dict[str, Any]]
"""A path, a hub name (``user/data``, ``user/data:split``), a dataset, a pandas or polars frame, or a list of dicts."""


Sources: TypeAlias = (
    str | Path | list[str] | list[dict[str, Any]] | datasets.Dataset | datasets.IterableDataset | DataFrame | list[Any]
)
"""What a split may be: a path or hub name, a list of rows, a dataset, a pandas or polars frame, or a list of those."""


def as_sources(given: Sources, argument: str) -> dict[str, Source]:
    """The sources of an argument by the name that errors call them.

    Example:
        >>> as_sources("a.jsonl", "train"), list(as_sources([[{}], "b.jsonl", "b.jsonl"], "train"))
        ({'a.jsonl': 'a.jsonl'}, ['train[0]', 'b.jsonl', 'b.jsonl (2)'])

    Raises:
        ConfigError: For something that is no source, or an empty list of them.
    """
    several = isinstance(given, (list, tuple)) and not _is_row_list(given)
    sources: dict[str, Source] = {}
    every: list[Any] = list(given) if several else [given]  # type: ignore[arg-type]
    for index, source in enumerate(every):
        if not _is_source(source):
            raise ConfigError(
                f"{argument}: expected a path, a hub name, a dataset, a pandas or polars DataFrame or a list of dicts, "
                f"or a list of those, got {type(source).__name__}{_hint(source)}"
            )
        label = f"{argument}[{index}]" if several else argument
        name = str(source) if isinstance(source, (str, Path)) else label
        copies = sum(other == source for other in sources.values()) if isinstance(source, (str, Path)) else 0
        sources[f"{name} ({copies + 1})" if copies else name] = source
    return sources


def _is_row_list(source: Any) -> bool:
    """Whether this is a list of rows rather than of sources; whatever else stands in it is told as a bad row."""
    return isinstance(source, (list, tuple)) and (not source or any(isinstance(row, Mapping) for row in source))


def _is_source(source: Any) -> bool:
    known = (str, Path, datasets.Dataset, datasets.IterableDataset)
    return _is_row_list(source) or isinstance(source, known) or library_of(source) is not None


def _hint(source: Any) -> str:
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return f": pass one of its splits ({', '.join(map(str, list(source)[:5]))})."
    if isinstance(source, Mapping):
        return ": pass a list of rows, or a list of sources."
    return ": pass its .collect()." if library_of(source, "LazyFrame") else "."


def read_rows(source: Source, name: str, argument: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Read a source row by row.

    Args:
        source: What to read; an `IterableDataset` is read once, to its end.
        name: What errors call it.
        argument: Name of the argument it was passed as.
        notes: Counts things worth knowing that are no problem.

    Raises:
        DataNotFoundError: If there is no such file or dataset.
        DataError: If a file as a whole can't be read.
    """
    if not isinstance(source, (str, Path)):
        if library_of(source):
            yield from check_values(numbered(frame_rows(source, name), name), filled=True)
        elif isinstance(source, (list, tuple)):
            yield from check_values(numbered(source, name), filled=False)
        else:
            yield from check_values(numbered(_of_dataset(source, name), name), filled=True)
        return
    path = _as_path(str(source))
    if path is not None and path.is_file():
        yield from read_file(path, name, notes)
    elif path is None or _looks_like_path(str(source)) or path.exists():
        there = "It is too long for a path." if path is None else _what_is_there(path)
        shown = str(source) if len(str(source)) < 200 else f"{str(source)[:80]}..."
        raise DataNotFoundError(f"{argument}={shown!r}: there is no such file. {there}")
    else:
        yield from check_values(numbered(_of_dataset(_from_hub(str(source), argument), name), name), filled=True)


def _of_dataset(dataset: Any, name: str) -> Iterator[Any]:
    """Rows of a dataset; whatever stops it before its end is told with its name."""
    read = 0
    try:
        for row in dataset:
            read += 1
            yield row
    except Exception as error:  # a file it is read from, a function it was mapped with, the network
        said = (str(error).strip().splitlines() or ["no message"])[0]
        where = f"after row {read:,}" if read else "before its first row"
        raise DataError(f"{name}: reading the dataset failed {where} with {type(error).__name__}: {said}") from error


def _as_path(source: str) -> Path | None:
    """The path that a text is, None for one that can't be the name of a file."""
    try:
        path = Path(source).expanduser()
        path.stat()
    except (RuntimeError, ValueError):  # the home folder of a user who isn't there; a NUL
        return None
    except OSError as error:
        return None if error.errno == errno.ENAMETOOLONG else path
    return path


def _looks_like_path(name: str) -> bool:
    return Path(name).suffix.lower() in (*SUFFIXES, *PACKED) or name.startswith((".", "/", "~")) or name.count("/") > 1


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return _what_folder(path)
    if path.exists():
        return "It is no regular file: write its rows to one."
    if not path.parent.is_dir():
        return f"The folder {str(path.parent)!r} doesn't exist."
    others = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES)
    near = difflib.get_close_matches(path.name, others, n=1)
    if near:
        return f"Did you mean {str(path.with_name(near[0]))!r}?"
    return f"The folder holds {', '.join(others[:5])}." if others else "The folder holds no data files."


def _what_folder(path: Path) -> str:
    if (path / "dataset_dict.json").is_file():
        load = f"datasets.load_from_disk({str(path)!r})[SPLIT]"
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        load = f"datasets.load_from_disk({str(path)!r})"
    else:
        return "It is a folder: name a file in it."
    return f"It is a dataset saved by save_to_disk: pass {load}, or save that as Parquet by its to_parquet()."


def _from_hub(name: str, argument: str) -> Any:
    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # datasets, huggingface_hub and the network each raise their own
        said = str(error).strip().splitlines()
        raise DataNotFoundError(
            f"{argument}={name!r} is no file, and the Hub dataset {repository!r} (split {split or 'train'!r}) couldn't "
            f"be loaded: {said[0] if said else type(error).__name__}. Check the spelling; a split is named as "
            "'user/data:split'."
        ) from error


def source_as_json(given: Any) -> Any:
    """A source as hyperparameters hold it: names and shares; rows themselves don't belong there."""
    if isinstance(given, (list, tuple)):
        return [str(item) for item in given] if given and all(isinstance(i, (str, Path)) for i in given) else None
    return str(given) if isinstance(given, Path) else given if isinstance(given, (str, int, float)) else None
