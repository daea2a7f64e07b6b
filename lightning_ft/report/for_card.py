"""Results of a run for the model card of an export that is made later, from a checkpoint."""

from __future__ import annotations

from lightning_ft.checkpoint_file import local_path
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import DataError
from lightning_ft.evaluation.retention.card import retention_for_card
from lightning_ft.evaluation.savings.card import savings_for_card
from lightning_ft.models.card_facts import MeasuredResult
from lightning_ft.models.card_sections import FORGETTING, SAVINGS
from lightning_ft.report.collect import RunReport, collect

_FOLDERS = ("token_savings", "retention")
"""Where `TokenSavings` and `Retention` write by default, in the folder of the run."""
_TITLES = {"Token savings": SAVINGS, "Retention": FORGETTING}
"""Names of measurements in a run's folder to their titles on a card."""


def results_of_run(folder: str | None, ckpt_path: str) -> tuple[MeasuredResult, ...]:
    """Read what was measured in a run.

    Args:
        folder: Folder with the results; None for the run's, in which Lightning has ``checkpoints/``.
        ckpt_path: Path of a checkpoint of the run.

    Returns:
        Results, of whichever weights; empty if there are none.

    Raises:
        DataError: If a result in `folder` can't be read.
    """
    if folder is not None:
        return _for_cards(collect(folder))
    checkpoint = local_path(ckpt_path)
    run = None if checkpoint is None else checkpoint.parent.parent
    if run is None or not any((run / name).is_dir() for name in _FOLDERS):
        return ()
    try:
        return _for_cards(collect(run, within=_FOLDERS))
    except DataError as error:  # the export doesn't depend on it
        rank_zero_warn(f"The model card lacks the results of the run: {error}")
        return ()


def _for_cards(report: RunReport) -> tuple[MeasuredResult, ...]:
    failed = [_TITLES[f.measurement] for each in report.undefined.values() for f in each if f.measurement in _TITLES]
    return (
        *map(savings_for_card, report.savings.values()),
        *map(retention_for_card, report.retention.values()),
        *(MeasuredResult(title, failed=True) for title in failed),
    )
