"""Shard a Hugging Face model with FSDP2: which weights are gathered together, in which dtype, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lightning_ft.distributed import max_over_ranks, mesh_device
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.backbone import head_of
from lightning_ft.models.head import gathered_dtype, register_sharded
from lightning_ft.models.load import quantization_options
from lightning_ft.models.load_once import receive_weights

_NO_8_BIT = (
    "FSDP2 would separate 8-bit weights from their scales, which bitsandbytes keeps with the weight: use 4 bits "
    "(quantization='4bit'), which can be sharded, or DDP."
)
_GATHERED_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

_CASTS = ("16-true", "64-true")
"""Ends of precisions under which the Trainer casts all trained weights to one dtype, after they are sharded."""


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are sharded over ranks (FSDP), so that all ranks must run the model together."""
    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        isinstance(module, FSDPModule) or type(module).__name__ == "FullyShardedDataParallel"
        for module in model.modules()
    )


def check_quantization(quantization: str | dict[str, Any] | None) -> None:
    """Refuse weights that can't be sharded, before they are loaded.

    4-bit weights can, as bytes: FSDP2 casts only floating-point weights, and each `Linear4bit` keeps the scales of its
    own weight, which stay whole on every rank (a byte per 64 weights with double quantization).

    Args:
        quantization: Argument of a module.

    Raises:
        ConfigError: For 8-bit weights.
    """
    if quantization is not None and not quantization_options(quantization).get("load_in_4bit"):
        raise ConfigError(f"quantization={quantization!r} can't be used with ModelParallelStrategy. {_NO_8_BIT}")


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Return FSDP2's policy for a precision of the Trainer.

    Under ``bf16-mixed`` and ``16-mixed``, weights are gathered in half precision, which is what the products take, and
    half as much to send. Gradients are summed over ranks in fp32 (fp64 under ``64-true``) in any precision.

    Args:
        precision: The Trainer's precision.

    Example:
        >>> mixed_precision("bf16-mixed").param_dtype, mixed_precision("bf16-true").param_dtype
        (torch.bfloat16, None)
        >>> mixed_precision("bf16-true").reduce_dtype
        torch.float32
    """
    reduced = torch.float64 if precision.startswith("64") else torch.float32
    return MixedPrecisionPolicy(param_dtype=_GATHERED_DTYPES.get(precision), reduce_dtype=reduced)


def offload_policy(cpu_offload: bool, device_type: str) -> OffloadPolicy:
    """Return FSDP2's policy for where shards are between passes.

    Args:
        cpu_offload: Whether they are in the memory of the CPU, where the optimizer updates them.
        device_type: Type of the device that the passes are made on. Only for a GPU the memory is page-locked, so that
            copies don't wait for each other; without one PyTorch can't do that.

    Example:
        >>> offload_policy(True, "cuda"), offload_policy(True, "cpu")
        (CPUOffloadPolicy(pin_memory=True), CPUOffloadPolicy(pin_memory=False))
    """
    return CPUOffloadPolicy(pin_memory=device_type == "cuda") if cpu_offload else OffloadPolicy()


class ShardGroups(NamedTuple):
    """The modules of a model that are gathered by themselves; what is left over is gathered with the root.

    Args:
        layers: The decoder layers.
        ends: Embeddings and head; None where they share a weight, or have none outside of the layers.
    """

    layers: list[nn.Module]
    ends: tuple[nn.Module, nn.Module] | None


def shard_groups(base: PreTrainedModel) -> ShardGroups:
    """Divide a model into the groups that :func:`shard` shards.

    Args:
        base: Model, with its adapters if any, before it is sharded.

    Raises:
        ModelError: If transformers doesn't name the model's layers.
    """
    layer_names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [module for module in base.modules() if type(module).__name__ in layer_names]
    if not layers:
        raise ModelError(f"{type(base).__name__} doesn't name its layers (_no_split_modules), so it can't be sharded.")
    embeddings, head = base.get_input_embeddings(), head_of(base)
    if not isinstance(embeddings, nn.Module) or head is None:
        return ShardGroups(layers, None)
    weights = [*embeddings.parameters(), *head.parameters()]
    grouped = {id(p) for layer in layers for p in layer.parameters()}
    apart = len({id(p) for p in weights} - grouped) == len(weights)
    return ShardGroups(layers, (embeddings, head) if apart else None)


def shard(base: PreTrainedModel, mesh: DeviceMesh, precision: str = "32-true", *, cpu_offload: bool = False) -> None:
    """Shard a model over the ranks of a device mesh; all ranks must call it.

    Each decoder layer is a group, whose weights are gathered for its pass and freed after it. So are the embeddings and
    the head, which are the largest of all in a model with a large vocabulary: as part of the root, they would be in
    memory from the start of the forward pass to the end of the backward pass. Tied ones are, since the first and the
    last thing that a pass needs is the same tensor.

    Weights that only rank 0 has loaded (`lightning_ft.models.load_once`) are sent to the others one group at a time.

    The root is the transformers model and not the PEFT wrapper around it, whose `generate` would not gather the
    weights.

    Args:
        base: Model, with its adapters if any.
        mesh: The `device_mesh` of Lightning's ModelParallelStrategy, or one with the dimensions ``replicate`` and
            ``shard``: ranks of the same shard hold the same weights, and gradients are summed over all ranks.
        precision: The Trainer's precision, which decides the dtypes of what is sent; see :func:`mixed_precision`.
        cpu_offload: Whether shards of weights and gradients are in the memory of the CPU between passes.

    Raises:
        ModelError: For tensor parallelism and 8-bit weights, which aren't supported, if transformers doesn't name the
            model's layers, or if weights that are gathered together are trained in several dtypes.
    """
    if any(type(p).__name__ == "Int8Params" for p in base.parameters()):
        raise ModelError(f"{type(base).__name__} is quantized to 8 bits. {_NO_8_BIT}")
    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        raise ModelError("Tensor parallelism isn't supported. Pass tensor_parallel_size=1 to ModelParallelStrategy.")
    data_mesh = mesh["data_parallel"] if "data_parallel" in names else mesh
    policy, offload = mixed_precision(precision), offload_policy(cpu_offload, mesh.device_type)
    layers, ends = shard_groups(base)
    device = mesh_device(mesh)
    send = max_over_ranks(int(any(p.is_meta for p in base.parameters())), device)

    def share(part: nn.Module, reshard_after_forward: bool | None = None) -> FSDPModule:
        if not precision.endswith(_CASTS):
            _check_one_dtype(part, base)
        if send:
            receive_weights(part, device)
        options: dict[str, Any] = {"mesh": data_mesh, "mp_policy": policy, "offload_policy": offload}
        return fully_shard(part, reshard_after_forward=reshard_after_forward, **options)

    for layer in layers:
        share(layer)
    if ends is not None:
        embeddings, head = ends
        # The gradient of a lookup doesn't depend on the weights.
        share(embeddings).set_unshard_in_backward(False)
        # Its backward pass is the next thing after its forward pass, so it isn't freed in between.
        share(head, reshard_after_forward=False)
        register_sharded(head)
    share(base)
    register_sharded(base)


def _check_one_dtype(part: nn.Module, base: PreTrainedModel) -> None:
    """Refuse weights that FSDP2 would only find in the first pass not to fit together."""
    trained = {p.dtype: name for name, p in part.named_parameters() if p.requires_grad and not isinstance(p, DTensor)}
    if len(trained) > 1:
        found = " and ".join(f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in trained.items())
        raise ModelError(
            f"{type(base).__name__}: {type(part).__name__} trains weights in {found}, and FSDP2 gathers and sums those "
            "of one dtype together. Pass dtype='float32' to load all in one, with precision='bf16-mixed' if products "
            "should be in bfloat16; or precision='bf16-true', which casts all that is trained."
        )


def sharded_parts(model: nn.Module) -> list[FSDPModule]:
    """The modules of a model whose weights are gathered together, each with its own; none without sharding."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free all gathered weights of a model, so that its parameters are the shards again.

    FSDP2 keeps those of the root and of the head for a backward pass. After a pass without one they would take memory,
    and be used by a pass after the weights have changed.
    """
    for part in sharded_parts(model):
        part.reshard()


@contextmanager
def kept_gathered(base: PreTrainedModel) -> Iterator[None]:
    """Keep weights that the passes in the block gather until its end; each is gathered once.

    Args:
        base: Sharded model, as :func:`shard` was passed it. No weight may change in the block.
    """
    parts = sharded_parts(base)
    ends: tuple[object, ...] = (base, head_of(base))
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        reshard(base)
        for part in parts:
            part.set_reshard_after_forward(part not in ends, recurse=False)


def gathered_bytes(base: PreTrainedModel) -> int:
    """Bytes of all weights of a model in the dtype that they are gathered in, in addition to the shards."""
    half = gathered_dtype(base)
    itemsizes = [(half if half and p.is_floating_point() else p.dtype).itemsize for p in base.parameters()]
    return sum(p.numel() * size for p, size in zip(base.parameters(), itemsizes, strict=True))


@contextmanager
def gradients_kept_apart(model: nn.Module) -> Iterator[None]:
    """Let backward passes add up the gradients of each rank; the first one after the block sums them over ranks.

    Args:
        model: Sharded model. For the time of an accumulation window, each rank has the gradients of all trained
            weights, in fp32.
    """
    parts = sharded_parts(model)
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)
