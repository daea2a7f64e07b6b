"""The weights of a live model as a server of the plain model names them, adapters folded in on the way."""

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
class _Holder:
    """The parameters of one module of the plain model, and the adapter layer around it, if it changes them."""

    prefix: str
    parameters: dict[str, nn.Parameter]
    adapter: BaseTunerLayer | None


class ServedWeights:
    """Every weight that the plain model has, under its name there, one at a time.

    Adapters are merged into copies, a layer at a time: the live model isn't touched. (Merging into it and subtracting
    again, as is often done, would leave rounding errors behind, step after step.) Sharded weights are gathered, so
    every rank has to iterate.

    Args:
        model: The live model, adapted or not, sharded or not.

    Raises:
        ModelError: If a plain model can't have these weights: a quantized base, an adapter that isn't a change of
            weights, or one that changes only one of two tied weights.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> served = ServedWeights(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
        >>> served.metadata[1]
        ('model.layers.0.self_attn.q_proj.weight', 'float32', [16, 16])
    """

    def __init__(self, model: CausalLM) -> None:
        base = base_of(model)
        if getattr(base, "is_quantized", False):
            raise ModelError(
                "The base weights are quantized: a server can't be given them, nor an adapter merged into them. Load "
                "the model without quantization, or generate with the local engine."
            )
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"A {model.active_peft_config.peft_type} adapter can't be merged into weights: generate with the local "
                "engine."
            )
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in base.modules()):
            raise ModelError("FSDP1 isn't supported: shard the model with ModelParallelStrategy (FSDP2).")
        self._holders = list(_untied(_holders(base, "")))
        self.problem: Exception | None = None
        """What went wrong when an adapter was merged; unmerged weights were given in its place.

        Both sides of a transfer wait for each other, so it has to be brought to its end before this is raised.
        """
        names = {name for name, _, _ in self.metadata}
        tied = set(getattr(base, "_tied_weights_keys", None) or ()) & names
        if tied and getattr(base.config, "tie_word_embeddings", False):
            raise ModelError(
                f"{', '.join(sorted(tied))} has been trained apart from the embeddings, which a server of this model "
                "takes for both: use LoraConfig(ensure_weight_tying=True)."
            )

    @property
    def metadata(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and whole shape of each, in order."""
        return [
            (holder.prefix + name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape))
            for holder in self._holders
            for name, parameter in holder.parameters.items()
        ]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole tensor of each, in order."""
        self.problem = None
        for holder in self._holders:
            weights = None
            if holder.adapter is not None:
                try:
                    weights = _merged(holder.adapter)
                except (ValueError, RuntimeError) as error:
                    self.problem = self.problem or error
            for name, parameter in holder.parameters.items():
                yield holder.prefix + name, _whole(parameter) if weights is None else weights[name]


def _holders(module: nn.Module, prefix: str) -> Iterator[_Holder]:
    """The modules of the plain model in their order, without what PEFT has put around them."""
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
        yield _Holder(prefix, parameters, adapter)
    for name, child in module.named_children():
        yield from _holders(child, f"{prefix}{name}.")


def _untied(holders: Iterator[_Holder]) -> Iterator[_Holder]:
    """Each parameter only where it stands first."""
    first: dict[int, _Holder] = {}
    for holder in holders:
        parameters = {}
        for name, parameter in holder.parameters.items():
            if (other := first.get(id(parameter))) is None:
                first[id(parameter)] = holder
                parameters[name] = parameter
            elif (other.adapter or holder.adapter) is not None and not _change_alike(other.adapter, holder.adapter):
                raise ModelError(
                    f"{other.prefix}{name} and {holder.prefix}{name} are one weight, which the adapter changes in one "
                    "of its places only: a server has but one. Leave it out of target_modules."
                )
        if parameters:
            yield _Holder(holder.prefix, parameters, holder.adapter)


def _change_alike(one: BaseTunerLayer | None, other: BaseTunerLayer | None) -> bool:
    return isinstance(other, TrainableTokensLayer) and other.tied_adapter is one


def _merged(layer: BaseTunerLayer) -> dict[str, Tensor]:
    """The weights of a layer with its adapters added, in new tensors."""
    module: nn.Module = layer  # type: ignore[assignment]  # a mix-in of modules
    # What deepcopy finds in its memo it doesn't copy: the copy stands on the live weights, in parameters of its own.
    memo: dict[int, nn.Parameter] = {id(p): nn.Parameter(_whole(p), requires_grad=False) for p in module.parameters()}
    copied: nn.Module = copy.deepcopy(module, memo)  # type: ignore[arg-type]
    while isinstance(copied, BaseTunerLayer):  # adapters of several parameters of a module are nested
        copied.merge(safe_merge=True)  # into a new tensor, after a look for NaNs
        copied = cast(nn.Module, copied.base_layer)
    return {name: parameter.detach() for name, parameter in copied.named_parameters(recurse=False)}


def _whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
