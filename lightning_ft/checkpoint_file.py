"""Checkpoint files, written atomically and read without running any code that they contain."""

from __future__ import annotations

import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from packaging.version import InvalidVersion, Version
from torch import Tensor

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.atomic_files import atomic_write
from lightning_ft.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from lightning_ft.read_errors import first_line

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION as MapLocation

Source: TypeAlias = "str | Path | IO[bytes]"
"""A path, a URL (http, https or any scheme that fsspec knows), or an open file."""
VERSION = "pytorch-lightning_version"
"""Checkpoint key of the version of Lightning that wrote the file."""
_REMEDY = "Use another checkpoint of the run, or start the run again."


def write_checkpoint(checkpoint: Mapping[str, object], path: str | Path) -> None:
    """Write a checkpoint to a local file.

    Args:
        checkpoint: Contents of the checkpoint, as for `torch.save`.
        path: Path of the file; missing parent folders are created.

    Raises:
        FileWriteError: If the file can't be written.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # `read_checkpoint` verifies them
    try:
        # An open file rather than a path, so that torch raises the operating system's own error.
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
    finally:
        torch.serialization.set_crc32_options(checksums)


def read_checkpoint(
    source: Source, map_location: MapLocation = "cpu", *, from_trainer: bool = False, name: str | None = None
) -> dict[str, Any]:
    """Read a checkpoint after verifying its checksums, without running any code that it contains.

    Args:
        source: Path, URL or open file of the checkpoint.
        map_location: Device to load the tensors to, as in `torch.load`.
        from_trainer: Whether the checkpoint must contain what a Trainer saves in addition to the weights.
        name: Name of the checkpoint in error messages; its path or URL by default.

    Returns:
        Contents of the checkpoint, including its ``state_dict``.

    Raises:
        CheckpointNotFoundError: If the file doesn't exist.
        CheckpointError: If the file is damaged, isn't a checkpoint, or contains more than tensors and plain values.
    """
    name = name or _name(source)
    with local_file(source) as file:
        _check_whole(file, name)
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(_why_refused(name, error)) from error
        except Exception as error:  # a malformed file can make the unpickler raise anything
            raise damaged(name, first_line(error)) from error
    _check_content(checkpoint, name, from_trainer=from_trainer)
    return cast("dict[str, Any]", checkpoint)


@contextmanager
def checked_file(
    source: Source,
    weights_only: bool | None = None,
    *,
    kept: str = "",
    required: str | None = None,
    arguments: dict[str, Any] | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[Path | IO[bytes]]:
    """Check that a Trainer's checkpoint contains only data, and yield a file for `load_from_checkpoint`.

    Args:
        source: Path, URL or open file of the checkpoint.
        weights_only: Value that the user passed for `load_from_checkpoint`'s argument of this name.
        kept: Checkpoint key of the saved constructor arguments.
        required: Name of an argument that must be saved there, unless the user passes it.
        arguments: Arguments that the user passed, which override those of the checkpoint. ``trust_remote_code=False``
            is added if missing: a file must not decide whether a repository's code is run.
        check: Function that raises an error if the checkpoint doesn't fit in some other way.

    Raises:
        CheckpointError: As :func:`read_checkpoint` does.
        ConfigError: For ``weights_only=False``.
    """
    refuse_pickle(weights_only)
    arguments = {} if arguments is None else arguments
    arguments.setdefault("trust_remote_code", False)
    with local_file(source) as file:
        checkpoint = read_checkpoint(file, from_trainer=True, name=_name(source))
        if required is not None and required not in arguments and required not in checkpoint.get(kept, {}):
            raise CheckpointError(
                f"The checkpoint {_name(source)!r} was written by another class: its {kept!r} contain no "
                f"{required!r}. If its weights fit this class, pass {required}=."
            )
        if "_instantiator" in checkpoint.get(kept, {}):
            raise CheckpointError(
                f"The {kept!r} of the checkpoint {_name(source)!r} name an instantiator, with which Lightning would "
                "import every class that they name. A checkpoint doesn't decide which code runs: build the module "
                "yourself and call load_checkpoint(path), or fit with ckpt_path=."
            )
        if check is not None:
            check(checkpoint)
        del checkpoint
        if not isinstance(file, Path):
            file.seek(0)
        yield file


def refuse_pickle(weights_only: bool | None) -> None:
    """Refuse ``weights_only=False``.

    Raises:
        ConfigError: For False.
    """
    if weights_only is False:
        raise ConfigError(
            "weights_only=False would run any code that the checkpoint contains. Checkpoints of this package contain "
            "only data, so leave the argument out."
        )


@contextmanager
def local_file(source: Source) -> Iterator[Path | IO[bytes]]:
    """Yield a checkpoint as a seekable file; http and https URLs are downloaded to a temporary folder.

    Raises:
        CheckpointNotFoundError: If the file doesn't exist.
        CheckpointError: If it is a folder or can't be read.
    """
    if not isinstance(source, (str, Path)):
        source.seek(0)
        yield source
    elif re.match(r"https?://", str(source)):
        with tempfile.TemporaryDirectory(prefix="lightning_ft_") as folder:
            # torch's download cache identifies a file by the last part of its URL only, so it isn't used.
            yield _downloaded(str(source), Path(folder) / "downloaded.ckpt")
    elif (path := local_path(source)) is not None:
        if path.is_dir():
            raise CheckpointError(
                f"The checkpoint {str(path)!r} is a folder. Pass a checkpoint file, such as one in that folder."
            )
        if not path.is_file():
            hint = did_you_mean_path(path) or " Check the path."
            raise CheckpointNotFoundError(f"The checkpoint {str(path)!r} doesn't exist.{hint}")
        yield path
    else:
        files, name = url_to_fs(str(source))
        if not files.exists(name):
            raise CheckpointNotFoundError(f"The checkpoint {str(source)!r} doesn't exist. Check the URL.")
        with files.open(name, "rb") as opened:
            yield opened


def local_path(path: str | Path) -> Path | None:
    """Path of a local file; None for a remote URL.

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
    except Exception as error:  # HTTP status, DNS, certificate, a dropped connection
        raise CheckpointError(
            f"The checkpoint {url!r} can't be downloaded ({first_line(error)}). Download it and pass its path."
        ) from error
    return path


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "an open file"))


def damaged(name: str, reason: str) -> CheckpointError:
    """Error for a checkpoint that isn't intact.

    Args:
        name: Path or URL of the checkpoint.
        reason: What is wrong with it.
    """
    return CheckpointError(f"The checkpoint {name!r} is damaged or isn't a checkpoint ({reason}). {_REMEDY}")


def _check_whole(file: Path | IO[bytes], name: str) -> None:
    """Verify the checksums of a local file; `torch.load` doesn't."""
    try:
        if not zipfile.is_zipfile(file):  # a zip archive ends with its directory
            if _size(file) == 0:
                raise CheckpointError(f"The checkpoint {name!r} is empty. {_REMEDY}")
            raise damaged(name, "it isn't a zip archive, the format that torch writes, or its end is missing")
        if isinstance(file, Path):  # checking a remote file would transfer it twice
            with zipfile.ZipFile(file) as archive:
                if (member := archive.testzip()) is not None:
                    raise damaged(name, f"the checksum of {member!r} doesn't match")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many types for damaged archives
        raise damaged(name, first_line(error)) from error
    if not isinstance(file, Path):
        file.seek(0)


def _size(file: Path | IO[bytes]) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, 2)


def _why_refused(name: str, error: pickle.UnpicklingError) -> str:
    match = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", str(error))
    if match is None:
        return str(damaged(name, first_line(error)))
    return (
        f"The checkpoint {name!r} contains {match[1] or match[2]}, which is neither a tensor nor a plain value and "
        "could run code, so nothing was loaded. If you trust its author and need that object, allow it by name with "
        "torch.serialization.add_safe_globals."
    )


def _check_content(checkpoint: object, name: str, *, from_trainer: bool) -> None:
    """Check that the contents are those of a checkpoint of Lightning."""
    problem = f"{name!r} isn't a Lightning checkpoint: "
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{problem}it contains no 'state_dict'.")
    weights = checkpoint["state_dict"]
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        raise CheckpointError(f"{problem}its 'state_dict' isn't a dict of tensors by name.")
    for key in ("hyper_parameters", "datamodule_hyper_parameters", "loops", "callbacks", "lightning_ft"):
        if not isinstance(checkpoint.get(key, {}), Mapping):
            raise CheckpointError(f"{problem}its {key!r} isn't a dict.")
    if from_trainer:
        try:
            Version(checkpoint[VERSION])
        except (KeyError, TypeError, InvalidVersion) as error:
            raise CheckpointError(f"{problem}it doesn't name the version of Lightning that wrote it.") from error


__all__ = [
    "VERSION",
    "Source",
    "checked_file",
    "damaged",
    "local_file",
    "local_path",
    "read_checkpoint",
    "refuse_pickle",
    "write_checkpoint",
]
