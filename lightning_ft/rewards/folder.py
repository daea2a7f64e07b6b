"""Folders of reward models: where they are, and how what they hold is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_ft.errors import RewardError
from lightning_ft.models.load import ADAPTER_CONFIG, adapter_base, load_config, load_model
from lightning_ft.models.sequence_scores import HEADS

_HEAD = re.compile(rf"(base_model\.model\.)?({'|'.join(HEADS)})\.")
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def local_folder(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The folder of a reward model, downloaded from the hub where there is none of that name here.

    Args:
        name: A folder, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Download the code that the repository ships, too.

    Raises:
        RewardError: If there is neither.
    """
    if Path(name).is_dir():
        if not any((Path(name) / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise RewardError(f"The folder {name!r} holds no model: there is neither config.json nor {ADAPTER_CONFIG}.")
        return Path(name)
    patterns = [*_FILES, "*.py"] if trust_remote_code else _FILES
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(f"There is no folder {name!r}, nor a model of that name on the hub: {reason}") from error


def load_scorer(folder: Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel | PeftModel:
    """Load a reward model, frozen and in eval mode.

    Args:
        folder: With a sequence-classification model of one label, or a PEFT adapter for one.
        dtype: Of the weights; ``"auto"`` is the checkpoint's own.
        trust_remote_code: Run code that the folder ships.

    Raises:
        RewardError: If the model isn't one that gives a score: a head that was never trained would be drawn at random.
        ModelError: If it can't be loaded.
    """
    if not any(_HEAD.match(name) for name in _saved_names(folder)):
        raise RewardError(
            f"{str(folder)!r} holds a model without a trained score head, which would score at random. A reward model "
            "is an export of RewardModeling, or another AutoModelForSequenceClassification with num_labels=1."
        )
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    base = adapter_base(str(folder))
    if base is None:
        labels = load_config(str(folder), trust_remote_code=trust_remote_code).num_labels
        if labels != 1:
            raise RewardError(f"{str(folder)!r} holds a classifier of {labels} labels; a reward model has one.")
        model: Any = load_model(AutoModelForSequenceClassification, str(folder), num_labels=1, **options)
    else:
        whole = load_model(AutoModelForSequenceClassification, base, num_labels=1, **options)
        model = PeftModel.from_pretrained(whole, str(folder))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _saved_names(folder: Path) -> list[str]:
    """Names of the weights in a folder.

    Raises:
        RewardError: If there are none in safetensors files.
    """
    names: list[str] = []
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names += json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise RewardError(f"{str(index)!r} is damaged ({error!r}): export or copy the folder again.") from error
    for file in [] if names else sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                names += weights.keys()
        except (OSError, SafetensorError) as error:
            raise RewardError(f"{str(file)!r} is damaged ({error}): export or copy the folder again.") from error
    if not names:
        raise RewardError(f"{str(folder)!r} holds no weights in safetensors files.")
    return names
