"""Errors of the libraries that engines call, as errors of a rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_ft.errors import LightningFTError, RolloutError
from lightning_ft.read_errors import first_line


@contextmanager
def errors_named(what: str, remedy: str = "") -> Iterator[None]:
    """Raise errors of other packages as a `RolloutError`; those of this package pass.

    Args:
        what: What failed, as the beginning of a sentence.
        remedy: What to do, as a sentence; it follows the first line of the error.

    Raises:
        RolloutError: For any exception that isn't one of this package.

    Example:
        >>> with errors_named("vLLM failed to generate"):
        ...     _ = 1 / 0
        Traceback (most recent call last):
        lightning_ft.errors.RolloutError: vLLM failed to generate: ZeroDivisionError: division by zero
    """
    try:
        yield
    except LightningFTError:
        raise
    except Exception as error:  # these packages raise many types, and a bare Exception
        reason = f"{first_line(error).rstrip('.')}. {remedy}" if remedy else str(error)
        raise RolloutError(f"{what}: {type(error).__name__}: {reason}") from error
