"""Merge an adapter into its base model, and verify that the merged model's output is the same."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.errors import ExportError
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.lora_checks import shared_adapted_layers

CHECK_TOKENS = 16


def merged(model: PeftModel, check_prompts: list[list[int]] | None = None) -> PreTrainedModel:
    """Fold the adapter into a copy of the base, and compare the output of both models for a few prompts.

    A tied head that was adapted without the embeddings gets weights of its own in the copy, whose configuration then
    has ``tie_word_embeddings=False``.

    Args:
        model: The trained model, which is not changed.
        check_prompts: Token ids of prompts whose greedy continuation must be the same; a few random ones by default.

    Returns:
        The whole model.

    Raises:
        ExportError: If the adapter can't be merged, or the merged model's output differs.
    """
    base = base_of(model)
    prompts = check_prompts or _random_prompts(base)
    expected_outputs = [_output(model, prompt) for prompt in prompts]
    copied = copy.deepcopy(model)
    _unshare(copied)
    try:
        whole = copied.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ExportError(f"PEFT can't merge this adapter: {str(error).strip()} Export it unmerged.") from error
    for prompt, expected in zip(prompts, expected_outputs, strict=True):
        output = _output(whole, prompt)
        exact = not expected.is_floating_point()
        same = torch.equal(output, expected) if exact else torch.allclose(output, expected, 1e-2, 1e-3)
        if not same:
            raise ExportError(
                f"The merged model answers the prompt {prompt[:8]}... with {output.tolist()}, the unmerged one with "
                f"{expected.tolist()}. {_why_different(base)}"
            )
    return cast(PreTrainedModel, whole)


def _unshare(model: PeftModel) -> None:
    """Untie adapted layers from the modules that they share weights with."""
    layers: list[Any] = shared_adapted_layers(model)
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    base = base_of(model)
    parts: list[Any] = [base.get_output_embeddings(), base.get_input_embeddings()]
    ends = [part.get_base_layer() if hasattr(part, "get_base_layer") else part for part in parts]
    if any(layer is end for layer in layers for end in ends):
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def _why_different(base: PreTrainedModel) -> str:
    if base.dtype == torch.float32:
        return (
            "Rounding isn't the reason, since the weights are float32: PEFT merges this adapter inexactly. Export it "
            "unmerged."
        )
    return f"Merging in {base.dtype} loses too much precision. Export unmerged, or load the model with dtype='float32'."


def _random_prompts(base: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in (4, 9, 16)]


def _output(model: CausalLM, prompt: list[int]) -> Tensor:
    """Return a model's output for a prompt: its greedy continuation, or the output of its head if it has no answers."""
    if base_of(model).can_generate():
        return greedy(model, prompt)
    ids = torch.tensor([prompt], device=input_device(model))
    with evaluating(model):
        output: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
    return output.float().cpu()


def greedy(model: CausalLM, prompt: list[int], tokens: int = CHECK_TOKENS) -> Tensor:
    """Greedy continuation of token ids in eval mode.

    Args:
        model: The model, in any mode.
        prompt: Token ids.
        tokens: Maximum number of new tokens.

    Returns:
        New token ids, ``int64 [tokens]``, or fewer if the completion ended.
    """
    ids = torch.tensor([prompt], device=input_device(model))
    with evaluating(model):
        out = cast(Any, model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1
        )
    start = 0 if base_of(model).config.is_encoder_decoder else len(prompt)
    return cast(Tensor, out[0, start:].cpu())
