"""Frequencies of rotary positions, which casts of a model leave exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def exact_frequencies(module: nn.Module) -> Iterator[None]:
    """Within this context, a cast of the module leaves the frequencies of rotary positions as they are.

    transformers computes positions in float32 in every dtype, and a loaded model has float32 frequencies. A frequency
    in bfloat16 is wrong by up to 0.4%, and so the angle of position 2,000 by up to whole radians: the model that is
    trained wouldn't be the one that its export is loaded as.

    Args:
        module: The module; its frequencies follow it to another device.
    """
    before = {name: b for name, b in module.named_buffers(remove_duplicate=False) if name.endswith("inv_freq")}
    yield
    for name, frequencies in before.items():
        owner, _, buffer = name.rpartition(".")
        cast = module.get_buffer(name)
        if cast.dtype != frequencies.dtype and not frequencies.is_meta:
            setattr(module.get_submodule(owner), buffer, frequencies.to(cast.device))
