"""Whether a model gives the same with a cache: asked of the model itself, on a few tokens.

Architectures differ in more than a list of names could hold.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_ft.models.head import CausalLM, base_of, input_device, takes_explicit_masks
from lightning_ft.rollout.bundles import Bundles, ReadPrompts, read_prompts
from lightning_ft.rollout.forward import next_logits, read_tokens

_TOKENS = 12
_SHORT = _TOKENS - 3  # the second prompt is shorter, so that its row has a hole behind the prefix
_PREFIX = 5


def cache_is_exact(model: CausalLM, layers: int, pad_token_id: int) -> bool:
    """Whether logits behind a prefix taken from a cache, with holes behind it, are those of the plain pass.

    Args:
        model: In eval mode.
        layers: Of its cache.
        pad_token_id: Stands at masked places.

    Returns:
        So. No random number of the global generators is drawn.
    """
    first, second = _prompts(model)
    return _close(model, _read(model, layers, pad_token_id).logits, [first, second])


def rows_can_be_shared(model: CausalLM, layers: int, pad_token_id: int) -> bool:
    """Whether sequences that stand in one row of the cache, behind a mask, get the logits that they get by themselves.

    Args:
        model: In eval mode, and exact with a cache.
        layers: Of its cache.
        pad_token_id: Stands at masked places.
    """
    if not takes_explicit_masks(base_of(model)):
        return False
    first, second = _prompts(model)
    bundles = Bundles(_read(model, layers, pad_token_id), times=2, last=True, ahead=2, together=True, width=4)
    tokens = torch.stack([first[:4], first[4:8]])  # two steps of four sequences, two of each prompt
    for step in tokens:
        got = bundles.write(partial(next_logits, model), step.to(input_device(model)))
    return _close(model, got, [torch.cat([first if s < 2 else second, tokens[:, s]]) for s in range(4)])


def _prompts(model: CausalLM) -> tuple[Tensor, Tensor]:
    vocabulary = base_of(model).config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    return ids[0], torch.cat([ids[0, :_PREFIX], ids[1, _PREFIX:_SHORT]])


def _read(model: CausalLM, layers: int, pad_token_id: int) -> ReadPrompts:
    first, second = _prompts(model)
    return read_prompts(
        partial(next_logits, model),
        [first[_PREFIX:].tolist(), second[_PREFIX:].tolist()],
        read_tokens(model, first[:_PREFIX].tolist(), layers),
        layers=layers,
        pad_token_id=pad_token_id,
        device=input_device(model),
    )


def _close(model: CausalLM, got: Tensor, sequences: list[Tensor]) -> bool:
    base, device = base_of(model), input_device(model)
    alone = [base(input_ids=ids[None].to(device), use_cache=False).logits[:, -1].float() for ids in sequences]
    want = torch.cat(alone)
    rounds = base.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
    tolerance = 5e-2 if rounds or getattr(base, "is_quantized", False) else 1e-4
    return bool((got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1.0))
