"""Functions by where they stand: ``package.module.function``, or ``path/to/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_ft.errors import LightningFTError

_FORBIDDEN = ContextVar("_FORBIDDEN", default=False)


@contextmanager
def without_imports() -> Iterator[None]:
    """Within it nothing of the user's is imported: who looks at rows must not have to run a stranger's code.

    Functions that are asked for are placeholders, which give no value that is one.
    """
    token = _FORBIDDEN.set(True)
    try:
        yield
    finally:
        _FORBIDDEN.reset(token)


def _placeholder(path: str) -> Any:
    def placeholder(*_: Any, **__: Any) -> Any:
        return placeholder

    placeholder.__name__ = re.split(r"[.:]", path)[-1]
    return placeholder


def from_import_path(path: str, *, argument: str, error: type[LightningFTError]) -> Any:
    """Import ``package.module.name`` or ``package.module:name``.

    Args:
        path: Where it stands.
        argument: What was given as such, for messages.
        error: What is raised where the module fails.

    Raises:
        ModuleNotFoundError: If there is no such module.
        AttributeError: If the module has no such name.
        LightningFTError: The `error` given, if the module can't be imported for another reason, which must not be taken
            for its absence.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> from_import_path("operator.add", argument="scorer", error=ConfigError)(1, 2)
        3
    """
    if _FORBIDDEN.get():
        return _placeholder(path)
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name is not None and f"{module_name}.".startswith(f"{cause.name}."):
            raise
        raise error(_failed(argument, path, cause)) from cause
    except Exception as cause:  # whatever the module does when it is imported
        raise error(_failed(argument, path, cause)) from cause
    try:
        return _attribute(module, name)
    except AttributeError:
        raise
    except Exception as cause:  # modules may import a name when it is asked for
        raise error(_failed(argument, path, cause)) from cause


def from_file(path: str, *, argument: str, error: type[LightningFTError]) -> Any:
    """Take a name from a Python file, as ``path/to/file.py:name``.

    The file is run once, however many names are taken from it. Its folder is put behind all others on Python's path, so
    that it finds the modules beside it.

    Args:
        path: Where it stands.
        argument: What was given as such, for messages.
        error: What is raised.

    Raises:
        LightningFTError: The `error` given, if there is no such file or name, or the file fails.
    """
    place, _, name = path.rpartition(":")
    file = Path(place).resolve()
    if not file.is_file():
        raise error(f"{argument}={path!r}: there is no file {place!r} (looked for {str(file)!r}).")
    if _FORBIDDEN.get():
        return _placeholder(path)
    try:
        module = _module(file)
    except Exception as cause:  # whatever the file does
        raise error(_failed(argument, path, cause)) from cause
    try:
        return _attribute(module, name)
    except AttributeError as cause:
        raise error(f"{argument}={path!r}: {place} has no {name!r}.") from cause


def import_object(place: str, *, argument: str, error: type[LightningFTError]) -> Any:
    """Take what stands at ``path/to/file.py:name``, ``package.module.name`` or ``package.module:name``.

    Args:
        place: Where it stands.
        argument: What was given as such, for messages.
        error: What is raised.

    Raises:
        LightningFTError: The `error` given, if there is nothing, or the file or module fails.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> import_object("operator:add", argument="scorer", error=ConfigError)(1, 2)
        3
    """
    if is_file(place):
        return from_file(place, argument=argument, error=error)
    try:
        return from_import_path(place, argument=argument, error=error)
    except (ImportError, AttributeError) as cause:
        raise error(f"{argument}={place!r} can't be imported: {cause}") from cause


def is_file(place: str) -> bool:
    """Whether a place is one in a file, as ``path/to/file.py:name``.

    Example:
        >>> is_file("mine/rewards.py:short"), is_file("package.module:short")
        (True, False)
    """
    return place.rpartition(":")[0].endswith(".py")


def _module(file: Path) -> ModuleType:
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it is run: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(found: Any, name: str) -> Any:
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _failed(argument: str, path: str, cause: Exception) -> str:
    return f"{argument}={path!r}: importing it failed with {type(cause).__name__}: {cause}"
