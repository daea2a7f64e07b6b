"""Which strategies of Lightning these modules can't train with, and what to pass instead."""

from __future__ import annotations

from typing import Any

from lightning_ft.errors import ConfigError


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy before any weight is loaded, with all that is wrong with it.

    Args:
        strategy: The Trainer's.

    Raises:
        ConfigError: For DeepSpeed, tensor parallelism and checkpoints that are spread over files.
    """
    if "DeepSpeed" in type(strategy).__name__:
        raise ConfigError(
            "DeepSpeed keeps its gradients to itself, so the token-weighted mean can't be formed there: use DDP or "
            "ModelParallelStrategy (FSDP2)."
        )
    problems = []
    if getattr(strategy, "_tensor_parallel_size", 1) != 1:
        problems.append("tensor parallelism isn't supported")
    if getattr(strategy, "_save_distributed_checkpoint", False):
        problems.append("checkpoints hold trainable weights only, which checkpoints spread over files can't")
    if problems:
        raise ConfigError(
            f"{type(strategy).__name__}: {', and '.join(problems)}. Pass "
            f"ModelParallelStrategy(data_parallel_size={strategy.num_nodes * strategy.num_processes}, "
            "tensor_parallel_size=1, save_distributed_checkpoint=False)."
        )
