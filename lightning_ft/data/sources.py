"""Read rows from files, the Hub, datasets, data frames and lists."""

from __future__ import annotations

import difflib
import errno
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import datasets
import pyarrow as pa

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.data.files import COMPRESSED, SUFFIXES, read_file
from lightning_ft.data.raw_rows import RawRow, check_values, numbered
from lightning_ft.errors import ConfigError, DataError, DataNotFoundError
from lightning_ft.importing import is_file_path, is_import_path

_LIBRARIES = ("pandas", "polars")


class DataFrame(Protocol):
    """A `pandas.DataFrame` or a `polars.DataFrame`."""

    @property
    def columns(self) -> object:
        """Names of the columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""


def library_of(source: object, class_name: str = "DataFrame") -> str | None:
    """The library of a data frame; None for anything else.

    Args:
        source: Any object.
        class_name: Class of the frame.

    Example:
        >>> import pandas
        >>> library_of(pandas.DataFrame({"input": ["2+2?"]})), library_of([{"input": "2+2?"}])
        ('pandas', None)
    """
    for ancestor in type(source).__mro__:
        library = ancestor.__module__.partition(".")[0]
        if ancestor.__name__ == class_name and library in _LIBRARIES:
            return library
    return None


def frame_rows(frame: Any, name: str) -> Iterator[dict[str, object]]:
    """Rows of a data frame; missing values (NaN, NaT, `pandas.NA`) become None.

    Args:
        frame: A pandas or polars frame. The index of a pandas frame is left out.
        name: Name of the frame in errors.

    Raises:
        DataError: If two columns have the same name, or column names have several levels.

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
                f"{name}: the frame's columns have {frame.columns.nlevels} levels. Name each column by one string."
            )
        columns = [str(column) for column in frame.columns]
        values = zip(*(frame.iloc[:, i].tolist() for i in range(len(columns))), strict=True)
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise DataError(f"{name}: two columns are named {repeated[0]!r}. Rename one of them.")
    for row in values:
        yield {column: None if _is_missing(value) else value for column, value in zip(columns, row, strict=True)}


def _is_missing(value: object) -> bool:
    return (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")


Source: TypeAlias = str | Path | datasets.Dataset | datasets.IterableDataset | DataFrame | list[dict[str, Any]]
"""A path, a hub name (``user/data``, ``user/data:split``), a dataset, a pandas or polars frame, or a list of dicts."""


Sources: TypeAlias = (
    str | Path | list[str] | list[dict[str, Any]] | datasets.Dataset | datasets.IterableDataset | DataFrame | list[Any]
)
"""Types of a split: a path or hub name, a list of rows, a dataset, a pandas or polars frame, or a list of those."""


def as_sources(sources: Sources, argument: str) -> dict[str, Source]:
    """The sources of an argument, by their names in errors.

    Example:
        >>> as_sources("a.jsonl", "train"), list(as_sources([[{}], "b.jsonl", "b.jsonl"], "train"))
        ({'a.jsonl': 'a.jsonl'}, ['train[0]', 'b.jsonl', 'b.jsonl (2)'])

    Raises:
        ConfigError: If anything in it isn't a source.
    """
    named = named_sources(sources, argument)
    for _, source in named:
        if not (is_map_style(source) or isinstance(source, datasets.IterableDataset)):
            raise ConfigError(
                f"{argument}: expected a path, a hub name, a dataset, a pandas or polars DataFrame or a list of dicts, "
                f"or a list of those, got {type(source).__name__}{_hint(source)}"
            )
    return dict(named)


def named_sources(sources: object, argument: str) -> list[tuple[str, Any]]:
    """What an argument holds, each with a name of its own: whatever it is, or a list of several.

    Args:
        sources: Value of the argument.
        argument: Its name.
    """
    if not isinstance(sources, (list, tuple)) or is_row_list(sources):
        return [(str(sources) if isinstance(sources, (str, Path)) else argument, sources)]
    names: list[str] = []
    for index, source in enumerate(sources):
        names.append(str(source) if isinstance(source, (str, Path)) else f"{argument}[{index}]")
    copies = [names[:index].count(name) for index, name in enumerate(names)]
    return [(f"{name} ({n + 1})" if n else name, s) for name, n, s in zip(names, copies, sources, strict=True)]


def is_row_list(source: object) -> bool:
    """Whether a list contains rows rather than sources; whatever else is in it will be reported as a bad row."""
    return isinstance(source, (list, tuple)) and (not source or any(isinstance(row, Mapping) for row in source))


def is_map_style(source: object) -> bool:
    """Whether a source has a known number of rows, or is named by a string."""
    known = (str, Path, datasets.Dataset)
    return is_row_list(source) or isinstance(source, known) or library_of(source) is not None


def _hint(source: object) -> str:
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return f": pass one of its splits ({', '.join(map(str, list(source)[:5]))})."
    if isinstance(source, Mapping):
        return ": pass a list of rows, or a list of sources."
    if library_of(source, "LazyFrame"):
        return ": pass its .collect()."
    return ": pass list(rows)." if isinstance(source, Iterable) else "."


def read_rows(source: Source, name: str, argument: str, notes: Counter[str]) -> Iterator[RawRow]:
    """Read a source row by row.

    Args:
        source: The source; an `IterableDataset` is read once, to its end.
        name: Name of the source in errors.
        argument: Name of the argument it was passed as.
        notes: Counter of harmless findings, such as blank lines.

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
            yield from check_values(numbered(dataset_rows(source, name), name), filled=True)
        return
    path = path_of(str(source))
    if path is not None and path.is_file():
        yield from read_file(path, name, notes)
    elif path is None or is_file_path(str(source)) or looks_like_path(str(source)) or path.exists():
        if is_file_path(str(source)):
            hint = "A function that returns training rows needs streaming=True."
        else:
            hint = "It can't be a path." if path is None else _missing_file_hint(path)
        shown = str(source) if len(str(source)) < 200 else f"{str(source)[:80]}..."
        raise DataNotFoundError(f"{argument}={shown!r}: there is no such file. {hint}")
    else:
        yield from check_values(numbered(dataset_rows(from_hub(str(source), argument), name), name), filled=True)


def dataset_rows(dataset: Any, name: str, read: int = 0) -> Iterator[object]:
    """Rows of a dataset; an exception while it is read is raised with the dataset's name.

    Args:
        dataset: Any iterable.
        name: Name of the source in errors.
        read: Number of rows that were read before its first row.
    """
    try:
        for row in dataset:
            read += 1
            yield _row_of_table(row, name)
    except Exception as error:  # from a file, a mapped function or the network
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        where = f"after row {read:,}" if read else "before its first row"
        raise DataError(f"{name}: reading the dataset failed {where} with {type(error).__name__}: {reason}") from error


def _row_of_table(row: object, name: str) -> object:
    """A row as a dict where a dataset's format (``pandas``, ``polars``, ``arrow``) makes a table of each row."""
    if isinstance(row, pa.Table) and row.num_rows == 1:
        return row.to_pylist()[0]
    frame: Any = row
    return next(frame_rows(frame, name)) if library_of(row) and frame.shape[0] == 1 else row


def path_of(source: str) -> Path | None:
    """A string as a path; None if it can't be the name of a file."""
    try:
        path = Path(source).expanduser()
        path.stat()
    except (RuntimeError, ValueError):  # the home folder of an unknown user, or a NUL character
        return None
    except OSError as error:
        return None if error.errno == errno.ENAMETOOLONG else path
    return path


def looks_like_path(name: str) -> bool:
    """Whether a name can only be that of a file, by its suffix, its start or its number of slashes."""
    return (
        Path(name).suffix.lower() in (*SUFFIXES, *COMPRESSED) or name.startswith((".", "/", "~")) or name.count("/") > 1
    )


def _missing_file_hint(path: Path) -> str:
    if path.is_dir():
        return _folder_hint(path)
    if path.exists():
        return "It isn't a regular file: write its rows to one."
    if path.is_symlink():
        return f"It is a link to {str(path.readlink())!r}, which doesn't exist."
    if not path.parent.is_dir():
        return f"The folder {str(path.parent.absolute())!r} doesn't exist.{did_you_mean_path(path)}"
    others = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES)
    near = difflib.get_close_matches(path.name, others, n=1)
    if near:
        return f"Did you mean {str(path.with_name(near[0]))!r}?"
    return f"The folder {str(path.parent.absolute())!r} contains {', '.join(others[:5]) or 'no data files'}."


def _folder_hint(path: Path) -> str:
    if (path / "dataset_dict.json").is_file():
        load = f"datasets.load_from_disk({str(path)!r})[SPLIT]"
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        load = f"datasets.load_from_disk({str(path)!r})"
    else:
        return "It is a folder: name a file in it."
    return f"It is a dataset saved by save_to_disk: pass {load}, or save it as Parquet with its to_parquet()."


def from_hub(name: str, argument: str, *, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Load a dataset of the Hub by its name, ``user/data`` or ``user/data:split``.

    Args:
        name: The name.
        argument: Name of the argument it was passed as.
        streaming: Whether its rows are downloaded as they are read.

    Raises:
        DataNotFoundError: If it can't be loaded.
    """
    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train", **({"streaming": True} if streaming else {}))
    except Exception as error:  # datasets, huggingface_hub and the network raise many types
        lines = str(error).strip().splitlines()
        function = "; a function as 'path/to/file.py:function'" if streaming else ""
        raise DataNotFoundError(
            f"{argument}={name!r} isn't a file, and Hub dataset {repository!r} (split {split or 'train'!r}) couldn't "
            f"be loaded: {lines[0] if lines else type(error).__name__}. Check the spelling; a split is written as "
            f"'user/data:split'{function}."
        ) from error


def published_name(source: Source) -> str:
    """Name of a source for others to read: that of a hub data set, or of a file without its folder.

    Args:
        source: The source.

    Returns:
        ``rows in memory`` for a source without a name.

    Example:
        >>> published_name("/home/me/support.jsonl"), published_name("user/data:train"), published_name([{}])
        ('support.jsonl', 'user/data:train', 'rows in memory')
    """
    if not isinstance(source, (str, Path)):
        return "rows in memory"
    return str(source) if is_hub_name(source) else Path(source).name


def is_hub_name(source: Source) -> bool:
    """Whether a source is a data set on the hub, as :func:`read_rows` decides it.

    Args:
        source: The source.

    Example:
        >>> is_hub_name("user/data"), is_hub_name("data/support.jsonl"), is_hub_name([{}])
        (True, False, False)
    """
    if not isinstance(source, str) or looks_like_path(source) or is_file_path(source):
        return False
    path = path_of(source)
    return path is not None and not path.exists()


def names_function(source: str) -> bool:
    """Whether a source is the import path of a function that returns rows, rather than a hub name with a split.

    ``name:split`` has the form of an import path; it is one if there is such a module.

    Args:
        source: The source.

    Example:
        >>> names_function("mine/rows.py:make"), names_function("package.rows.make"), names_function("squad:train")
        (True, True, False)
    """
    if is_file_path(source):
        return True
    if not is_import_path(source) or looks_like_path(source):
        return False
    module = source.partition(":")[0]
    known = module in sys.modules or "." in source or importlib.util.find_spec(module) is not None
    return known or Path(f"{module}.py").is_file()  # a function in a file here, which isn't written so


def source_as_json(source: object) -> list[str] | str | int | float | None:
    """A source as it is saved in the hyperparameters: names and shares; None for rows in memory."""
    if isinstance(source, (list, tuple)):
        return [str(item) for item in source] if source and all(isinstance(i, (str, Path)) for i in source) else None
    return str(source) if isinstance(source, Path) else source if isinstance(source, (str, int, float)) else None
