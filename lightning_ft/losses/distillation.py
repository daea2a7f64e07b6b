"""Divergence of a student's next-token distributions from a teacher's, without holding the logits of a whole batch.

As in `lightning_ft.losses.logprobs`, the heads run over a chunk of positions at a time, and gradients are computed in
the forward pass. Shapes: `n` positions, hidden size `d` of the student, `v` tokens in the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_ft.errors import ConfigError
from lightning_ft.losses.head_products import HeadGradients, logits_buffer, product_dtype, raw_products
from lightning_ft.losses.logprobs import IDENTITY, LogitTransform, chunk_size

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
TeacherLogits = Callable[[Tensor], Tensor]
"""Function of a teacher's hidden states, ``[c, d_teacher]``, that returns its logits, ``fp32 [c, v]``."""


class DistillationLoss(NamedTuple):
    """Loss of a batch of positions.

    Args:
        loss: Sum over the positions of divergence and weighted cross-entropy in nats, ``fp32 []``, with gradient.
        divergence: Divergence at each position in nats, ``fp32 [n]``, without gradient.
        agreed: Whether student and teacher find the same token most probable, ``bool [n]``.
    """

    loss: Tensor
    divergence: Tensor
    agreed: Tensor


def check_divergence(divergence: str, beta: float, ce_coef: float) -> None:
    """Check the arguments that say which loss is computed.

    Raises:
        ConfigError: For an unknown divergence, or a number out of its range.

    Example:
        >>> check_divergence("jsd", 0.5, 0.0)
    """
    if divergence not in get_args(Divergence):
        raise ConfigError(f"divergence={divergence!r}: expected one of {', '.join(get_args(Divergence))}.")
    if not 0 < beta < 1:
        raise ConfigError(f"beta={beta}: expected a number between 0 and 1, the teacher's share of the mixture.")
    if not 0 <= ce_coef < math.inf:
        raise ConfigError(f"ce_coef={ce_coef}: expected a number of at least 0.")


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence = "forward_kl", *, beta: float = 0.5
) -> Tensor:
    """Divergence of the student's distribution from the teacher's at each position.

    ``forward_kl`` is KL(teacher || student), ``reverse_kl`` is KL(student || teacher), and ``jsd`` the generalized
    Jensen-Shannon divergence of GKD (Agarwal et al. 2024, https://arxiv.org/abs/2306.13649), with the mixture
    ``m = beta * teacher + (1 - beta) * student``: ``beta * KL(teacher || m) + (1 - beta) * KL(student || m)``.

    Args:
        student_logits: Logits of the student, ``[n, v]``.
        teacher_logits: Logits of the teacher, ``[n, v]``.
        divergence: Which divergence to compute.
        beta: Share of the teacher in the mixture of ``jsd``.

    Returns:
        Divergences in nats, ``fp32 [n]``; differentiable.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> [round(float(token_divergence(student, teacher, name)), 3) for name in ("forward_kl", "reverse_kl", "jsd")]
        [0.328, 0.434, 0.09]
    """
    q, p = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    if divergence == "forward_kl":
        return _expected(p.exp(), p - q)
    if divergence == "reverse_kl":
        return _expected(q.exp(), q - p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _expected(p.exp(), p - m) + (1 - beta) * _expected(q.exp(), q - m)


def _expected(probabilities: Tensor, values: Tensor) -> Tensor:
    """Expected values, ``[n]``; what has probability 0 doesn't count, even if infinite."""
    return (probabilities * values.masked_fill(probabilities == 0, 0.0)).sum(-1)


def _with_gradient(p: Tensor, q: Tensor, divergence: Divergence, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence at each position, ``[c]``, and its gradient with respect to the student's logits, ``[c, v]``.

    Args:
        p: Log-probabilities of the teacher, ``[c, v]``; overwritten.
        q: Log-probabilities of the student, ``[c, v]``.
        divergence: Which divergence to compute.
        beta: Share of the teacher in the mixture.
    """
    if divergence == "forward_kl":
        probabilities = p.exp()
        return _expected(probabilities, p.sub_(q)), q.exp().sub_(probabilities)
    student = q.exp()
    if divergence == "reverse_kl":
        ratios = torch.sub(q, p, out=p).masked_fill_(student == 0, 0.0)
        values = (student * ratios).sum(-1)
        return values, ratios.sub_(values[:, None]).mul_(student)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    values = beta * _expected(p.exp(), p.sub_(m))
    ratios = torch.sub(q, m, out=m).masked_fill_(student == 0, 0.0)
    expected = (student * ratios).sum(-1)
    return values + (1 - beta) * expected, ratios.sub_(expected[:, None]).mul_(student).mul_(1 - beta)


class _Distillation(torch.autograd.Function):
    """Sum of the losses of all positions, which share one incoming gradient: the forward pass computes gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_logits: TeacherLogits,
        targets: Tensor,
        transform: LogitTransform,
        divergence: Divergence,
        beta: float,
        ce_coef: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        factor = weight.to(hidden.dtype)  # in the dtype of the products
        total, divergences, agreed = hidden.new_zeros((), dtype=torch.float32), [], []
        buffer = logits_buffer(hidden, factor, chunk)
        for states, teacher, ids, start in zip(
            hidden.split(chunk),
            teacher_hidden.split(chunk),
            targets.split(chunk),
            range(0, len(targets), chunk),
            strict=True,
        ):
            logits = transform(raw_products(states, factor, bias, buffer))
            p, q = teacher_logits(teacher)[:, : len(weight)].float().log_softmax(-1), logits.log_softmax(-1)
            agreed.append(p.argmax(-1) == q.argmax(-1))
            values, grad = _with_gradient(p, q, divergence, beta)
            total += values.sum()
            divergences.append(values)
            if ce_coef:
                rows = torch.arange(len(ids), device=ids.device)
                total -= ce_coef * q[rows, ids].sum()
                grad += q.exp_().mul_(ce_coef)
                grad[rows, ids] -= ce_coef
            grads.add(transform.backward_(grad, logits), states, factor, start)
        ctx.save_for_backward(*grads.results(weight, bias))
        result = total, torch.cat(divergences), torch.cat(agreed)
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)  # type: ignore[attr-defined]
        return (*grads, *([None] * 8))


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_logits: TeacherLogits,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    ce_coef: float = 0.0,
    chunk: int | None = None,
) -> DistillationLoss:
    """Distill a teacher into a student with a linear head.

    Args:
        hidden: Hidden states of the student that predict the targets, ``[n, d]``.
        weight: Weight of the student's head, ``[v, d]``.
        teacher_hidden: Hidden states of the teacher, ``[n, d_teacher]``.
        teacher_logits: Function of a chunk of them that returns the teacher's logits. Without gradient; more than `v`
            logits are cut to the first `v`.
        targets: Tokens of the answer for the cross-entropy, ``int64 [n]``.
        bias: Bias of the student's head, ``[v]``.
        transform: Steps from the raw products of the student's head to its logits.
        divergence: Divergence to compute, see :func:`token_divergence`.
        beta: Share of the teacher in the mixture of ``jsd``.
        ce_coef: Weight of the cross-entropy of the targets.
        chunk: Number of positions per chunk; peak memory is a few times ``[chunk, v]``. By default the fastest on the
            device.

    Example:
        >>> hidden, teacher, weight = torch.randn(5, 4), torch.randn(5, 4), torch.randn(11, 4)
        >>> expected = token_divergence(hidden @ weight.T, teacher @ weight.T).sum()
        >>> targets = torch.zeros(5, dtype=torch.int64)
        >>> found = linear_distillation(hidden, weight, teacher, lambda states: states @ weight.T, targets, chunk=2)
        >>> bool(torch.allclose(found.loss, expected, atol=1e-5))
        True
    """
    if not len(targets):
        return _no_positions(hidden, weight, bias)
    states = hidden.to(product_dtype(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return DistillationLoss(
            *_Distillation.apply(
                states,
                weight,
                bias,
                teacher_hidden,
                teacher_logits,
                targets,
                transform,
                divergence,
                beta,
                ce_coef,
                chunk_size(hidden.device, chunk),
            )
        )


def module_distillation(
    hidden: Tensor,
    head: torch.nn.Module,
    teacher_hidden: Tensor,
    teacher_logits: TeacherLogits,
    targets: Tensor,
    *,
    transform: LogitTransform = IDENTITY,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    ce_coef: float = 0.0,
    chunk: int | None = None,
) -> DistillationLoss:
    """:func:`linear_distillation` for a head that isn't a single plain matrix, such as one with LoRA.

    Each chunk is recomputed in the backward pass by PyTorch's checkpointing.
    """
    if not len(targets):
        parameter = next(head.parameters(), None)
        return _no_positions(hidden, parameter if parameter is not None else hidden, None)

    def chunk_loss(states: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = transform(head(states))
        with torch.no_grad():
            teacher_values = teacher_logits(teacher)[:, : logits.shape[1]].float()
        values = token_divergence(logits, teacher_values, divergence, beta=beta)
        loss = values.sum()
        if ce_coef:
            loss = loss + ce_coef * torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
        return loss, values.detach(), logits.argmax(-1) == teacher_values.argmax(-1)

    size = chunk_size(hidden.device, chunk)
    chunks = zip(hidden.split(size), teacher_hidden.split(size), targets.split(size), strict=True)
    losses, values, agreed = zip(*(checkpoint(chunk_loss, *part, use_reentrant=False) for part in chunks), strict=True)
    return DistillationLoss(torch.stack(losses).sum(), torch.cat(values), torch.cat(agreed))


def _no_positions(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> DistillationLoss:
    """Loss without positions: zero, attached to every input, so that the rank takes part in the backward pass."""
    zero = (hidden.sum() * 0.0 + weight.sum() * 0.0 + (0.0 if bias is None else bias.sum() * 0.0)).float()
    return DistillationLoss(zero, zero.detach().expand(0), torch.zeros(0, dtype=torch.bool, device=hidden.device))
