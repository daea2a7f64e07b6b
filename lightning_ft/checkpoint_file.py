"""Checkpoint files: written whole or not at all, and read without running what they may contain."""

from __future__ import annotations

import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from packaging.version import InvalidVersion, Version
from torch import Tensor

from lightning_ft.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from lightning_ft.unreadable import first_line
from lightning_ft.whole_files import written_aside

Source: TypeAlias = "str | Path | IO[bytes]"
"""A file, the URL of one (http, https, or what fsspec knows), or one that is open."""
VERSION = "pytorch-lightning_version"
_OTHER = "Take another checkpoint of the run, or start again."


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint to a file on this machine.

    Args:
        checkpoint: What `torch.save` takes.
        path: The file; its folder is made where there is none.

    Raises:
        FileWriteError: If it can't be written.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # by which `read_checkpoint` knows that a file is whole
    try:
        # an open file, not a path: torch tells then what the system said
        with written_aside(path) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
    finally:
        torch.serialization.set_crc32_options(checksums)


def read_checkpoint(
    source: Source, map_location: Any = "cpu", *, of_trainer: bool = False, name: str | None = None
) -> dict[str, Any]:
    """Read a checkpoint after its checksums were compared, and never run code that is in it.

    Args:
        source: The checkpoint.
        map_location: As of `torch.load`.
        of_trainer: Whether it must have what a Trainer wrote next to the weights.
        name: What errors call it; by default its path or URL.

    Returns:
        What was saved; ``state_dict`` is in it.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, isn't a checkpoint, or contains more than tensors and plain values.
    """
    name = name or _name(source)
    with local_file(source) as file:
        _check_whole(file, name)
        try:
            found = torch.load(cast(Any, file), map_location=map_location, weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(_why_refused(name, error)) from error
        except Exception as error:  # whatever a file that only looks like one makes its reader raise
            raise _damaged(name, first_line(error)) from error
    _check_content(found, name, of_trainer=of_trainer)
    return cast("dict[str, Any]", found)


@contextmanager
def checked_file(
    source: Source,
    weights_only: bool | None = None,
    *,
    kept: str = "",
    required: str | None = None,
    arguments: dict[str, Any] | None = None,
) -> Iterator[Path | IO[bytes]]:
    """A checkpoint of a Trainer as a file that contains nothing but data, for Lightning to make an object from.

    Args:
        source: The checkpoint.
        weights_only: The user's argument.
        kept: Key of the arguments that the checkpoint keeps for the object.
        required: One that must be among them, unless the user passes it.
        arguments: The user's, which come before those of the checkpoint. ``trust_remote_code`` is added to them, off,
            where it is missing: a file doesn't decide whether code of a repository is run.

    Raises:
        CheckpointError: As :func:`read_checkpoint` does.
        ConfigError: For ``weights_only=False``.
    """
    refuse_pickle(weights_only)
    arguments = {} if arguments is None else arguments
    arguments.setdefault("trust_remote_code", False)
    with local_file(source) as file:
        found = read_checkpoint(file, of_trainer=True, name=_name(source))
        if required is not None and required not in arguments and required not in found.get(kept, {}):
            raise CheckpointError(
                f"The checkpoint {_name(source)!r} was written by something else: its {kept!r} hold no "
                f"{required!r}. Pass {required}= if its weights fit."
            )
        del found
        if not isinstance(file, Path):
            file.seek(0)
        yield file


def refuse_pickle(weights_only: bool | None) -> None:
    """Refuse to load whatever a file contains.

    Raises:
        ConfigError: For False.
    """
    if weights_only is False:
        raise ConfigError(
            "weights_only=False would run whatever code a checkpoint contains, and those of this package need none: "
            "leave it out."
        )


@contextmanager
def local_file(source: Source) -> Iterator[Path | IO[bytes]]:
    """A checkpoint as a file that can be read from any position; http and https are downloaded for the time.

    Raises:
        CheckpointNotFoundError: If there is no such file.
        CheckpointError: If it is a folder, or can't be read.
    """
    if not isinstance(source, (str, Path)):
        source.seek(0)
        yield source
    elif re.match(r"https?://", str(source)):
        with tempfile.TemporaryDirectory(prefix="lightning_ft_") as folder:
            # not torch's cache of downloads: it knows a file by the last part of its address only
            yield _downloaded(str(source), Path(folder) / "downloaded.ckpt")
    elif (path := local_path(source)) is not None:
        if path.is_dir():
            raise CheckpointError(
                f"The checkpoint {str(path)!r} is a folder: give a checkpoint file, such as one in it."
            )
        if not path.is_file():
            raise CheckpointNotFoundError(f"There is no checkpoint {str(path)!r}.")
        yield path
    else:
        files, name = url_to_fs(str(source))
        if not files.exists(name):
            raise CheckpointNotFoundError(f"There is no checkpoint {str(source)!r}.")
        with files.open(name, "rb") as opened:
            yield opened


def local_path(path: str | Path) -> Path | None:
    """The path of a file on this machine; None for a URL of another.

    Example:
        >>> local_path("s3://bucket/a.ckpt"), local_path("file:///runs/a.ckpt").as_posix()
        (None, '/runs/a.ckpt')
    """
    if "://" not in str(path):
        return Path(path)
    if not re.match(r"(file|local)://", str(path)):
        return None
    files, name = url_to_fs(str(path))
    return Path(name) if isinstance(files, LocalFileSystem) else None


def _downloaded(url: str, path: Path) -> Path:
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except Exception as error:  # of urllib and of the server: status, name, certificate, a connection that ends
        raise CheckpointError(f"The checkpoint {url!r} can't be downloaded ({first_line(error)}).") from error
    return path


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "an open file"))


def _damaged(name: str, reason: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {name!r} is damaged, or no checkpoint ({reason}). {_OTHER}")


def _check_whole(file: Path | IO[bytes], name: str) -> None:
    """Compare the checksums of a file on this machine; torch doesn't."""
    try:
        if not zipfile.is_zipfile(file):  # its list of contents is at the end
            if _size(file) == 0:
                raise CheckpointError(f"The checkpoint {name!r} is empty. {_OTHER}")
            raise _damaged(name, "it isn't a zip archive, as torch writes, or its end is missing")
        if isinstance(file, Path):  # what is elsewhere would be transferred twice
            with zipfile.ZipFile(file) as archive:
                if (part := archive.testzip()) is not None:
                    raise _damaged(name, f"the checksum of {part!r} in it is another")
    except CheckpointError:
        raise
    except Exception as error:  # of zipfile, about as many as there are ways to be broken
        raise _damaged(name, first_line(error)) from error
    if not isinstance(file, Path):
        file.seek(0)


def _size(file: Path | IO[bytes]) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, 2)


def _why_refused(name: str, error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
    if found is None:
        return str(_damaged(name, first_line(error)))
    kind = found[1] or found[2]
    return (
        f"The checkpoint {name!r} contains {kind}, which isn't a tensor or a plain value, and could run code: nothing "
        "of it was loaded. If you know who wrote it and need that, allow it by name with "
        "torch.serialization.add_safe_globals."
    )


def _check_content(found: Any, name: str, *, of_trainer: bool) -> None:
    """Refuse what isn't a checkpoint of a Trainer."""
    says = f"{name!r} is no checkpoint of a Trainer: "
    if not isinstance(found, dict) or "state_dict" not in found:
        raise CheckpointError(f"{says}it holds no 'state_dict'.")
    weights = found["state_dict"]
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise CheckpointError(f"{says}its 'state_dict' isn't a dict of tensors by name.")
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "loops", "callbacks", "lightning_ft"):
        if not isinstance(found.get(key, {}), Mapping):
            raise CheckpointError(f"{says}its {key!r} isn't a dict.")
    if of_trainer:
        try:
            Version(found[VERSION])
        except (KeyError, TypeError, InvalidVersion) as error:
            raise CheckpointError(f"{says}it doesn't say which version of Lightning wrote it.") from error


__all__ = [
    "VERSION",
    "Source",
    "checked_file",
    "local_file",
    "local_path",
    "read_checkpoint",
    "refuse_pickle",
    "write_checkpoint",
]
