"""The weights of a model in training under the names of the model without adapters, with the adapters merged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_ft.errors import ModelError
from lightning_ft.models.head import CausalLM, base_of


@dataclass(frozen=True, eq=False)
class ModuleParameters:
    """Parameters of one module of the plain model.

    Args:
        prefix: What their names in the plain model start with.
        parameters: The parameters by their names in the module.
        adapter: The active adapter layer around the module; None without one.
    """

    prefix: str
    parameters: dict[str, nn.Parameter]
    adapter: BaseTunerLayer | None

    def merged(self) -> dict[str, Tensor]:
        """The parameters with the adapter merged, as new tensors.

        Raises:
            ValueError, RuntimeError: If it can't be merged, for example because its weights aren't finite.
        """
        return dict(self.parameters) if self.adapter is None else _merged(self.adapter)


def plain_modules(model: CausalLM) -> list[ModuleParameters]:
    """Find the modules of the plain model that have parameters of their own; of tied parameters, the first.

    Args:
        model: Model in training, with or without an adapter, sharded or not.

    Raises:
        ModelError: If adapters can't be merged into its weights: a quantized base, an adapter without such products, or
            one that changes only one of two tied weights.
    """
    base = base_of(model)
    if getattr(base, "is_quantized", False):
        raise ModelError(
            "The base weights are quantized: an adapter can't be merged into them, nor can they be sent to a server. "
            "Load the model without quantization, or let the built-in engine sample with it as it is."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"A {model.active_peft_config.peft_type} adapter can't be merged into weights: let the built-in engine "
            "sample with it as it is."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in base.modules()):
        raise ModelError("FSDP1 isn't supported: shard the model with ModelParallelStrategy (FSDP2).")
    return list(_untied(_parameters_by_module(base, "")))


class MergedWeights:
    """Iterates over every weight of the plain model (the model without adapters), under its name there.

    Adapters are merged into copies, one layer at a time, so the model in training doesn't change. (Merging in place
    and subtracting again, as is often done, would add rounding errors at every step.) Sharded weights are gathered, so
    every rank has to iterate.

    Args:
        model: Model in training, with or without an adapter, sharded or not.

    Raises:
        ModelError: If a plain model can't have these weights: those of :func:`plain_modules`, and a head that was
            trained apart from the embeddings it is tied to.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> served = MergedWeights(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
        >>> served.metadata[1]
        ('model.layers.0.self_attn.q_proj.weight', 'float32', [16, 16])
    """

    def __init__(self, model: CausalLM) -> None:
        base = base_of(model)
        self._modules = plain_modules(model)
        self.problem: Exception | None = None
        """Error raised while an adapter was merged; the unmerged weights were yielded instead.

        Both sides of a transfer wait for each other, so the transfer has to finish before this is raised.
        """
        names = {name for name, _, _ in self.metadata}
        tied = set(getattr(base, "_tied_weights_keys", None) or ()) & names
        if tied and getattr(base.config, "tie_word_embeddings", False):
            raise ModelError(
                f"{', '.join(sorted(tied))} was trained apart from the embeddings, but a server of this model uses one "
                "weight for both: use LoraConfig(ensure_weight_tying=True)."
            )

    @property
    def metadata(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and unsharded shape of each weight, in order."""
        return [
            (module.prefix + name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape))
            for module in self._modules
            for name, parameter in module.parameters.items()
        ]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the name and the unsharded tensor of each weight, in order."""
        self.problem = None
        for module in self._modules:
            weights = None
            if module.adapter is not None:
                try:
                    weights = _merged(module.adapter)
                except (ValueError, RuntimeError) as error:
                    self.problem = self.problem or error
            for name, parameter in module.parameters.items():
                yield module.prefix + name, _full_tensor(parameter) if weights is None else weights[name]


def _parameters_by_module(module: nn.Module, prefix: str) -> Iterator[ModuleParameters]:
    """Iterate over the modules of the plain model in order, without the wrappers of PEFT."""
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    if isinstance(module, ModulesToSaveWrapper):
        active = [] if module.disable_adapters else [a for a in module.active_adapters if a in module.modules_to_save]
        module = module.modules_to_save[active[0]] if active else module.original_module
    adapter = None
    if isinstance(module, BaseTunerLayer):
        adapter = None if module.disable_adapters or module.merged or not module.active_adapters else module
        module = module.get_base_layer()
    parameters = dict(module.named_parameters(recurse=False))
    if parameters:
        yield ModuleParameters(prefix, parameters, adapter)
    for name, child in module.named_children():
        yield from _parameters_by_module(child, f"{prefix}{name}.")


def _untied(modules: Iterator[ModuleParameters]) -> Iterator[ModuleParameters]:
    """Keep only the first occurrence of tied parameters."""
    first: dict[int, ModuleParameters] = {}
    for module in modules:
        parameters = {}
        for name, parameter in module.parameters.items():
            if (other := first.get(id(parameter))) is None:
                first[id(parameter)] = module
                parameters[name] = parameter
            elif (other.adapter or module.adapter) is not None and not _are_tied(other.adapter, module.adapter):
                raise ModelError(
                    f"{other.prefix}{name} and {module.prefix}{name} are tied, but the adapter changes only one of "
                    "them, and merged they are one weight. Leave it out of target_modules."
                )
        if parameters:
            yield ModuleParameters(module.prefix, parameters, module.adapter)


def _are_tied(first: BaseTunerLayer | None, second: BaseTunerLayer | None) -> bool:
    """Whether the second adapter layer makes the same change as the first."""
    return isinstance(second, TrainableTokensLayer) and second.tied_adapter is first


def _merged(layer: BaseTunerLayer) -> dict[str, Tensor]:
    """Return the weights of a layer with its adapters merged, as new tensors."""
    module: nn.Module = layer  # type: ignore[assignment]  # a mix-in of modules
    # deepcopy doesn't copy what its memo contains: the copied layer has its own parameters, but shares their storage.
    memo: dict[int, nn.Parameter] = {
        id(p): nn.Parameter(_full_tensor(p), requires_grad=False) for p in module.parameters()
    }
    copied: nn.Module = copy.deepcopy(module, memo)  # type: ignore[arg-type]
    while isinstance(copied, BaseTunerLayer):  # layers that adapt several parameters of one module are nested
        copied.merge(safe_merge=True)  # into a new tensor, after a check for NaNs
        copied = cast(nn.Module, copied.base_layer)
    return {name: parameter.detach() for name, parameter in copied.named_parameters(recurse=False)}


def _full_tensor(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
