"""Find the local folder of an adapter's base model again, without storing its path.

Adapters get published, and a path says something about the author's machine. So the configuration names a local base by
the last part of its path, and the weight file's metadata holds a fingerprint that tells it from other folders of that
name. The path itself is noted in the cache of this machine, under the fingerprint.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lightning_ft.atomic_files import write_text
from lightning_ft.data.cache import default_folder
from lightning_ft.errors import FileWriteError, ModelError

KEY = "base_fingerprint"
"""Key of the fingerprint in the metadata of ``adapter_model.safetensors``."""
_EDGE = 2**20  # bytes hashed at the start and end of each file: two trainings of one model differ everywhere

MERGE = "merge=True (`--merge true` on the command line; `transformers serve` loads that)"
"""What messages propose for an adapter that can't be used without its base."""


def base_fingerprint(folder: str | Path) -> str | None:
    """A hash of a model folder's weights and configuration; None if the folder contains no model.

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
            digest.update(content.read(_EDGE))
            content.seek(max(size - _EDGE, 0))
            digest.update(content.read(_EDGE))
    return digest.hexdigest()[:32]


def note_base(folder: str | Path, fingerprint: str) -> None:
    """Note on this machine where a base is, so that its adapters find it from any folder and in later processes.

    Args:
        folder: Folder of the base.
        fingerprint: Its :func:`base_fingerprint`.
    """
    try:
        write_text(_note(fingerprint), str(Path(folder).resolve()))
    except (OSError, FileWriteError):  # a read-only cache: the base is still searched for near the adapter
        return


def find_base(adapter: str | Path, name: str) -> str:
    """The base of a saved adapter: the name in its configuration, or the matching local folder of that name.

    A folder of that name with the adapter's fingerprint is searched for in the current folder, next to the adapter and
    next to each folder above it; then where the adapter was exported on this machine; then, as in ``models/base``, up
    to two levels below the current folder, and one level below the two nearest folders above the adapter.

    Args:
        adapter: Folder of the adapter.
        name: Name of the base in the adapter's configuration.

    Raises:
        ModelError: If the base is a local folder that can't be found.
    """
    if (fingerprint := _saved_fingerprint(Path(adapter))) is None:
        return name
    for folder in _candidates(Path(adapter), name, fingerprint):
        if base_fingerprint(folder) == fingerprint:
            return str(folder)
    if Path(name).is_absolute() and (Path(name) / "config.json").is_file():
        return name  # an absolute path was written by the user
    raise ModelError(
        f"The adapter in {str(adapter)!r} was trained on a local folder called {name!r}, but that folder is neither in "
        f"the current folder ({str(Path.cwd())!r}) or up to two levels below it, nor next to the adapter or above it, "
        "nor where it was when the adapter was exported on this machine. "
        "Write its path into adapter_config.json as base_model_name_or_path, copy it next to the adapter, or export "
        f"with {MERGE}. A module also takes that folder as model= and the adapter as adapter=."
    )


def _candidates(adapter: Path, name: str, fingerprint: str) -> Iterator[Path]:
    """Folders that may be the base, the likeliest first; listing folders comes last, since they may be large."""
    yield Path(name)
    parents = list(adapter.resolve().parents)
    for parent in parents:
        yield parent / name
    with suppress(OSError, ValueError):  # exported on another machine, or a damaged note
        yield Path(_note(fingerprint).read_text(encoding="utf-8"))
    last = glob.escape(Path(name).name)
    if not last:
        return
    yield from sorted(Path().glob(f"[!.]*/{last}"))
    yield from sorted(Path().glob(f"[!.]*/[!.]*/{last}"))
    for parent in parents[:-1][:2]:  # never below the root of the file system
        yield from sorted(parent.glob(f"[!.]*/{last}"))


def _note(fingerprint: str) -> Path:
    return default_folder() / "bases" / fingerprint


def _saved_fingerprint(adapter: Path) -> str | None:
    try:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (OSError, SafetensorError):  # loading the weights will report what is wrong with them
        return None
