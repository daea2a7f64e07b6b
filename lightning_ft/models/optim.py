"""The default optimizer and learning-rate schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lightning_ft.errors import ConfigError
from lightning_ft.importing import import_object

ParameterGroup = dict[str, Any]
"""Parameters and their settings, as `torch.optim` takes them."""

Schedule = Literal["cosine", "linear", "constant"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Split trainable parameters into two groups: matrices with weight decay, and norms and biases without.

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
    schedule: Schedule, *, warmup_ratio: float, total_steps: Callable[[], int | None]
) -> Callable[[int], float]:
    """Return the learning-rate factor as a function of the optimizer step: linear warm-up, then `schedule`.

    No step has rate 0: of `w` warm-up steps the first has ``1 / (w + 1)`` of the peak, the step after them the peak,
    and the last step of the run is the last one before the schedule reaches 0. That is transformers' schedule, shifted
    by one step. At least one step has the peak rate, even in a run of a single step.

    Args:
        schedule: Schedule after the warm-up: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup_ratio: Share of all steps in the warm-up, rounded up.
        total_steps: Function that returns the number of steps; None without an end, or if it isn't known yet (see
            :func:`set_first_rate`).

    Raises:
        ConfigError: For an unknown schedule or a ratio outside [0, 1).

    Example:
        >>> factor = schedule_factor("linear", warmup_ratio=0.2, total_steps=lambda: 10)
        >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 9)]
        [0.333, 0.667, 1.0, 0.5, 0.125]
    """
    if schedule not in ("cosine", "linear", "constant"):
        raise ConfigError(f"lr_schedule={schedule!r}: expected 'cosine', 'linear' or 'constant'.")
    if not 0 <= warmup_ratio < 1:
        raise ConfigError(f"warmup_ratio={warmup_ratio}: expected a share in [0, 1).")

    def factor(step: int) -> float:
        total = total_steps()
        if total is None:
            if schedule != "constant" and step > 0:
                raise ConfigError(
                    f"lr_schedule={schedule!r} needs the number of training steps: use a Trainer with max_steps or "
                    "max_epochs, or lr_schedule='constant'."
                )
            return 1.0  # nothing to decay to, or not known before the first step
        warmup = min(math.ceil(total * warmup_ratio), max(0, total - 1))
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


class ExtendableLambdaLR(torch.optim.lr_scheduler.LambdaLR):
    """A `LambdaLR` whose optimizer may get parameter groups during training, as callbacks add that unfreeze layers.

    An added group takes its first step with the rate that it was added with; from there its rate changes in proportion
    to the schedule.

    Args:
        optimizer: The optimizer.
        lr_lambda: Function from the number of steps taken to the factor of the learning rates of all groups.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = ExtendableLambdaLR(optimizer, lambda step: 1 - step / 4)
        >>> optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1})
        >>> optimizer.step()
        >>> scheduler.step()
        >>> [round(group["lr"], 3) for group in optimizer.param_groups]
        [0.75, 0.075]
    """

    def __init__(self, optimizer: torch.optim.Optimizer, lr_lambda: Callable[[int], float]) -> None:
        super().__init__(optimizer, lr_lambda)

    def get_lr(self) -> list[float | torch.Tensor]:
        """As in `LambdaLR`, for the groups added since the last step too."""
        factor = self.lr_lambdas[0]
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            current = factor(self.last_epoch - 1)  # of the step that the group has just taken
            group["initial_lr"] = group["lr"] / (current or 1.0)
            self.base_lrs.append(group["initial_lr"])
        self.lr_lambdas = [factor] * len(self.base_lrs)
        return super().get_lr()


def set_first_rate(scheduler: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Set the learning rate of the first step according to the schedule.

    A scheduler sets the first rate when it is created, before the Trainer has loaded its data and the number of steps
    is known. Call this once it is known. A scheduler that has already taken a step isn't changed.

    Args:
        scheduler: Scheduler of the optimizer that is about to take its first step.

    Example:
        >>> total = None
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> factor = schedule_factor("constant", warmup_ratio=0.3, total_steps=lambda: total)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        >>> total = 10
        >>> set_first_rate(scheduler)
        >>> optimizer.param_groups[0]["lr"]  # a quarter of the peak: three steps warm up
        0.125
    """
    if scheduler.last_epoch != 0:
        return
    rates = [base * factor(0) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=False):  # added groups keep their own
        group["lr"] = rate
    scheduler._last_lr = rates


def set_peak_rates(scheduler: torch.optim.lr_scheduler.LambdaLR, rates: Sequence[float]) -> None:
    """Replace the learning rates at the peak of a schedule; the rates of the next step follow.

    Args:
        scheduler: Scheduler of the optimizer.
        rates: Learning rate of each parameter group at the peak.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        >>> set_peak_rates(scheduler, [2.0])
        >>> optimizer.param_groups[0]["lr"], scheduler.base_lrs
        (1.0, [2.0])
    """
    scheduler.base_lrs, scheduler._last_lr = list(rates), []
    for group, peak, factor in zip(scheduler.optimizer.param_groups, rates, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * factor(scheduler.last_epoch)
        scheduler._last_lr.append(group["lr"])


def adamw(groups: Iterable[ParameterGroup], learning_rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Create AdamW for parameter groups, fused where its kernel exists: one pass over the weights instead of several.

    On a CPU that is three to six times as fast.

    Args:
        groups: Parameter groups.
        learning_rate: Learning rate at the peak of the schedule.
        betas: Decay rates of AdamW's running averages of the gradient and its square.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> adamw([{"params": [weight]}], 1e-3, (0.9, 0.999)).param_groups[0]["fused"]
        True
    """
    groups = list(groups)
    fused = all(_has_fused_kernel(parameter) for group in groups for parameter in group["params"])
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True if fused else None)
    # The fused kernel offers to unscale gradients itself, and Lightning refuses to clip those of an optimizer that does
    # so, with a gradient scaler (16-mixed) or without (bf16-mixed). Without the offer the scaler unscales them first.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _has_fused_kernel(parameter: nn.Parameter) -> bool:
    sharded = hasattr(parameter, "full_tensor")
    return parameter.is_floating_point() and parameter.device.type in (("cuda",) if sharded else ("cpu", "cuda"))


ADAMW = "adamw"
OptimizerLike = str | dict[str, Any]
"""``adamw``, the import path of an optimizer class, or a dict of its ``class_path`` and ``init_args``."""


def named_class(optimizer: OptimizerLike, names: Sequence[str] = (ADAMW,)) -> str | None:
    """Import path of the optimizer class that an argument names; None for one of `names`.

    Args:
        optimizer: Value of the argument `optimizer`.
        names: Names that are no import paths.

    Raises:
        ConfigError: If it is neither.

    Example:
        >>> named_class("adamw"), named_class({"class_path": "torch.optim.RMSprop"})
        (None, 'torch.optim.RMSprop')
    """
    path = optimizer.get("class_path") if isinstance(optimizer, dict) else optimizer
    unknown = set(optimizer) - {"class_path", "init_args"} if isinstance(optimizer, dict) else set()
    if not isinstance(path, str) or unknown or (path not in names and not {".", ":"} & set(path)):
        raise ConfigError(
            f"optimizer={optimizer!r}: expected {', '.join(map(repr, names))} or the import path of an optimizer "
            "class, such as 'bitsandbytes.optim.PagedAdamW8bit'; a dict has class_path and init_args."
        )
    return None if path in names else path


def make_optimizer(
    optimizer: OptimizerLike, groups: Iterable[ParameterGroup], learning_rate: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Create the optimizer that an argument names, for groups that say which parameters don't decay.

    Args:
        optimizer: ``adamw``, an import path, or a dict of ``class_path`` and ``init_args``, which come last.
        groups: Parameter groups.
        learning_rate: Learning rate at the peak of the schedule.
        betas: Decay rates of running averages, for a class that takes them.

    Raises:
        ConfigError: If there is no such class, it is no optimizer, or it refuses its arguments.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), 0.1)
        >>> named = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
        >>> optimizer = make_optimizer(named, groups, 1e-2, (0.9, 0.99))
        >>> [(group["lr"], group["momentum"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.01, 0.9, 0.1), (0.01, 0.9, 0.0)]
    """
    path = named_class(optimizer)
    if path is None:
        return adamw(groups, learning_rate, betas)
    found = import_object(path, argument="optimizer", error=ConfigError)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer={path!r} is no subclass of torch.optim.Optimizer.")
    options: dict[str, Any] = {"lr": learning_rate}
    if "betas" in inspect.signature(found).parameters:
        options["betas"] = betas
    options |= (optimizer.get("init_args") or {}) if isinstance(optimizer, dict) else {}
    try:
        return found(list(groups), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer={path!r} refuses {options}: {error}") from error
