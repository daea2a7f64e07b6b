"""Probes whether a model gives the same logits with this package's cache as without, on a few tokens.

Architectures differ in too many ways for a list of supported ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ft.errors import NonFiniteError
from lightning_ft.models.head import CausalLM, base_of, input_device, takes_explicit_masks
from lightning_ft.models.numerics import are_close, tolerance_of
from lightning_ft.rollout.decode import next_logits, prefill_tokens
from lightning_ft.rollout.shared_rows import SharedRows, prefill_prompts

_TOKENS = 12
_SHORT = _TOKENS - 3  # the second prompt is shorter, so that its row has padding after the prefix
_PREFIX = 5


class CacheProbe(NamedTuple):
    """What the probe found.

    Args:
        exact: Whether logits after a cached prefix, with padding after it, equal those of a pass without a cache.
        can_share_rows: Whether sequences that share a row of the cache, under a mask, get the same logits as alone.
    """

    exact: bool
    can_share_rows: bool


def probe_cache(model: CausalLM, layers: int, pad_token_id: int) -> CacheProbe:
    """Run a model with a cache, without drawing from the global random generators.

    Args:
        model: Model in eval mode.
        layers: Number of layers of its cache.
        pad_token_id: Token id at masked positions.

    Raises:
        NonFiniteError: If the model's logits without a cache aren't finite, so that nothing can be compared with them.
    """
    forward, device = partial(next_logits, model), input_device(model)
    vocabulary = base_of(model).config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    prompts = [ids[0], torch.cat([ids[0, :_PREFIX], ids[1, _PREFIX:_SHORT]])]
    prefix = prefill_tokens(model, ids[0, :_PREFIX].tolist(), layers)
    suffixes = [prompt[_PREFIX:].tolist() for prompt in prompts]
    prefilled = prefill_prompts(forward, suffixes, prefix, layers=layers, pad_token_id=pad_token_id, device=device)
    exact = _matches_uncached(model, prefilled.logits, prompts)
    if not exact or not takes_explicit_masks(base_of(model)):
        return CacheProbe(exact, can_share_rows=False)
    shared_rows = SharedRows(prefilled, num_completions=2, reuse_cache=True, max_new_tokens=2, sequences_per_row=4)
    tokens = torch.stack([ids[0, :4], ids[0, 4:8]])  # two steps of four sequences, two per prompt
    for step in tokens:
        logits = shared_rows.append(forward, step.to(device))
    sequences = [torch.cat([prompts[s // 2], tokens[:, s]]) for s in range(4)]
    return CacheProbe(exact, can_share_rows=_matches_uncached(model, logits, sequences))


def _matches_uncached(model: CausalLM, logits: Tensor, sequences: Sequence[Tensor]) -> bool:
    """Whether logits are close to those that the model gives each sequence alone, without a cache."""
    base, device = base_of(model), input_device(model)
    alone = [base(input_ids=ids[None].to(device), use_cache=False).logits[:, -1].float() for ids in sequences]
    expected = torch.cat(alone)
    if not bool(expected.isfinite().all()):
        raise NonFiniteError("its logits are not finite, so cached and uncached passes can't be compared")
    return are_close(logits, expected, tolerance_of(base))
