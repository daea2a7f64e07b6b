"""Tensors as bytes for hashing, and as files that are written completely or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_ft.atomic_files import atomic_write

_CHECKSUM = "checksum"


def tensor_bytes(value: Tensor) -> memoryview:
    r"""Return the bytes of a tensor, gathered from all ranks if it is sharded.

    Example:
        >>> bytes(tensor_bytes(torch.tensor([1, 256], dtype=torch.int16)))
        b'\x01\x00\x00\x01'
    """
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return memoryview(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, key: str | None = None) -> None:
    """Write a safetensors file completely or not at all.

    Args:
        path: Path of the file.
        tensors: Tensors by name.
        key: Name that the checksum in the file covers in addition to the tensors, for :func:`read_tensors`.

    Raises:
        FileWriteError: If the file can't be written.
    """
    metadata = None if key is None else {_CHECKSUM: _checksum(tensors, key)}
    with atomic_write(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
        aside.chmod(0o644)  # safetensors creates files that only the owner can read; a shared cache is for all users


def read_tensors(path: Path, *, key: str) -> dict[str, Tensor] | None:
    """Read what :func:`write_tensors` wrote under a key; None if there is no such file, or its content differs."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tensors if metadata.get(_CHECKSUM) == _checksum(tensors, key) else None


def _checksum(tensors: Mapping[str, Tensor], key: str) -> str:
    digest = hashlib.sha256(key.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()
