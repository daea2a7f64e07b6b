"""The default optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from lightning_ft.errors import ConfigError

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and norms and biases, which don't.

    Example:
        >>> groups = parameter_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), 0.1)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 1), (0.0, 3)]
    """
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        (decay if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def schedule_factor(
    kind: Schedule, *, warmup_ratio: float, total_steps: Callable[[], int | None]
) -> Callable[[int], float]:
    """Factor on the learning rate by optimizer step: linear warm-up, then `kind`.

    The number of steps is asked for only after the first one: before a Trainer has set up its data it isn't known, and
    asking Lightning for it then would make a stateful loader lose its place when a run is resumed.

    Args:
        kind: What follows the warm-up.
        warmup_ratio: Share of all steps that warm up, from zero as in transformers.
        total_steps: Gives the number of steps, None where there is no end.

    Raises:
        ConfigError: For an unknown kind or a ratio outside [0, 1).

    Example:
        >>> factor = schedule_factor("linear", warmup_ratio=0.2, total_steps=lambda: 10)
        >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if kind not in ("cosine", "linear", "constant"):
        raise ConfigError(f"lr_schedule={kind!r}: expected 'cosine', 'linear' or 'constant'.")
    if not 0 <= warmup_ratio < 1:
        raise ConfigError(f"warmup_ratio={warmup_ratio}: expected a share in [0, 1).")

    def factor(step: int) -> float:
        if step == 0:
            return 0.0 if warmup_ratio > 0 else 1.0
        total = total_steps()
        if total is None:  # only a constant schedule gets here; it has nothing to decay to
            return 1.0
        warmup = math.ceil(total * warmup_ratio)
        if step < warmup:
            return step / warmup
        if kind == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def adamw(
    groups: Iterable[dict[str, Any]], learning_rate: float, betas: tuple[float, float], *, scaled: bool = False
) -> torch.optim.AdamW:
    """AdamW over parameter groups; in one kernel for each of them on a CPU, three to six times as fast there.

    Args:
        groups: Of parameters.
        learning_rate: The peak.
        betas: Of AdamW.
        scaled: Whether a gradient scaler may be used. Lightning clips no gradients of an optimizer that could undo the
            scaling itself, as that kernel can.
    """
    groups = list(groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    plain = all(p.device.type == "cpu" and p.is_floating_point() and not hasattr(p, "full_tensor") for p in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True if plain and not scaled else None)
