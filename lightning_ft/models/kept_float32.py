"""What stays in float32 when a model is cast: frequencies of rotary positions, and what transformers never rounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def kept_float32(module: nn.Module) -> Iterator[None]:
    """Within this context, a cast of the module leaves in float32 what a loaded model has in float32 in every dtype.

    Otherwise the model that is trained isn't the one that its export is loaded as. A frequency of rotary positions in
    bfloat16 is wrong by up to 0.4%, and so the angle of position 2,000 by up to whole radians. Biases of routers
    decide which experts a token goes to; models name them, and other such tensors, in `_keep_in_fp32_modules_strict`,
    or in `_keep_in_fp32_modules` if float16 alone is too coarse. A trained parameter takes the precision that was
    asked for, since it is exported in it.

    Args:
        module: The module; what is kept follows it to another device.
    """
    frequencies = {
        name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name.endswith("inv_freq")
    }
    rounded = dict(_never_rounded(module))
    yield
    for name, before in frequencies.items():
        if _tensor(module, name).dtype != before.dtype:
            _restore(module, name, before)
    for name, (before, dtypes) in rounded.items():
        if _tensor(module, name).dtype in dtypes:
            _restore(module, name, before)


def stays_float32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers loads a weight or buffer in float32 where a model is loaded in a dtype.

    Args:
        model: The model.
        name: Name of the weight or buffer in it.
        dtype: The dtype of the others.
    """
    patterns = set(model._keep_in_fp32_modules_strict or ()) if dtype in _HALF else set()
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    return any(re.search(pattern, name) for pattern in patterns)


def _never_rounded(module: nn.Module) -> Iterator[tuple[str, tuple[Tensor, list[torch.dtype]]]]:
    """Yield names of tensors that aren't trained, each with its value and the dtypes that are too coarse for it."""
    for prefix, model in module.named_modules():
        if not isinstance(model, PreTrainedModel):
            continue
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.requires_grad or tensor.dtype != torch.float32:
                continue
            dtypes = [dtype for dtype in _HALF if stays_float32(model, name, dtype)]
            if dtypes:
                yield f"{prefix}.{name}" if prefix else name, (tensor.data, dtypes)


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, own_name = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), own_name)
    return tensor


def _restore(module: nn.Module, name: str, before: Tensor) -> None:
    cast = _tensor(module, name)
    if before.is_meta and not cast.is_meta:
        return
    if isinstance(cast, DTensor):  # as PyTorch casts it: FSDP2 finds its parameters in the modules
        torch.utils.swap_tensors(cast, nn.Parameter(before.to(cast.device), requires_grad=False))
    else:
        cast.data = before.to(cast.device)
