"""The router loss of mixture-of-experts models, which balances the load of the experts.

transformers adds it to the cross-entropy if the configuration says so (`output_router_logits=True` and a coefficient
above 0). Its formula differs between architectures, so the model's own code computes it: the forward pass runs again
on the output that the backbone has already computed, which costs no more than the term itself. The coefficient is the
derivative of the model's loss with respect to the term.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.data.layout import TokenBatch
from lightning_ft.errors import ModelError
from lightning_ft.models.backbone import head_of
from lightning_ft.models.frozen_layers import replaced_forwards
from lightning_ft.models.head import CausalLM, as_forward, base_of
from lightning_ft.models.numerics import are_close, tolerance_of
from lightning_ft.models.reach import model_output, probe_ids, probing


@dataclass(frozen=True)
class OwnLoss:
    """Terms of a model's own loss.

    Args:
        router: Coefficient of the router loss; 0 if there is none.
        unknown: Description of any further term, as a sentence; None if the loss is the cross-entropy and the router
            loss only.
    """

    router: float = 0.0
    unknown: str | None = None


def find_own_loss(model: CausalLM) -> OwnLoss:
    """Find out from a pass over a few tokens what a model adds to the cross-entropy.

    The model isn't changed.

    Args:
        model: A causal language model, adapted or not, not sharded.

    Raises:
        ModelError: If the model has a router loss that can't be reproduced in training.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.02)
        >>> find_own_loss(MixtralForCausalLM(config))
        OwnLoss(router=0.02, unknown=None)
    """
    base = base_of(model)
    with probing(model):
        try:
            out = model_output(model, labels=True)
            ids, logits, loss = probe_ids(base), out.logits, cast("Tensor | None", getattr(out, "loss", None))
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            return OwnLoss()  # a later forward pass will show whether the model can be trained at all
        if not isinstance(loss, Tensor) or logits.shape[:2] != ids.shape:
            return OwnLoss()
        term = getattr(out, "aux_loss", None)
        factor = _derivative(loss, term)
        expected = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
        if factor:
            expected = expected + factor * cast(Tensor, term).to(expected.device)
        unknown = None
        if not are_close(loss.float()[None], expected[None], tolerance_of(base)):
            unknown = (
                f"{type(base).__name__}: its own loss over {ids.shape[1]} tokens is {float(loss):.4g}, and the "
                f"cross-entropy of its logits{' with its router loss' if factor else ''} {float(expected):.4g}: "
                "its further terms (such as multi-token prediction) are not trained here."
            )
        if factor:
            with RouterLoss(model).recorded() as recorded:
                base(input_ids=ids, use_cache=False, return_dict=True)
            ours = recorded.value(None)
            if not are_close(ours[None], cast(Tensor, term).float()[None].to(ours.device), tolerance_of(base)):
                raise _unavailable(
                    base, f"the model gives {float(cast(Tensor, term)):.4g}, this pass {float(ours):.4g}"
                )
    return OwnLoss(factor, unknown)


def _derivative(loss: Tensor, term: object) -> float:
    """The coefficient of a term in a loss; 0 if the loss doesn't contain it."""
    if not isinstance(term, Tensor) or not term.requires_grad or not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, term, retain_graph=True, allow_unused=True)
    return 0.0 if gradient is None else float(f"{float(gradient):.6g}")  # 0.02 and not 0.019999999552965164


def _unavailable(base: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"{type(base).__name__} has a router loss (output_router_logits), which can't be computed here: {why}. Set "
        "output_router_logits=False in the model's configuration to train without it."
    )


_Pass = tuple[dict[str, Tensor], object]
"""Keyword arguments of a forward pass, and its output."""


class RouterLoss:
    """The router loss of batches that go through a model's backbone.

    Args:
        model: A model whose configuration enables its router loss.
    """

    def __init__(self, model: CausalLM) -> None:
        self._base = base_of(model)

    @contextmanager
    def recorded(self) -> Iterator[RecordedPass]:
        """Record the one forward pass with gradients that the model makes in this context."""
        passes: list[_Pass] = []

        def keep(module: nn.Module, args: object, kwargs: dict[str, Tensor], out: object) -> None:
            if torch.is_grad_enabled():  # passes without gradients only probe the model
                passes.append((kwargs, out))

        hook = self._base.base_model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield RecordedPass(self._base, passes)
        finally:
            hook.remove()


class RecordedPass:
    """A forward pass of a model's backbone.

    Args:
        base: The model.
        passes: Arguments and output of each recorded pass; filled while recording.
    """

    def __init__(self, base: PreTrainedModel, passes: list[_Pass]) -> None:
        self._base, self._passes = base, passes

    def value(self, batch: TokenBatch | None) -> Tensor:
        """The router loss over all tokens of the pass except padding, ``fp32 []``.

        Args:
            batch: The batch of the pass; None for a row without padding.

        Raises:
            ModelError: If there wasn't exactly one pass, or the model returns no router loss for it.
        """
        if len(self._passes) != 1:
            raise _unavailable(self._base, f"a batch took {len(self._passes)} forward passes, expected one")
        ((inputs, out),) = self._passes
        term = getattr(out, "aux_loss", None)  # set if the model is its own backbone
        if term is None:
            padded = batch is not None and batch.num_tokens < batch.input_ids.numel()
            mask = (cast(TokenBatch, batch).segment_ids >= 0).long() if padded else None
            term = as_forward(self._base, _term_of, inputs["input_ids"], mask, out)
        if not isinstance(term, Tensor):
            raise _unavailable(self._base, "its forward pass returns none")
        return term.float()


def _term_of(base: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, out: object) -> object:
    """The router loss that a model's forward pass computes from its backbone's output; the head gets no rows."""
    head = head_of(base)
    without_rows = None if head is None else head.register_forward_pre_hook(lambda _, args: (args[0][:, :0], *args[1:]))
    with replaced_forwards([(base.base_model, lambda *_, **__: out)]):
        try:
            whole = type(base).forward(
                base, input_ids=input_ids, attention_mask=mask, use_cache=False, return_dict=True
            )
        finally:
            if without_rows is not None:
                without_rows.remove()
    return getattr(whole, "aux_loss", None)
