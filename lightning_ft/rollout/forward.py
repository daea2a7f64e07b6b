"""One pass of a model over new tokens and a cache, and whether a model can be run so."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.models.generate import left_padded
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.rollout.cache import GrowingCache, cache_layers

_PROBE_TOKENS = 12


def next_logits(model: CausalLM, ids: Tensor, cache: GrowingCache, positions: Tensor, mask: Tensor | None) -> Tensor:
    """Run tokens through a model and keep their keys and values.

    Args:
        model: The model.
        ids: New tokens, ``int64 [b, t]``.
        cache: Holds `p` places of each row; `t` are added.
        positions: Of the new tokens, ``int64 [b, t]``.
        mask: Which places are tokens, ``[b, p + t]``; None if all are.

    Returns:
        Logits behind the last place of each row, ``fp32 [b, vocabulary]``.
    """
    base = base_of(model)
    device = input_device(model)
    options = {_cache_argument(base): cache}
    out = base(  # the base and not the PEFT wrapper, around which FSDP2 would not gather the weights
        input_ids=ids.to(device),
        attention_mask=None if mask is None else mask.to(device),
        position_ids=positions.to(device),
        use_cache=True,
        logits_to_keep=1,
        **options,
    )
    last: Tensor = out.logits[:, -1].float()
    return last


def idle_pass(model: CausalLM) -> None:
    """One token through a model, for nothing but the weights that its ranks gather."""
    base_of(model)(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=input_device(model)), use_cache=False)


def read_tokens(model: CausalLM, tokens: list[int], layers: int) -> GrowingCache:
    """A cache of one row with these tokens."""
    cache = GrowingCache(layers)
    next_logits(model, torch.tensor([tokens]), cache, torch.arange(len(tokens))[None], None)
    return cache


def cached_layers(model: CausalLM, tokens: int) -> tuple[int, str | None]:
    """Number of layers of the cache, and why it can't be used for rows of so many tokens (None if it can)."""
    base = base_of(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return 0, "its adapter puts tokens of its own before every prompt"
    accepted = inspect.signature(base.forward).parameters
    for name in ("position_ids", _cache_argument(base), "logits_to_keep"):
        if name not in accepted:
            return 0, f"its forward pass takes no {name}"
    return cache_layers(base.config, tokens)


def cache_is_exact(model: CausalLM, layers: int, pad_token_id: int) -> bool:
    """Ask the model itself, on a few tokens: architectures differ in more than a list of names could hold.

    Args:
        model: In eval mode.
        layers: Of its cache.
        pad_token_id: Stands at masked places.

    Returns:
        Whether logits behind a prefix taken from a cache, with holes behind it, are those of the plain pass. No random
        number of the global generators is drawn.
    """
    base = base_of(model)
    vocabulary = base.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[1, :5] = ids[0, :5]
    short = _PROBE_TOKENS - 3  # the second prompt is shorter, so that its row has a hole behind the prefix
    alone = [
        base(input_ids=prompt[None].to(input_device(model)), use_cache=False) for prompt in (ids[0], ids[1, :short])
    ]
    want = torch.cat([out.logits[:, -1].float() for out in alone])
    start = read_tokens(model, ids[0, :5].tolist(), layers)
    rest, mask = left_padded([ids[0, 5:].tolist(), ids[1, 5:short].tolist()], pad_token_id)
    mask = torch.cat([mask.new_ones(2, 5), mask], dim=1)
    positions = (mask.cumsum(1) - 1)[:, 5:]
    got = next_logits(model, rest, GrowingCache(layers, start), positions, mask)
    rounds = base.dtype != torch.float32 or torch.is_autocast_enabled(input_device(model).type)
    tolerance = 5e-2 if rounds or getattr(base, "is_quantized", False) else 1e-4
    return bool((got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1.0))


def _cache_argument(base: PreTrainedModel) -> str:
    """What the model's forward pass calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
