"""Checkpoints of sharded models: a folder into which each rank writes its own shards, without gathering any.

The tensors are in the format of `torch.distributed.checkpoint`: a file per rank, and ``.metadata`` that says which part
of which tensor is where, so that any number of ranks can read them, and one process too. Everything else of a Trainer's
checkpoint is in ``meta.pt``, a checkpoint file without tensors of weights and of optimizers, with the checksum of every
other file. Like a file, the folder appears when it is complete, and is read without running any code in it:
``.metadata`` is a pickle, of which only the classes that describe tensors are accepted.
"""

from __future__ import annotations

import io
import pickle
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from lightning_ft.atomic_files import flush_to_disk, remove, remove_leftovers, replace_folder, temporary_path
from lightning_ft.atomic_files import write_failure as failed_write
from lightning_ft.checkpoint_file import Source, damaged, local_path, read_checkpoint, write_checkpoint
from lightning_ft.distributed import all_gather_objects, on_rank_zero, rank_and_world_size
from lightning_ft.errors import CheckpointError, FileWriteError
from lightning_ft.read_errors import first_line

if TYPE_CHECKING:
    from torch.serialization import MAP_LOCATION as MapLocation

META = "meta.pt"
_METADATA = ".metadata"
_CHECKSUMS = "lightning_ft_files"
"""Key in ``meta.pt`` of the checksums of the other files, by name."""
_WEIGHTS, _OPTIMIZER = "state_dict", "optimizer_"
_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
"""What ``.metadata`` may name, besides dtypes."""


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether a path is the folder of a sharded checkpoint, intact or not."""
    folder = local_path(path)
    return folder is not None and (folder / META).is_file()


def write_sharded_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write the checkpoint of a sharded model; every rank must call it.

    Args:
        checkpoint: A Trainer's checkpoint. Tensors of its ``state_dict`` and ``optimizer_states`` may be sharded; the
            latter name parameters, where a file numbers them.
        path: Folder to write; an earlier checkpoint of this name is replaced.

    Raises:
        FileWriteError: On all ranks, if any rank can't write its part; an earlier checkpoint is then unchanged.
    """
    tensors, rest = _split(checkpoint)
    rank, ranks = rank_and_world_size()
    temporary = Path(on_rank_zero(lambda _: [_prepare(path)] * ranks, None))
    checksums: dict[str, int] = {}
    problem = None
    try:
        with _quiet():
            save_tensors(tensors, storage_writer=_Writer(temporary))
        names = [file.name for file in temporary.glob(f"__{rank}_*")] + ([_METADATA] if rank == 0 else [])
        checksums = {name: _checksum(temporary / name) for name in names}
    except (CheckpointException, OSError, RuntimeError) as error:
        problem = _reason(error)

    def finish(outcomes: list[tuple[str | None, dict[str, int]]]) -> list[None]:
        try:
            reason = next((problem for problem, _ in outcomes if problem is not None), None)
            if reason is None:
                found = {name: value for _, own in outcomes for name, value in own.items()}
                write_checkpoint({**rest, _CHECKSUMS: found}, temporary / META)
                flush_to_disk(temporary)
                replace_folder(temporary, path)
        except OSError as error:
            reason = _reason(error)
        finally:
            remove(temporary)
        if reason is not None:
            raise _unwritten(path, reason)
        return [None] * ranks

    on_rank_zero(finish, (problem, checksums))


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A sharded checkpoint whose files are intact, of which no tensor has been read.

    Args:
        path: Its folder.
        rest: A Trainer's checkpoint without the tensors of ``state_dict`` and ``optimizer_states``. The latter have
            names of parameters where a file has their numbers.
        tensors: Dtype and shape of each tensor by key: ``state_dict.<name of the weight>``, and
            ``optimizer_0.state.<name of the weight>.<name in the optimizer's state>``.
    """

    path: Path
    rest: dict[str, Any]
    tensors: Mapping[str, TensorStorageMetadata]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each weight by name."""
        prefix = f"{_WEIGHTS}."
        return {key.removeprefix(prefix): t.size for key, t in self.tensors.items() if key.startswith(prefix)}

    def optimizer_tensors(self, index: int) -> dict[tuple[str, str], str]:
        """Keys of an optimizer's tensors by the weight's name and the name in the optimizer's state.

        Args:
            index: Index of the optimizer.
        """
        prefix = f"{_OPTIMIZER}{index}.state."
        keys = {key: key.removeprefix(prefix).rpartition(".") for key in self.tensors if key.startswith(prefix)}
        return {(name, entry): key for key, (name, _, entry) in keys.items()}

    def optimizer_state(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """State of an optimizer as its own `state_dict` gives it, with numbers for the names of parameters.

        Args:
            index: Index of the optimizer.
            tensors: Its tensors by key.
        """
        saved = self.rest["optimizer_states"][index]
        number = {name: i for i, name in enumerate(n for group in saved["param_groups"] for n in group["params"])}
        state: dict[int, dict[str, Any]] = {number[name]: dict(plain) for name, plain in saved["state"].items()}
        for (name, entry), key in self.optimizer_tensors(index).items():
            state.setdefault(number[name], {})[entry] = tensors[key]
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load(self, into: Mapping[str, Tensor], *, alone: bool = False) -> None:
        """Read tensors, each rank its own shards.

        Args:
            into: Tensors by key, sharded or not, which are overwritten. All ranks must name the same keys.
            alone: Whether only this process reads.

        Raises:
            CheckpointError: If they can't be read.
        """
        try:
            with _quiet(), torch.no_grad():
                load_tensors(dict(into), storage_reader=_Reader(self.path), no_dist=alone)
        except CheckpointException as error:
            raise damaged(str(self.path), _reason(error)) from error


def open_sharded_checkpoint(path: str | Path, *, together: bool = False) -> ShardedCheckpoint:
    """Verify the files of a sharded checkpoint, and read what is no tensor.

    Args:
        path: Its folder.
        together: Whether all ranks make this call. Each then verifies some of the files, and all raise the same error.

    Raises:
        CheckpointError: If files are missing, damaged, or hold more than tensors and plain values.
    """
    folder = cast(Path, local_path(path))
    rank, ranks = rank_and_world_size() if together else (0, 1)
    opened, problem = None, None
    try:
        opened = _open(folder, rank, ranks)
    except CheckpointError as error:
        problem = str(error)
    problems = all_gather_objects(problem) if together else [problem]
    if (first := next((found for found in problems if found is not None), None)) is not None:
        raise CheckpointError(first)
    return cast(ShardedCheckpoint, opened)


def read_any_checkpoint(
    source: Source, map_location: MapLocation = "cpu", *, from_trainer: bool = False, optimizers: bool = True
) -> dict[str, Any]:
    """Read a checkpoint file, or a sharded checkpoint as if it were one, in one process.

    Args:
        source: Path, URL or open file of the checkpoint, or the folder of a sharded one.
        map_location: Device to load the tensors of a file to; those of a sharded checkpoint are on the CPU.
        from_trainer: As in `lightning_ft.checkpoint_file.read_checkpoint`.
        optimizers: Whether to read the states of optimizers from a sharded checkpoint.

    Raises:
        CheckpointNotFoundError: If the file doesn't exist.
        CheckpointError: If it can't be read.
    """
    if not isinstance(source, (str, Path)) or not is_sharded_checkpoint(source):
        return read_checkpoint(source, map_location, from_trainer=from_trainer)
    opened = open_sharded_checkpoint(source)
    wanted = {key: t for key, t in opened.tensors.items() if optimizers or key.startswith(f"{_WEIGHTS}.")}
    tensors = {key: torch.empty(t.size, dtype=t.properties.dtype) for key, t in wanted.items()}
    opened.load(tensors, alone=True)
    weights = {name: tensors[f"{_WEIGHTS}.{name}"] for name in opened.shapes}
    found = {**opened.rest, "state_dict": weights}
    states = found.pop("optimizer_states", None)
    if optimizers and states is not None:
        found["optimizer_states"] = [opened.optimizer_state(index, tensors) for index in range(len(states))]
    return found


@contextmanager
def as_file(source: Source) -> Iterator[Source]:
    """Yield a checkpoint file; the weights of a sharded checkpoint are written to a temporary one.

    Args:
        source: Path, URL or open file of a checkpoint, or the folder of a sharded one.
    """
    if not isinstance(source, (str, Path)) or not is_sharded_checkpoint(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="lightning_ft_") as folder:
        file = Path(folder) / "weights.ckpt"
        write_checkpoint(read_any_checkpoint(source, optimizers=False), file)
        yield file


# ---------------------------------------------------------------- the two parts of a checkpoint


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of weights and optimizers, nested as they are stored, and everything else."""
    tensors: dict[str, Any] = {_WEIGHTS: dict(checkpoint["state_dict"])}
    rest = {**checkpoint, "state_dict": {}}
    plain_states = []
    for index, saved in enumerate(checkpoint.get("optimizer_states", ())):
        plain: dict[str, Any] = {"state": {}, "param_groups": saved["param_groups"]}
        stored: dict[str, dict[str, Tensor]] = {}
        for name, values in saved["state"].items():
            for entry, value in values.items():
                part = stored if isinstance(value, Tensor) else plain["state"]
                part.setdefault(name, {})[entry] = value
        if stored:
            tensors[f"{_OPTIMIZER}{index}"] = {"state": stored}
        plain_states.append(plain)
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = plain_states
    return tensors, rest


# ---------------------------------------------------------------- files


class _Writer(FileSystemWriter):
    """Leaves the folder's temporary path out of what it writes."""

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Reader(FileSystemReader):
    """Reads ``.metadata`` without importing anything that it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _read_metadata(Path(self.path) / _METADATA)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which describes no tensor and could run code")


def _read_metadata(file: Path) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise damaged(str(file), first_line(error)) from error
    if not isinstance(metadata, Metadata) or not all(
        isinstance(name, str) and isinstance(stored, TensorStorageMetadata)
        for name, stored in metadata.state_dict_metadata.items()
    ):
        raise damaged(str(file), "it describes something other than tensors")
    return metadata


def _open(folder: Path, rank: int, ranks: int) -> ShardedCheckpoint:
    rest = read_checkpoint(folder / META, from_trainer=True)
    checksums = rest.pop(_CHECKSUMS, None)
    if not isinstance(checksums, Mapping) or _METADATA not in checksums:
        raise damaged(str(folder), f"{META} doesn't name the other files, so another program wrote it")
    for number, (name, checksum) in enumerate(sorted(checksums.items())):
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise damaged(str(folder), f"{name!r} is missing")
        if (number % ranks == rank or name == _METADATA) and _checksum(file) != checksum:
            raise damaged(str(folder), f"the checksum of {name!r} doesn't match")
    metadata = _read_metadata(folder / _METADATA)
    if any(stored.relative_path not in checksums for stored in metadata.storage_data.values()):
        raise damaged(str(folder), f"{_METADATA} names other files")
    return ShardedCheckpoint(folder, rest, cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata))


def _prepare(path: Path) -> str:
    """Make a temporary folder next to the one to write."""
    temporary = temporary_path(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary.mkdir()
    except OSError as error:
        raise _unwritten(path, _reason(error)) from error
    return str(temporary)


def _unwritten(path: Path, reason: str) -> FileWriteError:
    return FileWriteError(
        f"{str(path)!r} can't be written ({reason}). An earlier version is unchanged. Free some space, or choose "
        "another folder, which all ranks can write to."
    )


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            value = zlib.crc32(block, value)
    return value


def _reason(error: BaseException) -> str:
    """The system's reason for a failed write on any rank, or the first line of the error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return failed_write(error) or first_line(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide that one process reads or writes without a process group, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


__all__ = [
    "META",
    "ShardedCheckpoint",
    "as_file",
    "is_sharded_checkpoint",
    "open_sharded_checkpoint",
    "read_any_checkpoint",
    "write_sharded_checkpoint",
]
