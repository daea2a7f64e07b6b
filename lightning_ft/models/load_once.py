"""Load a model on one rank of many that will share its weights: the others get its structure, without weights.

If every rank loaded the model before it is sharded, a machine with 8 ranks would hold 8 models. So rank 0 loads, and
sends the model with its parameters on the meta device. `lightning_ft.models.shard` then sends the weights group by
group, each just before it is sharded, so that the other ranks hold their shards and the weights of one group.

Rank 0 needs no memory for a whole model either, unless it casts the weights: transformers maps safetensors files, and
parameters in the dtype of their checkpoint are views of these. Casting each group when it is sharded would need a model
that was made in one dtype to hold weights of another: scales that models make from the default dtype, probes of the
model, and initializations of adapters that read weights would then differ from those of one process.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_ft.distributed import on_rank_zero, rank_and_world_size
from lightning_ft.errors import LightningFTError, ModelError
from lightning_ft.read_errors import first_line

Loaded = TypeVar("Loaded")
_INPUT_HOOK = "PreTrainedModel.enable_input_require_grads.<locals>.make_inputs_require_grads"
"""Hook on embeddings that gradient checkpointing of adapters needs."""


def load_once(load: Callable[[], Loaded]) -> Loaded:
    """Load a model on rank 0; on the other ranks, return what it loaded with parameters on the meta device.

    Buffers and everything else are copied. Where a model can't be pickled, every rank loads it.

    Args:
        load: Function that loads a model, and returns it or a tuple that contains it. Every rank must pass the same.

    Raises:
        LightningFTError: On all ranks, if rank 0 can't load it.

    Example:
        >>> load_once(lambda: nn.Linear(2, 1)).weight.device.type  # rank 0
        'cpu'
    """
    rank, ranks = rank_and_world_size()
    if ranks == 1:
        return load()
    loaded: list[Loaded] = []

    def on_first(_: list[None]) -> list[bytes | None]:
        try:
            loaded.append(load())
        except LightningFTError:
            raise
        except Exception as error:
            raise ModelError(
                f"Rank 0 can't load the model for all ranks ({type(error).__name__}: {first_line(error)})."
            ) from error
        return [_structure(loaded[0])] * ranks

    structure = on_rank_zero(on_first, None)
    if rank == 0:
        return loaded[0]
    found: Loaded = load() if structure is None else pickle.loads(structure)
    return found


@torch.no_grad()
def receive_weights(part: nn.Module, device: torch.device) -> None:
    """Send the parameters of a module from rank 0 to ranks that have them on the meta device; all ranks must call it.

    Args:
        part: The module; parameters that are sharded already are left out.
        device: Device on which the process group communicates, and on which the others put them.
    """
    for parameter in part.parameters():
        if isinstance(parameter, DTensor):
            continue
        whole = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.detach().to(device)
        dist.broadcast(whole, src=0)
        if parameter.is_meta:  # the same object, which other modules may share
            torch.utils.swap_tensors(parameter, nn.Parameter(whole, parameter.requires_grad))


class _StructurePickler(pickle.Pickler):
    """Pickles parameters as their shape, dtype and whether they are trained."""

    def reducer_override(self, value: Any) -> Any:
        if getattr(value, "__qualname__", None) == _INPUT_HOOK:
            return _input_hook, ()
        if not isinstance(value, nn.Parameter):
            return NotImplemented
        if type(value) is not nn.Parameter:
            raise pickle.PicklingError(f"a {type(value).__name__} is more than its numbers")
        return _meta_parameter, (tuple(value.shape), value.dtype, value.requires_grad)


def _meta_parameter(shape: tuple[int, ...], dtype: torch.dtype, trained: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), trained)


def _input_hook() -> Callable[..., None]:
    """The hook of transformers that no pickle can name, since it is a function inside a method."""
    return _require_gradients


def _require_gradients(module: nn.Module, args: object, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _structure(loaded: object) -> bytes | None:
    """What a model is without its weights; None if it can't be pickled."""
    file = io.BytesIO()
    try:
        _StructurePickler(file).dump(loaded)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return file.getvalue()
