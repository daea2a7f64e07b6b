"""Text from a model that may be in the middle of its training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import answer_end_token
from lightning_ft.errors import ConfigError
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.load import context_length


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


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``int64 [b, s]`` each, every row ending at the right."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


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
    """Continue each prompt by transformers' `generate`, with left padding.

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
    """
    device = input_device(model)
    limit = context_length(base_of(model))
    texts: list[str] = []
    with evaluating(model):
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            longest = max(len(prompt) for prompt in part)
            if limit is not None and longest + max_new_tokens > limit:
                raise ConfigError(
                    f"A prompt of {longest} tokens and {max_new_tokens} new ones don't fit the context of {limit}."
                )
            ids, mask = left_padded(part, pad_token_id)
            out = cast(Any, model).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                eos_token_id=end_token_ids(model, tokenizer),
                **options,
            )
            texts += tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts
