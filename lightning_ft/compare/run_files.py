"""Files of one run of a comparison: its plan, its results, and the checkpoint that it resumes from."""

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

PLAN, CONFIG, RESULT, CHECKPOINT, EXPORT = "plan.json", "config.yaml", "result.json", "last.ckpt", "export"
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def read_text(path: Path) -> str | None:
    """Read a text file; None if it is missing or isn't text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Read the plan of a run; None if it is missing or damaged."""
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return plan if isinstance(plan["hash"], str) and {"run", "rows", "settings"} <= plan.keys() else None
    except _UNREADABLE:
        return None


def write_plan(folder: Path, plan: Mapping[str, object]) -> None:
    """Write the plan of a run.

    Raises:
        FileWriteError: If the file can't be written.
    """
    write_text(folder / PLAN, json.dumps(plan, indent=1, default=str) + "\n")


def read_results(folder: Path) -> list[RunResult] | None:
    """Read the results of a run. A damaged file is renamed, so that the run is repeated.

    Returns:
        The result; for the original weights, one for each of their two arms. None if the run isn't complete.
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
        damaged = path.with_name(f"{RESULT}.damaged")
        os.replace(path, damaged)
        print(f"{path} is damaged ({first_line(error)}). It was renamed to {damaged.name}, and the run is repeated.")
        return None


def write_results(folder: Path, results: Sequence[RunResult]) -> None:
    """Write the results of a complete run.

    Raises:
        FileWriteError: If the file can't be written.
    """
    write_text(folder / RESULT, json.dumps([result.to_dict() for result in results]))


def find_checkpoint(folder: Path, config_hash: str) -> str | None:
    """Find the checkpoint that a run resumes from.

    Args:
        folder: Folder of the run.
        config_hash: Hash of the run's configuration, compared with that in the checkpoint: the plan may be newer.

    Returns:
        Path of the checkpoint; None if it is missing, damaged, or of another configuration.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        found = read_checkpoint(path).get("callbacks", {}).get("RunRecorder", {}).get("config_hash", config_hash)
    except CheckpointError as error:
        print(f"{error} The run starts from scratch.")
        return None
    if found != config_hash:
        print(f"{path} is of another configuration. The run starts from scratch.")
        return None
    return str(path)
