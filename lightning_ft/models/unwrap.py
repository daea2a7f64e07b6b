"""Find the transformers or PEFT model inside a module or its wrappers."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_ft.errors import LightningFTError
from lightning_ft.models.head import base_of


def unwrapped(module: object) -> object:
    """Remove the wrappers of Fabric, DDP and `torch.compile` from a module."""
    while not isinstance(module, (PreTrainedModel, PeftModel)) and not _has_own_model(module):
        inner = getattr(module, "_orig_mod", None)  # of torch.compile, which passes other attributes on
        inner = getattr(module, "module", None) if inner is None else inner
        if inner is None:
            break
        module = inner
    return module


def _has_own_model(module: object) -> bool:
    """Whether a module has a `model`, rather than passing on that of a module that it wraps."""
    own = {**getattr(module, "__dict__", {}), **getattr(module, "_modules", {})}
    return "model" in own or hasattr(type(module), "model")


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


def check_causal(model: PreTrainedModel | PeftModel, measuring: str, error: type[LightningFTError]) -> None:
    """Refuse a model that doesn't continue a prompt: an encoder-decoder, or one without a head over the vocabulary.

    Args:
        model: The model.
        measuring: Name of the caller, for the message.
        error: Class of the error to raise.

    Raises:
        LightningFTError: An `error`, with what the model is.
    """
    base: Any = base_of(model)
    if base.config.is_encoder_decoder or not isinstance(base.get_output_embeddings(), nn.Module):
        what = "is an encoder-decoder" if base.config.is_encoder_decoder else "has no output embeddings"
        raise error(
            f"{type(base).__name__} {what}, and {measuring} needs a causal language model, which continues a prompt. "
            f"Leave {measuring} out, or measure in validation_step of your own module."
        )


def known_tokenizer(tokenizer: PreTrainedTokenizerBase | None, module: object) -> object:
    """The tokenizer that was passed, or that of a module; None if it has none yet, as before its own `setup`.

    Args:
        tokenizer: Tokenizer that was passed; None for the module's.
        module: The module, or a wrapper of it, which may pass attributes on or not.
    """
    found = (tokenizer, *(getattr(holder, "tokenizer", None) for holder in (module, unwrapped(module))))
    return next((each for each in found if each is not None), None)


def tokenizer_is_late(tokenizer: PreTrainedTokenizerBase | None, module: object) -> bool:
    """Whether a module may load its tokenizer in its `setup`, which Lightning calls after that of its callbacks.

    Args:
        tokenizer: Tokenizer that was passed to the callback.
        module: The module.
    """
    return known_tokenizer(tokenizer, module) is None


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
        LightningFTError: An `error`, if there is neither, or an object that isn't a tokenizer.
    """
    found = known_tokenizer(tokenizer, module)
    if found is None:
        raise error(f"{measuring} has no tokenizer. Pass tokenizer=, or use a module that has one.")
    if not isinstance(found, PreTrainedTokenizerBase):
        raise error(
            f"{measuring}: the tokenizer is a {type(found).__name__}, expected one of transformers. Pass tokenizer=, "
            "as AutoTokenizer.from_pretrained returns it (of a processor, its `tokenizer`)."
        )
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
