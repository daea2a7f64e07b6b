"""Griffe extension: docstrings and signatures as the site shows them.

Griffe reads sources without running them, so it doesn't see what `lightning_ft.signatures.complete` adds to the classes
whose constructors pass ``**options`` on. Those are imported, and shown as `help` shows them.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod):`~?(?:[\w.]+\.)?(?P<name>\w+)`")
ROOMS = ("lightning_ft.modules.", "lightning_ft.data.")


def readable(text: str) -> str:
    """Docstring in which griffe finds the example, and without the roles of Sphinx.

    Example:
        >>> readable("See :func:`~package.module.function`."), readable("Example:")
        ('See `function`.', 'Examples:')
    """
    return ROLE.sub(r"`\g<name>`", re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE))


def parameters_of(signature: inspect.Signature) -> griffe.Parameters:
    """Parameters of a constructor with this signature.

    Example:
        >>> def build(model: str, *, seed: int = 0): ...
        >>> [str(parameter.annotation) for parameter in parameters_of(inspect.signature(build))]
        ['None', 'str', 'int']
    """
    kinds = {kind: griffe.ParameterKind(kind.description) for kind in inspect._ParameterKind}
    found = [griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)]
    for parameter in signature.parameters.values():
        annotation = parameter.annotation if isinstance(parameter.annotation, str) else _name(parameter.annotation)
        default = None if parameter.default is parameter.empty else repr(parameter.default)
        found.append(
            griffe.Parameter(parameter.name, annotation=annotation, kind=kinds[parameter.kind], default=default)
        )
    return griffe.Parameters(*found)


def _name(annotation: Any) -> str | None:
    return None if annotation is inspect.Parameter.empty else inspect.formatannotation(annotation)


class Docstrings(griffe.Extension):
    """Completes classes, and applies :func:`readable` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change a docstring once griffe has read it."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Take the signature and the docstring that `lightning_ft.signatures.complete` made."""
        constructor = cls.members.get("__init__")
        if not cls.path.startswith(ROOMS) or not isinstance(constructor, griffe.Function) or cls.docstring is None:
            return
        if all(parameter.kind is not griffe.ParameterKind.var_keyword for parameter in constructor.parameters):
            return
        completed = getattr(import_module(cls.module.path), cls.name)
        if "__signature__" in vars(completed):
            constructor.parameters = parameters_of(completed.__signature__)
            cls.docstring.value = readable(inspect.cleandoc(completed.__doc__))
