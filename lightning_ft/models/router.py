"""What a model adds to the cross-entropy in its own loss: a mixture of experts a term that spreads tokens evenly.

transformers adds it where the configuration asks for it (`output_router_logits=True`, with a coefficient above 0).
How it is computed differs between architectures, so the model's own code does it: its forward pass is run again on
what its backbone gave already, which costs no more than the term itself, and the coefficient is the derivative of its
loss by the term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ft.data.layout import TokenBatch
from lightning_ft.errors import ModelError
from lightning_ft.models.backbone import head_of
from lightning_ft.models.head import CausalLM, as_forward, base_of
from lightning_ft.models.numerics import are_close, tolerance_of
from lightning_ft.models.reach import model_output, probe_ids, probing


@dataclass(frozen=True)
class OwnLoss:
    """What a model's own loss is made of.

    Args:
        router: Factor of the term that balances the experts; 0 where there is none.
        unknown: What else is in it, as a sentence; None if it is the cross-entropy of the logits and that term.
    """

    router: float = 0.0
    unknown: str | None = None


def find_own_loss(model: CausalLM) -> OwnLoss:
    """Ask a model what it adds to the cross-entropy, with a few tokens.

    The model is left as it was.

    Args:
        model: A causal language model, adapted or not. Not sharded.

    Raises:
        ModelError: If it has a term for its router that can't be had in training.

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
            return OwnLoss()  # whether it can be trained at all, its plain forward pass says
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
                "what else it counts (such as further predicted tokens) is not trained here."
            )
        if factor:
            with RouterLoss(model).recorded() as recorded:
                base(input_ids=ids, use_cache=False, return_dict=True)
            ours = recorded.value(None)
            if not are_close(ours[None], cast(Tensor, term).float()[None].to(ours.device), tolerance_of(base)):
                raise _not_had(base, f"it is {float(cast(Tensor, term)):.4g}, and {float(ours):.4g} here")
    return OwnLoss(factor, unknown)


def _derivative(loss: Tensor, term: Any) -> float:
    """The factor that a term has in a loss; 0 for one that isn't in it."""
    if not isinstance(term, Tensor) or not term.requires_grad or not loss.requires_grad:
        return 0.0
    (found,) = torch.autograd.grad(loss, term, retain_graph=True, allow_unused=True)
    return 0.0 if found is None else float(f"{float(found):.6g}")  # 0.02 and not 0.019999999552965164


def _not_had(base: PreTrainedModel, why: str) -> ModelError:
    return ModelError(
        f"{type(base).__name__} asks for its router's loss (output_router_logits), which can't be had here: {why}. Set "
        "output_router_logits=False in the model's configuration to train without it."
    )


class RouterLoss:
    """The term that balances a model's experts, for batches that go through its backbone.

    Args:
        model: A model whose configuration asks for that term.
    """

    def __init__(self, model: CausalLM) -> None:
        self._base = base_of(model)

    @contextmanager
    def recorded(self) -> Iterator[RecordedPass]:
        """In this context the model makes one forward pass with gradients; what it gave is there afterwards."""
        passes: list[tuple[Any, Any]] = []

        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            if torch.is_grad_enabled():  # others try the model out
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
        passes: The arguments and results of its passes; filled while they are recorded.
    """

    def __init__(self, base: PreTrainedModel, passes: list[tuple[Any, Any]]) -> None:
        self._base, self._passes = base, passes

    def value(self, batch: TokenBatch | None) -> Tensor:
        """The term over all tokens of the pass, padding left out, ``fp32 []``.

        Args:
            batch: What went through; None for a row without padding.

        Raises:
            ModelError: If there wasn't exactly one pass, or the model gives no term for it.
        """
        if len(self._passes) != 1:
            raise _not_had(self._base, f"a batch took {len(self._passes)} forward passes, expected one")
        ((inputs, out),) = self._passes
        term = getattr(out, "aux_loss", None)  # of a model that is its own backbone
        if term is None:
            padded = batch is not None and batch.num_tokens < batch.input_ids.numel()
            mask = (cast(TokenBatch, batch).segment_ids >= 0).long() if padded else None
            term = as_forward(self._base, _term_of, inputs["input_ids"], mask, out)
        if not isinstance(term, Tensor):
            raise _not_had(self._base, "its forward pass gives none")
        return term.float()


def _term_of(base: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, out: Any) -> Any:
    """What a model's forward pass makes of a result of its backbone, without logits: the head gets no rows."""
    head = head_of(base)
    without_rows = None if head is None else head.register_forward_pre_hook(lambda _, args: (args[0][:, :0], *args[1:]))
    with _given(base.base_model, lambda *_, **__: out):
        try:
            whole = type(base).forward(
                base, input_ids=input_ids, attention_mask=mask, use_cache=False, return_dict=True
            )
        finally:
            if without_rows is not None:
                without_rows.remove()
    return getattr(whole, "aux_loss", None)


@contextmanager
def _given(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another `forward`, as long as the context lasts."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own
