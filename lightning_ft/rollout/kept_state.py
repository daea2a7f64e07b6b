"""What engines of other libraries change in a process and in a model, set back after them."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.models.head import input_device
from lightning_ft.models.kept_float32 import stays_float32


@contextmanager
def heap_frozen() -> Iterator[None]:
    """Keep the objects that exist before the block out of its garbage collections.

    Transformers collects all garbage twice at the end of every session, which takes a second in a process that has
    imported PyTorch, most of the time of a short rollout.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def process_kept(device: torch.device, variables: Sequence[str]) -> Iterator[None]:
    """Set environment variables and the global random generators back after the block.

    Args:
        device: Device whose generator is set back, besides those of the CPU.
        variables: Names of the environment variables.
    """
    before = {name: os.environ.get(name) for name in variables}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[int]:
    """Draw a seed, and let the block, which seeds all global generators, leave no other trace in them."""
    seed = int(torch.randint(2**31, (), device=device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield seed


@contextmanager
def attention_kept(model: PreTrainedModel) -> Iterator[None]:
    """Set the attention implementation back after the block, which transformers doesn't do after an error."""
    before = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def data_kept() -> Iterator[Callable[[nn.Parameter, Tensor], None]]:
    """Yield a function that gives a parameter other data, which it has until the end of the block."""
    kept: list[tuple[nn.Parameter, Tensor]] = []

    def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
        kept.append((parameter, parameter.data))
        parameter.data = data

    try:
        yield replace_data
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def weights_in_autocast_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Hold fp32 weights in autocast's dtype for the block, if it is under autocast; the fp32 ones return unchanged.

    Autocast itself doesn't reach the thread that generates, and its products don't fit a cache in the weights' dtype.
    """
    device = input_device(model).type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    with data_kept() as replace_data:
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and not stays_float32(model, name, dtype):
                replace_data(parameter, parameter.data.to(dtype))
        yield
