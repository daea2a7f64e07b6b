"""Imports objects by import path: ``package.module.name``, ``package.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_ft.errors import LightningFTError

_DISABLED = ContextVar("_DISABLED", default=False)


@contextmanager
def without_imports() -> Iterator[None]:
    """Context in which imports by path return placeholders, so that looking at rows runs no code of their author.

    A placeholder can be called with any arguments, and returns itself.
    """
    token = _DISABLED.set(True)
    try:
        yield
    finally:
        _DISABLED.reset(token)


def _placeholder(path: str) -> Callable[..., object]:
    def placeholder(*_: object, **__: object) -> object:
        return placeholder

    placeholder.__name__ = re.split(r"[.:]", path)[-1]
    return placeholder


def from_import_path(path: str, *, argument: str, error: type[LightningFTError]) -> Any:
    """Import ``package.module.name`` or ``package.module:name``.

    Args:
        path: Import path of the object.
        argument: Name of the argument that holds the path, for error messages.
        error: Exception class to raise if the module fails while it is imported.

    Returns:
        The object.

    Raises:
        ModuleNotFoundError: If there is no such module.
        AttributeError: If the module has no such name.
        LightningFTError: An `error`, if the module exists but can't be imported.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> from_import_path("operator.add", argument="scorer", error=ConfigError)(1, 2)
        3
    """
    if _DISABLED.get():
        return _placeholder(path)
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name is not None and f"{module_name}.".startswith(f"{cause.name}."):
            raise
        raise error(_failure(argument, path, cause)) from cause
    except Exception as cause:  # importing a module may raise anything
        raise error(_failure(argument, path, cause)) from cause
    try:
        return _attribute(module, name)
    except AttributeError:
        raise
    except Exception as cause:  # a module's `__getattr__` may import lazily
        raise error(_failure(argument, path, cause)) from cause


def from_file(path: str, *, argument: str, error: type[LightningFTError]) -> Any:
    """Import ``path/to/file.py:name`` from a Python file.

    The file is run once, even if several names are imported from it. Its folder is appended to `sys.path`, so that it
    can import the modules next to it.

    Args:
        path: Path of the file and the name in it.
        argument: Name of the argument that holds the path, for error messages.
        error: Exception class to raise.

    Returns:
        The object.

    Raises:
        LightningFTError: An `error`, if the file or the name doesn't exist, or the file fails while it is run.
    """
    file_path, _, name = path.rpartition(":")
    file = Path(file_path).resolve()
    if not file.is_file():
        raise error(f"{argument}={path!r}: there is no file {file_path!r} (looked for {str(file)!r}).")
    if _DISABLED.get():
        return _placeholder(path)
    try:
        module = _module(file)
    except Exception as cause:  # running a file may raise anything
        raise error(_failure(argument, path, cause)) from cause
    try:
        return _attribute(module, name)
    except AttributeError as cause:
        raise error(f"{argument}={path!r}: {file_path} has no {name!r}.") from cause


def import_object(path: str, *, argument: str, error: type[LightningFTError]) -> Any:
    """Import ``path/to/file.py:name``, ``package.module.name`` or ``package.module:name``.

    Args:
        path: Import path of the object.
        argument: Name of the argument that holds the path, for error messages.
        error: Exception class to raise.

    Returns:
        The object.

    Raises:
        LightningFTError: An `error`, if the object doesn't exist, or its file or module can't be imported.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> import_object("operator:add", argument="scorer", error=ConfigError)(1, 2)
        3
    """
    if is_file_path(path):
        return from_file(path, argument=argument, error=error)
    try:
        return from_import_path(path, argument=argument, error=error)
    except ImportError as cause:
        raise error(not_importable(argument, path, str(cause))) from cause
    except AttributeError as cause:
        # The module may be another of the same name as the file that was meant.
        remedy = _file_to_write(path)
        raise error(f"{argument}={path!r} can't be imported: {cause}." + (f" {remedy}." if remedy else "")) from cause


def not_importable(argument: str, path: str, reason: str) -> str:
    """Message for a module that can't be imported, with the form for a function in a file.

    Args:
        argument: Name of the argument that holds the path.
        path: Import path of the object.
        reason: Reason why it can't be imported.
    """
    remedy = _file_to_write(path) or "For a function in a file, write path/to/file.py:function"
    return (
        f"{argument}={path!r} can't be imported: {reason.removesuffix('.')}. {remedy}; for one in a package, install "
        "the package or add its folder to PYTHONPATH."
    )


def _file_to_write(path: str) -> str | None:
    """What to write instead of an import path whose module is a file of the current folder; None if there is none."""
    module, _, name = path.rpartition(":" if ":" in path else ".")
    file = f"{module.replace('.', '/')}.py"
    return f"There is a file {file!r}: write {file}:{name or 'function'}" if Path(file).is_file() else None


def is_file_path(path: str) -> bool:
    """Whether an import path names a file, as in ``path/to/file.py:name``.

    Example:
        >>> is_file_path("mine/rewards.py:short"), is_file_path("package.module:short")
        (True, False)
    """
    return path.rpartition(":")[0].endswith(".py")


def is_import_path(text: str) -> bool:
    """Whether a text has the form ``package.module.name`` or ``package.module:name``.

    Example:
        >>> is_import_path("package.module:name"), is_import_path("owner/model"), is_import_path("name")
        (True, False, False)
    """
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*(\.[^\W\d]\w*)*", text) is not None


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
    sys.modules[name] = module  # before the module runs, since dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _failure(argument: str, path: str, cause: Exception) -> str:
    return f"{argument}={path!r}: importing it failed with {type(cause).__name__}: {cause}"
