"""What a base says at the places of a batch, next to what the tuned model says: live, or kept from step 0."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.arithmetic import TopK, kl_divergence, kl_lower_bound
from lightning_ft.losses.logprobs import CHUNK
from lightning_ft.models.head import CausalLM, as_forward, base_of, hidden_states, input_device, logit_transform
from lightning_ft.models.reference import active_adapter

EXACT, ROUNDED = 1e-4, 1e-2
"""Largest KL at step 0, nats a token, in fp32 and where weights or products are rounded (half precision, quantized).

A new adapter adds zeros, and a pass made twice is the same, so that both were 0 to the last bit in fp32, bf16, fp16 and
under autocast. DoRA's rescaling rounds: 3e-4 (2 layers) to 3e-3 (12) were measured in bf16, 4e-5 in fp16, 0 in fp32;
rounding all of a model's weights to bf16 moves it by 6e-4. An adapter that was trained stands far above either."""


class Compared(NamedTuple):
    """Of `c` places: KL from the base, the base's negative log-likelihood of the targets, and its likeliest token."""

    kl: Tensor
    base_nll: Tensor
    base_top: Tensor


class Reader(Protocol):
    """Compares places of a batch with a base, given the tuned model's log-probabilities there, ``fp32 [c, v]``."""

    def __call__(self, places: slice, tuned_logprobs: Tensor) -> Compared:
        """Compare the places of a slice of the batch's targets."""


class Base(Protocol):
    """What a tuned model is compared with."""

    def reader(self, batch: TokenBatch, first: int) -> Reader:
        """Compares places of a batch, whose targets are those from `first` on of all texts."""


class LiveBase:
    """A model with its adapter or without it: states of a batch first, then log-probabilities a chunk at a time.

    Two models' logits of a whole batch would be twice its largest tensor; their hidden states are small.
    """

    def __init__(self, model: CausalLM, *, adapter: bool = True) -> None:
        self._model, self._adapter = model, adapter

    def _active(self) -> AbstractContextManager[None]:
        # around each call, since the head may be adapted too
        return nullcontext() if self._adapter else active_adapter(cast(PeftModel, self._model), None)

    def states(self, batch: TokenBatch) -> Tensor:
        """Hidden states that predict the targets, ``[n, d]``."""
        with self._active():
            return cast(Tensor, as_forward(base_of(self._model), _selected_states, batch))

    def logprobs(self, states: Tensor) -> Tensor:
        """Of every token, ``fp32 [c, v]``."""
        with self._active():
            return cast(Tensor, as_forward(base_of(self._model), _head_logprobs, states))

    def reader(self, batch: TokenBatch, first: int) -> Reader:
        """Compares places of a batch with this model, exactly."""
        states = self.states(batch)

        def compare(places: slice, tuned_logprobs: Tensor) -> Compared:
            base = self.logprobs(states[places])
            if base.shape != tuned_logprobs.shape:
                raise RetentionError(
                    f"The base has {base.shape[1]:,} tokens and the tuned model {tuned_logprobs.shape[1]:,}: only "
                    "models of one vocabulary can be compared."
                )
            base_nll = -base.gather(-1, batch.targets[places, None])[:, 0]
            return Compared(kl_divergence(base, tuned_logprobs), base_nll, base.argmax(-1))

        return compare


@dataclass(frozen=True)
class KeptBase:
    """What was kept of a model at the `n` targets of all texts, on the CPU.

    Args:
        ids: Most probable tokens, ``int32 [n, k]``.
        logprobs: Theirs, ``fp32 [n, k]``.
        tail: Logarithm of the rest's probability, ``fp32 [n]``.
        nll: Negative log-likelihood of the targets, ``fp32 [n]``.
        top: The most probable token, ``int32 [n]``.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    nll: Tensor
    top: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def reader(self, batch: TokenBatch, first: int) -> Reader:
        """Compares places of a batch with what was kept: the divergence is a lower bound."""
        device = batch.targets.device

        def compare(places: slice, tuned_logprobs: Tensor) -> Compared:
            where = slice(first + places.start, first + places.stop)
            kept = TopK(*(t[where].to(device) for t in (self.ids, self.logprobs, self.tail)))
            return Compared(
                kl_lower_bound(kept, tuned_logprobs), self.nll[where].to(device), self.top[where].to(device)
            )

        return compare


def _selected_states(base: PreTrainedModel, batch: TokenBatch) -> Tensor:
    return hidden_states(base, batch).flatten(0, 1).index_select(0, batch.predictors)


def _head_logprobs(base: PreTrainedModel, states: Tensor) -> Tensor:
    head = cast(Any, base.get_output_embeddings())
    weight = getattr(head, "weight", None)  # of the copy that is active, where PEFT keeps several
    if isinstance(weight, Tensor) and weight.is_floating_point():  # packed weights take what the layers give
        states = states.to(weight.dtype)
    with torch.autocast(states.device.type, enabled=False):  # as the losses do: autocast would round the logits
        return logit_transform(base.config)(head(states)).log_softmax(-1)


def chunks(count: int) -> list[slice]:
    """So many places in parts, of which a part's log-probabilities may be held."""
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def rounds(model: CausalLM) -> bool:
    """Whether weights or products have fewer bits than fp32."""
    base, device = base_of(model), input_device(model)
    return (
        base.dtype != torch.float32
        or torch.is_autocast_enabled(device.type)
        or bool(getattr(base, "is_quantized", False))
    )


def tolerance(model: CausalLM) -> float:
    """Largest KL between two passes of a model that counts as none."""
    return ROUNDED if rounds(model) else EXACT


def check_head(model: CausalLM, text: Example) -> None:
    """Refuse a model that does something unknown between its last states and its logits.

    Raises:
        RetentionError: Naming it.
    """
    few = Example(text.input_ids[:8], text.supervised[:8])
    batch = collate_examples([few], packing=False).to(input_device(model))
    read = LiveBase(model)
    ours = read.logprobs(read.states(batch))
    base = base_of(model)
    own = base(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    known = torch.isfinite(own)  # a token may be ruled out
    if not known.any():
        raise RetentionError(f"What {type(base).__name__} says isn't a number: its weights or outputs are NaN.")
    off = float((ours - own)[known].abs().max())
    limit = (5e-2 if rounds(model) else 1e-4) * max(1.0, float(own[known].abs().max()))
    if off > limit:
        raise RetentionError(
            f"{type(base).__name__} does something to its logits that isn't known here: log-probabilities differ by "
            f"{off:.3g}, so its retention can't be measured."
        )
