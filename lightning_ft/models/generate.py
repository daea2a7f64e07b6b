"""Generate text with transformers' `generate` from a model that may be in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import answer_end_token
from lightning_ft.distributed import max_over_ranks, rank_and_world_size, warn
from lightning_ft.errors import ConfigError
from lightning_ft.models.autocast import weights_cast_once
from lightning_ft.models.batched_generation import left_padded, plan_batches
from lightning_ft.models.exactness import some_tokens
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch
from lightning_ft.models.load import context_length
from lightning_ft.models.shard import is_sharded, reshard


@contextmanager
def restoring_modes(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every module of a model afterwards.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with restoring_modes(model):
        ...     _ = model.eval()
        >>> [module.training for module in model.modules()]
        [True, True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored afterwards.

    In train mode with gradient checkpointing, transformers drops the cache and generates wrong tokens from the second
    token on.
    """
    with restoring_modes(model), torch.no_grad():
        model.eval()
        yield


def end_token_ids(model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that end a completion: the chat template's, the tokenizer's EOS and the model's own."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = [] if ids is None else ([ids] if isinstance(ids, int) else list(ids))
    return list(
        dict.fromkeys(int(i) for i in (answer_end_token(tokenizer), tokenizer.eos_token_id, *own) if i is not None)
    )


NEUTRAL_SETTINGS: dict[str, float | None] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "diversity_penalty": 0.0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
}
"""Settings of transformers' `generate` that can change which token is the most likely, with their neutral values."""


def altering_settings(model: CausalLM, options: Mapping[str, object]) -> dict[str, object]:
    """Settings that make `generate` choose other tokens than the model's logits would.

    Args:
        model: The model with its generation config.
        options: Arguments of `generate`, which override the config.

    Returns:
        The settings by name.

    Example:
        >>> from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))
        >>> model.generation_config = GenerationConfig(repetition_penalty=1.5, top_p=0.9)
        >>> altering_settings(model, {"num_beams": 2}), altering_settings(model, {"repetition_penalty": 1.0})
        ({'repetition_penalty': 1.5, 'num_beams': 2}, {})
    """
    config = getattr(model, "generation_config", None)
    settings = {name: options.get(name, getattr(config, name, None)) for name in NEUTRAL_SETTINGS}
    return {name: value for name, value in settings.items() if value is not None and value != NEUTRAL_SETTINGS[name]}


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
    """Continue each prompt with transformers' `generate`, in left-padded batches if those change no completion.

    Every rank of a sharded model must call it. The ranks' prompts may differ: each runs as many passes as the rank that
    needs most, since a pass gathers weights from all of them.

    Args:
        model: The model, in any mode.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        pad_token_id: Id of the padding token, put before shorter prompts and masked.
        max_new_tokens: Maximum number of new tokens per prompt.
        batch_size: Number of prompts per batch.
        options: Further arguments of `generate`.

    Raises:
        ConfigError: If a prompt and its completion don't fit the model's context, on any rank of a sharded model; for
            `num_return_sequences`.
        ModelError: If the model can't generate.
    """
    config = getattr(model, "generation_config", None)
    count = options.get("num_return_sequences") or getattr(config, "num_return_sequences", None) or 1
    if count != 1:
        raise ConfigError(f"num_return_sequences={count}: each prompt gets one answer. Repeat the prompts instead.")
    if options.get("stop_strings") or getattr(config, "stop_strings", None):
        options["tokenizer"] = tokenizer  # `generate` finds them in the text
    base, device = base_of(model), input_device(model)
    synced = is_sharded(base) and rank_and_world_size()[1] > 1
    texts: dict[int, str] = {}
    lengths = [len(prompt) for prompt in prompts]

    def most(number: int) -> int:
        """The largest number of any rank that shares the model."""
        return max_over_ranks(number, device) if synced else number

    limit, length = context_length(base), max(lengths, default=0)
    exceeds = limit is not None and length + max_new_tokens > limit
    if most(int(exceeds)):
        what = f"A prompt of {length:,} tokens" if exceeds else "A prompt of another rank"
        raise ConfigError(
            f"{what} and {max_new_tokens:,} new tokens exceed the model's context of {limit:,}. Lower max_new_tokens, "
            "or shorten the prompts."
        )
    with evaluating(model), weights_cast_once(model):
        plan = plan_batches(
            model, lengths, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, synced_ranks=synced
        )
        if plan.why is not None:
            warn(
                f"{type(base).__name__}: {plan.why}. The completions are correct; generation is only slower.",
                stacklevel=3,
            )
        batches = plan.batches(batch_size)
        idle = most(len(batches)) - len(batches)
        for indices in [*batches, *[[]] * idle]:
            batch = [prompts[i] for i in indices] or [some_tokens(base, (1,))[0].tolist()]
            longest = max(len(prompt) for prompt in batch)
            if (switch := as_forward(base, length_switch)) is not None:
                switch.forget()
            ids, mask = left_padded(batch, pad_token_id)
            out = cast(Any, model).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id,
                eos_token_id=end_token_ids(model, tokenizer),
                **({"synced_gpus": True} if synced else {}),
                **options,
            )
            answers = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            texts |= zip(indices, answers[: len(indices)], strict=True)
    if synced:
        reshard(base)  # FSDP2 keeps the root's weights for a backward pass, and none follows
    return [texts[i] for i in range(len(prompts))]
