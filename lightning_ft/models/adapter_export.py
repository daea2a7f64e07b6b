"""Export an adapter as a folder that fits the original base model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.distributed import rank_zero_warn
from lightning_ft.errors import ExportError, ModelError
from lightning_ft.models.adapt import InitialAdapter, rounds_base, splits_base
from lightning_ft.models.base_folder import KEY, MERGE, base_fingerprint, note_base
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.load import load_config
from lightning_ft.models.model_card import hub_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    model: PeftModel,
    path: Path,
    *,
    initial: InitialAdapter | None = None,
    state_dict: dict[str, Tensor] | None = None,
    revision: str | None = None,
) -> None:
    """Write the trained adapter, without the reference's and the critic's adapters next to it.

    Args:
        model: The adapted model.
        path: Folder to write to.
        initial: The adapter as initialized, if that changed the base weights.
        state_dict: Gathered weights of a sharded model.
        revision: Branch, tag or commit of the base on the hub.

    Raises:
        ExportError: If no plain adapter on the named base would give the same output.
    """
    check_adapter_export(model)
    # The embeddings' weights aren't trained, and every copy of the base has them.
    options = {} if state_dict is None else {"state_dict": state_dict}
    cast(Any, model).save_pretrained(
        str(path), selected_adapters=[model.active_adapter], save_embedding_layers=False, **options
    )
    if model.active_adapter != "default":  # PEFT makes a folder of that name
        for file in (path / model.active_adapter).iterdir():
            file.rename(path / file.name)
        (path / model.active_adapter).rmdir()
    config, trained = json.loads((path / CONFIG).read_text(encoding="utf-8")), load_file(path / WEIGHTS)
    if initial is not None:
        trained = differences_to(load_file(initial.path / WEIGHTS), trained)
        config |= _twice_the_rank(config)
    metadata = {"format": "pt"}
    if source := getattr(base_of(model).config, "_name_or_path", None):
        config["base_model_name_or_path"] = hub_name(source) or Path(source).name
        if hub_name(source) is None and (fingerprint := base_fingerprint(source)) is not None:
            metadata[KEY] = fingerprint
            note_base(source, fingerprint)
    save_file(trained, path / WEIGHTS, metadata=metadata)
    # The weights are trained: loading them must not initialize the adapter (and split the base) again.
    if "init_lora_weights" in config:  # PEFT's other methods have no such argument
        config["init_lora_weights"] = True
    for name in ("eva_config", "corda_config", "loftq_config", "lora_ga_config"):
        if name in config:
            config[name] = {} if name == "loftq_config" else None
    if revision is not None:
        config["revision"] = revision
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def check_adapter_export(model: PeftModel) -> None:
    """Refuse an adapter that can't be loaded on the base that it names.

    Args:
        model: The adapted model.

    Raises:
        ExportError: If LoftQ rounded the base weights, or the base's embeddings were resized.
    """
    if rounds_base(model.active_peft_config):
        raise ExportError(f"LoftQ rounded the base weights, so its adapter fits no other base. Export with {MERGE}.")
    if (sizes := resized(base_of(model))) is not None:
        raise ExportError(
            f"The base has {sizes[0]:,} embeddings, and {base_of(model).config._name_or_path!r} has {sizes[1]:,}: the "
            f"adapter can't be loaded on that. Export with {MERGE}; or save the resized model and its tokenizer with "
            "save_pretrained before training, and pass that folder as model=."
        )


def check_adapter_is_whole_update(model: PeftModel) -> None:
    """Refuse an adapter that isn't all that training changes, where nothing is known about how it was made.

    Args:
        model: The adapted model of a module that isn't this package's.

    Raises:
        ExportError: If the adapter's initialization changed the base weights, or weights outside the adapter are
            trained.
    """
    config = cast(LoraConfig, model.active_peft_config)
    if splits_base(config) or rounds_base(config):
        raise ExportError(
            f"init_lora_weights={config.init_lora_weights!r} changed the base weights, so the adapter alone doesn't "
            f"fit the original base. Export with {MERGE}, or train with LoRAFineTuning, which exports the difference."
        )
    adapter = model.active_adapter
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    own = {_without(name, adapter) for name in saved}
    outside = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and _without(name, adapter) not in own
        and not name.startswith(f"prompt_encoder.{adapter}.")  # PEFT saves what this encoder computes
    ]
    if outside:
        raise ExportError(
            f"{len(outside)} weights outside the adapter are trained (first: {outside[0]}), and an exported adapter "
            "wouldn't have them. Name their modules in the adapter's modules_to_save, freeze them, or export with "
            f"{MERGE}."
        )


def _without(name: str, adapter: str) -> str:
    """A weight's name without the parts that PEFT leaves out of files."""
    return ".".join(part for part in name.split(".") if part not in (adapter, "modules_to_save"))


def check_base(model: CausalLM) -> None:
    """Warn before training if an adapted model's embeddings were resized after loading.

    Args:
        model: The model, adapted or not.

    Raises:
        ModelError: If its weights are also quantized: the adapter could be exported neither alone nor merged.
    """
    base = base_of(model)
    if not isinstance(model, PeftModel) or (sizes := resized(base)) is None:
        return
    problem = f"The model has {sizes[0]:,} embeddings, and {base.config._name_or_path!r}, which it was loaded from, "
    problem += f"has {sizes[1]:,}: its adapter can't be loaded on that. "
    remedy = "save the resized model and its tokenizer with save_pretrained, and pass that folder as model="
    if getattr(base, "is_quantized", False):
        raise ModelError(f"{problem}Nor can it be merged into quantized weights: {remedy}.")
    rank_zero_warn(f"{problem}Export it with {MERGE}, or first {remedy}.")


def resized(base: PreTrainedModel) -> tuple[int, int] | None:
    """Vocabulary sizes of a model and of the checkpoint that it was loaded from, if they differ.

    Args:
        base: The model.

    Returns:
        None if they are equal or the checkpoint can't be found.
    """
    name = getattr(base.config, "_name_or_path", None)
    if not name:
        return None
    try:
        config = load_config(name)
    except ModelError:
        return None
    ours, theirs = (int(c.get_text_config().vocab_size) for c in (base.config, config))
    return None if ours == theirs else (ours, theirs)


def differences_to(initial: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an ordinary adapter of twice the rank that adds ``s(BA - B0 A0)``.

    An initialization that splits the base subtracts ``s B0 A0`` from it, so this is the difference from the original
    base (https://arxiv.org/abs/2404.02948, appendix C). Weights that aren't pairs of matrices (DoRA magnitudes,
    trained heads, biases and tokens) stay as trained.

    Args:
        initial: The adapter's weights as initialized, by name.
        trained: The adapter's weights after training, by name.

    Returns:
        The new weights under the same names.

    Example:
        >>> a, b = torch.ones(1, 3), torch.ones(2, 1)
        >>> both = differences_to({"q.lora_A.weight": a, "q.lora_B.weight": b},
        ...                       {"q.lora_A.weight": 2 * a, "q.lora_B.weight": b})
        >>> both["q.lora_B.weight"] @ both["q.lora_A.weight"]
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    doubled = dict(trained)
    for name, value in trained.items():
        if "lora_A" in name or "lora_embedding_A" in name:  # [r, d] -> [2r, d]
            doubled[name] = torch.cat([value, initial[name].to(value)], dim=0).contiguous()
        elif name.endswith("lora_B.weight") or "lora_embedding_B" in name:  # [d, r] -> [d, 2r]
            doubled[name] = torch.cat([value, -initial[name].to(value)], dim=1).contiguous()
    return doubled


def _twice_the_rank(config: dict[str, Any]) -> dict[str, object]:
    """Settings for twice the rank at the same scale, which is ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()},
    }
