"""The parts of a model (attention, experts, router, ...), and how many weights of each are trained.

Parts are recognized by structure: where token ids go in and logits come out, which modules repeat, what holds one
matrix per expert, and which modules have attributes of attention heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from math import prod

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_ft.models.head import CausalLM
from lightning_ft.models.reward_head import HEADS

PARTS = ("attention", "MLP", "experts", "router", "encoders", "embeddings", "head", "norms", "other")
_MIXERS = re.compile(r"atten|mixer|mamba|ssm|recurrent|shortconv|deltanet", re.IGNORECASE)
_KNOWS_HEADS = ("num_heads", "num_attention_heads", "head_dim", "num_key_value_heads", "n_head")
_WRAPPED = re.compile(r"(\.(base_layer|original_module))+\.")
_ADDED = re.compile(r"\.(lora_\w+|modules_to_save|token_adapter|trainable_tokens_\w+)\.")


def weight_counts(model: nn.Module) -> dict[str, int]:
    """Return the number of weights in each parameter by name; 4-bit weights are stored two per byte.

    Args:
        model: Model, sharded or not.

    Example:
        >>> weight_counts(nn.Linear(3, 2))
        {'weight': 6, 'bias': 2}
    """
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        # A sharded parameter is no longer of the class that knows its shape; its module still does.
        state = getattr(module, "quant_state", None) or getattr(getattr(module, "weight", None), "quant_state", None)
        if (weight := f"{name}.weight".removeprefix(".")) in counts and state is not None:
            counts[weight] = prod(state.shape)
    return counts


def expert_counts(config: PreTrainedConfig) -> frozenset[int]:
    """Return each number above 1 that a configuration sets for experts.

    Example:
        >>> from transformers import MixtralConfig
        >>> sorted(expert_counts(MixtralConfig(num_local_experts=8, num_experts_per_tok=2)))
        [2, 8]
    """

    def numbers(values: Mapping[str, object]) -> Iterator[int]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from numbers(value)
            elif "expert" in str(key) and "size" not in str(key) and type(value) is int and value > 1:
                yield value

    return frozenset(numbers(config.to_dict()))


def expert_tensors(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return parameters with one matrix per expert, outside of linear layers, where adapters usually are.

    Args:
        base: A model without adapters.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))
        >>> for name, tensor in expert_tensors(model).items():
        ...     print(name, tuple(tensor.shape))
        model.layers.0.mlp.experts.gate_up_proj (4, 16, 8)
        model.layers.0.mlp.experts.down_proj (4, 8, 8)
    """
    counts = expert_counts(base.config)
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            stacked = parameter.ndim == 3 and parameter.shape[0] in counts and min(parameter.shape) > 1
            flattened = parameter.ndim == 2 and "expert" in type(module).__name__.lower() and "bias" not in key
            if stacked or (flattened and parameter.shape[0] not in counts):
                found[f"{name}.{key}"] = parameter
    return found


def find_parts(base: PreTrainedModel) -> dict[str, str]:
    """Find the part that each parameter of a model, and each module with parameters of its own, belongs to.

    Args:
        base: A model without adapters.

    Returns:
        One of :data:`PARTS` for each name.
    """
    modules = dict(base.named_modules(remove_duplicate=False))
    part_of = _PartFinder(base, modules)
    parts: dict[str, str] = {}
    for name, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            parts[f"{name}.{key}" if name else key] = part = part_of(name, parameter)
            parts.setdefault(name, part)
    return parts


class _PartFinder:
    """Finds the part that a parameter belongs to from the modules that contain it."""

    def __init__(self, base: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        head = base.get_output_embeddings()
        heads = [head] if head is not None else [getattr(base, name, None) for name in HEADS]
        embeddings = base.get_input_embeddings()
        self._heads, self._embeddings = _ids(heads), _ids([embeddings])
        decoder = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        inside = _ids([decoder])
        self._text = (inside if inside >= self._embeddings else _ids([base])) | self._heads
        counts = expert_counts(base.config)
        lists = [name for name in modules if self._lists_experts(name, counts)]
        self._experts = {name: len(list(modules[name].children())) for name in lists}
        for name, tensor in expert_tensors(base).items():
            self._experts[name.rpartition(".")[0]] = tensor.shape[0]
        self._blocks = {name.rpartition(".")[0]: count for name, count in self._experts.items()}

    def _lists_experts(self, name: str, counts: frozenset[int]) -> bool:
        """Whether a module is a list of experts: of the expected number, of one class, inside a layer."""
        module = self._modules[name]
        if not isinstance(module, nn.ModuleList) or len(module) not in counts:
            return False
        nested = any(isinstance(self._modules[outer], nn.ModuleList) for outer in _ancestors(name)[1:])
        return nested and len({type(member) for member in module}) == 1

    def __call__(self, where: str, parameter: nn.Parameter) -> str:
        owner, outer = self._modules[where], _ancestors(where)
        if id(parameter) in self._embeddings:
            return "embeddings"
        if id(parameter) in self._heads:
            return "head"
        if id(parameter) not in self._text:
            return "encoders"
        if isinstance(owner, nn.Embedding):
            return "embeddings"
        if any(name in self._experts for name in outer):
            return "experts"
        if parameter.ndim and any(self._blocks.get(name) == parameter.shape[0] for name in outer):
            return "router"
        if "norm" in type(owner).__name__.lower():
            return "norms"
        lists = [number for number, name in enumerate(outer) if isinstance(self._modules[name], nn.ModuleList)]
        in_layer = outer[: max(lists[-1] - 1, 0)] if lists else []  # the name inside its layer
        if any(_mixes_tokens(self._modules[name]) for name in in_layer):
            return "attention"
        return "MLP" if in_layer and _has_matrix(owner) else "other"


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether a module mixes tokens, judging by its class name or attributes of attention heads."""
    return bool(_MIXERS.search(type(module).__name__)) or any(hasattr(module, name) for name in _KNOWS_HEADS)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


def _ancestors(name: str) -> list[str]:
    """Return a module's name and those of its ancestors, innermost first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _ids(modules: list[object]) -> set[int]:
    return {id(p) for module in modules if isinstance(module, nn.Module) for p in module.parameters()}


def base_name(name: str) -> tuple[str, bool]:
    """Convert the name of a parameter of an adapted model to the base's: its own, or that of the module it adapts.

    Returns:
        Name in the base, and whether the parameter is an adapter's.

    Example:
        >>> base_name("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
        ('model.layers.0.self_attn.q_proj', True)
        >>> base_name("base_model.model.model.layers.0.mlp.experts.base_layer.base_layer.gate_up_proj")
        ('model.layers.0.mlp.experts.gate_up_proj', False)
    """
    name = _WRAPPED.sub(".", name.removeprefix("base_model.model."))
    added = _ADDED.search(name)
    return (name, False) if added is None else (name[: added.start()], True)


def adapted_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the base's parameters that an adapter is added to."""
    found = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            found.add(id(getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"), None)))
    return found


@dataclass
class Amounts:
    """Numbers of weights of one part of a model.

    Args:
        total: All weights without adapters.
        trained: Weights that the optimizer changes, including those of adapters.
        adapted: Weights that an adapter is added to.
        frozen: Weights that stay unchanged, adapted or not.
        unreached: Frozen weights that text doesn't reach.
    """

    total: int = 0
    trained: int = 0
    adapted: int = 0
    frozen: int = 0
    unreached: int = 0


def count_parts(model: CausalLM, parts: Mapping[str, str], unreached: frozenset[str]) -> dict[str, Amounts]:
    """Count the weights of each part, and how many of them are trained, adapted and frozen.

    Args:
        model: Model, prepared for training, adapted or not.
        parts: Parts of its base, from :func:`find_parts`.
        unreached: Names of the base's parameters that text doesn't reach.

    Returns:
        Counts by part, in the order of :data:`PARTS`, without empty parts.
    """
    counts = {part: Amounts() for part in PARTS}
    adapted, weights = adapted_parameters(model), weight_counts(model)
    for full_name, parameter in model.named_parameters():
        name, added = base_name(full_name)
        amounts, count = counts[parts.get(name, "other")], weights[full_name]
        amounts.trained += count if parameter.requires_grad else 0
        if added:
            continue
        amounts.total += count
        amounts.adapted += count if id(parameter) in adapted else 0
        if not parameter.requires_grad:
            amounts.frozen += count
            amounts.unreached += count if name in unreached else 0
    return {part: amounts for part, amounts in counts.items() if amounts != Amounts()}


def parts_table(parts: Mapping[str, Amounts]) -> str:
    """Format the counts as a text table, with sums in the last row.

    Example:
        >>> print(parts_table({"attention": Amounts(1_500_000, 2_000, 1_500_000, 1_500_000, 0)}))
                        total    trained    adapted     frozen  unreached
        attention       1.50M      2.00K      1.50M      1.50M          0
        all             1.50M      2.00K      1.50M      1.50M          0
    """
    names = [field.name for field in fields(Amounts)]
    whole = Amounts(*(sum(getattr(amounts, name) for amounts in parts.values()) for name in names))
    lines = [" " * 10 + "".join(f"{name:>11}" for name in names)]
    for part, amounts in {**parts, "all": whole}.items():
        lines.append(f"{part:<10}" + "".join(f"{short_count(getattr(amounts, name)):>11}" for name in names))
    return "\n".join(lines)


def short_count(count: int) -> str:
    """Format a number of weights in few characters.

    Example:
        >>> short_count(999), short_count(1_234_567), short_count(70_553_706_496)
        ('999', '1.23M', '70.6B')
    """
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:#.3g}{unit}".replace(".K", "K").replace(".M", "M").replace(".B", "B")
    return str(count)
