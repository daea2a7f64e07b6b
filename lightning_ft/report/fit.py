"""The report at the end of a fit, by the last of the callbacks that measure something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_ft.rank_zero import rank_zero_info
from lightning_ft.report.collect import collect
from lightning_ft.report.write import FOLDER, write_files


def report_at_end(trainer: Any, callback: Any) -> list[Path]:
    """Write the report of a fit once, when the last of its measuring callbacks is through.

    Call it in ``on_fit_end``, on all ranks: results are written at the end of training, so they are all there. What is
    reported is what the callbacks wrote into the Trainer's folder, nothing else that may lie there.

    Args:
        trainer: The Trainer.
        callback: The one that calls. Like every callback that measures it has the attributes ``reports``, True,
            ``name``, its folder in that of the Trainer, and ``output_dir``, None unless its files are somewhere else;
            ``unwritten``, why it could not write them, is optional.

    Returns:
        The files written; empty on other ranks than the first, for other callbacks than the last, and where no
        callback wrote results into the Trainer's folder.

    Raises:
        DataError: If a file isn't what its name says.
    """
    measuring = [other for other in trainer.callbacks if getattr(other, "reports", False)]
    if not measuring or measuring[-1] is not callback:
        return []
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on all ranks: the first one tells the others
    if not trainer.is_global_zero or not folder.is_dir():
        return []
    # What could not be written leaves an earlier run's files in its folder.
    ours = [other for other in measuring if other.output_dir in (None, True) and not getattr(other, "unwritten", None)]
    found = collect(folder, within=[other.name for other in ours])
    if found.empty:
        return []
    written = write_files(found, folder / FOLDER)
    rank_zero_info(f"Report written: {written[0]}")
    return written
