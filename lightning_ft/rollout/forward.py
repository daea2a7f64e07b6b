"""One pass of a model over new tokens and a cache."""

from __future__ import annotations

import inspect

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.models.exactness import first_line
from lightning_ft.models.head import CausalLM, attention_bias, base_of, input_device
from lightning_ft.rollout.cache import GrowingCache, cache_layers


def next_logits(
    model: CausalLM, ids: Tensor, cache: GrowingCache, positions: Tensor, mask: Tensor | None, last: int = 1
) -> Tensor:
    """Run tokens through a model and keep their keys and values.

    Args:
        model: The model.
        ids: New tokens, ``int64 [b, t]``.
        cache: Holds `p` places of each row; `t` are added.
        positions: Of the new tokens, ``int64 [b, t]``.
        mask: Which places are tokens, ``[b, p + t]``, or what each new token sees, ``bool [b, 1, t, p + t]``; None if
            all are, and each sees those before it.
        last: Places at the end of each row whose logits are wanted.

    Returns:
        Logits behind them, ``fp32 [b, last, vocabulary]``.
    """
    base = base_of(model)
    device = input_device(model)
    options = {_cache_argument(base): cache}
    if mask is not None:
        mask = mask.to(device)
        mask = attention_bias(base, mask) if mask.ndim == 4 else mask
    out = base(  # the base and not the PEFT wrapper, around which FSDP2 would not gather the weights
        input_ids=ids.to(device),
        attention_mask=mask,
        position_ids=positions.to(device),
        use_cache=True,
        logits_to_keep=last,
        **options,
    )
    behind: Tensor = out.logits[:, -last:].float()
    return behind


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
    try:
        return cache_layers(base.config, tokens)
    except Exception as error:  # configurations that no cache of transformers can be made from
        return 0, f"no cache can be made from its configuration ({type(error).__name__}: {first_line(error)})"


def _cache_argument(base: PreTrainedModel) -> str:
    """What the model's forward pass calls its cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
