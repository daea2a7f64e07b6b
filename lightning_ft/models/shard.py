"""Shard a Hugging Face model with FSDP2."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_ft.errors import ModelError
from lightning_ft.models.head import register_sharded


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are sharded over ranks (FSDP), so that all ranks must run the model together."""
    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )


def shard(base: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model over the data-parallel dimension of a device mesh, one decoder layer at a time.

    The root is the transformers model and not the PEFT wrapper around it, whose `generate` would not gather the
    weights.

    Args:
        base: Model, with its adapters if any.
        mesh: The `device_mesh` of Lightning's ModelParallelStrategy.

    Raises:
        ModelError: For tensor parallelism, which isn't supported, or if transformers doesn't name the model's layers.
    """
    from torch.distributed.fsdp import fully_shard

    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        raise ModelError("Tensor parallelism isn't supported. Pass tensor_parallel_size=1 to ModelParallelStrategy.")
    data_mesh = mesh["data_parallel"] if "data_parallel" in names else mesh
    layer_names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in layer_names]
    if not layers:
        raise ModelError(f"{type(base).__name__} doesn't name its layers (_no_split_modules), so it can't be sharded.")
    for layer in layers:
        fully_shard(layer, mesh=data_mesh)
    fully_shard(base, mesh=data_mesh)
    register_sharded(base)
