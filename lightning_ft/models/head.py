"""Log-probs of a batch's targets for every objective: the backbone once, then the head at target positions only.

Supervised fine-tuning, preference losses and policy gradients all call :func:`completion_logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.masks import attention_mask
from lightning_ft.distributed import device_of_passes
from lightning_ft.errors import ModelError
from lightning_ft.losses.distillation import (
    DistillationLoss,
    Divergence,
    TeacherLogits,
    linear_distillation,
    module_distillation,
)
from lightning_ft.losses.head_products import product_dtype, raw_products
from lightning_ft.losses.logprobs import (
    LogitTransform,
    SelectedLogProbs,
    linear_logprob_sum,
    linear_logprobs,
    module_logprobs,
)
from lightning_ft.models.backbone import Backbone, backbone_of, takes_keywords, takes_positions
from lightning_ft.models.block_mask import block_mask, takes_block_masks
from lightning_ft.models.lengths import LengthSwitch, length_switch
from lightning_ft.models.passes import put_back, switched_parts

if TYPE_CHECKING:
    from typing_extensions import TypeIs

CausalLM = PreTrainedModel | PeftModel
Reduction = Literal["none", "sum"]
M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
T = TypeVar("T")
_AS_FORWARD = "_lightning_ft_as_forward"


def base_of(model: CausalLM) -> PreTrainedModel:
    """The transformers model inside an adapted one, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def input_device(model: CausalLM) -> torch.device:
    """The device that a model expects its token ids on."""
    return device_of_passes(cast(Tensor, base_of(model).get_input_embeddings().weight))


SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Names that configurations have for a factor of the logits: Cohere, Falcon-H1, Muse Glimmer."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names that configurations have for a bound of the logits: Gemma 2, RecurrentGemma, xLSTM."""


def logit_transform(config: PreTrainedConfig, temperature: float = 1.0) -> LogitTransform:
    """The scaling and soft-capping that a configuration applies to the head's output, and the temperature.

    A soft cap that isn't known here would be missed: logits of a model that is trained from scratch are far below it
    when the model is probed, and reach it later. So would a factor close to 1.
    """
    text = config.get_text_config()
    multiplies = text.model_type.startswith("hyperclovax")  # it has Granite's name for the inverse
    scale = math.prod(float(value) for name in SCALES if (value := getattr(text, name, None)) is not None)
    if (value := getattr(text, "logits_scaling", None)) is not None:  # Granite, MiniCPM3
        scale = scale * float(value) if multiplies else scale / float(value)
    cap = next((value for name in SOFT_CAPS if (value := getattr(text, name, None)) is not None), None)
    return LogitTransform(scale, None if cap is None else float(cap), temperature)


def completion_logprobs(
    model: CausalLM,
    batch: TokenBatch,
    *,
    reduction: Reduction = "none",
    chunk: int | None = None,
    backbone: Backbone | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    states: bool = False,
) -> SelectedLogProbs:
    """Log-probability of each target of a batch.

    Args:
        model: A causal language model, adapted or not.
        batch: The batch, `b` rows of `s` positions with `n` targets.
        reduction: ``"none"`` for ``[n]``, or ``"sum"`` for the sum (cheaper if the head is trained).
        chunk: Number of targets whose logits are in memory at a time; by default the fastest for the device.
        backbone: Callable that replaces the model's own backbone, such as a compiled one.
        temperature: Temperature of the distribution that the completions were sampled from.
        entropy: Also compute the entropy of each distribution; not with ``"sum"``.
        states: Also return the hidden states that predicted the targets, for a critic's head.

    Returns:
        `logprobs`, ``fp32 [n]`` or ``[]``, and `correct`, ``bool [n]``; if requested `entropy`, ``fp32 [n]``, and
        `states`, ``[n, d]``.
    """
    result = as_forward(
        base_of(model),
        _target_logprobs,
        batch,
        reduction,
        chunk,
        backbone,
        temperature=temperature,
        entropy=entropy,
        states=states,
    )
    return SelectedLogProbs(*result)


def as_forward(module: M, function: Callable[Concatenate[M, P], T], *args: P.args, **options: P.kwargs) -> T:
    """Call ``function(module, ...)`` as a forward pass of `module`, a model or its head.

    FSDP2 gathers the parameters of a module only around methods that are registered with it.
    """
    registered = getattr(module, _AS_FORWARD, None)
    return function(module, *args, **options) if registered is None else registered(function, *args, **options)


def register_sharded(module: nn.Module) -> None:
    """Register :func:`as_forward`'s calls with FSDP2 as forward passes of `module`, which it shards."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(module, _AS_FORWARD, MethodType(_call, module))
    register_fsdp_forward_method(module, _AS_FORWARD)


def _call(module: M, function: Callable[Concatenate[M, P], T], *args: P.args, **options: P.kwargs) -> T:
    return function(module, *args, **options)


def gathered_dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype that FSDP2 gathers the weights of a module in; None for their own, or without sharding."""
    state: Any = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
    return None if state is None else state._mp_policy.param_dtype


def _target_logprobs(
    base: PreTrainedModel,
    batch: TokenBatch,
    reduction: Reduction,
    chunk: int | None,
    backbone: Backbone | None,
    *,
    temperature: float,
    entropy: bool,
    states: bool,
) -> SelectedLogProbs:
    hidden = hidden_states(base, batch, backbone)  # [b, s, d]
    selected = hidden.flatten(0, 1).index_select(0, batch.predictors)  # [n, d]
    result = project(base, selected, batch.targets, reduction, chunk, temperature=temperature, entropy=entropy)
    return result._replace(states=selected) if states else result


def project(
    base: PreTrainedModel,
    selected: Tensor,
    targets: Tensor,
    reduction: Reduction = "none",
    chunk: int | None = None,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> SelectedLogProbs:
    """Log-probabilities of targets from the hidden states that predict them. Call it through :func:`as_forward`.

    Args:
        base: The transformers model.
        selected: Hidden states, ``[n, d]``.
        targets: Token ids, ``int64 [n]``.
        reduction: As in :func:`completion_logprobs`.
        chunk: Number of targets whose logits are in memory at a time.
        temperature: Temperature of the distribution.
        entropy: Whether to compute entropies.

    Raises:
        ModelError: If the model has no head.
    """
    transform = logit_transform(base.config, temperature)

    def compute(outer: nn.Module, selected: Tensor) -> SelectedLogProbs:
        head = active_head(base)
        if not is_plain_linear(head):
            result = module_logprobs(selected, head, targets, transform=transform, chunk=chunk, entropy=entropy)
            return result if reduction == "none" else result._replace(logprobs=result.logprobs.sum())
        if reduction == "sum":
            return linear_logprob_sum(selected, head.weight, targets, bias=head.bias, transform=transform, chunk=chunk)
        return linear_logprobs(
            selected, head.weight, targets, bias=head.bias, transform=transform, chunk=chunk, entropy=entropy
        )

    return as_forward(_outer_head(base), compute, selected)


def is_plain_linear(module: nn.Module) -> TypeIs[nn.Linear]:
    """Whether a module is `nn.Linear` itself, sharded or not, and no subclass that computes something else.

    Example:
        >>> is_plain_linear(nn.Linear(1, 1)), is_plain_linear(nn.Bilinear(1, 1, 1))
        (True, False)
    """
    found = type(module)
    # FSDP2 replaces the class of a module by one that derives from `FSDPModule` and the class that it had.
    return (found.__mro__[2] if isinstance(module, FSDPModule) else found) is nn.Linear


def _outer_head(base: PreTrainedModel) -> nn.Module:
    """The head with what PEFT has put around it: the module that FSDP2 may have sharded as a group of its own."""
    head = base.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(f"{type(base).__name__} has no output embeddings, so it isn't a causal language model.")
    return head


def active_head(base: PreTrainedModel) -> nn.Module:
    """The head in use: where PEFT keeps trained copies of it, that of the active adapter.

    Raises:
        ModelError: If the model has no head.
    """
    head = _outer_head(base)
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]] if not head.disable_adapters else head.original_module
    return head


def head_logits(
    base: PreTrainedModel,
    states: Tensor,
    dtype: torch.dtype | None = None,
    casts: dict[torch.dtype, Tensor] | None = None,
) -> Tensor:
    """Logits of hidden states, ``[c, d]`` to ``fp32 [c, v]``. Call it through :func:`as_forward`.

    Args:
        base: The transformers model.
        states: Hidden states.
        dtype: Dtype of the products with a linear head; by default as in the losses.
        casts: Casts of the head's weight by dtype, which are used and added to; only for a weight that doesn't change.
    """
    transform = logit_transform(base.config)

    def compute(outer: nn.Module, states: Tensor) -> Tensor:
        head = active_head(base)
        wanted = product_dtype(head.weight) if dtype is None and is_plain_linear(head) else dtype
        with torch.autocast(states.device.type, enabled=False):  # as in the losses
            if is_plain_linear(head):
                weight = _cast_once(head.weight, wanted, casts)
                return transform(raw_products(states.to(weight.dtype), weight, head.bias))
            other = getattr(head, "weight", None)
            if isinstance(other, Tensor) and other.is_floating_point():  # packed weights take the states unchanged
                states = states.to(other.dtype)
            return transform(head(states))

    return as_forward(_outer_head(base), compute, states)


def _cast_once(weight: Tensor, dtype: torch.dtype | None, casts: dict[torch.dtype, Tensor] | None) -> Tensor:
    """A weight in a dtype, from `casts` if it is there, where it is put otherwise."""
    if dtype is None or weight.dtype == dtype:
        return weight
    casts = {} if casts is None else casts
    if dtype not in casts:
        casts[dtype] = weight.to(dtype)
    return casts[dtype]


def frozen_logits(use: Callable[[], AbstractContextManager[CausalLM]]) -> TeacherLogits:
    """Function from hidden states of a frozen model to its logits, for the time of a step.

    Its products have the dtype of the student's, which depends on autocast where this is called.

    Args:
        use: Function that returns a context in which the model can be used. It is entered for each call only if the
            head has an adapter, which would otherwise be active.
    """
    with use() as model:
        base = base_of(model)
        head = base.get_output_embeddings()
        plain = is_plain_linear(head)
        dtype = product_dtype(head.weight) if plain else None
    casts: dict[torch.dtype, Tensor] = {}  # chunks share one

    def compute(states: Tensor) -> Tensor:
        with nullcontext() if plain else use():
            return as_forward(base, head_logits, states, dtype, casts)

    return compute


def distill(
    model: CausalLM,
    selected: Tensor,
    targets: Tensor,
    teacher_states: Tensor,
    teacher_logits: TeacherLogits,
    *,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    ce_coef: float = 0.0,
) -> DistillationLoss:
    """Loss of distilling a teacher into a model, from the hidden states of both.

    Args:
        model: The student, adapted or not.
        selected: Its hidden states that predict the targets, ``[n, d]``.
        targets: Token ids, ``int64 [n]``.
        teacher_states: Hidden states of the teacher, ``[n, d_teacher]``.
        teacher_logits: Function from a chunk of them to the teacher's logits.
        divergence: As in :func:`lightning_ft.losses.distillation.token_divergence`.
        beta: Share of the teacher in the mixture of ``jsd``.
        ce_coef: Weight of the cross-entropy of the targets.
    """

    def compute(base: PreTrainedModel) -> DistillationLoss:
        head, transform = active_head(base), logit_transform(base.config)  # of a model that isn't sharded
        arguments = (teacher_states, teacher_logits, targets)
        options: dict[str, Any] = {"transform": transform, "divergence": divergence, "beta": beta, "ce_coef": ce_coef}
        if not is_plain_linear(head):
            return module_distillation(selected, head, *arguments, **options)
        return linear_distillation(selected, head.weight, *arguments, bias=head.bias, **options)

    return as_forward(base_of(model), compute)


def hidden_states(base: PreTrainedModel, batch: TokenBatch, backbone: Backbone | None = None) -> Tensor:
    """Last hidden states, ``[b, s, d]``. Call it through :func:`as_forward` if the model may be sharded.

    Rows without shared prefixes need no mask (although one may be cheaper, see :class:`TokenBatch`). Without a mask or
    cache, transformers isolates sequences wherever position ids restart, for every attention kernel and for sliding
    windows. Padding comes after all real tokens, so a causal model doesn't see it.

    If the longest sequence of a pass would change the others (see :func:`length_switch`), the batch takes several
    passes.

    Args:
        base: The transformers model.
        batch: The batch.
        backbone: Callable that replaces the model's own backbone, such as a compiled one.

    Raises:
        ModelError: If a sharded model would need several passes.
    """
    run = backbone if backbone is not None else backbone_of(base)
    one_pass = partial(_one_pass, base, run=run)
    switch = length_switch(base)
    if switch is None:
        return one_pass(batch)
    parts = switched_parts(batch, switch)
    if parts is None:
        return one_pass(batch, switch=switch)
    refuse_several_passes(base, switch.why)
    return put_back(parts, [one_pass(part.batch, switch=switch) for part in parts], batch)


def refuse_several_passes(base: PreTrainedModel, why: str) -> None:
    """Refuse several passes of a sharded model, whose ranks must all make the same number of passes.

    Args:
        base: The transformers model.
        why: Reason why one pass isn't enough.

    Raises:
        ModelError: If `base` is sharded.
    """
    if getattr(base, _AS_FORWARD, None) is not None:
        raise ModelError(
            f"{type(base).__name__} {why}, so this batch takes several passes, which the ranks of a sharded model "
            "can't synchronize. Use batch_size=1 (one completion per prompt), or train without sharding."
        )


def _one_pass(base: PreTrainedModel, batch: TokenBatch, *, run: Backbone, switch: LengthSwitch | None = None) -> Tensor:
    if switch is not None:
        switch.forget()
    options: dict[str, Any] = {}
    if batch.explicit_mask or batch.has_shared_prefixes:
        flex = takes_block_masks(base)
        options["attention_mask"] = block_mask(batch) if flex else attention_bias(base, attention_mask(batch))
    options |= {"position_ids": batch.position_ids} if takes_positions(base.base_model) else {}
    options |= _sequence_boundaries(base, batch)
    out = run(input_ids=batch.input_ids, use_cache=False, return_dict=True, **options)
    return cast(Tensor, out.last_hidden_state)


def _sequence_boundaries(base: PreTrainedModel, batch: TokenBatch) -> dict[str, Any]:
    """Arguments that tell FlashAttention where sequences start: transformers would look for them in every layer."""
    one_packed_row = batch.packed and batch.boundaries is not None and len(batch.input_ids) == 1
    flash = "flash" in str(base.config._attn_implementation)
    if not (flash and one_packed_row and takes_keywords(base.base_model)):
        return {}
    return {
        "cu_seq_lens_q": batch.boundaries,
        "cu_seq_lens_k": batch.boundaries,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }


def takes_explicit_masks(base: PreTrainedModel) -> bool:
    """Whether a model's attention accepts a dense mask of which tokens see which others."""
    return base.config._attn_implementation in ("sdpa", "eager")


def attention_bias(base: PreTrainedModel, allowed: Tensor) -> Tensor:
    """The bias that is added to attention scores to mask out tokens.

    SDPA also accepts `allowed` itself, but converts it to such a bias in every layer and keeps each one for the
    backward pass.

    Args:
        base: The model.
        allowed: Whether query `t` sees key `s`, ``bool [b, 1, t, s]``.

    Raises:
        ModelError: If the model's attention takes no such mask.
    """
    if not takes_explicit_masks(base):
        raise ModelError(
            "Shared prefixes need attn_implementation 'sdpa', 'eager' or 'flex_attention', not "
            f"{base.config._attn_implementation!r}."
        )
    device_type = allowed.device.type
    embedded = gathered_dtype(base) or cast(Tensor, base.get_input_embeddings().weight).dtype
    # On a GPU the bias must have the dtype of the queries; adapters may have another one.
    states = embedded if embedded.is_floating_point else base.dtype
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else states
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, torch.finfo(dtype).min)
