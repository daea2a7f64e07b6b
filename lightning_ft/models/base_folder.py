"""Which local folder an adapter was trained over, told without the path that it has on this machine.

An adapter is published. So its configuration calls a local base by the last name of its folder, and the adapter's file
keeps a fingerprint of it, by which the folder is found again and not mistaken for another of that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lightning_ft.errors import ModelError

KEY = "base_fingerprint"
"""In the metadata of ``adapter_model.safetensors``."""
_PART = 2**20  # bytes at the start and end of each file: two trainings of one model differ in every part


def base_fingerprint(folder: str | Path) -> str | None:
    """Names the weights and the configuration in a folder; None where it isn't one of a model.

    Args:
        folder: Folder of a model.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        return None
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".bin", ".gguf") and f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_PART))
            content.seek(max(size - _PART, 0))
            digest.update(content.read(_PART))
    return digest.hexdigest()[:32]


def find_base(adapter: str | Path, name: str) -> str:
    """Where the base of a saved adapter is: what its configuration says, or a folder of that name.

    Looked for is the very folder, in the current one, next to the adapter's and next to each that it is in.

    Args:
        adapter: Folder of the adapter.
        name: What its configuration calls the base.

    Raises:
        ModelError: If the base was a local folder, and that isn't found.
    """
    if (wanted := _kept_fingerprint(Path(adapter))) is None:
        return name
    for folder in _candidates(Path(adapter), name):
        if base_fingerprint(folder) == wanted:
            return str(folder)
    if Path(name).is_absolute() and (Path(name) / "config.json").is_file():
        return name  # written by hand: the user knows
    raise ModelError(
        f"The adapter in {str(adapter)!r} was trained over a local folder called {name!r}, which is neither in the "
        "current folder nor next to the adapter or above it. Pass that folder as model= and the adapter as adapter=, "
        "or write its path into adapter_config.json as base_model_name_or_path."
    )


def _candidates(adapter: Path, name: str) -> Iterator[Path]:
    yield Path(name)
    for parent in adapter.resolve().parents:
        yield parent / name


def _kept_fingerprint(adapter: Path) -> str | None:
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):  # whoever loads the weights says what is wrong with them
        return None
