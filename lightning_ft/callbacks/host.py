"""What calls a callback: a Trainer of either Lightning, or Fabric."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any


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
