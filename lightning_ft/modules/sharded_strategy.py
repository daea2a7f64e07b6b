"""What Lightning's ModelParallelStrategy leaves to its users.

That is data parallelism by default, several copies of sharded weights, one reduction of gradients per accumulation
window, and checkpoints of trainable weights only, which any number of ranks can resume from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_ft._lightning import _pl
from lightning_ft.checkpoint_file import local_path
from lightning_ft.errors import CheckpointError, ConfigError
from lightning_ft.models.numerics import first_nonfinite
from lightning_ft.models.shard import gradients_kept_apart, reshard
from lightning_ft.sharded_checkpoint import ShardedCheckpoint, write_sharded_checkpoint

if TYPE_CHECKING:
    from pytorch_lightning.strategies import ModelParallelStrategy
else:
    ModelParallelStrategy = _pl.strategies.ModelParallelStrategy


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` (FSDP2) for the modules of this package: hybrid sharding, and offloading.

    A plain `ModelParallelStrategy` becomes one of these by itself, so that this class is only needed for an argument
    that Lightning's hasn't. These have the names that they have in Lightning's `FSDPStrategy`.

    Args:
        device_mesh: Number of copies of the weights, and number of ranks that each copy is sharded over; their product
            is the number of processes. ``[2, 8]`` on two machines with 8 GPUs each (HSDP, hybrid sharding) gathers
            weights within a machine, and sends only gradients from one machine to the other. None for one copy that is
            sharded over all ranks.
        cpu_offload: Whether shards of weights, gradients and optimizer states are in the memory of the CPU, where the
            optimizer updates them. A GPU then holds the layer that it computes, and activations.
        save_distributed_checkpoint: Whether each rank writes its shards into a folder. Otherwise the trainable weights
            are gathered on rank 0, which writes one file.
        process_group_backend: Backend of `torch.distributed`, such as ``gloo``; None for the one of the device.
        timeout: Time after which ranks that wait for another one fail.

    Raises:
        ConfigError: For a mesh that isn't two positive numbers.

    Example:
        >>> ShardedStrategy(device_mesh=(2, 8), cpu_offload=True).mesh_shape
        (2, 8)
    """

    mesh_shape: tuple[int, int] | None = None
    """Number of copies of the weights, and of shards of each; None for one copy."""
    cpu_offload: bool = False
    """Whether shards are in the memory of the CPU between passes."""

    def __init__(
        self,
        *,
        device_mesh: tuple[int, int] | None = None,
        cpu_offload: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if device_mesh is not None:
            self.mesh_shape = _two_sizes(device_mesh)
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Let the processes find each other, and arrange them in a mesh.

        Raises:
            ConfigError: If the mesh doesn't have as many ranks as there are processes, and for a precision or a
                process group that offloading doesn't work with.
        """
        if self.cpu_offload and self.precision_plugin.precision == "16-mixed":
            raise ConfigError(
                "cpu_offload=True can't be used with precision='16-mixed': its gradient scaler looks for gradients on "
                "the GPU. Use precision='bf16-mixed'."
            )
        if (shape := self.mesh_shape) is None:
            self._connect()
            return
        if shape[0] * shape[1] != (ranks := self.num_nodes * self.num_processes):
            raise ConfigError(
                f"device_mesh={list(shape)} is a mesh of {shape[0] * shape[1]} ranks, but the Trainer has {ranks} "
                f"processes: {self.num_nodes} nodes with {self.num_processes} each. For a copy of the weights on each "
                f"node, pass device_mesh={[self.num_nodes, self.num_processes]}."
            )
        self._connect()
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        cast(Any, self.lightning_module)._device_mesh = self._device_mesh

    def _connect(self) -> None:
        super().setup_environment()
        if self.cpu_offload and "cpu:" not in (backends := dist.get_backend_config()):
            raise ConfigError(
                f"cpu_offload=True needs a process group for tensors on the CPU, and this process has {backends!r}: "
                "leave out process_group_backend, and train without cpu_offload in another process."
            )

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has rows of its own, also those with the same shards."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _get_process_group_backend(self) -> str:
        """Norms of gradients on the CPU are summed over ranks, which NCCL can't do."""
        backend = str(super()._get_process_group_backend())
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    def model_to_device(self) -> None:
        """Move what isn't sharded to the device, and with `cpu_offload` leave the shards on the CPU."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        module, device = cast(Any, self.lightning_module), self.root_device
        module._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(device))
        module._device = device  # as `to` does, for `self.device` of the module

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients add up on each rank; Lightning's own does so for DDP only."""
        assert self.model is not None
        with gradients_kept_apart(self.model):
            yield

    # ---------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Weights that a checkpoint holds: each rank's shards of them, or for one file all of them on rank 0.

        Lightning's own includes the frozen base, which would be gathered, or copied, and then left out.
        """
        weights = self._kept()
        if self._save_distributed_checkpoint:
            return weights
        found = {}
        for name, weight in weights.items():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if self.is_global_zero:
                found[name] = whole.cpu()
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State of an optimizer, with names of parameters in a sharded checkpoint, and as in Lightning in a file.

        Raises:
            ConfigError: For an optimizer whose state isn't sharded like its weights: each rank has a part that no other
                knows of.
        """
        for parameter, values in optimizer.state.items():
            _refuse_local_state(optimizer, parameter, values)
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        names = {id(parameter): name for name, parameter in self._parameters()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        return {"state": {names[id(p)]: dict(v) for p, v in optimizer.state.items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None) -> None:
        """Write a checkpoint; with ``save_distributed_checkpoint=True`` a folder, see `sharded_checkpoint`.

        Raises:
            ConfigError: For a folder that isn't in a file system.
            FileWriteError: If it can't be written; an earlier one of its name is still there.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = local_path(self.broadcast(str(filepath)))
        if path is None or storage_options is not None:
            raise ConfigError(
                f"The checkpoint {str(filepath)!r} isn't in a file system that all ranks share, where each of them "
                "could write its part: choose another `dirpath`, or ModelParallelStrategy("
                "save_distributed_checkpoint=False), which gathers trainable weights on rank 0 and writes one file."
            )
        write_sharded_checkpoint(checkpoint, path)

    def load_sharded(self, checkpoint: ShardedCheckpoint) -> dict[str, Any]:
        """Load weights and states of optimizers, each rank its own shards, whatever number of ranks wrote them.

        Returns:
            The rest of the checkpoint.

        Raises:
            CheckpointError: If it doesn't fit the module or its optimizers, or holds weights that are not finite.
        """
        refuse_other_names(set(self._kept()), set(checkpoint.shapes), {name for name, _ in self._parameters()})
        refuse_other_shapes(cast(nn.Module, self.lightning_module), checkpoint.shapes)
        weights = {name: p.detach() for name, p in self._parameters() if name in checkpoint.shapes}
        into: dict[str, Tensor] = {f"state_dict.{name}": weight for name, weight in weights.items()}
        loaded = [self._optimizer_state(checkpoint, *each, into) for each in enumerate(self.optimizers)]
        checkpoint.load(into)
        for optimizer, state in zip(self.optimizers, loaded, strict=True):
            optimizer.load_state_dict(state)
        if (name := first_nonfinite(weights.items())) is not None:
            raise CheckpointError(
                f"The checkpoint's weight {name} holds values that are not finite, so every output would be NaN: use "
                "an earlier checkpoint."
            )
        return {key: value for key, value in checkpoint.rest.items() if key != "state_dict"}

    def _optimizer_state(
        self, checkpoint: ShardedCheckpoint, index: int, optimizer: Optimizer, into: dict[str, Tensor]
    ) -> dict[str, Any]:
        """State that the optimizer will load; its tensors, sharded like their weights, are added to `into`."""
        saved = checkpoint.rest["optimizer_states"][index]
        names = {id(parameter): name for name, parameter in self._parameters()}
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        if groups != [group["params"] for group in saved["param_groups"]]:
            raise CheckpointError(
                f"The checkpoint {str(checkpoint.path)!r} was written with other parameter groups of the optimizer. "
                "Use the optimizer of the run that wrote it, or load the weights alone with load_checkpoint()."
            )
        parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        for (name, _), key in checkpoint.optimizer_tensors(index).items():
            stored, parameter = checkpoint.tensors[key], parameters[name]
            dtype = stored.properties.dtype
            alike = stored.size == parameter.shape
            into[key] = torch.zeros_like(parameter, dtype=dtype) if alike else torch.zeros(stored.size, dtype=dtype)
        return checkpoint.optimizer_state(index, into)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and shards of all parameters."""
        module = cast(nn.Module, self.lightning_module)
        reshard(module)
        return module.named_parameters()

    def _kept(self) -> dict[str, Tensor]:
        """Shards of the weights that a checkpoint holds."""
        names = cast(Any, self.lightning_module).checkpoint_names()
        return {name: parameter.detach() for name, parameter in self._parameters() if name in names}


def _two_sizes(device_mesh: object) -> tuple[int, int]:
    sizes = tuple(device_mesh) if isinstance(device_mesh, (list, tuple)) else ()
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise ConfigError(
            f"device_mesh={device_mesh!r}: expected two numbers, the number of copies of the weights and the number of "
            "ranks that each copy is sharded over, such as (2, 8) for two machines with 8 GPUs each."
        )
    return sizes


def _refuse_local_state(optimizer: Optimizer, parameter: Tensor, values: Mapping[str, object]) -> None:
    several = isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1
    local = [n for n, v in values.items() if isinstance(v, Tensor) and not isinstance(v, DTensor) and v.ndim]
    if several and local:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__!r} keeps {local[0]!r} of sharded weights as a tensor of each rank, "
            "which no checkpoint can put together: use optimizer='adamw', or DDP."
        )


def refuse_other_names(expected: set[str], saved: set[str], existing: set[str]) -> None:
    """Refuse a checkpoint that lacks trainable weights of the module, or has weights that the module hasn't.

    Weights that exist and are frozen are accepted: a callback may have unfrozen them in the run that wrote them.

    Args:
        expected: Names of the weights that the module's own checkpoints hold.
        saved: Names of the checkpoint's weights.
        existing: Names of all weights of the module.

    Raises:
        CheckpointError: If it does.
    """
    missing, unknown = sorted(expected - saved), sorted(saved - existing)
    if missing or unknown:
        found = (("lacks", missing, "trainable weights"), ("has", unknown, "weights that don't exist here"))
        problems = [f"{verb} {len(n)} {what} (first: {', '.join(n[:3])})" for verb, n, what in found if n]
        raise CheckpointError(
            f"The checkpoint doesn't fit this module: it {' and '.join(problems)}. Use the model, the lora settings "
            "and, for PPO, the critic of the run that wrote it."
        )


def refuse_other_shapes(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Refuse weights whose shape differs from that of the parameter of the same name.

    Args:
        module: Module that the weights are loaded into.
        shapes: Shapes of the weights by name.

    Raises:
        CheckpointError: With the first such weight.
    """
    for name, parameter in module.named_parameters():
        if name in shapes and shapes[name] != parameter.shape:
            raise CheckpointError(
                f"The checkpoint doesn't fit this module: {name} is {tuple(shapes[name])} in it and "
                f"{tuple(parameter.shape)} here. Use the model and lora settings of the run that wrote it."
            )


def adopt(strategy: Any) -> None:
    """Give a ModelParallelStrategy the methods of :class:`ShardedStrategy`, and all ranks to its data parallelism.

    Its defaults are tensor parallelism within a machine, which these modules don't have. So ``"auto"`` means as many
    ranks as there are for `data_parallel_size`, and 1 for `tensor_parallel_size`.

    Args:
        strategy: The Trainer's strategy, before its processes communicate; others are left as they are.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    own = type(strategy)
    if not isinstance(strategy, ShardedStrategy):
        bases = (ShardedStrategy,) if own is ModelParallelStrategy else (ShardedStrategy, own)
        strategy.__class__ = type(own.__name__, bases, {})
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = 1
    if strategy._data_parallel_size == "auto" and strategy._tensor_parallel_size == 1:
        strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
