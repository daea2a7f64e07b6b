"""The update that training made to a model, scaled: from the original weights (0) to the trained ones (1) and between.

For an adapter that started at zero, scaling B scales the update of its layer. For trained weights themselves it is the
linear interpolation of WiSE-FT (Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from lightning_ft.errors import ModelError
from lightning_ft.models.head import CausalLM
from lightning_ft.models.shard import is_sharded


def copy_weights(model: CausalLM) -> dict[str, Tensor]:
    """Copies of the trainable weights on the CPU, to interpolate from; an adapter needs none.

    Args:
        model: The model before training.
    """
    if isinstance(model, PeftModel):
        return {}
    return copies_of({name: p for name, p in model.named_parameters() if p.requires_grad})


def copies_of(weights: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Copies of weights on the CPU, by name."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}


class UpdateScale:
    """Scales the update of a trained model in place.

    Args:
        model: The trained model. An adapter must have started at zero, as PEFT's default does.
        original: Weights before training by name, for a model without an adapter; see :func:`copy_weights`.

    Raises:
        ModelError: For a sharded model, an update that isn't linear in what was trained (DoRA), and for weights whose
            original isn't known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> original = copy_weights(model)
        >>> _ = model.lm_head.weight.data.add_(1.0)
        >>> UpdateScale(model, original).set(0.5)
        >>> round(float((model.lm_head.weight - original["lm_head.weight"]).mean()), 3)
        0.5
    """

    def __init__(self, model: CausalLM, original: Mapping[str, Tensor] | None = None) -> None:
        if is_sharded(model):
            raise ModelError("The update of a sharded model can't be scaled. Export it, and scale it on one device.")
        self.scale = 1.0
        starts = _adapter_starts(model) if isinstance(model, PeftModel) else _weight_starts(model, original or {})
        # the trained values are kept, so that scaling back to 1 is exact
        self._weights = [(parameter, parameter.detach().clone(), start) for parameter, start in starts]

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Set the weights to ``original + scale * (trained - original)``; 1 restores the trained ones exactly."""
        for parameter, trained, start in self._weights:
            if scale == 1:
                parameter.copy_(trained)
            elif start is None:
                parameter.copy_(trained.float() * scale)
            else:
                origin = start.to(trained.device).float()
                parameter.copy_(origin + scale * (trained.float() - origin))
        torch.clear_autocast_cache()  # it may have half-precision copies of the weights at another scale
        self.scale = scale


_Starts = list[tuple[torch.nn.Parameter, "Tensor | None"]]
"""Trained weights with their values before training; None for zero."""


def _weight_starts(model: CausalLM, original: Mapping[str, Tensor]) -> _Starts:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if missing := [name for name in trained if name not in original]:
        raise ModelError(
            f"The original of {len(missing)} trained weights isn't known (first: {missing[0]}), so their update can't "
            "be scaled. Keep a copy of the weights before training."
        )
    return [
        (p, original[name]) for name, p in model.named_parameters() if name in original and _changed(p, original[name])
    ]


def _changed(parameter: torch.nn.Parameter, origin: Tensor) -> bool:
    """Whether training changed a weight, which may have been frozen since."""
    return parameter.requires_grad or not torch.equal(parameter.detach().cpu(), origin.to(parameter.dtype))


def _adapter_starts(model: PeftModel) -> _Starts:
    active = set(model.active_adapters)  # others, such as that of a reference, stay as they are
    copies = {
        id(parameter): origin
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for adapter, copied in wrapper.modules_to_save.items()
        if adapter in active
        for parameter, origin in zip(copied.parameters(), wrapper.original_module.parameters(), strict=True)
    }
    starts: _Starts = []
    unknown = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_embedding_A." in name:
            continue
        if id(parameter) in copies:  # also one that was trained and is frozen now
            starts.append((parameter, copies[id(parameter)]))
        elif (".lora_B." in name or ".lora_embedding_B." in name) and active.intersection(name.split(".")):
            starts.append((parameter, None))
        elif parameter.requires_grad:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"The update of {len(unknown)} trained weights of the adapter isn't linear, or their start isn't known "
            f"(first: {unknown[0]}), so it can't be scaled. Use LoRA without use_dora and bias."
        )
    return starts
