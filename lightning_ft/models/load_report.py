"""Check what was loaded: weights that are missing, mismatched or unused, and files that can't be read."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from lightning_ft.arguments import did_you_mean_path, searched_here
from lightning_ft.distributed import rank_zero_only, warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.read_errors import first_line

_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 3
_GGUF_REFUSED = (
    "the weights of a GGUF file can't be trained, and no adapter can name it as its base. Dequantize it once into a "
    "folder (examples/smollm2/prepare.py is a script for that), and pass the folder."
)


def check_loaded(model: PreTrainedModel, info: Mapping[str, Any], name: str, *, new_head: bool = False) -> None:
    """Refuse a model with randomly initialized weights, and warn of weights in the checkpoint that weren't loaded.

    Args:
        model: Loaded model.
        info: The loading info that `from_pretrained` returns with ``output_loading_info=True``.
        name: Hub name or folder, for messages.
        new_head: Whether the model has a new head. The checkpoint may then lack the head's weights, and its own head
            isn't loaded.

    Raises:
        ModelError: If weights are missing from the checkpoint, or their sizes don't match the model's.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> check_loaded(model, {"missing_keys": ["model.norm.weight"]}, "my/model")
        Traceback (most recent call last):
        lightning_ft.errors.ModelError: The checkpoint 'my/model' lacks 1 weight of LlamaForCausalLM: ...
    """
    backbone = f"{model.base_model_prefix}."
    missing, left_out = (
        sorted(key for key in info.get(which, ()) if not new_head or key.startswith(backbone))
        for which in ("missing_keys", "unexpected_keys")
    )
    class_name = type(model).__name__
    if mismatched := sorted(info.get("mismatched_keys", ())):
        key, actual, expected = mismatched[0]
        if new_head and not key.startswith(backbone):
            raise ModelError(
                f"{name!r} is a classifier of {actual[0]} labels, and a reward model has {expected[0]}. Use the "
                "language model that it was trained from."
            )
        raise ModelError(
            f"The checkpoint {name!r} and its config.json don't belong together: {_count(mismatched)} of {class_name} "
            f"{'has another size' if len(mismatched) == 1 else 'have other sizes'}. {key} is {tuple(actual)} in the "
            f"checkpoint and {tuple(expected)} by the configuration. Use the config.json that was saved with these "
            "weights."
        )
    if missing:
        others = f" It contains {_count(left_out)} that {class_name} lacks: {shortened(left_out)}." if left_out else ""
        raise ModelError(
            f"The checkpoint {name!r} lacks {_count(missing)} of {class_name}: {shortened(missing)}.{others} These "
            "would be random. Download the whole checkpoint again, or check that config.json belongs to these weights."
        )
    if left_out:
        warn_on_rank_zero(
            f"The checkpoint {name!r} contains {_count(left_out)} that {class_name} doesn't have; not "
            f"loaded: {shortened(left_out)}. If they matter, use the config.json that was saved with these weights."
        )


def warn_on_rank_zero(message: str) -> None:
    """Warn on the first rank only, whether or not Lightning has been imported."""
    if getattr(rank_zero_only, "rank", 0) in (0, None):
        warn(message, stacklevel=3)


def shortened(names: Iterable[str]) -> str:
    """List a few names for a message, merging those that differ only in numbers.

    Example:
        >>> shortened([f"layers.{n}.mlp.{name}" for n in range(9) for name in ("down", "gate", "norm", "up")])
        'layers.*.mlp.down, layers.*.mlp.gate, layers.*.mlp.norm, ...'
    """
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    return ", ".join(patterns[:_SHOWN]) + (", ..." if len(patterns) > _SHOWN else "")


def _count(names: Sized) -> str:
    return f"{len(names):,} weight{'' if len(names) == 1 else 's'}"


def refuse_damaged_json(name: str, file: str) -> None:
    """Refuse a model whose optional JSON file is damaged, since transformers would load it as if it had none.

    Args:
        name: Hub name or folder of the model; only a folder is checked.
        file: Name of the file.

    Raises:
        ModelError: If it is there and isn't a JSON object.
    """
    path = Path(name) / file
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        reason = None if isinstance(content, dict) else f"it contains a {type(content).__name__}"
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        reason = first_line(error)
    if reason is not None:
        raise ModelError(
            f"The file {str(path)!r} isn't a JSON object ({reason}). Download or copy it again, or delete it to do "
            "without its settings."
        )


def refuse_file(model: str, module: str) -> None:
    """Refuse the path of a file where a hub name or a folder is expected, without loading anything.

    Args:
        model: Hub name or path.
        module: Name of the class of the module that the model is for.

    Raises:
        ConfigError: If it is a file; the message says what to do with a file of this kind.
    """
    is_gguf = model.endswith(".gguf") and not Path(model).is_dir()
    if is_gguf or Path(model).is_file():
        checkpoint = f"a checkpoint is loaded with {module}.load_from_checkpoint; rows belong to the DataModule."
        raise ConfigError(
            f"`model={model!r}` is a file: expected a hub name, the folder of a model, or a loaded model; "
            f"{_GGUF_REFUSED if is_gguf else checkpoint}"
        )


def why_unreadable(name: str, error: BaseException, *, revision: str | None = None) -> str:
    """Explain why a model or adapter couldn't be loaded: the damaged file, or the library's own message.

    Args:
        name: Hub name or folder.
        error: The error that the library raised.
        revision: Branch, tag or commit on the hub.
    """
    if name.endswith(".gguf"):
        return _GGUF_REFUSED
    if Path(name).is_file():
        return "it is a file. Pass the folder that it is in."
    folder = _folder(name, revision)
    if folder is None:
        is_path = name.startswith((".", "~", "/")) or name.count("/") > 1
        missing = "there is no such folder" if is_path else searched_here() + first_line(error)
        return f"{missing.removesuffix('.')}.{did_you_mean_path(name)}"
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if (reason := _why_damaged(file, error)) is not None:
            return f"the file {str(file)!r} {reason}"
    return first_line(error)


def _folder(name: str, revision: str | None) -> Path | None:
    """Return the local folder of a model."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def _why_damaged(file: Path, error: BaseException) -> str | None:
    with file.open("rb") as opened:
        start = opened.read(len(_LFS_POINTER))
    if not start:
        return "is empty. Download or copy it again."
    if start == _LFS_POINTER:
        return "is a Git LFS pointer and contains no weights. Run `git lfs pull` in its repository."
    if file.suffix == ".bin":  # a zip archive; before torch 1.6 a pickle, which can only be checked by loading it
        reads = not isinstance(error, (UnpicklingError, EOFError, OSError, RuntimeError)) or zipfile.is_zipfile(file)
        return None if reads else "is damaged, or contains no weights. Download or copy it again."
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as damage:
        return f"is damaged or incomplete ({first_line(damage)}). Download or copy it again."
