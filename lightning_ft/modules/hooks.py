"""Hooks that a subclass may extend but not replace.

Lightning's own hooks do nothing, so they are usually overridden without a call of `super()`. Those of this package
average gradients, set the first learning rate, check rows and keep what an exact resume needs: a run without them would
go on, and be wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CellType, CodeType, FunctionType

from lightning_ft.errors import ConfigError

_OTHERS = ("setup", "configure_callbacks", "configure_model", "optimizer_step")
"""Hooks whose names don't begin with ``on_``."""
_REPLACEABLE = ("on_after_batch_transfer",)  # it only converts batches, and others are refused
_OF_OPTIONS = (("LoRAFineTuning", "on_train_epoch_end"), ("PolicyOptimization", "on_before_optimizer_step"))
"""Hooks that serve options: the activation cache; clipping, and the check for values that aren't finite."""
_LIBRARIES = ("lightning", "pytorch_lightning", "torch")


def refuse_replaced_hooks(cls: type, *, with_options: bool = False) -> None:
    """Refuse a class with a hook that can't call the one of this package, since its code never names it.

    The code of a hook includes what its decorators wrap, and methods of the user's classes that it calls.

    Args:
        cls: A subclass of a module of this package.
        with_options: Whether to refuse also those that replace a hook which does nothing unless an option is set.

    Raises:
        ConfigError: With the call that is missing.
    """
    bases = cls.__mro__
    users = [base for base in bases if not _is_ours(base) and base.__module__.partition(".")[0] not in _LIBRARIES]
    for position, owner in enumerate(bases):
        for name, hook in vars(owner).items() if not _is_ours(owner) else ():
            if not (name.startswith("on_") or name in _OTHERS) or name in _REPLACEABLE:
                continue
            replaced = next((base for base in bases[position + 1 :] if _is_ours(base) and name in vars(base)), None)
            function = inspect.unwrap(hook) if callable(hook) else None
            if replaced is None or not isinstance(function, FunctionType) or _mentions(function, users, set(), name):
                continue
            if (replaced.__name__, name) in _OF_OPTIONS and not with_options:
                continue
            code = function.__code__
            arguments = ", ".join(code.co_varnames[1 : code.co_argcount])
            raise ConfigError(
                f"{owner.__name__}.{name} must call super().{name}({arguments}): Lightning's own hook does nothing, "
                f"and that of {replaced.__name__} is part of how it trains, evaluates or resumes."
            )


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("lightning_ft.")


def _mentions(function: FunctionType, users: Sequence[type], seen: set[object], name: str) -> bool:
    """Whether the code of a function, or of those that it wraps or calls, names something."""
    seen.add(function)
    names = _names_in(function.__code__)
    if name in names:
        return True
    wrapped = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    called = [vars(base)[each] for each in sorted(names) for base in users if each in vars(base)]
    others = [inspect.unwrap(each) for each in (*wrapped, *called) if callable(each)]
    return any(
        _mentions(each, users, seen, name) for each in others if isinstance(each, FunctionType) and each not in seen
    )


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # of a name that isn't assigned yet, as the class itself
        return False
    return True


def _names_in(code: CodeType) -> set[str]:
    """Names of attributes in a function and in those defined in it, and its strings, for `getattr`."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return {*code.co_names, *strings}.union(*map(_names_in, inner))
