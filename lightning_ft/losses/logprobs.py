"""Log-probabilities of target tokens, computed without holding the logits of a whole batch.

Logits are the largest tensor of a batch: with a vocabulary of 152,000, those of a thousand targets take 600 MB in fp32,
and a plain loss holds several copies. Here the head runs over `chunk` targets at a time. Where its gradients don't
depend on the rest of the loss they are computed in the forward pass, so that no chunk is computed twice (the idea of
Liger Kernel's chunked losses, https://arxiv.org/abs/2410.10989). Shapes: `n` targets, hidden size `d`, vocabulary `v`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_ft.losses.head_products import HeadGradients, logits_buffer, product_dtype, raw_products

CHUNK = 1024
"""Number of targets per chunk, whose logits are ``[CHUNK, v]`` in fp32."""
_CPU_CHUNK = 128
"""Number of targets per chunk on a CPU: small enough for its caches; below it matrix products were measured slower."""


class SelectedLogProbs(NamedTuple):
    """Log-probabilities of targets, and metrics of the distributions that predict them.

    Args:
        logprobs: Log-probability of each target, ``fp32 [n]``, with gradient.
        correct: Whether no token is more probable than the target, ``bool [n]``.
        entropy: Entropy of the distribution at each target in nats, ``fp32 [n]``, without gradient; None if it wasn't
            requested.
        states: Hidden states from which the targets were predicted, ``[n, d]``, with gradient; None if they weren't
            requested.
    """

    logprobs: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    states: Tensor | None = None


class LogitTransform(NamedTuple):
    """The steps from a head's raw products, ``hidden @ weight.T``, to the model's logits.

    Args:
        scale: Factor of the logits (Cohere, Granite).
        softcap: Bound of the logits after scaling, ``softcap * tanh(logits / softcap)`` (Gemma 2); None for no bound.
        temperature: Divisor of the logits, applied last: log-probabilities are those of the sampling distribution.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        """Logits from the raw products, in fp32."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient of the raw products from the gradient of the logits, in place."""
        if self.softcap is not None:
            grad *= 1 - (logits * self.temperature / self.softcap) ** 2
        if self.scale != self.temperature:
            grad *= self.scale / self.temperature
        return grad


IDENTITY = LogitTransform()


def chunk_size(device: torch.device, chunk: int | None = None) -> int:
    """Number of targets per chunk: `chunk`, or the fastest number on the device.

    Example:
        >>> chunk_size(torch.device("cpu")), chunk_size(torch.device("cuda")), chunk_size(torch.device("cpu"), 7)
        (128, 1024, 7)
    """
    return chunk if chunk is not None else (_CPU_CHUNK if device.type == "cpu" else CHUNK)


def _logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, whether none is larger, and the log normalizers, all ``[n]``."""
    normalizers = logits.logsumexp(-1)
    target_logits = logits.gather(-1, targets[:, None])[:, 0]
    return target_logits - normalizers, target_logits >= logits.amax(-1), normalizers


def _logprobs_with_gradient_(
    logits: Tensor, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_logprobs` and :func:`_logprob_gradient_` with a single exponential for both; overwrites `logits`."""
    if transform.softcap is not None:
        logprobs, correct, normalizers = _logprobs(logits, targets)
        return logprobs, correct, normalizers, _logprob_gradient_(logits, targets, normalizers, transform)
    target_logits, largest = logits.gather(-1, targets[:, None])[:, 0], logits.amax(-1)
    exponentials = logits.sub_(largest[:, None]).exp_()
    total = exponentials.sum(-1)
    normalizers = largest + total.log()
    grad = exponentials.mul_(-1 / total[:, None])
    grad[torch.arange(len(targets), device=targets.device), targets] += 1
    return target_logits - normalizers, target_logits >= largest, normalizers, transform.backward_(grad, logits)


def _entropy(logits: Tensor, normalizers: Tensor) -> Tensor:
    """Entropy of each row's distribution in nats, ``[n]``."""
    return normalizers - ((logits - normalizers[:, None]).exp_() * logits).sum(-1)


def _logprob_gradient_(logits: Tensor, targets: Tensor, normalizers: Tensor, transform: LogitTransform) -> Tensor:
    """D logprob / d raw = (onehot - softmax) * d logits / d raw, ``[n, v]``; may overwrite `logits`."""
    if transform.softcap is None:
        grad = logits.sub_(normalizers[:, None]).exp_().neg_()
    else:
        grad = (logits - normalizers[:, None]).exp_().neg_()  # the softcap's derivative needs the logits
    grad[torch.arange(len(targets), device=targets.device), targets] += 1
    return transform.backward_(grad, logits)


class _SelectedLogProbs(torch.autograd.Function):
    """Log-probability of each target; the incoming gradients may differ."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        # With a frozen head d logprob / d hidden is one vector per target, ``[n, d]`` in all. It is computed here, so
        # that the backward pass needs no second pass over the vocabulary.
        frozen_head = ctx.needs_input_grad[0] and not head_trains
        jacobian = torch.empty_like(hidden) if frozen_head else None
        logprobs, correct, normalizers, entropies = [], [], [], []
        factor = weight.to(hidden.dtype)  # in the dtype of the products
        buffer = logits_buffer(hidden, factor, chunk)
        for states, ids, start in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(targets), chunk), strict=True
        ):
            logits = transform(raw_products(states, factor, bias, buffer))
            if jacobian is not None and not entropy:
                target_logprobs, is_largest, log_normalizers, grad = _logprobs_with_gradient_(logits, ids, transform)
            else:
                target_logprobs, is_largest, log_normalizers = _logprobs(logits, ids)
                if entropy:
                    entropies.append(_entropy(logits, log_normalizers))
                if jacobian is not None:
                    grad = _logprob_gradient_(logits, ids, log_normalizers, transform)
            logprobs.append(target_logprobs)
            correct.append(is_largest)
            normalizers.append(log_normalizers)
            if jacobian is not None:
                jacobian[start : start + len(ids)] = grad.to(factor.dtype) @ factor
        ctx.transform, ctx.chunk = transform, chunk
        ctx.save_for_backward(jacobian, hidden, weight, bias, targets, torch.cat(normalizers))
        result = torch.cat(logprobs), torch.cat(correct), torch.cat(entropies or [hidden.new_zeros(0)])
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        jacobian, hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        if jacobian is not None:
            return (jacobian * grad_logprobs[:, None]).to(hidden.dtype), None, None, None, None, None, None
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        factor = weight.to(hidden.dtype)
        buffer = logits_buffer(hidden, factor, ctx.chunk)
        chunks = (t.split(ctx.chunk) for t in (hidden, targets, normalizers, grad_logprobs))
        for start, (states, ids, log_normalizers, upstream) in zip(
            range(0, len(targets), ctx.chunk), zip(*chunks, strict=True), strict=True
        ):
            logits = ctx.transform(raw_products(states, factor, bias, buffer))
            grad = _logprob_gradient_(logits, ids, log_normalizers, ctx.transform)
            grads.add(grad.mul_(upstream[:, None]), states, factor, start)
        return *grads.results(weight, bias), None, None, None, None


class _SummedLogProbs(torch.autograd.Function):
    """Sum of the log-probabilities: all targets share one incoming gradient, so the forward pass computes gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        total, correct = hidden.new_zeros((), dtype=torch.float32), []
        factor = weight.to(hidden.dtype)  # in the dtype of the products
        buffer = logits_buffer(hidden, factor, chunk)
        for states, ids, start in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(targets), chunk), strict=True
        ):
            logits = transform(raw_products(states, factor, bias, buffer))
            if grads.needed:
                logprobs, is_largest, _, grad = _logprobs_with_gradient_(logits, ids, transform)
                grads.add(grad, states, factor, start)
            else:
                logprobs, is_largest, _ = _logprobs(logits, ids)
            total += logprobs.sum()
            correct.append(is_largest)
        ctx.save_for_backward(*grads.results(weight, bias))
        result = total, torch.cat(correct)
        ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)  # type: ignore[attr-defined]
        return (*grads, None, None, None)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
    entropy: bool = False,
) -> SelectedLogProbs:
    """Log-probability of each target under a linear head.

    Args:
        hidden: Hidden states that predict the targets, ``[n, d]``.
        weight: Weight of the head, ``[v, d]``.
        targets: Token ids of the targets, ``int64 [n]``.
        bias: Bias of the head, ``[v]``.
        transform: Steps from the raw products to the logits.
        chunk: Number of targets per chunk; peak memory is ``[chunk, v]``. By default the fastest on the device.
        entropy: Whether to compute the entropy of each distribution as well.

    Example:
        >>> import torch
        >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(11, 4), torch.randint(0, 11, (5,))
        >>> expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), targets]
        >>> bool(torch.allclose(linear_logprobs(hidden, weight, targets, chunk=2).logprobs, expected, atol=1e-6))
        True
    """
    if not len(targets):
        return _no_targets(hidden, weight, bias, summed=False)
    states = hidden.to(product_dtype(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, correct, entropies = _SelectedLogProbs.apply(
            states, weight, bias, targets, transform, chunk_size(hidden.device, chunk), entropy
        )
    return SelectedLogProbs(logprobs, correct, entropies if entropy else None)


def linear_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
) -> SelectedLogProbs:
    """Sum of the log-probabilities of the targets under a linear head, with the arguments of :func:`linear_logprobs`.

    If the head is trained this is cheaper than summing the result of that function, since nothing is recomputed.

    Returns:
        `logprobs` is the sum, ``fp32 []``; `correct` has one value per target.

    Example:
        >>> import torch
        >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(11, 4), torch.randint(0, 11, (5,))
        >>> expected = linear_logprobs(hidden, weight, targets).logprobs.sum()
        >>> bool(torch.allclose(linear_logprob_sum(hidden, weight, targets, chunk=2).logprobs, expected, atol=1e-5))
        True
    """
    if not len(targets):
        return _no_targets(hidden, weight, bias, summed=True)
    states, size = hidden.to(product_dtype(weight, rounded=True)), chunk_size(hidden.device, chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        return SelectedLogProbs(*_SummedLogProbs.apply(states, weight, bias, targets, transform, size))


def module_logprobs(
    hidden: Tensor,
    head: torch.nn.Module,
    targets: Tensor,
    *,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
    entropy: bool = False,
) -> SelectedLogProbs:
    """:func:`linear_logprobs` for a head that isn't a single plain matrix, such as a quantized head or one with LoRA.

    Each chunk is recomputed in the backward pass by PyTorch's checkpointing, so every parameter of the head gets its
    gradient.
    """
    if not len(targets):
        parameter = next(head.parameters(), None)
        return _no_targets(hidden, parameter if parameter is not None else hidden, None, summed=False)

    def chunk_logprobs(states: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = transform(head(states))
        logprobs, correct, normalizers = _logprobs(logits, ids)
        if not entropy:
            return logprobs, correct
        with torch.no_grad():
            return logprobs, correct, _entropy(logits, normalizers)

    size = chunk_size(hidden.device, chunk)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    results = [checkpoint(chunk_logprobs, states, ids, use_reentrant=False) for states, ids in chunks]
    return SelectedLogProbs(*(torch.cat(values) for values in zip(*results, strict=True)))


def _no_targets(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, summed: bool) -> SelectedLogProbs:
    """Result without targets: zeros attached to every input, so that the rank takes part in the backward pass."""
    zero = hidden.sum() * 0.0 + weight.sum() * 0.0 + (0.0 if bias is None else bias.sum() * 0.0)
    zero = zero.float()
    correct = torch.zeros(0, dtype=torch.bool, device=hidden.device)
    return SelectedLogProbs(zero if summed else zero.expand(0), correct, zero.detach().expand(0))
