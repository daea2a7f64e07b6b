"""Log-probabilities of chosen tokens without the logits of a whole batch.

The logits of a batch are its largest tensor: at a vocabulary of 152,000, a thousand targets are 600 MB in fp32, several
times over in a plain loss. Here the head runs over `chunk` targets at a time, and its gradients are formed in the
forward pass wherever they don't depend on what comes later (the idea of Liger Kernel's chunked losses,
https://arxiv.org/abs/2410.10989), so no chunk is computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Targets per chunk: its logits are ``[CHUNK, vocabulary]`` in fp32."""
_CPU_CHUNK = 128
"""On a CPU, whose caches smaller chunks stay in; matrix products become slower below it (measured)."""


class SelectedLogProbs(NamedTuple):
    """What a head says of its targets.

    Args:
        logprobs: Log-probability of each target, ``fp32 [n]``; carries the gradient.
        correct: Whether no token is more probable than the target, ``bool [n]``.
        entropy: Entropy of the distribution that each target was scored under, nats, ``fp32 [n]``, without gradient;
            None where it wasn't asked for.
        states: Hidden states that the targets were predicted from, ``[n, d]``, with gradient; None where not asked for.
    """

    logprobs: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    states: Tensor | None = None


class LogitTransform(NamedTuple):
    """What a model does to ``hidden @ weight.T`` before it calls it logits.

    Args:
        scale: Factor on the logits (Cohere, Granite).
        softcap: ``softcap * tanh(logits / softcap)`` after scaling (Gemma 2); None for no cap.
        temperature: Divides the logits at last: what is scored is the distribution that was sampled from.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        """Raw products to logits, in fp32."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1.0 else logits / self.temperature

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient on the logits to gradient on the raw products, in place."""
        if self.softcap is not None:
            grad *= 1 - (logits * self.temperature / self.softcap) ** 2
        if self.scale != self.temperature:
            grad *= self.scale / self.temperature
        return grad


IDENTITY = LogitTransform()


def chunk_size(device: torch.device, chunk: int | None = None) -> int:
    """How many targets to take at a time: `chunk`, or what is fastest on a device.

    Example:
        >>> chunk_size(torch.device("cpu")), chunk_size(torch.device("cuda")), chunk_size(torch.device("cpu"), 7)
        (128, 1024, 7)
    """
    return chunk if chunk is not None else (_CPU_CHUNK if device.type == "cpu" else CHUNK)


def _room(hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Where the products of each chunk go, ``[chunk, v]``: a new tensor for each would stand beside the one before."""
    return weight.new_empty(min(chunk, len(hidden)), len(weight))


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    out = room[: len(hidden)]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, whether none is larger, and the log normalizer, all ``[n]``."""
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    return chosen - normalizer, chosen >= logits.amax(-1), normalizer


def _score_with_gradient_(
    logits: Tensor, targets: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_score` and :func:`_logprob_gradient_` at once, with one exponential for both; overwrites `logits`."""
    if transform.softcap is not None:
        scored = _score(logits, targets)
        return *scored, _logprob_gradient_(logits, targets, scored[2], transform)
    chosen, largest = logits.gather(-1, targets[:, None])[:, 0], logits.amax(-1)
    exponentials = logits.sub_(largest[:, None]).exp_()
    total = exponentials.sum(-1)
    normalizer = largest + total.log()
    grad = exponentials.mul_(-1 / total[:, None])
    grad[torch.arange(len(targets), device=targets.device), targets] += 1
    return chosen - normalizer, chosen >= largest, normalizer, transform.backward_(grad, logits)


def _entropy(logits: Tensor, normalizer: Tensor) -> Tensor:
    """Entropy of each row's distribution, ``[n]``."""
    return normalizer - ((logits - normalizer[:, None]).exp_() * logits).sum(-1)


def _logprob_gradient_(logits: Tensor, targets: Tensor, normalizer: Tensor, transform: LogitTransform) -> Tensor:
    """D logprob / d raw = (onehot - softmax) * d logits / d raw, ``[n, v]``; may overwrite `logits`."""
    if transform.softcap is None:
        grad = logits.sub_(normalizer[:, None]).exp_().neg_()
    else:
        grad = (logits - normalizer[:, None]).exp_().neg_()  # the cap's derivative needs the logits themselves
    grad[torch.arange(len(targets), device=targets.device), targets] += 1
    return transform.backward_(grad, logits)


class _SelectedLogProbs(torch.autograd.Function):
    """Per-target log-probabilities; the incoming gradient may differ from target to target."""

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
        # With a frozen head d logprob / d hidden is one vector per target, known now: no second pass over the
        # vocabulary.
        direct = ctx.needs_input_grad[0] and not head_trains
        jacobian = torch.empty_like(hidden) if direct else None
        logprobs, correct, normalizers, entropies = [], [], [], []
        room = _room(hidden, weight, chunk)
        for part, ids, start in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(targets), chunk), strict=True
        ):
            logits = transform(_raw(part, weight, bias, room))
            if jacobian is not None and not entropy:
                scored, hit, normalizer, grad = _score_with_gradient_(logits, ids, transform)
            else:
                scored, hit, normalizer = _score(logits, ids)
                if entropy:
                    entropies.append(_entropy(logits, normalizer))
                if jacobian is not None:
                    grad = _logprob_gradient_(logits, ids, normalizer, transform)
            logprobs.append(scored)
            correct.append(hit)
            normalizers.append(normalizer)
            if jacobian is not None:
                jacobian[start : start + len(ids)] = grad.to(weight.dtype) @ weight
        ctx.transform, ctx.chunk, ctx.has_bias = transform, chunk, bias is not None
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
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        room = _room(hidden, weight, ctx.chunk)
        pieces = (t.split(ctx.chunk) for t in (hidden, targets, normalizers, grad_logprobs))
        for start, (part, ids, normalizer, upstream) in zip(
            range(0, len(targets), ctx.chunk), zip(*pieces, strict=True), strict=True
        ):
            grad = _logprob_gradient_(ctx.transform(_raw(part, weight, bias, room)), ids, normalizer, ctx.transform)
            grad = grad.mul_(upstream[:, None]).to(weight.dtype)
            _accumulate(grad, part, weight, start, grad_hidden, grad_weight, grad_bias)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


class _SummedLogProbs(torch.autograd.Function):
    """Their sum: every target has the same incoming gradient, so all gradients are formed in the forward pass."""

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
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        wanted = grad_hidden is not None or grad_weight is not None or grad_bias is not None
        total, correct = hidden.new_zeros((), dtype=torch.float32), []
        room = _room(hidden, weight, chunk)
        for part, ids, start in zip(
            hidden.split(chunk), targets.split(chunk), range(0, len(targets), chunk), strict=True
        ):
            logits = transform(_raw(part, weight, bias, room))
            if wanted:
                scored, hit, _, grad = _score_with_gradient_(logits, ids, transform)
                _accumulate(grad.to(weight.dtype), part, weight, start, grad_hidden, grad_weight, grad_bias)
            else:
                scored, hit, _ = _score(logits, ids)
            total += scored.sum()
            correct.append(hit)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        result = total, torch.cat(correct)
        ctx.mark_non_differentiable(result[1])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)  # type: ignore[attr-defined]
        return (*grads, None, None, None)


def _accumulate(
    grad: Tensor,
    part: Tensor,
    weight: Tensor,
    start: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Add one chunk's gradient on the raw products, ``[chunk, v]``, to those of the head's inputs."""
    if grad_hidden is not None:
        grad_hidden[start : start + len(part)] = grad @ weight
    if grad_weight is not None:
        grad_weight.addmm_(grad.T, part.to(weight.dtype))
    if grad_bias is not None:
        grad_bias += grad.sum(0)


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
        hidden: States that predict the targets, ``[n, d]``.
        weight: The head's weight, ``[v, d]``.
        targets: Token ids, ``int64 [n]``.
        bias: The head's bias, ``[v]``.
        transform: What the model does to the products.
        chunk: Targets at a time; peak memory is ``[chunk, v]``. By default what is fastest on the device.
        entropy: Give the entropy of each distribution too.

    Example:
        >>> import torch
        >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(11, 4), torch.randint(0, 11, (5,))
        >>> expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(5), targets]
        >>> bool(torch.allclose(linear_logprobs(hidden, weight, targets, chunk=2).logprobs, expected, atol=1e-6))
        True
    """
    if not len(targets):
        return _nothing(hidden, weight, bias, summed=False)
    with torch.autocast(hidden.device.type, enabled=False):
        logprobs, correct, entropies = _SelectedLogProbs.apply(
            hidden.to(weight.dtype), weight, bias, targets, transform, chunk_size(hidden.device, chunk), entropy
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
    """Sum of the log-probabilities of the targets under a linear head; the arguments are :func:`linear_logprobs`'s.

    Cheaper than summing those where the head trains, since nothing is recomputed.

    Returns:
        `logprobs` is the sum, ``fp32 []``, `correct` one per target.

    Example:
        >>> import torch
        >>> hidden, weight, targets = torch.randn(5, 4), torch.randn(11, 4), torch.randint(0, 11, (5,))
        >>> expected = linear_logprobs(hidden, weight, targets).logprobs.sum()
        >>> bool(torch.allclose(linear_logprob_sum(hidden, weight, targets, chunk=2).logprobs, expected, atol=1e-5))
        True
    """
    if not len(targets):
        return _nothing(hidden, weight, bias, summed=True)
    size = chunk_size(hidden.device, chunk)
    with torch.autocast(hidden.device.type, enabled=False):
        return SelectedLogProbs(*_SummedLogProbs.apply(hidden.to(weight.dtype), weight, bias, targets, transform, size))


def module_logprobs(
    hidden: Tensor,
    head: torch.nn.Module,
    targets: Tensor,
    *,
    transform: LogitTransform = IDENTITY,
    chunk: int | None = None,
    entropy: bool = False,
) -> SelectedLogProbs:
    """:func:`linear_logprobs` for a head that isn't one plain matrix (LoRA on the head, quantized heads).

    Each chunk is recomputed in the backward pass, by PyTorch's own checkpointing, so whatever the head holds gets its
    gradient.
    """
    if not len(targets):
        parameter = next(head.parameters(), None)
        return _nothing(hidden, parameter if parameter is not None else hidden, None, summed=False)

    def score(part: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        logits = transform(head(part))
        logprobs, correct, normalizer = _score(logits, ids)
        if not entropy:
            return logprobs, correct
        with torch.no_grad():
            return logprobs, correct, _entropy(logits, normalizer)

    size = chunk_size(hidden.device, chunk)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    scored = [checkpoint(score, part, ids, use_reentrant=False) for part, ids in pieces]
    return SelectedLogProbs(*(torch.cat(part) for part in zip(*scored, strict=True)))


def _nothing(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, summed: bool) -> SelectedLogProbs:
    """No targets: zero, still attached to every input, so that such a rank takes part in the backward pass."""
    zero = hidden.sum() * 0.0 + weight.sum() * 0.0 + (0.0 if bias is None else bias.sum() * 0.0)
    zero = zero.float()
    none = torch.zeros(0, dtype=torch.bool, device=hidden.device)
    return SelectedLogProbs(zero if summed else zero.expand(0), none, zero.detach().expand(0))
