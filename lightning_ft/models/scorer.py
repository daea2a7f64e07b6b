"""What was found out about a model before it was trusted with the fast paths, and the plain path where it wasn't."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch, collate_examples, in_one_row, unpack
from lightning_ft.data.shared import lay_out_completions
from lightning_ft.functional.logprobs import SelectedLogProbs
from lightning_ft.models.exact import are_close, tolerance_of
from lightning_ft.models.head import (
    CausalLM,
    Reduction,
    as_forward,
    base_of,
    completion_logprobs,
    hidden_states,
    input_device,
    takes_explicit_masks,
)

_ANY_ROWS = ("sdpa", "eager", "flex_attention")
"""Attention whose mask transformers makes from the positions of each row."""


@dataclass(frozen=True)
class Exactness:
    """What was found out about a model before it was trusted with the fast paths.

    Args:
        head: Whether projecting selected hidden states gives the model's own logits; True where it has no such head.
        packing: Whether packed segments don't see each other.
        sharing: Why completions can't share a prompt that is computed once; None if they can.
        window: Most tokens of a sequence that may share a prompt: beyond it the model's own layers attend to a part of
            the sequence only, which the explicit mask of shared prompts would not. None for no limit.
    """

    head: bool
    packing: bool
    sharing: str | None
    window: int | None


@torch.no_grad()
def probe(model: PreTrainedModel | PeftModel) -> Exactness:
    """Compare the fast paths with the model's own forward pass on a few tokens.

    Architectures differ in what they do after their head and in how they mix tokens (state spaces and linear attention
    see through a packed row); no list of names stays complete, so the model itself is asked.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        base = base_of(model)
        device = input_device(base)
        tolerance = tolerance_of(base)
        prompt, *answers = _some_tokens(base.config.get_text_config().vocab_size)
        sequences = [_supervised(torch.cat([prompt, answer])) for answer in answers]
        alone = [as_forward(base, hidden_states, collate_examples([s]).to(device), None)[0] for s in sequences]

        packed = as_forward(base, hidden_states, collate_examples(sequences).to(device), None)[0]
        packing = are_close(packed, torch.cat(alone), tolerance)
        sharing = _why_no_sharing(base) if packing else "it doesn't keep packed sequences apart"
        if sharing is None:
            behind = [_supervised(answer) for answer in answers]
            forest = lay_out_completions([prompt], [behind]).to(device)
            shared = as_forward(base, hidden_states, forest, None)[0]
            want = torch.cat([alone[0], *(states[len(prompt) :] for states in alone[1:])])
            sharing = None if are_close(shared, want, tolerance) else "its states differ under an explicit mask"
        head = base.get_output_embeddings() is None or _head_is_known(model, sequences, tolerance)
    finally:
        for module, training in modes:
            module.training = training
    return Exactness(head=head, packing=packing, sharing=sharing, window=_window(base.config))


def for_attention(base: PreTrainedModel, batch: TokenBatch) -> TokenBatch:
    """Several packed rows as one where sequences are kept apart in a single row only, as for FlashAttention."""
    one = not batch.packed or len(batch.input_ids) == 1 or batch.has_shared_prefixes
    return batch if one or base.config._attn_implementation in _ANY_ROWS else in_one_row(batch)


def _masked_once(base: PreTrainedModel, batch: TokenBatch, exactness: Exactness) -> TokenBatch:
    """A packed batch with a mask of ours, where the model takes one, its windows allow it and it is cheaper.

    Of the mask that transformers makes for SDPA from positions every layer makes another, and keeps it for the backward
    pass; of ours it doesn't.
    """
    ours = batch.packed and exactness.sharing is None and base.config._attn_implementation == "sdpa"
    if ours and (exactness.window is None or int(batch.position_ids.max()) < exactness.window):
        return replace(batch, explicit_mask=True)
    return batch


def _some_tokens(vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in (4, 3, 5)]


def _supervised(ids: Tensor) -> Example:
    return Example(ids, torch.ones(len(ids), dtype=torch.bool))


def _head_is_known(model: CausalLM, sequences: Sequence[Example], tolerance: float) -> bool:
    expected = []
    device = input_device(model)
    for sequence in sequences:
        ids = sequence.input_ids[None].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        expected.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    apart = completion_logprobs(model, collate_examples(sequences, packing=False).to(device)).logprobs
    return are_close(apart, torch.cat(expected), tolerance)


def _why_no_sharing(base: PreTrainedModel) -> str | None:
    if takes_explicit_masks(base):
        return None
    return f"attn_implementation={base.config._attn_implementation!r} takes no explicit mask ('sdpa' and 'eager' do)"


def _window(config: Any) -> int | None:
    """The smallest window that any layer attends to."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    found = []
    if kinds is None or any("sliding" in kind for kind in kinds):
        found.append(getattr(text, "sliding_window", None))
    if kinds is None or any("chunked" in kind for kind in kinds):
        found.append(getattr(text, "attention_chunk_size", None))
    return min((int(size) for size in found if size), default=None)


def full_logits_logprobs(
    model: CausalLM,
    batch: TokenBatch,
    reduction: Reduction,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    states: bool = False,
) -> SelectedLogProbs:
    """:func:`completion_logprobs` by the model's own forward pass, for heads that do something unknown."""
    out = model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, output_hidden_states=states
    )
    logits = out.logits.flatten(0, 1).index_select(0, batch.predictors).float() / temperature  # [n, v]
    every = logits.log_softmax(-1)
    logprobs = every.gather(-1, batch.targets[:, None])[:, 0]
    return SelectedLogProbs(
        logprobs.sum() if reduction == "sum" else logprobs,
        logits.argmax(-1) == batch.targets,
        -(every.exp() * every).sum(-1).detach() if entropy else None,
        out.hidden_states[-1].flatten(0, 1).index_select(0, batch.predictors) if states else None,
    )


class Scorer:
    """:func:`completion_logprobs` that probes the model once and takes the plain path where a fast one isn't exact.

    Args:
        pad_token_id: Stands behind rows that had to be unpacked.
        backbone: A compiled backbone to use while training.
    """

    def __init__(self, pad_token_id: int = 0, backbone: Callable[..., Any] | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.backbone = backbone
        self._exactness: Exactness | None = None
        self._told: set[str] = set()

    def exactness(self, model: PreTrainedModel | PeftModel) -> Exactness:
        """What the model can do, found out once."""
        if self._exactness is None:
            self._exactness = probe(model)
        return self._exactness

    def __call__(
        self, model: CausalLM, batch: TokenBatch, reduction: Reduction = "none", **options: Any
    ) -> SelectedLogProbs:
        """Score a batch; see :func:`completion_logprobs`."""
        exactness = self.exactness(model)
        if not exactness.head:
            self._warn_once(
                model,
                "changes its logits after the head in a way that isn't known here: its own forward pass is used, which "
                "holds the logits of the whole batch.",
            )
        batch = self.arranged(model, batch)
        if not exactness.head:
            return full_logits_logprobs(model, batch, reduction, **options)
        own = getattr(self.backbone, "_orig_mod", None) is base_of(model).base_model  # a reference has its own
        return completion_logprobs(
            model, batch, reduction=reduction, backbone=self.backbone if own else None, **options
        )

    def arranged(self, model: PreTrainedModel | PeftModel, batch: TokenBatch) -> TokenBatch:
        """A batch as the model's attention can take it: packed rows that it would mix are taken apart or put in one.

        The model is tried out here, if it hasn't been.

        Args:
            model: Whose forward pass it is for.
            batch: The batch.
        """
        if not self.exactness(model).packing and batch.packed:
            self._warn_once(
                model,
                "doesn't keep packed sequences apart, so batches are unpacked and padded. Set packing=False to silence "
                "this.",
            )
            return unpack(batch, pad_token_id=self.pad_token_id)
        base = base_of(model)
        return _masked_once(base, for_attention(base, batch), self.exactness(model))

    def lay_out(
        self,
        model: PreTrainedModel | PeftModel,
        prompts: Sequence[Tensor],
        completions: Sequence[Sequence[Example]],
        *,
        share_prompts: bool = True,
    ) -> TokenBatch:
        """Prompts and completions as one batch on the model's device, each prompt computed once where that is exact.

        Args:
            model: Whose batch it is.
            prompts: Token ids, ``int64 [t]`` each.
            completions: For each prompt what follows it.
            share_prompts: False repeats prompts whatever the model can do.
        """
        exactness = self.exactness(model)
        shared = share_prompts and any(len(behind) > 1 for behind in completions)
        if shared:
            longest = max(
                len(prompt) + len(completion)
                for prompt, behind in zip(prompts, completions, strict=True)
                for completion in behind
            )
            reason = exactness.sharing if exactness.head else "its own forward pass is used"
            if reason is None and exactness.window is not None and longest > exactness.window:
                reason = f"{longest:,} tokens are more than its attention window of {exactness.window:,}"
            if reason is not None:
                self._warn_once(model, f"computes each prompt once for each completion, because {reason}.")
            shared = reason is None
        batch = lay_out_completions(
            prompts, completions, shared=shared, packing=exactness.packing, pad_token_id=self.pad_token_id
        )
        return batch.to(input_device(model))

    def _warn_once(self, model: PreTrainedModel | PeftModel, what: str) -> None:
        kind = what[:40]  # the number of tokens in it changes from batch to batch
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(f"{type(base_of(model)).__name__} {what}", stacklevel=3)
