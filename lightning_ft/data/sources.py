"""Where rows come from: files, the Hub, datasets and lists."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from lightning_ft.data.files import SUFFIXES, RawRow, numbered, read_file
from lightning_ft.errors import ConfigError, DataNotFoundError

Source: TypeAlias = str | Path | datasets.Dataset | datasets.IterableDataset | list[dict[str, Any]]
"""A path, a hub name (``user/data``, ``user/data:split``), a dataset, or a list of dicts."""


Sources: TypeAlias = (
    str | Path | list[str] | list[dict[str, Any]] | datasets.Dataset | datasets.IterableDataset | list[Any]
)
"""What a split may be: a path or hub name, a list of rows, a dataset, or a list of those."""


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
        if not _is_row_list(source) and not isinstance(source, (str, Path, datasets.Dataset, datasets.IterableDataset)):
            raise ConfigError(
                f"{argument}: expected a path, a hub name, a dataset or a list of dicts, or a list of those, "
                f"got {type(source).__name__}" + (_split_hint(source) if isinstance(source, Mapping) else ".")
            )
        label = f"{argument}[{index}]" if several else argument
        name = str(source) if isinstance(source, (str, Path)) else label
        copies = sum(other == source for other in sources.values()) if isinstance(source, (str, Path)) else 0
        sources[f"{name} ({copies + 1})" if copies else name] = source
    return sources


def _is_row_list(source: Any) -> bool:
    """Whether this is a list of rows rather than of sources; whatever else stands in it is told as a bad row."""
    return isinstance(source, (list, tuple)) and (not source or any(isinstance(row, Mapping) for row in source))


def _split_hint(source: Mapping[Any, Any]) -> str:
    return f": pass one of its splits ({', '.join(map(str, list(source)[:5]))})."


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
        yield from numbered(source, name)
        return
    path = Path(source).expanduser()
    if path.is_file():
        yield from read_file(path, name, notes)
    elif _looks_like_path(str(source)) or path.is_dir():
        raise DataNotFoundError(f"{argument}={str(source)!r}: there is no such file. {_what_is_there(path)}")
    else:
        yield from numbered(_from_hub(str(source), argument), name)


def _looks_like_path(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return "It is a folder: name a file in it."
    if not path.parent.is_dir():
        return f"The folder {str(path.parent)!r} doesn't exist."
    others = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES)
    near = difflib.get_close_matches(path.name, others, n=1)
    if near:
        return f"Did you mean {str(path.with_name(near[0]))!r}?"
    return f"The folder holds {', '.join(others[:5])}." if others else "The folder holds no data files."


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
