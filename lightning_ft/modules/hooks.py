"""Hooks that a subclass may extend but not replace.

Lightning's own hooks do nothing, so they are usually overridden without a call of `super()`. Those of this package
average gradients, set the first learning rate, check rows and keep what an exact resume needs: a run without them would
go on, and be wrong.
"""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType

from lightning_ft.errors import ConfigError

_OTHERS = ("setup", "configure_callbacks", "configure_model", "optimizer_step")
"""Hooks whose names don't begin with ``on_``."""
_REPLACEABLE = ("on_after_batch_transfer",)  # it only converts batches, and others are refused


def refuse_replaced_hooks(cls: type) -> None:
    """Refuse a class with a hook that can't call the one of this package, since its code never names it.

    Args:
        cls: A subclass of a module of this package.

    Raises:
        ConfigError: With the call that is missing.
    """
    bases = cls.__mro__
    for position, owner in enumerate(bases):
        for name, hook in vars(owner).items() if not _is_ours(owner) else ():
            if not (name.startswith("on_") or name in _OTHERS) or name in _REPLACEABLE:
                continue
            replaced = next((base for base in bases[position + 1 :] if _is_ours(base) and name in vars(base)), None)
            function = inspect.unwrap(hook) if callable(hook) else None
            if replaced is None or not isinstance(function, FunctionType) or name in _names(function.__code__):
                continue
            code = function.__code__
            arguments = ", ".join(code.co_varnames[1 : code.co_argcount])
            raise ConfigError(
                f"{owner.__name__}.{name} must call super().{name}({arguments}): Lightning's own hook does nothing, "
                f"and that of {replaced.__name__} is part of how it trains, evaluates or resumes."
            )


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("lightning_ft.")


def _names(code: CodeType) -> set[str]:
    """Names of attributes in a function and in those defined in it, and its strings, for `getattr`."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    strings = {constant for constant in code.co_consts if isinstance(constant, str)}
    return {*code.co_names, *strings}.union(*map(_names, inner))
