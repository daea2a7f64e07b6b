"""What calls a callback: a Trainer of either Lightning, or Fabric."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning_ft.errors import ConfigError


def is_trainer(host: Any) -> bool:
    """Whether it is a Trainer, of whichever Lightning; Fabric isn't one."""
    return hasattr(host, "callback_metrics")


def precision_of(host: Any) -> AbstractContextManager[Any]:
    """The numerics that the run validates with."""
    if is_trainer(host):
        context: AbstractContextManager[Any] = host.precision_plugin.forward_context()
        return context
    return host.autocast() if hasattr(host, "autocast") else nullcontext()  # type: ignore[no-any-return]


def shows_progress(host: Any, wanted: bool | None) -> bool:
    """Whether to show progress bars: as it was asked for, else as the Trainer does; Fabric has none to go by."""
    if wanted is not None:
        return wanted
    return getattr(host, "progress_bar_callback", None) is not None if is_trainer(host) else True


def results_folder(host: Any, output_dir: str | Path | bool | None, name: str) -> Path | None:
    """Where a callback writes its results. Every rank must ask: the first one tells the others.

    Args:
        host: The Trainer, or Fabric.
        output_dir: The folder; None or True for `name` in the logger's folder (or `default_root_dir`), False for none.
        name: Of the callback.

    Returns:
        The folder; None where nothing is to be written, as with Fabric unless it is given.
    """
    if output_dir is False:
        return None
    if output_dir is not None and output_dir is not True:
        return Path(output_dir)
    return Path(host.log_dir or host.default_root_dir) / name if is_trainer(host) else None


def check_results_folder(folder: Path | None, name: str) -> None:
    """Refuse before training a folder that can't be written to after it.

    Args:
        folder: See `results_folder`.
        name: Name of the callback's class, for the message.

    Raises:
        ConfigError: If a file is in its way, or the user may not write there.
    """
    if folder is None:
        return
    there = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()), Path("/"))
    if not there.is_dir():
        raise ConfigError(f"{name} can't write its results into {str(folder)!r}: {str(there)!r} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} can't write its results into {str(folder)!r}: {str(there)!r} isn't writable.")
