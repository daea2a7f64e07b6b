"""Find the transformers or PEFT model inside a module or its wrappers."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.errors import LightningFTError


def unwrapped(module: object) -> object:
    """Remove the wrappers of Fabric or DDP from a module."""
    while not isinstance(module, (PreTrainedModel, PeftModel)) and hasattr(module, "module"):
        module = module.module
    return module


def model_of(module: object) -> PreTrainedModel | PeftModel | None:
    """Return the transformers or PEFT model of a module; None if it has none yet."""
    module = unwrapped(module)
    if isinstance(module, (PreTrainedModel, PeftModel)):
        return module
    model = unwrapped(getattr(module, "model", None))
    return model if isinstance(model, (PreTrainedModel, PeftModel)) else None


def required_model(module: object, measuring: str, error: type[LightningFTError]) -> PreTrainedModel | PeftModel:
    """Return the transformers or PEFT model of a module.

    Args:
        module: Module that contains the model, or with Fabric the model itself.
        measuring: Name of the caller, for the message.
        error: Class of the error to raise.

    Raises:
        LightningFTError: An `error`, if the module has no such model.
    """
    model = model_of(module)
    if model is None:
        raise error(
            f"{measuring} found no transformers model in {type(module).__name__}: assign it to the module's "
            '`model` attribute; with Fabric pass it: fabric.call("on_train_start", fabric, model).'
        )
    return model


def required_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, module: object, measuring: str, error: type[LightningFTError]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer that was passed, or that of the module.

    Args:
        tokenizer: Tokenizer that was passed to the caller; None for the module's.
        module: The module.
        measuring: Name of the caller, for the message.
        error: Class of the error to raise.

    Raises:
        LightningFTError: An `error`, if there is neither.
    """
    found = tokenizer if tokenizer is not None else getattr(unwrapped(module), "tokenizer", None)
    if found is None:
        raise error(f"{measuring} has no tokenizer. Pass tokenizer=, or use a module that has one.")
    return found


def weights_fingerprint(model: nn.Module) -> tuple[float, ...]:
    """Return numbers that change when trained weights do. All ranks of a sharded model must make this call.

    The step count isn't enough, since weight averaging replaces the weights after the last step.
    """
    totals: list[float] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            weights = parameter.detach()
            for total in (weights.sum(dtype=torch.float64), torch.linalg.vector_norm(weights, dtype=torch.float64)):
                totals.append(float(total.full_tensor() if hasattr(total, "full_tensor") else total))
    return tuple(totals)
