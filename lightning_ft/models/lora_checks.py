"""Adapters that can't be trained or exported exactly, refused before the first step with the reason."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import cast

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.arguments import did_you_mean
from lightning_ft.distributed import warn
from lightning_ft.errors import ExportError, ModelError
from lightning_ft.models.head import base_of
from lightning_ft.models.parts import expert_tensors

_HEADS = {"classifier", "score"}
"""Names that PEFT adds to `modules_to_save` of a configuration for classification, of which a model has one."""


def refuse_adapter_layers(base: nn.Module) -> None:
    """Refuse a base that holds an adapter already: it would be part of every pass, and of no export.

    Args:
        base: The model before it is adapted.

    Raises:
        ModelError: With the first layer of the adapter.
    """
    name = next((name for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)), None)
    if name is not None:
        raise ModelError(
            f"The model that was passed holds layers of an adapter (the first is {name}), as after the training of "
            "another module that it was passed to. Pass a name or folder, or a model that is loaded again for each "
            "module; to continue an adapter, pass the folder that it was exported to."
        )


def check_names(config: LoraConfig, base: PreTrainedModel) -> None:
    """Refuse names in `modules_to_save` that no module has, and warn of such in `target_modules`: PEFT skips them.

    Lists of targets are often written for several architectures, so the others in the list may be all that is meant.

    Args:
        config: Configuration of the adapter.
        base: The model before it is adapted.

    Raises:
        ModelError: With the name, and the nearest one.
    """
    modules = [name for name, module in base.named_modules() if name and any(True for _ in module.parameters())]
    known = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
    wanted = set(config.modules_to_save or ())
    if any(name.endswith(tuple(wanted & _HEADS)) for name in modules):
        wanted -= _HEADS
    for saved in sorted(wanted):
        if not any(name.endswith(saved) for name in modules):
            raise ModelError(
                f"lora's modules_to_save: {type(base).__name__} has no module {saved!r}, so nothing would be saved or "
                f"trained for it.{did_you_mean(saved, known)} Name another, or leave it out."
            )
    targets = config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else ()
    unknown = sorted(target for target in targets if not any(f".{name}".endswith(f".{target}") for name in modules))
    if 0 < len(unknown) < len(targets) and not expert_tensors(base):  # PEFT may find older names among experts
        hints = "".join(dict.fromkeys(did_you_mean(target, known) for target in unknown))
        warn(
            f"lora's target_modules: {type(base).__name__} has no module named {', '.join(map(repr, unknown))}, so "
            f"only the others get an adapter.{hints} Leave out such names to silence this.",
            stacklevel=2,
        )


def check_adapter(model: PeftModel, *, splits_base: bool) -> None:
    """Refuse a new adapter that would behave differently in training than after export.

    Args:
        model: The adapted model.
        splits_base: Whether initializing the adapter changed the base weights.

    Raises:
        ModelError: With the reason and the alternative.
    """
    config = cast(LoraConfig, model.active_peft_config)
    class_name = type(base_of(model)).__name__
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelError(
            "lora's alora_invocation_tokens: only PEFT's own forward pass finds the tokens from which such an adapter "
            "is active. Here layers are called directly, so it would never be trained. Leave the argument out."
        )
    shared = dict(_shared_weights(model))
    if shared and getattr(config, "target_modules_to_tie", None):
        raise ModelError(
            f"lora's ensure_weight_tying: PEFT ties the adapters of {_listed(shared)} by views of one storage, which "
            "moving the model to a device undoes. Leave it out, and each gets an adapter of its own; or name the "
            "module in modules_to_save, which stays tied."
        )
    if shared and (splits_base or config.init_lora_weights == "loftq"):
        name, others = next(iter(shared.items()))
        raise ModelError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights under its adapters, and "
            f"{_plain(name)} of {class_name} shares its weights with {_listed(others)}, which would change too. Leave "
            f"{_plain(name)} out of target_modules, or use the default init_lora_weights."
        )
    if config.use_dora and (found := _zero_rows(model)) is not None:
        name, rows = found
        raise ModelError(
            f"use_dora divides by the norm of each row of a weight, and {rows:,} rows of {name} in {class_name} are "
            "zero (usually the padding token's embedding), so its output would be NaN. Leave that module out of "
            "target_modules, or use_dora."
        )


def shared_adapted_layers(model: PeftModel) -> list[nn.Module]:
    """Adapted layers that share their weights with another module: a tied head, or repeated layers.

    Folding the adapter into such a weight would change the other module too.

    Args:
        model: The adapted model.

    Returns:
        The base layers under the adapters.
    """
    return [model.get_submodule(name).get_base_layer() for name, _ in _shared_weights(model)]  # type: ignore[operator]


def check_merge(model: PeftModel) -> None:
    """Refuse before training an adapter that PEFT can't merge, by merging a copy of one layer of each type.

    Args:
        model: The adapted model.

    Raises:
        ExportError: With PEFT's reason.
    """
    if getattr(base_of(model), "is_quantized", False):
        raise ExportError(
            "An adapter over quantized weights can't be merged exactly. Export it unmerged, or load the base "
            "unquantized, put the exported adapter on it and merge there."
        )
    if getattr(model.active_peft_config, "layer_replication", None):
        raise ExportError(
            "lora's layer_replication repeats layers by sharing their weights, and a merged model would need each "
            "layer's own. Export it unmerged."
        )
    if not hasattr(type(model.base_model), "merge_and_unload"):
        raise ExportError(
            f"PEFT can't merge an adapter of the method {peft_method(model)}, which isn't a change of weights. Export "
            "it unmerged."
        )
    seen = set()
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or hasattr(layer, "parameter_name"):
            continue
        base = layer.get_base_layer()
        sort = (type(layer), type(base), getattr(base, "bias", None) is None)
        if sort in seen:
            continue
        seen.add(sort)
        try:
            copy.deepcopy(layer).merge(safe_merge=True)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise ExportError(f"PEFT can't merge this adapter: {str(error).strip()} Export it unmerged.") from error


def peft_method(model: PeftModel) -> str:
    """Name of PEFT's method of the active adapter, such as ``LORA``."""
    found = model.active_peft_config.peft_type
    return str(getattr(found, "value", found))


def _shared_weights(model: PeftModel) -> Iterator[tuple[str, list[str]]]:
    """Names of adapted modules with shared base weights, each with the modules that share them."""
    owners: defaultdict[int, list[str]] = defaultdict(list)
    adapted: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[_storage(parameter)].append(name)
        if isinstance(module, LoraLayer) and not hasattr(module, "parameter_name"):
            weight = getattr(module.get_base_layer(), "weight", None)
            if isinstance(weight, Tensor) and weight.device.type != "meta":
                adapted[name] = weight
    for name, weight in adapted.items():
        others = [_plain(owner) for owner in owners[_storage(weight)] if owner != f"{name}.base_layer"]
        if others:
            yield name, others


def _storage(weight: Tensor) -> int:
    local = weight.to_local() if hasattr(weight, "to_local") else weight  # of a sharded model
    return int(local.untyped_storage().data_ptr()) or id(weight)


def _zero_rows(model: PeftModel) -> tuple[str, int] | None:
    """The first module whose DoRA magnitudes hold zeros, and how many."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for magnitude in module.lora_magnitude_vector.values():
                weight = cast(Tensor, getattr(magnitude, "weight", magnitude))
                zeros = int((weight == 0).sum()) if weight.device.type != "meta" else 0
                if zeros:
                    return _plain(name), zeros
    return None


def _plain(name: str) -> str:
    """A module's name as the base has it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def _listed(names: Iterable[str]) -> str:
    return " and ".join(_plain(name) for name in list(names)[:3])
