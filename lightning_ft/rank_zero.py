"""What is told to the user in warnings and logs, with nothing in it that steers a terminal.

Rows, completions, names of columns and files, and messages of other libraries are in it. All warnings of this package
go through here; `lightning_ft.errors` does the same for errors.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from lightning_utilities.core import rank_zero as lightning
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_ft.printable import printable

if getattr(rank_zero_only, "rank", None) is None:  # set by Lightning as soon as that is imported, likewise
    _RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    rank_zero_only.rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)  # type: ignore[attr-defined]


def rank_zero_info(message: object, *, stacklevel: int = 4, **options: Any) -> None:
    """Log on the first rank.

    Args:
        message: What to say; characters that a terminal would obey are escaped.
        stacklevel: As of Lightning's function, which has frames of its own.
        options: Arguments of `logging.Logger.info`.
    """
    lightning.rank_zero_info(printable(str(message)), stacklevel=stacklevel + 1, **options)


def rank_zero_warn(message: object, *, stacklevel: int = 4, **options: Any) -> None:
    """Warn on the first rank.

    Args:
        message: What to say; characters that a terminal would obey are escaped.
        stacklevel: As of Lightning's function, which has frames of its own.
        options: Arguments of `warnings.warn`.
    """
    lightning.rank_zero_warn(printable(str(message)), stacklevel=stacklevel + 1, **options)


def warn(message: object, *, stacklevel: int = 2) -> None:
    """Warn on every rank.

    Args:
        message: What to say; characters that a terminal would obey are escaped.
        stacklevel: As of `warnings.warn`: 1 is the line that calls this function.
    """
    warnings.warn(printable(str(message)), stacklevel=stacklevel + 1)


__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn", "warn"]
