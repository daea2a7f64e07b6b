"""What the training rows were, for others to read: names of their sources, number and hash, but no text and no path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ft.data.cache import content_hash
from lightning_ft.data.sources import as_sources, is_hub_name, names_function, published_name
from lightning_ft.data.splits import Splits


def describe_training_rows(
    splits: Splits[Any], streamed: Sequence[str | None] | None = None
) -> tuple[dict[str, str | int], tuple[str, ...]]:
    """Describe the training rows that are used.

    Args:
        splits: Rows, whose training split was tokenized.
        streamed: Paths and names of sources that are read while training instead, None for those without one; their
            rows have no number and hash.

    Returns:
        Sources, number of rows, number of supervised tokens and hash of the tokens, by label; and the names of the data
        sets on the hub among the sources.

    Example:
        >>> from lightning_ft.data.splits import RowRules
        >>> rules = RowRules(None, "error", 64, "error", seed=0, cache=None)
        >>> splits = Splits({"train": [{"input": "2 + 2?", "output": "4"}]}, rules)
        >>> splits.load(["train"])
        >>> describe_training_rows(splits)
        ({'training data': 'rows in memory', 'training rows': 1}, ())
    """
    if streamed is not None:
        # A function's import path says where somebody keeps their code, and looks like the name of a data set.
        named = [s for s in streamed if s is not None and not names_function(s)]
        names = dict.fromkeys([*map(published_name, named), *["a stream"] * (len(named) < len(streamed))])
        return (
            {"training data": f"{', '.join(names)}, read while training"},
            tuple(dict.fromkeys(name.partition(":")[0] for name in named if is_hub_name(name))),
        )
    sources = list(as_sources(splits.sources["train"], "train").values())  # type: ignore[arg-type]
    names = dict.fromkeys(published_name(source) for source in sources)
    found: dict[str, str | int] = {"training data": ", ".join(names)}
    if (report := splits.report.get("train")) is not None:
        found["training rows"] = report.kept
        if report.supervised:
            found["supervised tokens"] = sum(report.supervised)
    if (parts := splits.encoded.get("train")) is not None:
        found["hash of the tokenized rows"] = content_hash(parts)[:16]
    datasets = dict.fromkeys(str(source).partition(":")[0] for source in sources if is_hub_name(source))
    return found, tuple(datasets)
