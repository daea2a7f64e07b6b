"""The model inside what a training loop holds."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lightning_ft.errors import LightningFTError


def unwrapped(module: Any) -> Any:
    """Without what Fabric or DDP put around it."""
    while not isinstance(module, (PreTrainedModel, PeftModel)) and hasattr(module, "module"):
        module = module.module
    return module


def model_of(module: Any) -> Any:
    """The transformers or PEFT model of a module; None where it has none yet."""
    module = unwrapped(module)
    if isinstance(module, (PreTrainedModel, PeftModel)):
        return module
    model = unwrapped(getattr(module, "model", None))
    return model if isinstance(model, (PreTrainedModel, PeftModel)) else None


def required_model(module: Any, measuring: str, error: type[LightningFTError]) -> Any:
    """The transformers or PEFT model of a module.

    Args:
        module: The module, or with Fabric the model.
        measuring: Who asks, for the message.
        error: What is raised.

    Raises:
        LightningFTError: The `error` given, if it has none.
    """
    model = model_of(module)
    if model is None:
        raise error(
            f"{measuring} found no transformers model in {type(module).__name__}: the module must hold one as "
            '`model`; with Fabric pass it along: fabric.call("on_train_start", fabric, model).'
        )
    return model


def weights_fingerprint(model: Any) -> tuple[float, ...]:
    """Numbers that change when trained weights do; every rank of a sharded model must ask.

    Steps don't tell: weight averaging puts other weights in place after the last one.
    """
    found: list[float] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            weights = parameter.detach()
            for total in (weights.sum(dtype=torch.float64), torch.linalg.vector_norm(weights, dtype=torch.float64)):
                found.append(float(total.full_tensor() if hasattr(total, "full_tensor") else total))
    return tuple(found)
