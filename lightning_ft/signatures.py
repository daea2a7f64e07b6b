"""Signatures and docstrings of classes that share arguments with their base classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence


def complete(cls: type) -> None:
    """Replace ``**options`` in the signature and docstring of a class by the arguments that it represents.

    They are those of the constructors of its base classes, without the ones that the class names itself.

    Args:
        cls: The class.
    """
    parameters = _parameters(cls.__mro__)
    cls.__signature__ = inspect.Signature(parameters[1:])  # type: ignore[attr-defined]
    if "__doc__" in cls.__dict__ and cls.__doc__:
        before, own, after = _split_args(inspect.cleandoc(cls.__doc__))
        texts: dict[str, str] = {}
        for base in reversed(cls.__mro__[1:]):
            texts |= _split_args(inspect.cleandoc(base.__dict__.get("__doc__") or ""))[1]
        texts |= own
        entries = [texts[p.name] for p in parameters[1:] if p.name in texts]
        if entries:
            cls.__doc__ = "\n".join([before.rstrip(), "", "Args:", *entries, "", after.lstrip()]).rstrip() + "\n"


def _parameters(bases: Sequence[type]) -> list[inspect.Parameter]:
    """Parameters of the constructor, `self` first, with those that ``**options`` represents.

    Args:
        bases: The class and its bases in the order in which ``super().__init__`` calls them.
    """
    index = next(i for i, base in enumerate(bases) if "__init__" in base.__dict__)
    owner = bases[index]
    own = list(inspect.signature(owner.__dict__["__init__"]).parameters.values())
    if own[-1].kind is not inspect.Parameter.VAR_KEYWORD or not owner.__module__.startswith("lightning_ft."):
        return own  # the constructor of a user's class may do anything with its **kwargs
    inherited = _parameters(bases[index + 1 :])
    names = {p.name for p in own}
    return [*own[:-1], *(p for p in inherited if p.name not in names)]


_ENTRY = re.compile(r"    (\w+): ")


def _split_args(doc: str) -> tuple[str, dict[str, str], str]:
    """Text before ``Args:``, the entry of each argument, and the text after them."""
    before, header, rest = doc.partition("\nArgs:\n")
    entries: dict[str, str] = {}
    lines = rest.split("\n") if header else []
    name = ""
    while lines and lines[0].startswith("    "):
        line = lines.pop(0)
        match = _ENTRY.match(line)
        name = match[1] if match else name
        entries[name] = f"{entries[name]}\n{line}" if name in entries else line
    return before, entries, "\n".join(lines)
