"""FLOP counts: of code as it runs, operator by operator, or by formula for compiled code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lightning_ft.errors import ConfigError
from lightning_ft.models.head import base_of
from lightning_ft.models.unwrap import model_of, unwrapped

_HEAVY = re.compile(r"attention|attn|sdpa|gemm|gemv|matmul|grouped_mm|int_mm|_moe|moe_", re.IGNORECASE)
"""Names of operators that a count must not miss: attention, and matrix products of libraries and quantizations."""


_LEVEL: ContextVar[int] = ContextVar("level", default=0)
"""Number of :func:`counted_separately` contexts around the running code."""


@contextmanager
def counted_separately() -> Iterator[None]:
    """Suspend all counters that were created before this context: the code in it is counted by others.

    Example:
        >>> a = torch.ones(2, 3)
        >>> with OperationCounter() as outer, counted_separately(), OperationCounter() as inner:
        ...     product = a @ torch.ones(3, 5)
        >>> outer.flops, inner.flops
        (0, 60)
    """
    token = _LEVEL.set(_LEVEL.get() + 1)
    try:
        yield
    finally:
        _LEVEL.reset(token)


def _sdpa(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: object, **kwargs: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _sdpa_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: object, **kwargs: object
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _added(total: Sequence[int], a: Sequence[int], b: Sequence[int], *args: object, **kwargs: object) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _grouped(a: Sequence[int], b: Sequence[int], *args: object, **kwargs: object) -> int:
    groups = a[0] if len(a) == len(b) == 3 else 1  # otherwise the groups divide one of the dimensions
    return int(2 * groups * a[-2] * a[-1] * b[-1])


def _formulas() -> dict[object, Callable[..., int]]:
    """Formulas for operators that PyTorch's own table lacks (as of 2.13), in line with its own."""
    aten = torch.ops.aten
    known: dict[object, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
        aten.addmm_: _added,  # gradients of the output head are accumulated in place
    }
    return known | ({aten._grouped_mm: _grouped} if hasattr(aten, "_grouped_mm") else {})  # mixtures of experts


class OperationCounter(TorchDispatchMode):
    """Counts the FLOPs of the code inside it, in this thread and in the backward passes that it starts.

    Matrix products, convolutions and attention are counted by the formulas of `torch.utils.flop_counter`, with two
    operations per multiply-add. PyTorch's fused attention counts all pairs of queries and keys, as
    ``attn_implementation="eager"`` computes them, although kernels may skip masked ones; its backward pass includes the
    recomputed attention scores, a fifth product that eager attention doesn't have.

    Results are bitwise the same as without the counter. That rules out `FlopCounterMode`, which decomposes every
    operator that can be written with others, even if the device has a kernel for it that rounds differently (such as
    the gradient of SiLU). Code compiled by `torch.compile` can't be counted: see :func:`is_compiled`.

    Example:
        >>> a = torch.ones(2, 3)
        >>> with OperationCounter() as counter:
        ...     product = a @ torch.ones(3, 5)
        >>> counter.flops, counter.uncounted
        (60, ())
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Operations counted so far."""
        self._formulas: dict[object, Callable[..., int]] = FlopCounterMode(
            display=False, custom_mapping=_formulas()
        ).flop_registry
        self._seen: set[object] = set()
        self._level = _LEVEL.get()

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """Run an operator, and count it."""
        kwargs = kwargs or {}
        if _only_composite(func):  # arrives undecomposed in inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if _LEVEL.get() > self._level:
            return out
        self._seen.add(func)
        packet = getattr(func, "_overloadpacket", None)  # higher-order operators have none, and no formula
        if packet in self._formulas:
            self.flops += int(self._formulas[packet](*args, **kwargs, out_val=out))
        return out

    @property
    def saw_attention(self) -> bool:
        """Whether any attention operator ran, counted or not."""
        return any("attention" in name or "attn" in name for name in map(_name, self._seen))

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Attention and matrix-product operators that ran and for which there is no formula."""
        missed = (op for op in self._seen if getattr(op, "_overloadpacket", None) not in self._formulas)
        return tuple(sorted({name for op in missed if _HEAVY.search(name := _name(op))}))


@cache
def _only_composite(operator: object) -> bool:
    """Whether an operator is composed of others on every device, so that decomposing it changes nothing."""
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    keys = torch._C.DispatchKey
    own = (keys.CPU, keys.CUDA, keys.CompositeExplicitAutograd)
    composite = operator.has_kernel_for_dispatch_key(keys.CompositeImplicitAutograd)
    return composite and not any(operator.has_kernel_for_dispatch_key(key) for key in own)


def _name(operator: object) -> str:
    """An operator's name as ``library::operator``, without the overload."""
    named = getattr(operator, "name", None)
    name = str(named() if callable(named) else operator)
    return name.split(".")[0].lower()


def attention_kernel(module: nn.Module) -> str | None:
    """The attention implementation of a module's transformers model; None if the module has no such model."""
    model = model_of(module)
    return None if model is None else getattr(base_of(model).config, "_attn_implementation", None)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs code compiled by `torch.compile`, whose operators are invisible to a counter.

    A counter would make it run uncompiled in the counted steps. FlexAttention is compiled by transformers.

    Example:
        >>> is_compiled(nn.Linear(2, 2)), is_compiled(torch.compile(nn.Linear(2, 2)))
        (False, True)
    """
    if attention_kernel(module) == "flex_attention":
        return True
    inner = unwrapped(module)
    backbone = getattr(getattr(inner, "_logprob_model", None), "backbone", None)  # set by this package's modules
    if backbone is not None or getattr(inner, "_compiler_ctx", None) is not None:  # set by Lightning
        return True
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules())


def formula_flops_per_token(module: nn.Module, length: float) -> float:
    """Training FLOPs per token position, from the model's shape.

    Uses TRL's formula (`trl.trainer.utils.compute_flops_per_token`): the backward pass costs twice the forward pass,
    every token attends to its whole row, and the output head runs at every position, which is more than this package
    computes. With an adapter, gradients of frozen matrices aren't computed, so these count 4 instead of 6 FLOPs per
    weight, and the adapter's own weights 6.

    Args:
        module: A transformers or PEFT model, or a module that holds one as `model`.
        length: Number of positions per row.

    Raises:
        ConfigError: If the module holds no model, or one whose shape TRL's formula doesn't know.
    """
    from trl.trainer.utils import compute_flops_per_token

    model = model_of(module)
    if model is None:
        raise ConfigError(
            f"The operations of {type(module).__name__} can't be counted, since it is compiled, and the formula needs "
            "a transformers model, which it doesn't hold. Switch torch.compile off, or leave ComputeMeter out."
        )
    config = base_of(model).config.get_text_config(decoder=True)
    try:
        products = float(compute_flops_per_token(config, 0))
        attention = float(compute_flops_per_token(config, 1)) - products  # proportional to the length of the row
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"The operations of {type(base_of(model)).__name__} can't be counted, since it is compiled, and TRL's "
            f"formula doesn't know its shape ({error}): switch torch.compile off, or leave ComputeMeter out."
        ) from error
    if isinstance(model, PeftModel):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return products * 2 / 3 + attention * length + 6 * trained
    return products + attention * length


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOPs per second of a device in a dtype; None if no table lists it, as for every CPU.

    TRL's table of dense peaks comes first. Lightning's has more devices and float32, but sparse peaks for a few.

    Example:
        >>> known_peak(torch.device("cpu"), torch.float32) is None
        True
    """
    if device.type != "cuda":
        return None
    from trl.trainer.utils import get_peak_flops

    from lightning_ft._lightning import available_flops

    peak = get_peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
    return peak if peak is not None else available_flops(device, dtype)
