"""Choose the targets of a new adapter: every linear layer that text reaches, and experts stored as one tensor.

PEFT's ``"all-linear"`` covers modules only. Many architectures store all experts of a layer in one parameter, which
needs `target_parameters`, and PEFT converts module names of older checkpoints to parameters, losing linear layers of
the same name. So the adapter is first put on a copy of the model without weights, to see what PEFT would adapt.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_ft.distributed import warn
from lightning_ft.errors import ConfigError, ModelError
from lightning_ft.models.layers import in_top_layers, layers_of
from lightning_ft.models.parts import base_name, expert_tensors, short_count, weight_counts
from lightning_ft.models.reach import Reach
from lightning_ft.models.reward_head import HEADS


def adapted_names(base: PreTrainedModel, config: LoraConfig) -> set[str]:
    """Return the names of the base's parameters that PEFT would put an adapter on.

    Args:
        base: Base model; not changed.
        config: Adapter configuration; not changed.

    Raises:
        ModelError: If PEFT refuses.
    """
    with warnings.catch_warnings(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        plain = replace(copy.deepcopy(config), init_lora_weights=True)  # others read the weights
        try:
            model = get_peft_model(skeleton(base), plain)
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            raise ModelError(f"LoRA doesn't fit {type(base).__name__}: {str(error).strip()}") from error
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    return {base_name(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")[0] for name, layer in layers}


def skeleton(base: PreTrainedModel) -> PreTrainedModel:
    """Copy a model without its weights: the copy's parameters take no memory and have no values."""
    memo: dict[int, object] = {id(p): _empty(p) for p in base.parameters()}
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in base.buffers()}
    kept = [value for module in base.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    memo |= {id(value): torch.empty_like(value, device="meta") for value in kept}  # states of recurrent layers
    return copy.deepcopy(base, memo)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    empty = nn.Parameter(torch.empty_like(parameter.data, device="meta"), requires_grad=False)
    for name, value in vars(parameter).items():  # attributes of quantized parameters
        setattr(empty, name, value)
    return empty


ALL_LINEAR = "all-linear"


def fitted(config: LoraConfig, base: PreTrainedModel, reach: Reach, top_layers: int | None = None) -> LoraConfig:
    """Fit an adapter's configuration to a model: exclude what text doesn't reach, and add what "all-linear" misses.

    Args:
        config: The user's configuration; not changed.
        base: Model without adapters.
        reach: Parameters that text reaches.
        top_layers: Number of topmost layers to adapt; None for all.

    Returns:
        Configuration that PEFT can apply to the model, also when the adapter is loaded again.

    Raises:
        ConfigError: If it names only modules that text doesn't reach.
        ModelError: If PEFT can't apply it to the model.
    """
    config = copy.deepcopy(config)  # PEFT changes its argument
    config.inference_mode = False  # every saved configuration says True, with which PEFT freezes the adapter
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    experts = {} if config.target_parameters else expert_tensors(base)
    experts = {name: tensor for name, tensor in experts.items() if name not in reach.unreached}
    if everything and (experts or reach.unlike_linear or _refused(base, config)):
        return _everything(config, base, reach, sorted(experts), top_layers)
    top = config if top_layers is None else in_top_layers(config, base, top_layers)
    return without_unreached(top, base, reach) if reach.unreached else top


# ---------------------------------------------------------------- unreached modules


def without_unreached(config: LoraConfig, base: PreTrainedModel, reach: Reach) -> LoraConfig:
    """Exclude modules that text doesn't reach, by `exclude_modules`.

    Raises:
        ConfigError: If an entry names only unreached modules.
    """
    for name in config.modules_to_save or []:
        named = [key for key, _ in base.named_parameters() if re.search(rf"(^|\.){re.escape(name)}\.", key)]
        if named and reach.unreached.issuperset(named):
            raise ConfigError(f"modules_to_save={name!r}: no text reaches {named[0]}. Leave it out.")
    wanted = adapted_names(base, config)
    lost = sorted(wanted & reach.unreached)
    if not lost:
        return config
    if wanted <= reach.unreached:
        raise ConfigError(
            f"target_modules={config.target_modules!r} names only modules that no text reaches (first: {lost[0]}): an "
            "adapter there would learn nothing. Name modules of the language model."
        )
    if isinstance(config.target_modules, (list, set)):
        for entry in sorted(config.target_modules):
            named = [name for name in wanted if f".{name}".endswith((f".{entry}.weight", f".{entry}"))]
            if named and reach.unreached.issuperset(named):
                raise ConfigError(
                    f"target_modules: {entry!r} names only modules that no text reaches ({sorted(named)[0]}): an "
                    "adapter there would learn nothing. Leave it out."
                )
    modules = {name.rpartition(".")[0] for name in lost}
    return replace(config, exclude_modules=_excluding(config.exclude_modules, base, reach, modules))


def _excluding(
    excluded: str | Iterable[str] | None, base: PreTrainedModel, reach: Reach, modules: Iterable[str]
) -> str:
    """Build a regular expression that excludes these modules, with few names, and those already excluded."""
    whole = unreached_roots(base, reach)
    roots = sorted({next(root for root in whole if f"{name}.".startswith(f"{root}.")) for name in modules})
    parts = [f"({'|'.join(map(re.escape, roots))})(\\..*)?"]
    if isinstance(excluded, str):
        parts.append(f"({excluded})")
    elif excluded:
        parts.append(f"(.*\\.)?({'|'.join(map(re.escape, sorted(excluded)))})")
    return "|".join(parts)


def unreached_roots(base: nn.Module, reach: Reach) -> list[str]:
    """Return the names of the outermost modules, or parameters, that are completely unreached."""
    found: list[str] = []
    for name, module in base.named_modules():
        if not name or any(name.startswith(f"{root}.") for root in found):
            continue
        parameters = [f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)]
        if parameters and reach.unreached.issuperset(parameters):
            found.append(name)
    single = [name for name in sorted(reach.unreached) if not any(name.startswith(f"{root}.") for root in found)]
    return found + single


def unreached_groups(base: PreTrainedModel, reach: Reach) -> list[str]:
    """Describe each part of a model that text doesn't reach in one line, with layers merged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
        ...                                      num_hidden_layers=1, num_attention_heads=2))
        >>> model.tower = nn.Linear(2, 2)
        >>> unreached_groups(model, Reach(frozenset({"tower.weight", "tower.bias"})))
        ['tower: 2 parameters, 6: no text reaches them, so they stay frozen.']
    """
    sizes = {base_name(name)[0]: count for name, count in weight_counts(base).items() if not base_name(name)[1]}
    groups: dict[str, list[int]] = {}
    for root in unreached_roots(base, reach):
        inside = [size for n, size in sizes.items() if f"{n}.".startswith(f"{root}.") and n in reach.unreached]
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", root), []).extend(inside)
    return [
        f"{group}: {len(each)} parameter{'s' if len(each) > 1 else ''}, {short_count(sum(each))}: no text reaches "
        f"{'them, so they stay' if len(each) > 1 else 'it, so it stays'} frozen."
        for group, each in groups.items()
        if each
    ]


# ---------------------------------------------------------------- experts stored as one tensor


def _everything(
    config: LoraConfig, base: PreTrainedModel, reach: Reach, experts: list[str], top_layers: int | None
) -> LoraConfig:
    """Target each linear layer as a module, and what PEFT can't adapt as a module as a parameter."""
    inside = ("",) if top_layers is None else _inside_top_layers(base, top_layers)
    every = [n for n in _linear_layers(base, config) if f"{n}.weight" not in reach.unreached and n.startswith(inside)]
    every = [name for name in every if not _is_excluded(config, name)]
    linear = [name for name in every if name not in reach.unlike_linear]
    tensors = [name for name in experts if name.startswith(inside) and not _is_excluded(config, name)]
    tensors += [f"{name}.weight" for name in every if name in reach.unlike_linear]
    plain = replace(config, target_modules=_shortest_modules(base, linear), exclude_modules=None)
    if (reason := _why_no_parameters(config)) is not None:
        return _without_tensors(base, plain, linear, tensors, reason)
    lost = _lost(base, replace(plain, target_parameters=_shortest(base, tensors)), linear)
    # PEFT took these linear layers for experts of an older checkpoint, and skips them as parameters; or their weights
    # are used without calling them, and it refuses both
    parameters = dict(base.named_parameters(remove_duplicate=False))
    loose = [f"{name}.weight" for name in lost if parameters[f"{name}.weight"].is_floating_point()]
    alone = replace(plain, target_modules=[], target_parameters=_shortest(base, loose))
    tensors += loose if loose and not _refused(base, alone) else []
    kept = _shortest_modules(base, [name for name in linear if name not in lost])
    whole = replace(plain, target_modules=kept, target_parameters=_shortest(base, tensors))
    left = sorted({*tensors, *(f"{name}.weight" for name in linear)} - adapted_names(base, whole))
    if left:
        warn(
            f"{type(base).__name__}: {', '.join(_shortest(base, left))} get no adapter: PEFT adapts them neither as "
            "modules nor as parameters. Set lora's target_modules yourself to silence this.",
            stacklevel=2,
        )
    return whole


def _without_tensors(
    base: PreTrainedModel, plain: LoraConfig, linear: list[str], tensors: list[str], reason: str
) -> LoraConfig:
    """Adapt linear layers as modules only, with a warning, if a setting keeps PEFT from adapting parameters."""
    lost = _lost(base, plain, linear)
    kept = [name for name in linear if name not in lost]
    left = _shortest(base, [*tensors, *(f"{name}.weight" for name in lost)])
    if not kept:
        raise ModelError(
            f"{type(base).__name__}: PEFT can't adapt {', '.join(left)} with {reason}, and there is no other linear "
            f"layer. Leave out {reason}."
        )
    if left:
        warn(
            f"{type(base).__name__}: {', '.join(left)} get no adapter: PEFT adapts experts stored in one tensor "
            f"through target_parameters, which {reason} rules out. Leave that out to adapt them, or set lora's "
            "target_modules yourself to silence this.",
            stacklevel=2,
        )
    return replace(plain, target_modules=_shortest_modules(base, kept))


def _refused(base: PreTrainedModel, config: LoraConfig) -> bool:
    try:
        adapted_names(base, config)
    except ModelError:
        return True
    return False


def _lost(base: PreTrainedModel, config: LoraConfig, linear: list[str]) -> list[str]:
    """Return the linear layers that a configuration names and that get no adapter, or that PEFT refuses."""
    try:
        adapted = adapted_names(base, config)
        return [name for name in linear if f"{name}.weight" not in adapted]
    except ModelError:
        pass
    lost = []
    for short in sorted({name.rpartition(".")[2] for name in linear}):
        names = [name for name in linear if name.endswith(f".{short}")]
        try:
            adapted = adapted_names(base, replace(config, target_modules=names, target_parameters=None))
        except ModelError:
            adapted = set()
        lost += [name for name in names if f"{name}.weight" not in adapted]
    return lost


def _why_no_parameters(config: LoraConfig) -> str | None:
    """Return the setting that keeps PEFT from adapting parameters; None if there is none."""
    for name in ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out", "layers_to_transform", "layer_replication"):
        if value := getattr(config, name, None):
            return f"{name}={value}"
    for name in ("velora_config", "kasa_config", "arrow_config", "alora_invocation_tokens", "monteclora_config"):
        if getattr(config, name, None) is not None:
            return name
    init = config.init_lora_weights
    return f"init_lora_weights={init!r}" if isinstance(init, str) and init.lower() != "gaussian" else None


def _is_excluded(config: LoraConfig, name: str) -> bool:
    """Whether the user's `exclude_modules` or `modules_to_save` keep adapters off a module."""
    only = replace(config, target_modules=[name], exclude_modules=config.exclude_modules, layers_to_transform=None)
    return not check_target_module_exists(only, name)


def _linear_layers(base: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return the layers that "all-linear" covers: every linear layer but the head."""
    head = base.get_output_embeddings()
    heads = {id(head)} if head is not None else {id(getattr(base, name, None)) for name in HEADS}
    if head is None and str(getattr(config.task_type, "value", config.task_type)) != "SEQ_CLS":
        heads = set()
    return [n for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in heads]


def _inside_top_layers(base: PreTrainedModel, count: int) -> tuple[str, ...]:
    layers = layers_of(base)[1]
    if not 1 <= count <= len(layers):
        raise ConfigError(f"top_layers={count}: the model has {len(layers)} layers.")
    top = {id(layer) for layer in layers[-count:]}
    return tuple(f"{name}." for name, module in base.named_modules() if id(module) in top)


def _shortest(base: nn.Module, names: Iterable[str]) -> list[str]:
    """Shorten parameter names to what follows their last number, if that matches no other parameters."""
    return _without_prefixes([name for name, _ in base.named_parameters(remove_duplicate=False)], set(names))


def _shortest_modules(base: nn.Module, names: Iterable[str]) -> list[str]:
    return _without_prefixes([name for name, _ in base.named_modules(remove_duplicate=False)], set(names))


def _without_prefixes(every: list[str], names: set[str]) -> list[str]:
    found = set()
    for name in names:
        short = re.split(r"\.\d+\.", name)[-1]
        alike = {other for other in every if other == short or other.endswith(f".{short}")}
        found.add(short if alike <= names else name)
    return sorted(found)
