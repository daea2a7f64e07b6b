"""Whether a model gives the same with a cache: asked of the model itself, on a few tokens.

Architectures differ in more than a list of names could hold.
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
from lightning_ft.rollout.decode import next_logits, read_tokens
from lightning_ft.rollout.shared_rows import SharedRows, read_prompts

_TOKENS = 12
_SHORT = _TOKENS - 3  # the second prompt is shorter, so that its row has a hole behind the prefix
_PREFIX = 5


class CacheProbe(NamedTuple):
    """What was found out.

    Args:
        exact: Whether logits behind a prefix taken from a cache, with holes behind it, are those of the plain pass.
        together: Whether sequences that stand in one row of the cache, behind a mask, get the logits that they get by
            themselves.
    """

    exact: bool
    together: bool


def probe_cache(model: CausalLM, layers: int, pad_token_id: int) -> CacheProbe:
    """Try a model with a cache; no random number of the global generators is drawn.

    Args:
        model: In eval mode.
        layers: Of its cache.
        pad_token_id: Stands at masked places.

    Raises:
        NonFiniteError: If the model's own logits aren't finite, so that nothing can be compared with them.
    """
    forward, device = partial(next_logits, model), input_device(model)
    vocabulary = base_of(model).config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, _TOKENS), generator=torch.Generator().manual_seed(0))
    prompts = [ids[0], torch.cat([ids[0, :_PREFIX], ids[1, _PREFIX:_SHORT]])]
    prefix = read_tokens(model, ids[0, :_PREFIX].tolist(), layers)
    behind = [prompt[_PREFIX:].tolist() for prompt in prompts]
    read = read_prompts(forward, behind, prefix, layers=layers, pad_token_id=pad_token_id, device=device)
    exact = _as_alone(model, read.logits, prompts)
    if not exact or not takes_explicit_masks(base_of(model)):
        return CacheProbe(exact, together=False)
    bundles = SharedRows(read, times=2, last=True, ahead=2, width=4)
    tokens = torch.stack([ids[0, :4], ids[0, 4:8]])  # two steps of four sequences, two of each prompt
    for step in tokens:
        logits = bundles.write(forward, step.to(device))
    together = _as_alone(model, logits, [torch.cat([prompts[s // 2], tokens[:, s]]) for s in range(4)])
    return CacheProbe(exact, together)


def _as_alone(model: CausalLM, logits: Tensor, sequences: Sequence[Tensor]) -> bool:
    base, device = base_of(model), input_device(model)
    alone = [base(input_ids=ids[None].to(device), use_cache=False).logits[:, -1].float() for ids in sequences]
    expected = torch.cat(alone)
    if not bool(expected.isfinite().all()):
        raise NonFiniteError("its logits are not finite, so a cache of ours can't be compared with its own pass")
    return are_close(logits, expected, tolerance_of(base))
