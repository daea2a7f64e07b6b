"""One head for every objective: the backbone once, then the head at supervised places only.

Supervised fine-tuning, preferences and policy gradients all call :func:`completion_logprobs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.data.layout import Example, TokenBatch, attention_mask, collate_examples, unpack
from lightning_ft.errors import ModelError
from lightning_ft.functional.logprobs import (
    CHUNK,
    LogitTransform,
    SelectedLogProbs,
    linear_logprob_sum,
    linear_logprobs,
    module_logprobs,
)

CausalLM = PreTrainedModel | PeftModel
Reduction = Literal["none", "sum"]
_SCORE = "_lightning_ft_score"


def base_of(model: CausalLM) -> PreTrainedModel:
    """The transformers model inside an adapted one, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def input_device(model: CausalLM) -> torch.device:
    """Where a model wants its token ids."""
    return cast(Tensor, base_of(model).get_input_embeddings().weight).device


def logit_transform(config: Any) -> LogitTransform:
    """What the architecture does between its head and its logits, as its configuration says."""
    text = config.get_text_config()
    scale = 1.0
    if (factor := getattr(text, "logit_scale", None)) is not None:  # Cohere
        scale *= float(factor)
    if (divisor := getattr(text, "logits_scaling", None)) is not None:  # Granite
        scale /= float(divisor)
    cap = getattr(text, "final_logit_softcapping", None)
    return LogitTransform(scale, None if cap is None else float(cap))


def completion_logprobs(
    model: CausalLM,
    batch: TokenBatch,
    *,
    reduction: Reduction = "none",
    chunk: int = CHUNK,
    backbone: Callable[..., Any] | None = None,
) -> SelectedLogProbs:
    """Log-probability of each supervised token of a batch.

    Args:
        model: A causal language model, adapted or not.
        batch: `b` rows of `s` places with `n` supervised tokens.
        reduction: ``"none"`` for ``[n]``, ``"sum"`` for their sum (cheaper where the head trains).
        chunk: Targets whose logits are held at a time.
        backbone: Runs instead of the model's own (a compiled one).

    Returns:
        `logprobs`, ``fp32 [n]`` or ``[]``, and `correct`, ``bool [n]``.
    """
    base = base_of(model)
    sharded = getattr(base, _SCORE, None)
    if sharded is not None:  # FSDP gathers the root's parameters only around methods that it knows
        result = sharded(batch, reduction, chunk, backbone)
        return SelectedLogProbs(*result)
    return _score(base, batch, reduction, chunk, backbone)


def register_sharded(base: PreTrainedModel) -> None:
    """Tell FSDP2 that scoring is a forward pass of its root module `base`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(base, _SCORE, MethodType(_score, base))
    register_fsdp_forward_method(base, _SCORE)


def _score(
    base: PreTrainedModel, batch: TokenBatch, reduction: Reduction, chunk: int, backbone: Callable[..., Any] | None
) -> SelectedLogProbs:
    hidden = _hidden_states(base, batch, backbone)  # [b, s, d]
    selected = hidden.flatten(0, 1).index_select(0, batch.predictors)  # [n, d]
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # a trained copy of the head: the active adapter's
        head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
    transform = logit_transform(base.config)
    if type(head) is nn.Linear:
        function = linear_logprob_sum if reduction == "sum" else linear_logprobs
        return function(selected, head.weight, batch.targets, bias=head.bias, transform=transform, chunk=chunk)
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(base).__name__} has no output embeddings, so it isn't a causal language model.")
    scored = module_logprobs(selected, head, batch.targets, transform=transform, chunk=chunk)
    return scored if reduction == "none" else SelectedLogProbs(scored.logprobs.sum(), scored.correct)


def _hidden_states(base: PreTrainedModel, batch: TokenBatch, backbone: Callable[..., Any] | None) -> Tensor:
    """Last hidden states, ``[b, s, d]``.

    Rows without shared prefixes need no mask: where position ids start again transformers isolates what follows, for
    every attention kernel and for sliding windows, if it is given neither a mask nor a cache; padding stands behind all
    real tokens, which a causal model doesn't see.
    """
    run = backbone if backbone is not None else base.base_model
    mask = _explicit_mask(base, batch) if batch.has_shared_prefixes else None
    options = {} if mask is None else {"attention_mask": mask}
    out = run(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, return_dict=True, **options)
    return cast(Tensor, out.last_hidden_state)


def _explicit_mask(base: PreTrainedModel, batch: TokenBatch) -> Tensor:
    allowed = attention_mask(batch)
    if base.config._attn_implementation == "sdpa":
        return allowed
    if base.config._attn_implementation == "eager":  # added to the scores
        bias = torch.zeros(allowed.shape, dtype=base.dtype, device=allowed.device)
        return bias.masked_fill(~allowed, torch.finfo(base.dtype).min)
    raise ModelError(
        f"Shared prefixes need attn_implementation 'sdpa' or 'eager', not {base.config._attn_implementation!r}."
    )


@dataclass(frozen=True)
class Exactness:
    """What was found out about a model before it was trusted with the fast paths.

    Args:
        head: Whether projecting selected hidden states gives the model's own logits.
        packing: Whether packed segments don't see each other.
    """

    head: bool
    packing: bool


@torch.no_grad()
def probe(model: CausalLM) -> Exactness:
    """Compare the fast paths with the model's own forward pass on a few tokens.

    Architectures differ in what they do after their head and in how they mix tokens (state spaces and linear attention
    see through a packed row); no list of names stays complete, so the model itself is asked.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        base = base_of(model)
        device = input_device(base)
        vocabulary = base.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        examples = []
        for length in (7, 5):
            ids = torch.randint(0, vocabulary, (length,), generator=generator)
            examples.append(Example(ids, torch.ones(length, dtype=torch.bool)))
        expected = []
        for example in examples:
            ids = example.input_ids[None].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            expected.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
        want = torch.cat(expected)
        apart = completion_logprobs(model, collate_examples(examples, packing=False).to(device)).logprobs
        packed = completion_logprobs(model, collate_examples(examples).to(device)).logprobs
    finally:
        for module, training in modes:
            module.training = training
    exact = base.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    tolerance = 1e-4 if exact and not getattr(base, "is_quantized", False) else 5e-2
    return Exactness(head=_close(apart, want, tolerance), packing=_close(packed, apart, tolerance))


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))


def full_logits_logprobs(model: CausalLM, batch: TokenBatch, reduction: Reduction) -> SelectedLogProbs:
    """:func:`completion_logprobs` by the model's own forward pass, for heads that do something unknown."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    logits = logits.flatten(0, 1).index_select(0, batch.predictors).float()
    logprobs = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    correct = logits.argmax(-1) == batch.targets
    return SelectedLogProbs(logprobs.sum() if reduction == "sum" else logprobs, correct)


class Scorer:
    """:func:`completion_logprobs` that probes the model once and takes the plain path where a fast one isn't exact.

    Args:
        pad_token_id: Stands behind rows that had to be unpacked.
        backbone: A compiled backbone to use while training.
    """

    def __init__(self, pad_token_id: int = 0, backbone: Callable[..., Any] | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.backbone = backbone
        self.exactness: Exactness | None = None

    def __call__(self, model: CausalLM, batch: TokenBatch, reduction: Reduction = "none") -> SelectedLogProbs:
        """Score a batch; see :func:`completion_logprobs`."""
        if self.exactness is None:
            self.exactness = probe(model)
            name = type(base_of(model)).__name__
            if not self.exactness.head:
                warnings.warn(
                    f"{name} changes its logits after the head in a way that isn't known here: its own forward pass is "
                    "used, which holds the logits of the whole batch.",
                    stacklevel=2,
                )
            if not self.exactness.packing:
                warnings.warn(
                    f"{name} doesn't keep packed sequences apart, so batches are unpacked and padded. Set "
                    "packing=False to silence this.",
                    stacklevel=2,
                )
        if batch.packed and not self.exactness.packing:
            batch = unpack(batch, pad_token_id=self.pad_token_id)
        if not self.exactness.head:
            return full_logits_logprobs(model, batch, reduction)
        return completion_logprobs(model, batch, reduction=reduction, backbone=self.backbone)
