"""Values and gradients of the chunked head against the plain one."""

import pytest
import torch
from torch import nn

from lightning_ft.losses.logprobs import (
    LogitTransform,
    linear_logprob_sum,
    linear_logprobs,
    module_logprobs,
)

TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25), LogitTransform(softcap=2.0), LogitTransform(0.5, 3.0)]


def inputs(n=13, d=8, v=29, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).requires_grad_()
    offset = torch.randn(v, generator=generator, dtype=torch.float64).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, v, (n,), generator=generator)


def plain(hidden, weight, bias, targets, transform):
    logits = nn.functional.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_logprobs_match_plain_head(transform, head_trains, chunk, bias):
    hidden, weight, offset, targets = inputs(bias=bias)
    weight.requires_grad_(head_trains)
    if offset is not None:
        offset.requires_grad_(head_trains)
    leaves = [t for t in (hidden, weight, offset) if t is not None and t.requires_grad]
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    expected = plain(hidden, weight, offset, targets, transform)
    result = linear_logprobs(hidden, weight, targets, bias=offset, transform=transform, chunk=chunk)
    torch.testing.assert_close(result.logprobs, expected.float(), atol=1e-5, rtol=1e-5)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), leaves, retain_graph=True)
    grads = torch.autograd.grad((result.logprobs * upstream.float()).sum(), leaves)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)

    total = linear_logprob_sum(hidden, weight, targets, bias=offset, transform=transform, chunk=chunk)
    torch.testing.assert_close(total.logprobs, expected.sum().float(), atol=1e-4, rtol=1e-5)
    expected_grads = torch.autograd.grad(expected.sum() * 3, leaves)
    for grad, expected_grad in zip(torch.autograd.grad(total.logprobs * 3, leaves), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_correct_is_true_for_most_probable_token():
    hidden, weight, _, _ = inputs()
    best = (hidden @ weight.T).argmax(-1)
    other = (best + 1) % len(weight)
    assert linear_logprobs(hidden, weight, best, chunk=4).correct.all()
    assert not linear_logprob_sum(hidden, weight, other, chunk=4).correct.any()


def test_module_logprobs_match_plain_head():
    hidden, _, _, targets = inputs(bias=False)
    head = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 29, bias=False)).double()
    result = module_logprobs(hidden, head, targets, chunk=4)
    expected = head(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs, expected.float(), atol=1e-5, rtol=1e-5)
    leaves = [hidden, *head.parameters()]
    grads = torch.autograd.grad(result.logprobs.sum(), leaves)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", [linear_logprobs, linear_logprob_sum])
def test_logprobs_without_targets_stay_attached_to_inputs(function):
    hidden, weight, offset, _ = inputs()
    result = function(hidden[:0], weight, torch.zeros(0, dtype=torch.int64), bias=offset)
    assert result.logprobs.sum().item() == 0
    grads = torch.autograd.grad(result.logprobs.sum(), [weight, offset], allow_unused=True)
    if function is linear_logprob_sum:
        assert all(grad is not None and not grad.any() for grad in grads)


def test_linear_logprobs_never_hold_all_logits():
    """The largest tensor that the head allocates has `chunk` rows of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class LargestTensor(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    n, d, v, chunk = 256, 4, 1000, 16
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d)
    with LargestTensor():
        linear_logprobs(hidden, weight, torch.randint(0, v, (n,)), chunk=chunk).logprobs.sum().backward()
    assert largest <= chunk * v
