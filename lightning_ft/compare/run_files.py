"""Files of one run of a comparison: its plan, its result, and the checkpoint that it goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_ft.atomic_files import write_text
from lightning_ft.checkpoint_file import read_checkpoint
from lightning_ft.errors import CheckpointError
from lightning_ft.evaluation.comparison.result import RunResult
from lightning_ft.read_errors import first_line

PLAN, CONFIG, RESULT, CHECKPOINT = "plan.json", "config.yaml", "result.json", "last.ckpt"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of a run; None where there is none, or it is damaged."""
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return plan if isinstance(plan["hash"], str) and {"run", "rows", "settings"} <= plan.keys() else None
    except _UNREADABLE:
        return None


def write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan of a run.

    Raises:
        FileWriteError: If it can't be written.
    """
    write_text(folder / PLAN, json.dumps(plan, indent=1, default=str) + "\n")


def read_results(folder: Path) -> list[RunResult] | None:
    """What a run found; None where it isn't complete. A file that is damaged is renamed, so that the run is made again.

    Returns:
        Its result; for the original weights one for each of their two arms.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        found = [RunResult.from_dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]
        if not found:
            raise ValueError("it is empty")
        return found
    except _UNREADABLE as error:
        aside = path.with_name(f"{RESULT}.damaged")
        os.replace(path, aside)
        print(f"{path} is damaged ({first_line(error)}); it is now {aside.name}, and the run is made again.")
        return None


def write_results(folder: Path, results: Sequence[RunResult]) -> None:
    """Write what a run found, once it is complete.

    Raises:
        FileWriteError: If it can't be written.
    """
    write_text(folder / RESULT, json.dumps([result.to_dict() for result in results]))


def checkpoint_of(folder: Path, config_hash: str) -> str | None:
    """The checkpoint that a run goes on from; None where there is none of this configuration that is whole.

    Args:
        folder: Folder of the run.
        config_hash: Names its configuration: the plan that said so may have been lost.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        of = read_checkpoint(path).get("callbacks", {}).get("RunRecorder", {}).get("config_hash", config_hash)
    except CheckpointError as error:
        print(f"{error} The run starts again.")
        return None
    if of != config_hash:
        print(f"{path} is of another configuration. The run starts again.")
        return None
    return str(path)
