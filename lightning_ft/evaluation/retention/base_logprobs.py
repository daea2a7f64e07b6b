"""Log-probabilities of the base to compare a tuned model with: computed by a model, or stored at step 0."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.retention.arithmetic import TopK, kl_divergence, kl_lower_bound
from lightning_ft.losses.logprobs import CHUNK
from lightning_ft.models.head import CausalLM, as_forward, base_of, head_logits, hidden_states, input_device
from lightning_ft.models.reference import active_adapter

FP32_TOLERANCE, REDUCED_TOLERANCE = 1e-4, 1e-2
"""Largest KL at step 0, in nats per token, in fp32 and in reduced precision (half precision, autocast, quantized).

A new adapter adds zeros, and a repeated forward pass is deterministic, so that both gave exactly 0 in fp32, bf16, fp16
and under autocast. DoRA's rescaling rounds: 3e-4 (2 layers) to 3e-3 (12) were measured in bf16, 4e-5 in fp16, 0 in
fp32; rounding all weights of a model to bf16 gives 6e-4. A trained adapter is far above either."""


class BaseComparison(NamedTuple):
    """Comparison at `c` positions: KL from the base, the base's NLL of the targets, and its most probable tokens."""

    kl: Tensor
    base_nll: Tensor
    base_top: Tensor


class CompareFunction(Protocol):
    """Function that compares the tuned model's log-probabilities at some targets of a batch with the base."""

    def __call__(self, positions: slice, tuned_logprobs: Tensor) -> BaseComparison:
        """Compare a slice of the batch's targets.

        Args:
            positions: Slice of the batch's targets, of length `c`.
            tuned_logprobs: Log-probabilities of the vocabulary under the tuned model, ``fp32 [c, v]``.
        """


class Base(Protocol):
    """Base that a tuned model is compared with."""

    def prepare(self, batch: TokenBatch, first: int) -> CompareFunction:
        """Prepare the comparison of a batch.

        Args:
            batch: Batch of texts.
            first: Index of the batch's first target among the targets of all texts.
        """


class LiveModel:
    """Model with or without its adapter, which computes hidden states per batch and log-probabilities per chunk.

    The logits of a whole batch would be its largest tensor, and two models need them twice; hidden states are small.

    Args:
        model: Model to run.
        adapter: Whether the model's adapter is active.
    """

    def __init__(self, model: CausalLM, *, adapter: bool = True) -> None:
        self._model, self._adapter = model, adapter

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return input_device(self._model)

    def _active(self) -> AbstractContextManager[None]:
        # around each call, since the head may be adapted too
        return nullcontext() if self._adapter else active_adapter(cast(PeftModel, self._model), None)

    def states(self, batch: TokenBatch) -> Tensor:
        """Compute the hidden states that predict the targets, ``[n, d]``."""
        with self._active():
            return as_forward(base_of(self._model), _selected_states, batch)

    def logprobs(self, states: Tensor) -> Tensor:
        """Compute the log-probabilities of the vocabulary from ``[c, d]`` hidden states, ``fp32 [c, v]``."""
        with self._active():
            return as_forward(base_of(self._model), _head_logprobs, states)

    def prepare(self, batch: TokenBatch, first: int) -> CompareFunction:
        """Prepare the exact comparison of a batch with this model."""
        states = self.states(batch)

        def compare(positions: slice, tuned_logprobs: Tensor) -> BaseComparison:
            base = self.logprobs(states[positions])
            if base.shape != tuned_logprobs.shape:
                raise RetentionError(
                    f"The vocabulary of the base has {base.shape[1]:,} tokens and that of the tuned model "
                    f"{tuned_logprobs.shape[1]:,}. Compare models of the same vocabulary."
                )
            base_nll = -base.gather(-1, batch.targets[positions, None])[:, 0]
            return BaseComparison(kl_divergence(base, tuned_logprobs), base_nll, base.argmax(-1))

        return compare


@dataclass(frozen=True)
class StoredBase:
    """Log-probabilities of a model at the `n` targets of all texts, stored on the CPU.

    Args:
        ids: Ids of the most probable tokens, ``int32 [n, k]``.
        logprobs: Log-probabilities of these tokens, in nats, ``fp32 [n, k]``.
        tail: Logarithm of the total probability of the other tokens, ``fp32 [n]``.
        nll: Negative log-likelihood of the targets, in nats, ``fp32 [n]``.
        top: Id of the most probable token, ``int32 [n]``.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    nll: Tensor
    top: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def prepare(self, batch: TokenBatch, first: int) -> CompareFunction:
        """Prepare the comparison of a batch with the stored tokens, whose divergence is a lower bound."""
        device = batch.targets.device

        def compare(positions: slice, tuned_logprobs: Tensor) -> BaseComparison:
            stored = slice(first + positions.start, first + positions.stop)
            top_k = TopK(*(t[stored].to(device) for t in (self.ids, self.logprobs, self.tail)))
            return BaseComparison(
                kl_lower_bound(top_k, tuned_logprobs), self.nll[stored].to(device), self.top[stored].to(device)
            )

        return compare


def _selected_states(base: PreTrainedModel, batch: TokenBatch) -> Tensor:
    return hidden_states(base, batch).flatten(0, 1).index_select(0, batch.predictors)


def _head_logprobs(base: PreTrainedModel, states: Tensor) -> Tensor:
    return head_logits(base, states).log_softmax(-1)


def chunk_slices(count: int) -> list[slice]:
    """Split `count` positions into slices whose log-probabilities fit into memory."""
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def is_reduced_precision(model: CausalLM) -> bool:
    """Return whether weights or matrix products have fewer bits than fp32."""
    base, device = base_of(model), input_device(model)
    return (
        base.dtype != torch.float32
        or torch.is_autocast_enabled(device.type)
        or bool(getattr(base, "is_quantized", False))
    )


def tolerance(model: CausalLM) -> float:
    """Return the largest KL between two forward passes that counts as zero, in nats per token."""
    return REDUCED_TOLERANCE if is_reduced_precision(model) else FP32_TOLERANCE


def check_head(model: CausalLM, text: Example) -> None:
    """Check that the model's own logits follow from its last hidden states as :class:`LiveModel` computes them.

    Args:
        model: Model to check.
        text: Text to run it on; its first 8 tokens are used.

    Raises:
        RetentionError: If they differ, or the outputs aren't numbers.
    """
    start = Example(text.input_ids[:8], text.supervised[:8])
    batch = collate_examples([start], packing=False).to(input_device(model))
    live = LiveModel(model)
    logprobs = live.logprobs(live.states(batch))
    base = base_of(model)
    own = base(input_ids=batch.input_ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    finite = torch.isfinite(own)  # tokens may have probability 0
    if not finite.any():
        raise RetentionError(
            f"The output of {type(base).__name__} isn't a number: its weights or outputs are NaN. Load it again."
        )
    error = float((logprobs - own)[finite].abs().max())
    limit = (5e-2 if is_reduced_precision(model) else 1e-4) * max(1.0, float(own[finite].abs().max()))
    if error > limit:
        raise RetentionError(
            f"{type(base).__name__} does something to its logits that isn't supported (log-probabilities differ by "
            f"{error:.3g}), so its retention can't be measured. Leave out the Retention callback for this model."
        )
