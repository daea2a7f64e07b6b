"""Text from a model that may be in the middle of its training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import answer_end_token
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch
from lightning_ft.models.load import context_length
from lightning_ft.models.padding import left_padded
from lightning_ft.models.together import prompts_together


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, every module's own mode put back afterwards.

    In train mode with gradient checkpointing transformers drops the cache and generates wrong tokens from the second
    on.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def end_token_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: what the chat template puts there, the tokenizer's EOS and the model's own."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [] if ids is None else ([ids] if isinstance(ids, int) else list(ids))
    return list(
        dict.fromkeys(int(i) for i in (answer_end_token(tokenizer), tokenizer.eos_token_id, *found) if i is not None)
    )


def generate_text(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int = 32,
    **options: Any,
) -> list[str]:
    """Continue each prompt by transformers' `generate`, with left padding where that changes no answer.

    Args:
        model: The model, in whatever mode.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        pad_token_id: Stands in front of shorter prompts, masked.
        max_new_tokens: At most so many.
        batch_size: Prompts at a time.
        options: Further arguments of `generate`.

    Raises:
        ConfigError: If a prompt and its answer don't fit the model's context.
        ModelError: If the model can't generate.
    """
    device = input_device(model)
    limit = context_length(base_of(model))
    texts: dict[int, str] = {}
    lengths = [len(prompt) for prompt in prompts]
    if limit is not None and max(lengths, default=0) + max_new_tokens > limit:
        raise ConfigError(
            f"A prompt of {max(lengths)} tokens and {max_new_tokens} new ones don't fit the context of {limit}."
        )
    with evaluating(model):
        found = prompts_together(model, lengths, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id)
        if found.why is not None:
            warnings.warn(
                f"{type(base_of(model)).__name__}: {found.why}. The answers are the same, it is only slower.",
                stacklevel=3,
            )
        for chosen in found.batches(batch_size):
            part = [prompts[i] for i in chosen]
            longest = max(len(prompt) for prompt in part)
            if (switch := as_forward(base_of(model), length_switch)) is not None:
                switch.forget()
            ids, mask = left_padded(part, pad_token_id)
            out = cast(Any, model).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                eos_token_id=end_token_ids(model, tokenizer),
                **options,
            )
            texts |= zip(chosen, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True), strict=True)
    return [texts[i] for i in range(len(prompts))]
