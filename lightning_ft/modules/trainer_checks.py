"""Checks of the Trainer's strategy, callbacks and precision, and of the model's own loss, made before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lightning_ft._lightning import LightningModule, _pl
from lightning_ft.atomic_files import unwritable
from lightning_ft.checkpoint_file import local_path
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import CausalLM
from lightning_ft.models.router import OwnLoss
from lightning_ft.modules.sharded_strategy import ShardedStrategy

_SAMPLED_WEIGHTS = 4096  # of each tensor


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy that these modules can't train with, before its processes communicate.

    Args:
        strategy: The Trainer's strategy.

    Raises:
        ConfigError: For DeepSpeed, and for sizes of a ModelParallelStrategy that don't fit; one error lists all
            arguments to change.
    """
    if "DeepSpeed" in type(strategy).__name__:
        raise ConfigError(
            "DeepSpeed divides and reduces gradients by itself, while the loss of a step is a mean over the tokens of "
            "all its micro-batches and ranks. It would take the number of these tokens before the first of its "
            "backward passes, and checkpoints of trainable weights in DeepSpeed's format. Use ModelParallelStrategy() "
            "(FSDP2), which shards weights, gradients and optimizer states as ZeRO-3 does, or DDP."
        )
    tensor, data = (getattr(strategy, f"_{name}_parallel_size", 1) for name in ("tensor", "data"))
    problems = []
    if tensor != 1:
        problems.append(f"tensor_parallel_size={tensor}, but tensor parallelism isn't supported")
    if isinstance(strategy, ShardedStrategy) and data != (ranks := strategy.num_nodes * strategy.num_processes):
        problems.append(f"data_parallel_size={data}, but the Trainer has {ranks} processes")
    if problems:
        raise ConfigError(
            f"{type(strategy).__name__}: {', and '.join(problems)}. Leave both arguments out: every process is then "
            "part of the data parallelism."
        )


def check_callbacks(trainer: Any, module: LightningModule) -> None:
    """Refuse callbacks that would have no effect, or another one, since they work before the weights are loaded.

    Refuse also a `ModelCheckpoint` whose folder can't be written, which would end training at its first checkpoint.

    Args:
        trainer: The Trainer.
        module: The module that is trained.

    Raises:
        ConfigError: For `BaseFinetuning` and `ModelPruning` with a module that has no weights yet, for `ModelPruning`
            with an adapter, and for such a folder.
    """
    if trainer.state.fn == "fit" and not trainer.fast_dev_run and trainer.node_rank == 0:
        for callback in trainer.checkpoint_callbacks:
            _check_folder(callback, trainer)
    for callback in trainer.callbacks:
        if not isinstance(callback, (_pl.callbacks.BaseFinetuning, _pl.callbacks.ModelPruning)):
            continue
        name = type(callback).__name__
        if getattr(module, "model", None) is None:  # a subclass may have layers of its own
            raise ConfigError(
                f"{name} looks at the weights before they are loaded: call `configure_model()` of the module before "
                "the Trainer's `fit`. (`LoRAFineTuning(top_layers=...)` leaves lower layers frozen without a callback.)"
            )
        if isinstance(callback, _pl.callbacks.ModelPruning) and any(
            isinstance(m, PeftModel) for m in module.children()
        ):
            raise ConfigError(f"{name} would prune weights under an adapter, which are frozen: use full fine-tuning.")


def _check_folder(callback: Any, trainer: Any) -> None:
    """Refuse the folder of a `ModelCheckpoint` if it can't be written; a logger makes its own."""
    chosen = getattr(callback, "dirpath", None) or (None if trainer.loggers else trainer.default_root_dir)
    folder = None if chosen is None else local_path(chosen)
    if folder is not None and (reason := unwritable(folder)) is not None:
        raise ConfigError(
            f"{type(callback).__name__} can't write into {str(folder)!r}: {reason}. Set its dirpath, or the Trainer's "
            "default_root_dir, to another folder."
        )


def check_checkpoints_by_step(trainer: Any, name: str, steps: int) -> None:
    """Refuse a `ModelCheckpoint` that writes nothing under manual optimization, and warn of one that writes less often.

    Lightning asks one by steps after each batch, whether their number so far is a multiple of its own.

    Args:
        trainer: The Trainer.
        name: Name of the module's class.
        steps: Number of optimizer steps per batch.

    Raises:
        ConfigError: For ``train_time_interval``.
    """
    for callback in trainer.checkpoint_callbacks:
        if (interval := getattr(callback, "_train_time_interval", None)) is not None:
            raise ConfigError(
                f"ModelCheckpoint(train_time_interval={interval!r}) writes no checkpoint with {name}, since Lightning "
                "reads that argument under automatic optimization only: pass every_n_train_steps instead."
            )
        every = getattr(callback, "_every_n_train_steps", 0)
        if every % steps:
            written = math.lcm(every, steps)
            rank_zero_warn(
                f"ModelCheckpoint(every_n_train_steps={every}) writes a checkpoint every {written:,} steps only, since "
                f"{name} takes {steps} steps per rollout, between which none is written: pass a multiple of {steps}."
            )


def warn_own_loss(own_loss: OwnLoss, model: torch.nn.Module, module: str, *, trained: bool) -> None:
    """Warn of terms in a model's own loss that are left out.

    Args:
        own_loss: These terms.
        model: The model.
        module: Name of the module's class.
        trained: Whether the module trains on the loss of a router.
    """
    if own_loss.router and not trained:
        rank_zero_warn(
            f"{type(model).__name__} is configured with a router loss (output_router_logits), which is not part of "
            f"{module}'s loss: set output_router_logits=False in the model's configuration to silence this."
        )
    if own_loss.unknown is not None and trained:
        rank_zero_warn(own_loss.unknown)


def warn_lost_steps(model: CausalLM, learning_rate: float, precision: str) -> None:
    """Warn of weights that are trained in 16 bits, where rounding loses optimizer steps.

    Args:
        model: The model in the dtypes that it is trained in.
        learning_rate: Learning rate at the peak of the schedule.
        precision: The Trainer's precision.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not trained:
        return
    dtype = str(trained[0].dtype).removeprefix("torch.")
    mixed = "bf16-mixed" if trained[0].dtype == torch.bfloat16 else "16-mixed"
    if isinstance(model, PeftModel) and precision in ("bf16-true", "16-true"):
        rank_zero_warn(
            f"precision={precision!r} has turned the adapter and AdamW's running averages into {dtype}, which loses "
            f"small steps. With precision={mixed!r} the adapter stays in float32, over a base in the dtype it was "
            "loaded in."
        )
    elif (lost := lost_steps(trained, learning_rate)) > 0.5:
        rank_zero_warn(
            f"For {lost:.0%} of the trained weights a step of learning_rate={learning_rate:.3g} is below the "
            f"resolution of {dtype}: they would hardly move. Train with dtype='float32' and precision={mixed!r}, "
            "which computes as fast, or raise learning_rate."
        )


def warn_slow_precision(model: CausalLM, device: torch.device, precision: str) -> None:
    """Warn of products in fp32 on a GPU, whose half-precision units are several times as fast.

    Args:
        model: The model in the dtypes that it is trained in.
        device: Device that it is trained on.
        precision: The Trainer's precision.
    """
    if device.type == "cuda" and precision == "32-true" and model.dtype == torch.float32:
        rank_zero_warn(
            "precision='32-true' computes in float32 on a GPU, which takes several times as long and more memory than "
            "Trainer(precision='bf16-mixed'), whose weights stay in float32."
        )


@torch.no_grad()
def lost_steps(weights: Sequence[Tensor], step: float) -> float:
    """Share of weights that a step leaves unchanged, since it is rounded away in their dtype.

    Args:
        weights: Floating-point tensors; only the first few thousand weights of each are looked at.
        step: Amount added to each weight; AdamW adds about the learning rate.

    Example:
        >>> lost_steps([torch.tensor([0.0, 0.25, 1.0, 2.0], dtype=torch.bfloat16)], 1e-3)
        0.5
    """
    lost = total = 0.0
    for weight in weights:
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        sample = local.detach().flatten()[:_SAMPLED_WEIGHTS]
        share = float(((sample + step) == sample).float().mean()) if len(sample) else 0.0
        lost, total = lost + share * weight.numel(), total + weight.numel()
    return lost / max(total, 1.0)
