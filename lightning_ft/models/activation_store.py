"""Hidden states of sequences on disk, keyed by the sequences' tokens.

A store is a folder of safetensors files, each with the states of some hundreds of sequences. A file is written under
another name and moved into the folder in one step, never changes afterwards, and is read memory-mapped. So several
processes can share a store, and a killed process loses only what it hadn't written yet. Each sequence has a checksum,
verified when its states are first read: a file with a mismatch is removed, and its sequences count as missing again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_ft.atomic_files import remove_leftovers
from lightning_ft.errors import FileWriteError
from lightning_ft.models.tensors import tensor_bytes, write_tensors

_SHARD = 64 * 2**20
"""Bytes per file."""
_MARK = ".lightning_ft_states"
"""Name of a file in each folder of states. Folders without it belong to someone else and are never removed."""


def sequence_digest(input_ids: Tensor) -> bytes:
    """The key of a sequence: a 16-byte hash of its tokens.

    Args:
        input_ids: Token ids, ``int64 [t]``, on the CPU.

    Example:
        >>> sequence_digest(torch.tensor([1, 2])) == sequence_digest(torch.tensor([1, 2, 3])[:2])
        True
    """
    return hashlib.blake2b(input_ids.contiguous().numpy().tobytes(), digest_size=16).digest()


class _Slice(Protocol):
    """A tensor in an open safetensors file, which is read by slices."""

    def __getitem__(self, index: slice) -> Tensor: ...


class _Position(NamedTuple):
    """Where the states of a sequence are stored."""

    states: _Slice
    start: int
    stop: int
    checksum: int
    file: Path


class ActivationStore:
    """States of sequences in a folder.

    Args:
        root: Folder with one subfolder per key.
        key: Name of what computes the states (model, weights, software).
        limit: Maximum size of `root` in bytes. Other keys' folders are removed to make room, least recently used first.

    Example:
        >>> import tempfile
        >>> root = tempfile.TemporaryDirectory()
        >>> store = ActivationStore(Path(root.name), "some-model", limit=2**20)
        >>> store.put(b"0" * 16, torch.ones(3, 4)), store.get(b"0" * 16).shape, store.get(b"1" * 16) is None
        (True, torch.Size([3, 4]), True)
        >>> store.flush()
        >>> ActivationStore(Path(root.name), "some-model", limit=2**20).get(b"0" * 16).sum().item()
        12.0
    """

    def __init__(self, root: Path, key: str, *, limit: int) -> None:
        self._root, self.folder, self._limit = root, root / key, limit
        self.failure = ""
        """Why nothing more is stored, such as a full disk; stored states are still read."""
        try:
            self._make_folder()
            os.utime(self.folder)  # marks the folder as used
            remove_leftovers(self.folder)
        except OSError as error:
            self.failure = f"{str(self.folder)!r} can't be written ({error.strerror})."
        self._positions: dict[bytes, _Position] = {}
        self._verified: set[bytes] = set()
        self._read: set[str] = set()
        self._pending: dict[bytes, Tensor] = {}
        self._pending_bytes = 0
        self._written = 0
        self._others = sum(map(_bytes_in, self._other_folders()))
        self.full = False
        """Whether the limit kept any states from being stored."""
        self.refresh()

    def __len__(self) -> int:
        return len(self._positions) + len(self._pending)

    def refresh(self) -> None:
        """Read the index of files that other processes have written; an unreadable file is removed."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                file = safe_open(str(path), framework="pt")
                digests, starts = file.get_tensor("digests"), file.get_tensor("starts").tolist()
                checksums, states = file.get_tensor("checksums").tolist(), file.get_slice("states")
                positions = {
                    digest.numpy().tobytes(): _Position(states, start, stop, checksum, path)
                    for digest, start, stop, checksum in zip(digests, starts, starts[1:], checksums, strict=False)
                }
            except (OSError, SafetensorError, TypeError):  # TypeError: a tensor without a length
                path.unlink(missing_ok=True)
                continue
            self._read.add(path.name)
            self._positions |= positions
        self._written = _bytes_in(self.folder)

    def get(self, digest: bytes) -> Tensor | None:
        """The states of a sequence, ``[t, d]`` on the CPU; None if they aren't stored."""
        if (pending := self._pending.get(digest)) is not None:
            return pending
        if (position := self._positions.get(digest)) is None:
            return None
        states: Tensor | None
        try:
            states = position.states[position.start : position.stop]
        except (OSError, SafetensorError, LookupError, TypeError, ValueError):
            states = None
        if digest in self._verified and states is not None:
            return states
        if states is None or self._checksum(digest, states) != position.checksum:
            self._forget(position.file)
            return None
        self._verified.add(digest)
        return states

    def _checksum(self, digest: bytes, states: Tensor) -> int:
        """A checksum over the states, the sequence's digest and the store's key."""
        return zlib.crc32(tensor_bytes(states), zlib.crc32(self.folder.name.encode() + digest))

    def _forget(self, file: Path) -> None:
        """Remove a file whose contents changed after it was written."""
        file.unlink(missing_ok=True)
        self._positions = {digest: position for digest, position in self._positions.items() if position.file != file}
        self._written = _bytes_in(self.folder)

    def put(self, digest: bytes, states: Tensor) -> bool:
        """Store the states of a sequence, ``[t, d]``; False if there is no room."""
        if self.failure:
            return False
        size = states.numel() * states.element_size()
        if not self._make_room(self._written + self._pending_bytes + size):
            self.full = True
            return False
        self._pending[digest] = states.detach().cpu()
        self._pending_bytes += size
        if self._pending_bytes >= _SHARD:
            self.flush()
        return True

    def flush(self) -> None:
        """Write pending states to disk. If that fails, `failure` says why, and nothing is stored from then on."""
        if not self._pending:
            return
        lengths = torch.tensor([0, *(len(states) for states in self._pending.values())])
        tensors = {
            "digests": torch.tensor([list(digest) for digest in self._pending], dtype=torch.uint8),
            "starts": lengths.cumsum(0),
            "checksums": torch.tensor([self._checksum(*item) for item in self._pending.items()]),
            "states": torch.cat(list(self._pending.values())),
        }
        try:
            self._make_folder()  # another process may have removed it to make room
            write_tensors(self.folder / f"{uuid.uuid4().hex}.safetensors", tensors)
        except OSError as error:
            self.failure = str(error) if isinstance(error, FileWriteError) else f"{str(self.folder)!r}: {error}."
        self._pending, self._pending_bytes = {}, 0
        self.refresh()

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes of states in total, including those already stored.

        Raises:
            OSError: If that exceeds the limit or the free space on the disk.
        """
        if not self._make_room(size):
            raise OSError(f"{size:,} bytes of states are more than the {self._limit:,} that may be kept.")
        if self.failure:
            raise OSError(self.failure)
        free = shutil.disk_usage(self.folder).free
        if size - self._written > free:
            raise OSError(f"{size - self._written:,} bytes of states are more than the {free:,} free on the disk.")

    def _make_room(self, size: int) -> bool:
        """Whether this key may take `size` bytes, after removing other keys' folders if necessary."""
        if size > self._limit:
            return False
        if size + self._others > self._limit:
            others = sorted(self._other_folders(), key=_used)
            taken = {path: _bytes_in(path) for path in others}
            for path in others:
                if size + sum(taken.values()) <= self._limit:
                    break
                shutil.rmtree(path, ignore_errors=True)
                del taken[path]
            self._others = sum(taken.values())
        return True

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _MARK).touch()

    def _other_folders(self) -> list[Path]:
        return [mark.parent for mark in self._root.glob(f"*/{_MARK}") if mark.parent != self.folder]


def _bytes_in(folder: Path) -> int:
    return sum(map(_size, folder.glob("*.safetensors")))


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed by another process meanwhile
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
