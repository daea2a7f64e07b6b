"""An adapter folded into its base, refused where the whole model would answer differently."""

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
from lightning_ft.models.reward_head import last_token_rewards

CHECK_TOKENS = 16


def merged(model: PeftModel, check_prompts: list[list[int]] | None = None) -> PreTrainedModel:
    """Fold the adapter into a copy of the base, and compare what both make of a few prompts.

    A head that is the embeddings (tied) and was adapted alone gets weights of its own in the copy, whose configuration
    says ``tie_word_embeddings=False``.

    Args:
        model: The trained model; not changed.
        check_prompts: Token ids of prompts whose greedy continuation must be the same; a few made-up ones by default.

    Returns:
        The whole model.

    Raises:
        ExportError: If the adapter can't be merged, or the merged model answers differently.
    """
    base = base_of(model)
    prompts = check_prompts or _made_up_prompts(base)
    expected = [_output(model, prompt) for prompt in prompts]
    copied = copy.deepcopy(model)
    _unshare(copied)
    try:
        whole = cast(Any, copied).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ExportError(f"PEFT can't merge this adapter: {str(error).strip()} Export it unmerged.") from error
    for prompt, want in zip(prompts, expected, strict=True):
        got = _output(whole, prompt)
        same = torch.equal(got, want) if not want.is_floating_point() else torch.allclose(got, want, 1e-2, 1e-3)
        if not same:
            raise ExportError(
                f"The merged model answers the prompt {prompt[:8]}... with {got.tolist()}, the live one with "
                f"{want.tolist()}. {_why_different(base)}"
            )
    return cast(PreTrainedModel, whole)


def _unshare(model: PeftModel) -> None:
    """Give adapted layers whose weights other modules have too weights of their own."""
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
            "Rounding isn't the reason, since the weights are float32: what PEFT folds in isn't what this adapter "
            "does. Export it unmerged."
        )
    return f"Merging in {base.dtype} loses too much: export unmerged, or load the model with dtype='float32'."


def _made_up_prompts(base: PreTrainedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.config.get_text_config().vocab_size
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in (4, 9, 16)]


def _output(model: CausalLM, prompt: list[int]) -> Tensor:
    """What a model makes of a prompt: its greedy continuation, or of a reward model its score."""
    if base_of(model).can_generate():
        return greedy(model, prompt)
    with evaluating(model):
        return last_token_rewards(model, [torch.tensor(prompt)], 0).cpu()


def greedy(model: CausalLM, prompt: list[int], tokens: int = CHECK_TOKENS) -> Tensor:
    """Greedy continuation of token ids in eval mode.

    Args:
        model: The model, in whatever mode.
        prompt: Token ids.
        tokens: Most tokens to write.

    Returns:
        ``int64 [tokens]``, or fewer where it ended.
    """
    ids = torch.tensor([prompt], device=input_device(model))
    with evaluating(model):
        out = cast(Any, model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, num_beams=1
        )
    return cast(Tensor, out[0, len(prompt) :].cpu())
