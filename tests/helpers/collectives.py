"""What ranks send to each other, counted by a dispatch mode."""

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    """A collective operation: `name` without its namespace, `dtype`, and `numel` of its largest tensor on a rank."""

    name: str
    dtype: torch.dtype
    numel: int


class Collectives(TorchDispatchMode):
    """Records every collective on tensors in `seen`, of FSDP2, DTensor and `torch.distributed`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sends = any(word in func._opname for word in ("gather", "reduce", "scatter", "broadcast", "all_to_all"))
        if func.namespace in ("c10d", "_c10d_functional") and sends:
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
            if tensors:
                largest = max(tensors, key=torch.Tensor.numel)
                self.seen.append(Collective(func._opname, largest.dtype, largest.numel()))
        return out
