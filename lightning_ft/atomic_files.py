"""Files that are whole or not there: written aside in the folder that they belong in, then renamed in one step."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_ft.errors import FileWriteError
from lightning_ft.printable import json_text

_NAME = re.compile(r"\.writing-(?P<host>[\w.-]*)-(?P<pid>\d+)-[0-9a-f]{8}")
_BEGUN: set[str] = set()
"""Names that this process writes to now: after a restart in a container another has its number."""
_DAY = 86_400.0  # seconds after which what a process of another machine wrote aside is no longer waited for


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which then takes the place of `path` in one step.

    Where that fails, or the process is killed, `path` is what it was before. What a killed process left in the folder
    is removed by the next that writes there.

    Args:
        path: What to write; its folder is made where there is none.

    Raises:
        FileWriteError: If it can't be written, such as on a full disk; whatever else the block raises is passed on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/a.txt") as aside:
        ...         _ = aside.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    aside = temporary_path(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
        flush_to_disk(path.parent, deep=False)
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        raise FileWriteError(
            f"{str(path)!r} can't be written ({reason}). What was there before is unchanged: make room, or give "
            "another folder."
        ) from error
    finally:
        remove(aside)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all.

    Args:
        path: The file.
        text: What it will hold.

    Raises:
        FileWriteError: If it can't be written.
    """
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, harmless on a terminal, whole or not at all.

    Args:
        path: The file.
        value: JSON types; see :func:`lightning_ft.printable.json_text`.

    Raises:
        FileWriteError: If it can't be written.
    """
    write_text(path, json_text(value, indent=1) + "\n")


def temporary_path(folder: Path) -> Path:
    """A new name in a folder that says which process writes there."""
    name = f".writing-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    _BEGUN.add(name)
    return folder / name


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone had begun to write in a folder."""
    for path in folder.glob(".writing-*"):
        if _is_left(path):
            remove(path)


def is_temporary_path(path: Path) -> bool:
    """Whether a path is one that :func:`temporary_path` gave."""
    return _NAME.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and that is possible."""
    _BEGUN.discard(path.name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:  # another process was first, or may and we may not
        return


def write_failure(error: BaseException) -> str | None:
    """What the system said, where an error is about writing a file; libraries wrap it in errors of their own.

    Example:
        >>> write_failure(OSError(errno.ENOSPC, "No space left on device")), write_failure(ValueError("other"))
        ('No space left on device', None)
    """
    if isinstance(error, FileWriteError):
        return None  # says it already
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        return os.strerror(error.errno)
    if error.__context__ is not None and (reason := write_failure(error.__context__)) is not None:
        return reason  # torch.save
    if (found := re.search(r"([^:]+) \(os error \d+\)$", str(error))) is not None:
        return found[1].strip()  # what is written in Rust: safetensors, tokenizers
    return None


def flush_to_disk(path: Path, *, deep: bool = True) -> None:
    """Have the system write a file, or a folder with all of its files, so that a power cut after a rename loses none.

    Args:
        path: File or folder.
        deep: Also what a folder contains.
    """
    for part in [path, *(path.rglob("*") if deep and path.is_dir() else ())]:
        if part.is_dir() and os.name == "nt":  # folders can't be opened there
            continue
        handle = os.open(part, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems have no such thing
                raise
        finally:
            os.close(handle)


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def _is_left(path: Path) -> bool:
    found = _NAME.fullmatch(path.name)
    if found is None:
        return False
    if found["host"] == _host() and int(found["pid"]) == os.getpid():
        return path.name not in _BEGUN
    if found["host"] == _host() and os.name != "nt":
        return not _runs(int(found["pid"]))
    try:
        return time.time() - path.stat().st_mtime > _DAY
    except OSError:  # it is gone
        return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


__all__ = [
    "flush_to_disk",
    "is_temporary_path",
    "temporary_path",
    "remove",
    "remove_leftovers",
    "write_failure",
    "write_json",
    "write_text",
    "atomic_write",
]
