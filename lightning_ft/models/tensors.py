"""Tensors as bytes, and as files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def tensor_bytes(value: Tensor) -> memoryview:
    r"""What a tensor holds, of all ranks where it is sharded; to hash it.

    Example:
        >>> bytes(tensor_bytes(torch.tensor([1, 256], dtype=torch.int16)))
        b'\x01\x00\x00\x01'
    """
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return memoryview(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file aside and move it in one step, so that a run that is killed leaves nothing half written.

    Args:
        path: In a folder that exists.
        tensors: By name.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
        os.chmod(aside, 0o644)  # mkstemp's files are the owner's only; a shared cache is for all
        os.replace(aside, path)
    finally:
        Path(aside).unlink(missing_ok=True)
