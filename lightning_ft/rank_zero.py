"""What is told to the user once, by the first rank: as Lightning does it, with nothing in it that steers a terminal.

Rows, completions, names of columns and files, and messages of other libraries stand in warnings and logs. All of this
package's go through here; `lightning_ft.errors` does the same for errors.
"""

from __future__ import annotations

from typing import Any

from lightning_utilities.core import rank_zero as lightning

from lightning_ft.printable import printable


def rank_zero_info(message: object, **options: Any) -> None:
    """Log on the first rank.

    Args:
        message: Its characters that a terminal would obey are written as escapes.
        options: Of `logging.Logger.info`.
    """
    lightning.rank_zero_info(printable(str(message)), **options)


def rank_zero_warn(message: object, *, stacklevel: int = 4, **options: Any) -> None:
    """Warn on the first rank.

    Args:
        message: Its characters that a terminal would obey are written as escapes.
        stacklevel: Frames from Lightning's function to the line that is blamed, as without this one between.
        options: Of `warnings.warn`.
    """
    lightning.rank_zero_warn(printable(str(message)), stacklevel=stacklevel + 1, **options)
