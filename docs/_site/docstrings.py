"""Griffe extension: docstrings as the site shows them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|data|mod):`~?(?:[\w.]+\.)?(?P<name>\w+)`")


def readable(text: str) -> str:
    """Docstring in which griffe finds the example, and without the roles of Sphinx.

    Example:
        >>> print(readable('''See :func:`~package.module.function`.
        ...
        ... Example:
        ...     >>> 1 + 1'''))
        See `function`.
        <BLANKLINE>
        Examples:
            >>> 1 + 1
    """
    return ROLE.sub(r"`\g<name>`", re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE))


class Docstrings(griffe.Extension):
    """Applies :func:`readable` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change a docstring once griffe has read it."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
