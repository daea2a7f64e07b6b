"""Which prompts transformers' `generate` may continue together, so that no answer depends on its neighbors.

Shorter prompts of a batch are padded on the left. Recurrent models may read the padding (RWKV takes no mask at all),
and rotary scalings may follow the longest prompt. Nobody lists which models do, so each is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lightning_ft.errors import LightningFTError, ModelError
from lightning_ft.models.exactness import Rows, first_line, some_tokens
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch
from lightning_ft.models.numerics import are_close, tolerance_of


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, ``int64 [b, s]`` each, every row ending at the right."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


_LENGTHS, _STEPS = (9, 5, 9), 3
_known: WeakKeyDictionary[PreTrainedModel, Rows] = WeakKeyDictionary()


@dataclass(frozen=True)
class Together:
    """What was found out.

    Args:
        keys: One for each prompt; those with the same key may share a batch.
        alone: Whether even equal prompts would change each other, so that each row takes a batch of its own.
        why: What to tell the user; None if all may share a batch.
    """

    keys: tuple[int, ...]
    alone: bool = False
    why: str | None = None

    def batches(self, size: int, order: Sequence[int] | None = None) -> list[list[int]]:
        """Indices of prompts that share a batch, at most `size` each.

        Args:
            size: Prompts of a batch.
            order: In which order to take them; None for their own.

        Example:
            >>> Together((1, 2, 1, 1)).batches(2), Together((0, 1), alone=True).batches(2)
            ([[0, 2], [3], [1]], [[0], [1]])
        """
        shared: dict[int, list[int]] = {}
        for i in range(len(self.keys)) if order is None else order:
            shared.setdefault(self.keys[i], []).append(i)
        size = 1 if self.alone else size
        return [part[start : start + size] for part in shared.values() for start in range(0, len(part), size)]


def prompts_together(
    model: CausalLM,
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    in_step: bool = False,
) -> Together:
    """Which prompts may be continued in one batch.

    Args:
        model: In eval mode.
        lengths: Tokens of each prompt.
        max_new_tokens: At most so many are added to each.
        pad_token_id: Is put in front of shorter prompts, masked.
        in_step: Whether ranks of a sharded model make the same calls; then the model is asked whatever the lengths.

    Raises:
        ModelError: If the model can't generate at all.
    """
    if len(lengths) < 2 and not in_step:
        return Together((0,) * len(lengths))
    rows = left_padding(model, pad_token_id, in_step=in_step)
    if rows == "one":
        why = "an answer would depend on the other prompts of its batch, so prompts are generated one at a time"
        return Together(tuple(range(len(lengths))), alone=True, why=why)
    if rows == "equal":
        why = "an answer would depend on longer prompts of its batch, so only prompts of the same length share one"
        return Together(tuple(lengths), why=why if len(set(lengths)) > 1 else None)
    switch = as_forward(base_of(model), length_switch)
    if switch is None or max(lengths, default=0) + max_new_tokens <= switch.at:
        return Together((0,) * len(lengths))
    keys = tuple(0 if length + max_new_tokens <= switch.at else length for length in lengths)
    why = f"it {switch.why}, so only prompts of the same length share a batch where an answer may end beyond that"
    return Together(keys, why=why if len(set(keys)) > 1 else None)


def left_padding(model: CausalLM, pad_token_id: int, *, in_step: bool = False) -> Rows:
    """Which rows of a left-padded batch get the logits that they get alone, found out once for each model.

    Args:
        model: In eval mode.
        pad_token_id: Is put in front of shorter prompts, masked.
        in_step: Whether ranks of a sharded model make this call together.

    Returns:
        ``"any"``; ``"equal"`` if only rows of one length may share a batch; ``"one"`` if none may.

    Raises:
        ModelError: If the model can't generate at all.
    """
    base = base_of(model)
    if base not in _known:
        with torch.no_grad():
            _known[base] = _ask(model, pad_token_id, in_step)
    return _known[base]


def _ask(model: CausalLM, pad_token_id: int, in_step: bool) -> Rows:
    base = base_of(model)
    first, second, other = (ids.tolist() for ids in some_tokens(base, _LENGTHS))

    def logits(*prompts: list[int]) -> Tensor:
        return _forced_logits(model, prompts, pad_token_id, in_step)

    def same(prompts: Sequence[list[int]], alone: Sequence[Tensor]) -> bool:
        expected = torch.cat(list(alone), dim=1)
        try:
            found = logits(*prompts)
        except (torch.OutOfMemoryError, LightningFTError):
            raise
        except Exception:  # whatever an architecture raises for a padded batch: without one it may do
            return False
        scale = expected.std().clamp(min=1e-6)
        return found.shape == expected.shape and are_close(found / scale, expected / scale, tolerance_of(base))

    try:
        alone = [logits(prompt) for prompt in (first, second)]
    except (torch.OutOfMemoryError, LightningFTError):
        raise
    except Exception as error:
        raise ModelError(
            f"{type(base).__name__}: transformers' generate fails ({type(error).__name__}: {first_line(error)}), "
            "so it can't write answers."
        ) from error
    if not all(bool(tensor.isfinite().all()) for tensor in alone) or same([first, second], alone):
        return "any"  # of what isn't finite nothing can be told
    return "equal" if same([first, other], [alone[0], logits(other)]) else "one"


def _forced_logits(model: Any, prompts: Sequence[list[int]], pad_token_id: int, in_step: bool) -> Tensor:
    """Logits of a few steps of `generate` in which the same tokens are written, ``fp32 [steps, b, v]``."""
    device = input_device(model)
    ids, mask = left_padded(prompts, pad_token_id)
    forced = _Forced(some_tokens(base_of(model), (_STEPS,))[0].tolist())
    with own_generation_config(model):
        model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=_STEPS, eos_token_id=None, pad_token_id=pad_token_id
            ),
            logits_processor=LogitsProcessorList([forced]),
            synced_gpus=in_step,
        )
    return torch.stack(forced.seen)


class _Forced(LogitsProcessor):
    """Has given tokens chosen, and keeps the logits."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._tokens[len(self.seen)]] = 0
        self.seen.append(scores.float())
        return chosen  # type: ignore[return-value]


@contextmanager
def own_generation_config(model: CausalLM) -> Iterator[None]:
    """Without what the checkpoint's generation config would add: penalties, beams, suppressed tokens, ..."""
    base: Any = base_of(model)
    kept = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = kept
