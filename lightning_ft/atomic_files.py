"""Atomic writes: files and folders are written under a temporary name in their folder, then renamed."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_ft.errors import FileWriteError
from lightning_ft.printable import json_text

_NAME = re.compile(r"\.writing-(?P<host>[\w.-]*)-(?P<pid>\d+)-[0-9a-f]{8}")
_IN_USE: set[str] = set()
"""Temporary names that this process is writing to. The process ID alone doesn't tell, since a container that was
restarted may use it again."""
_DAY = 86_400.0
"""Age in seconds at which a temporary file of another machine counts as left over."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder to, and rename it to `path` at the end of the block.

    If the block fails or the process is killed, `path` is unchanged. Temporary files that a killed process left in the
    folder are removed by the next write to that folder.

    Args:
        path: Path of the file or folder to write. Missing parent folders are created.

    Yields:
        The temporary path, in the same folder.

    Raises:
        FileWriteError: If the file can't be written, such as on a full disk. Other errors in the block propagate.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/a.txt") as temporary:
        ...         _ = temporary.write_text("complete")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    temporary = temporary_path(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent, deep=False)
    except Exception as error:
        if (reason := write_failure(error)) is None:
            raise
        raise FileWriteError(
            f"{str(path)!r} can't be written ({reason}). An earlier version is unchanged. Free some space, or choose "
            "another folder."
        ) from error
    finally:
        remove(temporary)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically.

    Args:
        path: Path of the file.
        text: Contents of the file.

    Raises:
        FileWriteError: If the file can't be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically; its text is safe to print on a terminal.

    Args:
        path: Path of the file.
        value: Value of JSON types; see :func:`lightning_ft.printable.json_text`.

    Raises:
        FileWriteError: If the file can't be written.
    """
    write_text(path, json_text(value, indent=1) + "\n")


def temporary_path(folder: Path) -> Path:
    """Return a new path in a folder, whose name identifies the machine and process that write to it."""
    name = f".writing-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    _IN_USE.add(name)
    return folder / name


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that no longer run."""
    for path in folder.glob(".writing-*"):
        if _is_leftover(path):
            remove(path)


def is_temporary_path(path: Path) -> bool:
    """Whether a path was returned by :func:`temporary_path`, in this or another process."""
    return _NAME.fullmatch(path.name) is not None


def replace_folder(new: Path, path: Path) -> None:
    """Rename a folder to `path`, and remove what had that name.

    Linux exchanges the two in one step. Elsewhere there is none for folders, so for a moment neither has the name.

    Args:
        new: A complete folder, in the folder of `path`.
        path: Its name from now on.
    """
    if path.exists():
        if not _exchange(new, path):
            aside = temporary_path(path.parent)
            os.replace(path, aside)
            os.replace(new, path)
            new = aside
        remove(new)
    else:
        os.replace(new, path)
    flush_to_disk(path.parent, deep=False)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where the system can't."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def remove(path: Path) -> None:
    """Remove a file or a folder if possible; do nothing if it doesn't exist."""
    _IN_USE.discard(path.name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:  # another process removed it, or only another user may
        return


def write_failure(error: BaseException) -> str | None:
    """The operating system's reason for a failed write, or None if the error has another cause.

    Libraries wrap the system's error in errors of their own, so its context and message are searched too.

    Example:
        >>> write_failure(OSError(errno.ENOSPC, "No space left on device")), write_failure(ValueError("other"))
        ('No space left on device', None)
    """
    if isinstance(error, FileWriteError):
        return None  # its message contains the reason already
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        return os.strerror(error.errno)
    if error.__context__ is not None and (reason := write_failure(error.__context__)) is not None:
        return reason  # raised by torch.save
    if (found := re.search(r"([^:]+) \(os error \d+\)$", str(error))) is not None:
        return found[1].strip()  # libraries written in Rust: safetensors, tokenizers
    return None


def unwritable(folder: Path) -> str | None:
    """The reason why nothing can be written into a folder, or made there if it doesn't exist; None if there is none.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     unwritable(Path(file.name, "runs")) == f"{file.name!r} is a file"
        True
    """
    parents = (folder.absolute(), *folder.absolute().parents)
    existing = next((parent for parent in parents if os.path.exists(parent)), Path("/"))
    if not existing.is_dir():
        return f"{str(existing)!r} is a file"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{str(existing)!r} isn't writable"


def flush_to_disk(path: Path, *, deep: bool = True) -> None:
    """Sync a file, or a folder and its contents, to disk, so that a power failure after a rename loses no data.

    Args:
        path: Path of the file or folder.
        deep: Whether to sync the contents of a folder too.
    """
    for part in [path, *(path.rglob("*") if deep and path.is_dir() else ())]:
        if part.is_dir() and os.name == "nt":  # Windows can't open folders
            continue
        handle = os.open(part, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # some file systems don't support it
                raise
        finally:
            os.close(handle)


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())


def _is_leftover(path: Path) -> bool:
    found = _NAME.fullmatch(path.name)
    if found is None:
        return False
    if found["host"] == _host() and int(found["pid"]) == os.getpid():
        return path.name not in _IN_USE
    if found["host"] == _host() and os.name != "nt":
        return not _is_running(int(found["pid"]))
    try:
        return time.time() - path.stat().st_mtime > _DAY
    except OSError:  # removed by another process
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks whether the process exists
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
    "replace_folder",
    "unwritable",
    "write_failure",
    "write_json",
    "write_text",
    "atomic_write",
]
