"""Functions by where they stand: ``package.module.function``, or ``path/to/file.py:function``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_ft.errors import RewardError


def from_import_path(path: str) -> Any:
    """Import ``package.module.name`` or ``package.module:name``.

    Raises:
        ModuleNotFoundError: If there is no such module.
        AttributeError: If the module has no such name.
        RewardError: If the module can't be imported for another reason, which must not be taken for its absence.

    Example:
        >>> from_import_path("operator.add")(1, 2)
        3
    """
    module_name, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise _failed(path, error) from error
    except Exception as error:  # whatever the module does when it is imported
        raise _failed(path, error) from error
    try:
        return _attribute(module, name)
    except AttributeError:
        raise
    except Exception as error:  # modules may import a name when it is asked for
        raise _failed(path, error) from error


def from_file(path: str) -> Any:
    """Take a name from a Python file, as ``path/to/file.py:name``.

    The file is run once, however many names are taken from it. Its folder is put behind all others on Python's path, so
    that it finds the modules beside it.

    Raises:
        RewardError: If there is no such file or name, or the file fails.
    """
    place, _, name = path.rpartition(":")
    file = Path(place).resolve()
    if not file.is_file():
        raise RewardError(f"rewards={path!r}: there is no file {place!r} (looked for {str(file)!r}).")
    module = _module(file, path)
    try:
        return _attribute(module, name)
    except AttributeError as error:
        raise RewardError(f"rewards={path!r}: {place} has no {name!r}.") from error


def _module(file: Path, path: str) -> ModuleType:
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
    except Exception as error:  # whatever the file does
        del sys.modules[name]
        raise _failed(path, error) from error
    return module


def _attribute(found: Any, name: str) -> Any:
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _failed(path: str, error: Exception) -> RewardError:
    return RewardError(f"rewards={path!r}: importing it failed with {type(error).__name__}: {error}")
