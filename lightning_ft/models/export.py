"""Export a model or adapter for plain transformers and PEFT, and refuse exports whose output would differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.atomic_files import (
    flush_to_disk,
    remove,
    remove_leftovers,
    temporary_path,
    write_failure,
    write_text,
)
from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ExportError, TokenizerError
from lightning_ft.models.adapt import InitialAdapter
from lightning_ft.models.adapter_export import check_adapter_export, save_adapter
from lightning_ft.models.card_facts import CardFacts, weights_hash
from lightning_ft.models.generate import end_token_ids
from lightning_ft.models.gguf_export import GGUFType, check_gguf, export_gguf
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.lora_checks import check_merge
from lightning_ft.models.merge import merged
from lightning_ft.models.model_card import BaseOptions, model_card
from lightning_ft.models.numerics import first_nonfinite
from lightning_ft.models.shard import is_sharded

FIRST_READ = ("config.json", "adapter_config.json")
"""Files that transformers and PEFT look for first: without them a folder can't be loaded."""

CARD = "README.md"
"""Name of the model card, which the hub shows."""

ExportFormat = Literal["safetensors", "gguf"]

LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
"""Files of an export that transformers and PEFT load, besides the configuration that they look for first."""
REPLACED = (*LOADED, "*.gguf", "pytorch_model*", "adapter_model.bin", CARD)
"""Files that an export may have written, and that a later export over it must remove."""


def export(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge: bool = False,
    initial: InitialAdapter | None = None,
    check_prompts: list[list[int]] | None = None,
    overwrite: bool = False,
    write: bool = True,
    base_options: BaseOptions | None = None,
    format: ExportFormat = "safetensors",
    gguf_dtype: GGUFType = "f16",
    facts: CardFacts | None = None,
) -> Path:
    """Write an adapter or model folder with the tokenizer, its chat template, end tokens and a model card.

    `generation_config.json` contains every token that ends a completion (see
    :func:`lightning_ft.models.generate.end_token_ids`) and the model's own other settings. All files are first written
    to another folder: a folder that is overwritten contains the old export, the new one, or for a moment none that can
    be loaded.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        folder: Folder to write to; created if missing.
        merge: Fold the adapter into the base weights and write a whole model.
        initial: The adapter as initialized, if that changed the base weights.
        check_prompts: Token ids of prompts whose greedy continuation a merged model must reproduce; a few random ones
            by default.
        overwrite: Write into a folder that isn't empty. An earlier export in it is removed; other files stay.
        write: False on ranks that only take part in gathering the weights of a sharded model.
        base_options: Arguments that the base was loaded with, for the model card's code: `revision`,
            `trust_remote_code`, `dtype`, `quantization`.
        format: ``safetensors``, or ``gguf`` for a single ``model.gguf`` (an adapter is merged), see
            :func:`lightning_ft.models.gguf_export.export_gguf`.
        gguf_dtype: Type of the matrices in it: ``f32``, ``f16``, ``bf16`` or ``q8_0``.
        facts: What the model card says about training and measurements; results of other weights are left out.

    Returns:
        `folder`.

    Raises:
        ExportError: If a weight isn't finite, the folder isn't empty, the adapter can't be loaded on the base that it
            names, or the merged model's greedy output differs.
    """
    path, options = Path(folder), base_options or {}
    merge = merge or format == "gguf"
    check_export(model, merge=merge, initial=initial, format=format, tokenizer=tokenizer, gguf_dtype=gguf_dtype)
    _refuse_nonfinite(model, merge=merge)
    gathered = {} if not is_sharded(model) else {"state_dict": _gathered(model)}
    weights = weights_hash(model)
    if not write:
        return path
    check_folder(path, overwrite=overwrite)
    base = base_of(model)
    ends = _ends(model, tokenizer) if base.can_generate() else []
    with _written_aside(path) as aside:
        if format == "gguf":
            whole = merged(model, check_prompts) if isinstance(model, PeftModel) else model
            export_gguf(whole, tokenizer, aside, dtype=gguf_dtype)
            return path
        if isinstance(model, PeftModel) and not merge:
            save_adapter(model, aside, initial=initial, revision=options.get("revision"), **gathered)
        else:
            _save_whole(merged(model, check_prompts) if isinstance(model, PeftModel) else model, aside, gathered)
        if base.can_generate():
            _write_generation_config(base, ends, aside)
        tokenizer.save_pretrained(aside)
        chat = bool(tokenizer.chat_template)
        card = _card(path.name, model, ends, merge=merge, base_options=options, facts=facts, weights=weights, chat=chat)
        (aside / CARD).write_text(card, encoding="utf-8")
    return path


def card_text(
    name: str,
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    merge: bool = False,
    base_options: BaseOptions | None = None,
    facts: CardFacts | None = None,
) -> str:
    """Text of the model card of an export. All ranks of a sharded model must make this call.

    Args:
        name: Name or folder that the card's code loads the export from.
        model: The exported model.
        tokenizer: Its tokenizer.
        merge: Whether the adapter was folded into the base weights.
        base_options: As in :func:`export`.
        facts: What the card says about training and measurements; results of other weights are left out.
    """
    weights = weights_hash(model)
    ends = _ends(model, tokenizer) if base_of(model).can_generate() else []
    chat = bool(tokenizer.chat_template)
    return _card(name, model, ends, merge=merge, base_options=base_options, facts=facts, weights=weights, chat=chat)


def _card(name: str, model: CausalLM, ends: list[int], **options: Any) -> str:
    """The model card; it names the end tokens if the base itself lacks some of them."""
    own = getattr(getattr(base_of(model), "generation_config", None), "eos_token_id", None)
    missing = ends if set(ends) - set(own if isinstance(own, list) else [own]) else None
    return model_card(name, model, end_tokens=missing, **options)


def write_card(folder: str | Path, card: str) -> None:
    """Replace the model card of an export, when more is known about its weights.

    Args:
        folder: Folder of the export.
        card: Text of the card.

    Raises:
        FileWriteError: If it can't be written; the earlier card is unchanged.
    """
    write_text(Path(folder) / CARD, card)


def check_export(
    model: CausalLM,
    *,
    merge: bool,
    initial: InitialAdapter | None = None,
    format: ExportFormat = "safetensors",
    tokenizer: PreTrainedTokenizerBase | None = None,
    gguf_dtype: GGUFType = "f16",
) -> None:
    """Refuse a model that can't be exported, before training if possible. Call it on all ranks.

    Args:
        model: The model, before or after training.
        merge: Whether the adapter will be folded into the base weights.
        initial: The adapter as initialized, if that changed the base weights.
        format: ``safetensors`` or ``gguf``.
        tokenizer: Its tokenizer, which not every ``model.gguf`` can hold; None if it isn't known yet.
        gguf_dtype: Type of the matrices in it, as in :func:`export`.

    Raises:
        ExportError: With the reason and the alternative.
        MissingDependencyError: If `gguf` is needed and isn't installed.
    """
    if format not in get_args(ExportFormat):
        raise ExportError(f"format={format!r}: expected {' or '.join(map(repr, get_args(ExportFormat)))}.")
    if format == "gguf":
        if is_sharded(model):
            raise ExportError("A sharded model can't be exported as GGUF: run `lightning-ft export` on its checkpoint.")
        check_gguf(base_of(model), tokenizer, dtype=gguf_dtype)
        merge = True
    adapted = isinstance(model, PeftModel)
    if is_sharded(model) and adapted and (merge or initial is not None):
        raise ExportError(
            "A sharded model can't be merged, and an adapter that changed the base weights can't be converted while "
            "sharded. Run `lightning-ft export` on its checkpoint, which loads it on one device."
        )
    if isinstance(model, PeftModel):
        check_merge(model) if merge else check_adapter_export(model)


def _refuse_nonfinite(model: CausalLM, *, merge: bool) -> None:
    """Refuse weights that aren't finite, among those that the export contains."""
    every = merge or not isinstance(model, PeftModel)
    written = ((name, value) for name, value in model.named_parameters() if every or value.requires_grad)
    if (name := first_nonfinite(written)) is not None:
        raise ExportError(
            f"The weight {name} contains values that aren't finite (NaN or infinite), so the export's output would be "
            "meaningless. Export an earlier checkpoint."
        )


def check_folder(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that can't be a folder, or a folder with files in it.

    Args:
        path: The folder.
        overwrite: Whether the folder may contain files.

    Raises:
        ExportError: If it or a folder above it is a file or may not be written to, or if it isn't empty and may not be
            overwritten.
    """
    if path.exists() and not path.is_dir():
        raise ExportError(f"{path} is a file; export needs a folder.")
    existing = next((above for above in (path, *path.absolute().parents) if above.exists()), path)
    if not existing.is_dir():
        raise ExportError(f"{path} can't be made, since {existing} is a file. Export to another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ExportError(f"{path} can't be written, since {existing} isn't writable. Export to another folder.")
    remove_leftovers(path)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ExportError(
            f"{path} isn't empty: choose another folder, or pass overwrite=True (`lightning-ft export` has "
            "--overwrite true)."
        )


def _gathered(model: CausalLM) -> dict[str, Any]:
    """The whole weights of a sharded model, on rank 0."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _save_whole(model: PreTrainedModel, path: Path, options: Mapping[str, Any]) -> None:
    """Save a model without its generation config: transformers refuses to save some configs that it loads."""
    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            model.generation_config = GenerationConfig()
        model.save_pretrained(path, **options)
    finally:
        if settings is not None:
            model.generation_config = settings


def _write_generation_config(base: PreTrainedModel, ends: list[int], path: Path) -> None:
    settings = json.loads(base.generation_config.to_json_string(use_diff=True))
    settings["eos_token_id"] = ends or settings.get("eos_token_id")
    settings.pop("_from_model_config", None)  # makes older versions of transformers read the end token elsewhere
    (path / "generation_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _ends(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        return end_token_ids(model, tokenizer)
    except TokenizerError as error:  # training didn't need the template, so its result is still exported
        rank_zero_warn(f"The export stops at the model's own end tokens only, since its chat template fails: {error}")
        return []


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files then replace those of an earlier export.

    Raises:
        ExportError: If a file can't be written; an earlier export is then unchanged.
    """
    aside = temporary_path(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        flush_to_disk(aside)
    except Exception as error:
        remove(aside)
        if (reason := write_failure(error)) is None:
            raise
        raise ExportError(
            f"{str(path)!r} can't be written ({reason}). What was there before is unchanged: make room, or export to "
            "another folder."
        ) from error
    try:
        files = [file.relative_to(aside) for file in aside.rglob("*") if file.is_file()]
        for name in FIRST_READ:
            (path / name).unlink(missing_ok=True)
        for old in {old for pattern in REPLACED for old in path.glob(pattern) if old.is_file()}:
            old.unlink()
        for file in sorted(files, key=lambda file: file.name in FIRST_READ):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / file, path / file)
        flush_to_disk(path, deep=False)
    finally:
        remove(aside)
