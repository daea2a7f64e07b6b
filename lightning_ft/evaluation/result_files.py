"""Read results from their JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_ft.errors import DataError

_Result = TypeVar("_Result")


def read_result(path: Path, parse: Callable[[Mapping[str, Any]], _Result]) -> _Result:
    """Read a result from its JSON file.

    Args:
        path: File that `save` of a result wrote.
        parse: Function that builds the result from the parsed JSON, such as ``SavingsResult.from_dict``.

    Raises:
        DataError: If the file can't be read, or contains no such result.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{str(path)!r} can't be read ({type(error).__name__}: {error}). Expected a result file that this "
            "package wrote. Write it again, or move it out of the folder."
        ) from error
