"""Which prompts transformers' `generate` may continue in one batch, so that no completion depends on its neighbors.

Shorter prompts of a batch are padded on the left. Recurrent models may read the padding (RWKV takes no mask at all),
and rotary scalings may depend on the longest prompt. No list of such models exists, so each model is probed: it
generates a few forced tokens for prompts alone and in a batch, and the logits are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lightning_ft.errors import LightningFTError, ModelError
from lightning_ft.models.exactness import Rows, some_tokens
from lightning_ft.models.head import CausalLM, as_forward, base_of, input_device
from lightning_ft.models.lengths import length_switch
from lightning_ft.models.numerics import are_close, tolerance_of
from lightning_ft.read_errors import first_line

if TYPE_CHECKING:
    from transformers import GenerationMixin


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts padded on the left, ``int64 [b, s]`` each."""
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
class BatchPlan:
    """Which prompts may share a batch.

    Args:
        keys: A key per prompt; prompts with the same key may share a batch.
        alone: Whether even equal prompts change each other, so that each row needs a batch of its own.
        why: Explanation for the user; None if all prompts may share a batch.
    """

    keys: tuple[int, ...]
    alone: bool = False
    why: str | None = None

    def batches(self, size: int, order: Sequence[int] | None = None) -> list[list[int]]:
        """Batches of indices of prompts.

        Args:
            size: Maximum number of prompts per batch.
            order: Order in which prompts are added to batches; None for the order of `keys`.

        Example:
            >>> BatchPlan((1, 2, 1, 1)).batches(2), BatchPlan((0, 1), alone=True).batches(2)
            ([[0, 2], [3], [1]], [[0], [1]])
        """
        shared: dict[int, list[int]] = {}
        for i in range(len(self.keys)) if order is None else order:
            shared.setdefault(self.keys[i], []).append(i)
        size = 1 if self.alone else size
        return [part[start : start + size] for part in shared.values() for start in range(0, len(part), size)]


def plan_batches(
    model: CausalLM,
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    pad_token_id: int,
    synced_ranks: bool = False,
) -> BatchPlan:
    """Plan which prompts are continued in one batch.

    Args:
        model: The model, in eval mode.
        lengths: Number of tokens of each prompt.
        max_new_tokens: Maximum number of new tokens per prompt.
        pad_token_id: Id of the padding token, put before shorter prompts and masked.
        synced_ranks: Whether the ranks of a sharded model make this call together. The model is then probed whatever
            the number of prompts.

    Raises:
        ModelError: If the model can't generate at all.
    """
    if len(lengths) < 2 and not synced_ranks:
        return BatchPlan((0,) * len(lengths))
    rows = left_padding(model, pad_token_id, synced_ranks=synced_ranks)
    if rows == "one":
        why = "a completion would depend on the other prompts of its batch, so prompts are generated one at a time"
        return BatchPlan(tuple(range(len(lengths))), alone=True, why=why)
    if rows == "equal":
        why = "a completion would depend on longer prompts of its batch, so only prompts of equal length share one"
        return BatchPlan(tuple(lengths), why=why if len(set(lengths)) > 1 else None)
    switch = as_forward(base_of(model), length_switch)
    if switch is None or max(lengths, default=0) + max_new_tokens <= switch.at:
        return BatchPlan((0,) * len(lengths))
    keys = tuple(0 if length + max_new_tokens <= switch.at else length for length in lengths)
    why = f"it {switch.why}, so only prompts of equal length share a batch if a completion may end beyond that"
    return BatchPlan(keys, why=why if len(set(keys)) > 1 else None)


def left_padding(model: CausalLM, pad_token_id: int, *, synced_ranks: bool = False) -> Rows:
    """Which rows of a left-padded batch get the same logits as alone, probed once per model.

    Args:
        model: The model, in eval mode.
        pad_token_id: Id of the padding token, put before shorter prompts and masked.
        synced_ranks: Whether the ranks of a sharded model make this call together.

    Returns:
        ``"any"``; ``"equal"`` if only rows of one length may share a batch; ``"one"`` if none may.

    Raises:
        ModelError: If the model can't generate at all.
    """
    base = base_of(model)
    if base not in _known:
        with torch.no_grad():
            _known[base] = _probe_padding(model, pad_token_id, synced_ranks)
    return _known[base]


def _probe_padding(model: CausalLM, pad_token_id: int, synced_ranks: bool) -> Rows:
    base = base_of(model)
    first, second, other = (ids.tolist() for ids in some_tokens(base, _LENGTHS))

    def logits(*prompts: list[int]) -> Tensor:
        return _forced_logits(model, prompts, pad_token_id, synced_ranks)

    def same(prompts: Sequence[list[int]], alone: Sequence[Tensor]) -> bool:
        expected = torch.cat(list(alone), dim=1)
        try:
            actual = logits(*prompts)
        except (torch.OutOfMemoryError, LightningFTError):
            raise
        except Exception:  # an architecture may raise anything for a padded batch, and still work without padding
            return False
        scale = expected.std().clamp(min=1e-6)
        return actual.shape == expected.shape and are_close(actual / scale, expected / scale, tolerance_of(base))

    try:
        alone = [logits(prompt) for prompt in (first, second)]
    except (torch.OutOfMemoryError, LightningFTError):
        raise
    except Exception as error:
        raise ModelError(
            f"{type(base).__name__}: transformers' generate fails ({type(error).__name__}: {first_line(error)}), "
            "so it can't generate completions."
        ) from error
    if not all(bool(tensor.isfinite().all()) for tensor in alone) or same([first, second], alone):
        return "any"  # logits that aren't finite can't be compared
    return "equal" if same([first, other], [alone[0], logits(other)]) else "one"


def _forced_logits(model: CausalLM, prompts: Sequence[list[int]], pad_token_id: int, synced_ranks: bool) -> Tensor:
    """Logits of a few steps of `generate` with forced tokens, ``fp32 [steps, b, v]``."""
    device = input_device(model)
    ids, mask = left_padded(prompts, pad_token_id)
    forced = _ForcedTokens(some_tokens(base_of(model), (_STEPS,))[0].tolist())
    with own_generation_config(model):
        cast("GenerationMixin", model).generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=_STEPS, eos_token_id=None, pad_token_id=pad_token_id
            ),
            logits_processor=LogitsProcessorList([forced]),
            synced_gpus=synced_ranks,
        )
    return torch.stack(forced.logits)


class _ForcedTokens(LogitsProcessor):
    """Forces `generate` to write the same tokens in every row, and records the logits of each step."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[len(self.logits)]] = 0
        self.logits.append(scores.float())
        return forced  # type: ignore[return-value]


@contextmanager
def own_generation_config(model: CausalLM) -> Iterator[None]:
    """Suspend the checkpoint's generation config with its penalties, beams, suppressed tokens and so on."""
    base = base_of(model)
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
